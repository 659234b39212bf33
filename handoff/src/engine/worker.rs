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
    courier::Notice,
    sequence::{Made, Sequencer},
};
use crate::{
    root::StateRoot,
    stage::{Buffers, Codec, Compressor, CpuWatch, Mode, Packed, SegmentKind, Share, SharedShare},
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
    pub(super) stats: &'a WorkerStats,
    pub(super) buffers: Buffers,
    /// Share of a core that it may use while the guest runs.
    pub(super) cpu_share: f64,
}

impl Worker<'_> {
    /// Works until there are no more jobs, or nobody takes what it makes.
    pub(super) fn run(self) {
        let ending = Ending(&self.sequencer, &self.notices);
        match self.work() {
            Ok(()) => {}
            Err(why) => ending.fail(why),
        }
    }

    fn work(&self) -> Result<(), String> {
        let mut press = Press::default();
        for (number, job) in &self.jobs {
            let mut used_ns = 0;
            let made = match job {
                Job::Prepare(root, full_hash) => Made::Prepare(root, full_hash),
                Job::Body { round, kind, body, chunks } => {
                    let mut watch = CpuWatch::start();
                    let bytes_in = body.len() as u64;
                    let packed = press.pack(Mode::DEFAULT, body, &self.buffers)?;
                    used_ns = watch.lap_ns();
                    let bytes_out = packed.payload.len() as u64;
                    let share = Share { chunks, bytes_in, bytes_out, cpu_ns: used_ns };
                    self.stats.compress.add(share);
                    Made::Packed { round, kind, packed, chunks }
                }
            };
            if !self.sequencer.put(number, made, self.stats) {
                return Ok(());
            }
            self.rest(Duration::from_nanos(used_ns));
        }
        Ok(())
    }

    /// Leaves the core to others for as long as its share of it asks for.
    fn rest(&self, used: Duration) {
        let owed = rest_after(used, self.cpu_share);
        let until = Instant::now() + owed;
        while !self.stats.guest_waits.load(Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(LONGEST_REST));
        }
    }
}

/// A compressor, and the buffer that it compresses into: as large as it may need.
#[derive(Default)]
struct Press {
    compressor: Compressor,
    scratch: Vec<u8>,
}

impl Press {
    /// Compresses a body into a buffer no larger than it must be: many of them wait to be
    /// acknowledged.
    fn pack(&mut self, mode: Mode, body: Vec<u8>, buffers: &Buffers) -> Result<Packed, String> {
        let raw_len = u32::try_from(body.len()).map_err(|e| e.to_string())?;
        if mode == Mode::NONE {
            return Ok(Packed { codec: Codec::Raw, raw_len, payload: body });
        }
        let codec = self.compressor.compress(mode, &body, &mut self.scratch);
        let codec = codec.map_err(|e| e.to_string())?;
        let payload = match codec {
            Codec::Raw => body,
            _ => {
                buffers.give(body);
                let mut payload = buffers.take(self.scratch.len());
                payload.extend_from_slice(&self.scratch);
                payload
            }
        };
        Ok(Packed { codec, raw_len, payload })
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
