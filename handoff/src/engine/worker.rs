//! The source's workers: each takes the next body, compresses it, and gives it to the sequencer.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};

use super::{
    ahead::Ahead,
    courier::Notice,
    press::{Encoders, Press},
    sequence::{Made, Sequencer},
};
use crate::{
    Clock,
    adapt::{Adapter, Trial},
    priority,
    root::StateRoot,
    stage::{Buffers, Mode, SegmentKind, Share, SharedShare, seal::SEGMENT_OVERHEAD},
};

/// The smallest share of a core that a worker can be held to: it must get on at all.
pub const LEAST_CPU_SHARE: f64 = 0.05;
/// The longest that a worker rests at once, so that it sees when the guest is paused.
const LONGEST_REST: Duration = Duration::from_millis(20);

/// What the engine gives to the workers.
pub(super) enum Job {
    /// A body to compress and seal, and how many chunks it speaks of.
    Body { round: u32, kind: SegmentKind, body: Vec<u8>, chunks: u64 },
    /// Goes through, behind everything before it.
    Prepare(StateRoot, Option<[u8; 32]>),
}

/// What the workers and the sequencer did.
#[derive(Debug, Default)]
pub(super) struct WorkerStats {
    pub(super) compress: SharedShare,
    pub(super) seal: SharedShare,
    /// Whether the guest waits: then no CPU is left to it.
    pub(super) guest_waits: AtomicBool,
    /// Bytes of segments by the round they belong to.
    round_bytes: Mutex<BTreeMap<u32, u64>>,
}

impl WorkerStats {
    /// Bytes of a round's segments so far.
    pub(super) fn round_bytes(&self, round: u32) -> u64 {
        self.rounds().get(&round).copied().unwrap_or(0)
    }

    /// One more segment of a round.
    pub(super) fn sealed(&self, round: u32, bytes: u64) {
        *self.rounds().entry(round).or_default() += bytes;
    }

    fn rounds(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        // A number more or less: a panic elsewhere leaves it usable.
        self.round_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker.
pub(super) struct Worker<'a> {
    pub(super) jobs: Receiver<(u64, Job)>,
    pub(super) sequencer: Arc<Sequencer>,
    pub(super) notices: Sender<Notice>,
    pub(super) with: Shared<'a>,
    pub(super) buffers: Buffers,
    pub(super) encoders: Encoders,
    /// Share of a core that it may use while the guest runs.
    pub(super) cpu_share: f64,
    /// How many workers there are.
    pub(super) workers: usize,
    /// Whether other modes are tried besides the one chosen.
    pub(super) samples: bool,
}

/// What all workers look at.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) adapter: &'a Adapter,
    pub(super) ahead: &'a Ahead,
    pub(super) stats: &'a WorkerStats,
    pub(super) clock: &'a dyn Clock,
}

/// The newest body that a worker has seen, to try other modes on.
struct Tried {
    body: Vec<u8>,
    sent: Trial,
}

impl Worker<'_> {
    /// Works until there are no more jobs, or nobody takes what it makes.
    pub(super) fn run(self) {
        let ending = Ending(&self.sequencer, &self.notices);
        priority::give_way();
        if let Err(why) = self.work() {
            ending.fail(why);
        }
    }

    fn work(&self) -> Result<(), String> {
        let mut press = Press::new(self.encoders.clone(), !self.samples);
        let mut tried: Option<Tried> = None;
        let mut failed = None;
        while let Some((number, job)) = self.with.ahead.next(&self.jobs, || {
            failed = failed.take().or(self.sample(&mut press, tried.as_ref(), true).err());
        }) {
            if let Some(why) = failed.take() {
                return Err(why);
            }
            let (made, done) = match job {
                Job::Prepare(root, full_hash) => (Made::Prepare(root, full_hash), None),
                Job::Body { round, kind, body, chunks } => {
                    let mode = press.allowed(self.choose(body.len()));
                    let raw = (mode == Mode::NONE && self.samples).then(|| body.clone());
                    let mut spent = raw;
                    let keep = |body| spent = Some(body);
                    let (packed, trial) = press.pack(mode, body, &self.buffers, keep)?;
                    let trial = self.enter(trial, chunks);
                    if let Some(body) = spent {
                        self.keep(&mut tried, Tried { body, sent: trial });
                    }
                    (Made::Packed { round, kind, packed, chunks }, Some(trial))
                }
            };
            let bytes = |made: &Made| match made {
                Made::Packed { packed, .. } => (SEGMENT_OVERHEAD + packed.payload.len()) as u64,
                Made::Prepare(..) => 0,
            };
            self.with.ahead.made(done.map(|trial| (trial.took, bytes(&made))));
            if !self.sequencer.put(number, made, self.with.stats) {
                return Ok(());
            }
            if let Some(trial) = done {
                self.sample(&mut press, tried.as_ref(), false)?;
                self.rest(trial.cpu);
            }
        }
        Ok(())
    }

    fn choose(&self, body_bytes: usize) -> Mode {
        let view = self.with.ahead.view(body_bytes, self.jobs.len(), self.workers);
        let mode = self.with.adapter.choose(self.with.clock.now(), &view);
        self.with.ahead.lead(self.with.adapter.lead());
        mode
    }

    /// Takes note of what a body took. The rest that follows belongs to it.
    fn enter(&self, trial: Trial, chunks: u64) -> Trial {
        let Trial { bytes_in, bytes_out, cpu, .. } = trial;
        let cpu_ns = u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX);
        self.with.stats.compress.add(Share { chunks, bytes_in, bytes_out, cpu_ns });
        let rests = match self.with.stats.guest_waits.load(Relaxed) {
            true => Duration::ZERO,
            false => rest_after(cpu, self.cpu_share),
        };
        let trial = Trial { took: trial.took + rests, ..trial };
        self.with.adapter.measured(self.with.clock.now(), trial);
        trial
    }

    /// Keeps the newest body as long as another mode may be tried on it.
    fn keep(&self, tried: &mut Option<Tried>, newest: Tried) {
        let gone = match self.samples {
            true => tried.replace(newest).map(|tried| tried.body),
            false => Some(newest.body),
        };
        if let Some(body) = gone {
            self.buffers.give(body);
        }
    }

    /// Tries a mode on the newest body, if the adapter asks for it.
    fn sample(&self, press: &mut Press, tried: Option<&Tried>, idle: bool) -> Result<(), String> {
        let Some(Tried { body, sent }) = tried else { return Ok(()) };
        let now = self.with.clock.now();
        let Some(sample) = self.with.adapter.wants_sample(now, idle) else { return Ok(()) };
        let piece = body.get(..sample.most_bytes).unwrap_or(body);
        let nothing = Trial { mode: sample.mode, bytes_in: 0, bytes_out: 0, ..*sent };
        let trial = press.try_out(sample.mode, piece)?.unwrap_or(nothing);
        self.with.adapter.sampled(self.with.clock.now(), trial, *sent);
        self.rest(trial.cpu);
        Ok(())
    }

    /// Leaves the core to others for as long as its share of it asks for.
    fn rest(&self, used: Duration) {
        let owed = rest_after(used, self.cpu_share);
        let until = Instant::now() + owed;
        while !self.with.stats.guest_waits.load(Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(LONGEST_REST));
        }
    }
}

/// How long who used a core for `used` must leave it alone to have used no more than `share` of it.
fn rest_after(used: Duration, share: f64) -> Duration {
    let share = if share.is_nan() { 1.0 } else { share.clamp(LEAST_CPU_SHARE, 1.0) };
    used.mul_f64(1.0 / share - 1.0)
}

/// Sees to it that a worker which ends before its time ends the handoff: what it had taken would
/// be waited for in vain.
struct Ending<'a>(&'a Sequencer, &'a Sender<Notice>);

impl Ending<'_> {
    fn fail(&self, why: String) {
        // Whoever waits for the notice may be gone already; then nobody needs it.
        let _ = self.1.send(Notice::Compressor(why));
        self.0.fail();
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail("a worker panicked".into());
        }
    }
}

/// Whole microseconds, as reports have them.
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
