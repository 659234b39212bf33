//! What VMs, disks and hosts do wrong in the middle of a handoff: whichever operation fails, and
//! whichever is slow, the guest runs in one place in the end, whole, and a message says why.
#![allow(clippy::unwrap_used)]

mod sim;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::unbounded;
use guest_images::Chunk;
use handoff::{
    BaseView, ChunkId, ChunkSet, Geometry, Offer, Refusal, SourceVm, Space, TargetHost, TargetVm,
    base_view::testing::MemBase,
    engine::{
        KeptReason, Limits, ReceiveError, ReceiveOptions, Received, Recovery, SendError,
        SendOptions, SendOutcome, accept, receive, send, send_resume,
    },
    ownership::{Journal, Record, State, VmId},
    sim::{LinkShape, SimConnect, SimLink},
    tcp::MonotonicClock,
    vm::{DiskFlusher, Prepared, VmError},
};
use sim::{Host, HostFaults, Runners, Source, Target, base};

/// No test waits longer for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        silence: ms(2000),
        ping_every: ms(100),
        relink_grace: ms(1000),
        stall: ms(5000),
        prepare: ms(3000),
        commit: ms(1500),
        hold_prepared: ms(3000),
        release: ms(500),
        ..Limits::default()
    }
}

/// What is wrong with one side.
#[derive(Clone)]
struct Ills {
    /// Operations until one fails. Far below zero, none does.
    until_failure: Arc<AtomicI64>,
    /// Whether all that come after it fail too, as with a disk that is full or dead.
    lasting: bool,
    error: io::ErrorKind,
    /// How long each write to the disk takes, and making it durable.
    slow_write: Duration,
    slow_flush: Duration,
    /// The guest cannot be set running again, as often as this is above zero.
    stuck: Arc<AtomicI64>,
    counted: Arc<AtomicU64>,
}

impl Ills {
    fn none() -> Self {
        Self::nth(i64::MIN / 2, false)
    }

    fn nth(n: i64, lasting: bool) -> Self {
        Self {
            until_failure: Arc::new(AtomicI64::new(n)),
            lasting,
            error: io::ErrorKind::StorageFull,
            slow_write: Duration::ZERO,
            slow_flush: Duration::ZERO,
            stuck: Arc::default(),
            counted: Arc::default(),
        }
    }

    fn operation(&self) -> Result<(), VmError> {
        self.counted.fetch_add(1, SeqCst);
        let left = self.until_failure.fetch_sub(1, SeqCst);
        let fails = left == 0 || (self.lasting && (i64::MIN / 4..0).contains(&left));
        if fails { Err(io::Error::from(self.error).into()) } else { Ok(()) }
    }
}

/// A VM that is ill.
struct Ill<Vm> {
    vm: Vm,
    ills: Ills,
}

impl SourceVm for Ill<Source> {
    fn geometry(&self) -> Geometry {
        self.vm.geometry()
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        self.ills.operation()?;
        self.vm.changed_disk_chunks()
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        let set = self.vm.start_tracking()?;
        self.ills.operation()?;
        Ok(set)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        self.ills.operation()?;
        self.vm.harvest()
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        self.vm.stop_tracking()
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    fn read_chunks(&mut self, ids: &[ChunkId], into: &mut [Chunk]) -> Result<(), VmError> {
        self.ills.operation()?;
        self.vm.read_chunks(ids, into)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.ills.operation()?;
        self.vm.pause()
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        self.ills.operation()?;
        self.vm.save_state()
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.ills.operation()?;
        self.vm.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.ills.stuck.fetch_sub(1, SeqCst) > 0 {
            return Err("no thread for a vCPU".into());
        }
        self.vm.resume()
    }
}

impl TargetVm for Ill<Target> {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        self.vm.write_chunk(id, chunk)
    }

    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        self.ills.operation()?;
        if chunks.iter().any(|(id, _)| id.space == Space::Disk) {
            thread::sleep(self.ills.slow_write);
        }
        self.vm.write_chunks(chunks)
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.ills.operation()?;
        self.vm.reset_chunk(id)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.ills.operation()?;
        self.vm.load_state(state)
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        self.ills.operation()?;
        thread::sleep(self.ills.slow_flush);
        self.vm.make_disk_durable()
    }

    fn disk_flusher(&mut self) -> Option<Box<dyn DiskFlusher>> {
        Some(Box::new(Flusher(self.ills.clone())))
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.ills.operation()?;
        self.vm.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.ills.operation()?;
        self.vm.resume()
    }

    fn discard(&mut self) {
        self.vm.discard();
    }
}

struct Flusher(Ills);

impl DiskFlusher for Flusher {
    fn flush(&self) -> Result<(), VmError> {
        self.0.operation()?;
        thread::sleep(self.0.slow_flush);
        Ok(())
    }
}

struct IllHost(Host, Ills);

impl TargetHost for IllHost {
    type Vm = Ill<Target>;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Ill<Target>>, Refusal> {
        let Prepared { vm, bases, start } = self.0.prepare(offer)?;
        Ok(Prepared { vm: Ill { vm, ills: self.1.clone() }, bases, start })
    }
}

type Outcome = Result<Received<Ill<Target>>, ReceiveError>;

/// Two cloudlets and a guest that writes.
struct Pair {
    source: Ill<Source>,
    connect: SimConnect,
    runners: Runners,
    base: Arc<MemBase>,
    journals: tempfile::TempDir,
    target: JoinHandle<Vec<Outcome>>,
    options: SendOptions,
    cancel: Arc<AtomicBool>,
}

fn pair(here: Ills, there: Ills) -> Pair {
    let (base, runners) = (base(), Runners::default());
    let journals = tempfile::tempdir().unwrap();
    let (connect, links) = SimConnect::new(LinkShape::mbps(400.0, Duration::from_millis(1)));
    let faults = HostFaults::default();
    let host = Host { base: Arc::clone(&base), runners: runners.clone(), faults };
    let target = target_side(links, journals.path().join("target"), IllHost(host, there));
    let mut options = SendOptions::new("vm", "target", b"one vCPU".to_vec());
    options.limits = limits();
    options.audit = true;
    let pair = Pair {
        source: Ill { vm: Source::new(&base, &runners, 500), ills: here },
        connect,
        runners,
        base,
        journals,
        target,
        options,
        cancel: Arc::default(),
    };
    pair.journal("source").write(Record::created(VmId::random())).unwrap();
    pair
}

/// A cloudlet that receives: later links go to the handoff under way, or are settled from disk.
fn target_side(
    links: crossbeam_channel::Receiver<SimLink>,
    path: std::path::PathBuf,
    mut host: IllHost,
) -> JoinHandle<Vec<Outcome>> {
    thread::spawn(move || {
        let clock = MonotonicClock::default();
        let mut outcomes = Vec::new();
        let mut options = ReceiveOptions::new("source");
        options.limits = limits();
        while let Ok(link) = links.recv() {
            let Ok(first) = accept(link, &limits(), &clock) else { continue };
            let mut journal = Journal::open(&path).unwrap();
            if !first.is_new() {
                let _ = first.settle(&mut journal, &limits(), &clock);
                continue;
            }
            let (relink, relinks) = unbounded();
            let over = AtomicBool::new(false);
            outcomes.push(thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(SeqCst) {
                        if let Ok(link) = links.recv_timeout(Duration::from_millis(5))
                            && let Ok(link) = accept(link, &limits(), &clock)
                        {
                            let _ = relink.send(link);
                        }
                    }
                });
                let outcome = receive(first, &mut host, &mut journal, &relinks, &options, &clock);
                over.store(true, SeqCst);
                outcome
            }));
        }
        outcomes
    })
}

/// Where the guest is in the end.
#[derive(Debug)]
enum End {
    Moved,
    /// With what a user is told.
    Kept(String),
}

impl Pair {
    fn journal(&self, side: &str) -> Journal {
        Journal::open(self.journals.path().join(side)).unwrap()
    }

    /// Hands the guest off, settles doubts as the binary does, and checks what must hold however it
    /// ended: one guest runs, its record allows it, and it has what it wrote.
    fn run(mut self) -> End {
        let clock = MonotonicClock::default();
        let mut journal = self.journal("source");
        let base = Arc::clone(&self.base) as Arc<dyn BaseView>;
        let sent = send(
            &mut self.source,
            base.into(),
            &mut self.connect,
            &mut journal,
            &self.options,
            &clock,
            &mut |_| {},
            &self.cancel,
        );
        let end = match sent.unwrap() {
            SendOutcome::Moved { .. } => End::Moved,
            SendOutcome::KeptHere { reason, .. } => End::Kept(reason.to_string()),
            SendOutcome::InDoubt { .. } => self.ask(&mut journal),
        };
        let before = self.source.vm.guest.memory.lock().unwrap().hash();
        let here = self.source.vm.guest.is_running();
        assert!(journal.record().unwrap().may_run() == here, "{:?}", journal.record());
        let there = self.journals.path().join("target");
        let Self { source, connect, runners, target, journals, .. } = self;
        drop(connect);
        let mut outcomes = target.join().unwrap();
        assert!(!runners.ever_two());
        assert_eq!(runners.now(), 1, "{end:?}");
        match (&end, outcomes.pop()) {
            (End::Moved, Some(Ok(received))) => {
                assert!(!here && received.vm.vm.guest.is_running());
                assert_eq!(received.vm.vm.guest.memory.lock().unwrap().hash(), before);
                let record = Journal::open(there).unwrap().record().unwrap().clone();
                assert!(matches!(record.state, State::Owner(_)), "{record}");
            }
            (End::Kept(_), None | Some(Err(_))) => assert!(here),
            (end, there) => panic!("here {end:?}, there {:?}", there.map(|t| t.map(drop))),
        }
        drop((source, journals));
        end
    }

    fn ask(&mut self, journal: &mut Journal) -> End {
        let clock = MonotonicClock::default();
        let since = std::time::Instant::now();
        while since.elapsed() < PATIENCE {
            let (vm, connect) = (&mut self.source, &mut self.connect);
            let settled = send_resume(vm, journal, "vm", connect, &limits(), &clock);
            match settled.unwrap() {
                Recovery::Gone { .. } => return End::Moved,
                Recovery::MayRun => return End::Kept("declined after the commit".into()),
                Recovery::InDoubt { .. } => thread::sleep(Duration::from_millis(50)),
                Recovery::NeverHere { reason } => panic!("{reason}"),
            }
        }
        panic!("in doubt for ever")
    }
}

/// How many operations a handoff has on each side, roughly: how often rounds are asked varies.
fn operations() -> (u64, u64) {
    let (here, there) = (Ills::none(), Ills::none());
    let counted = (Arc::clone(&here.counted), Arc::clone(&there.counted));
    assert!(matches!(pair(here, there).run(), End::Moved));
    (counted.0.load(SeqCst), counted.1.load(SeqCst))
}

/// Every operation of the source's VM, failing once: the guest goes on there, and the message says
/// what failed.
#[test]
fn whatever_fails_at_the_source_the_guest_goes_on_there() {
    let (operations, _) = operations();
    let mut kept = 0;
    for n in 0..operations {
        let here = Ills { error: io::ErrorKind::Other, ..Ills::nth(n as i64, false) };
        match pair(here, Ills::none()).run() {
            End::Kept(why) => {
                kept += 1;
                assert!(why.contains("other error"), "{why}");
            }
            // This time there were fewer operations.
            End::Moved => assert!(n > operations / 2, "{n} of {operations}"),
        }
    }
    assert!(kept >= operations / 2, "{kept} of {operations}");
}

/// Every operation of the target's VM and its disk, failing once, or from then on: the target
/// declines and the guest goes on at the source.
#[test]
fn whatever_fails_at_the_target_the_guest_goes_on_at_the_source() {
    let (_, operations) = operations();
    let mut kept = 0;
    for n in 0..operations {
        let there = Ills::nth(n as i64, n % 2 == 0);
        match pair(Ills::none(), there).run() {
            End::Kept(why) => {
                kept += 1;
                assert!(why.contains("no storage space") || why.contains("declined"), "{why}");
            }
            End::Moved => assert!(n > operations / 2, "{n} of {operations}"),
        }
    }
    assert!(kept >= operations / 2, "{kept} of {operations}");
}

/// A disk that takes its time: slower, and nothing else.
#[test]
fn a_slow_disk_is_waited_for() {
    let ms = Duration::from_millis;
    let there = Ills { slow_write: ms(20), slow_flush: ms(700), ..Ills::none() };
    let pair = pair(Ills::none(), there);
    assert!(matches!(pair.run(), End::Moved));
}

/// A disk that takes longer than anybody waits: wherever the guest is then, it is there once.
#[test]
fn a_disk_that_stands_still_costs_the_handoff_and_not_the_guest() {
    let there = Ills { slow_flush: Duration::from_secs(5), ..Ills::none() };
    let mut pair = pair(Ills::none(), there);
    pair.options.limits.prepare = Duration::from_millis(300);
    pair.options.limits.commit = Duration::from_millis(300);
    match pair.run() {
        End::Kept(why) => assert!(why.contains("longer than") || why.contains("declined"), "{why}"),
        // Committed before the disk stood still, and it moved in the end.
        End::Moved => {}
    }
}

/// What the source's VMM keeps, its tracking and its pause, is undone however often it fails: the
/// next try moves the guest.
#[test]
fn a_handoff_that_failed_can_be_tried_again() {
    for n in [1, 4] {
        let mut pair = pair(Ills::nth(n, false), Ills::none());
        let clock = MonotonicClock::default();
        let mut journal = pair.journal("source");
        let base = Arc::clone(&pair.base) as Arc<dyn BaseView>;
        let first = send(
            &mut pair.source,
            base.into(),
            &mut pair.connect,
            &mut journal,
            &pair.options,
            &clock,
            &mut |_| {},
            &AtomicBool::new(false),
        );
        let SendOutcome::KeptHere { reason, .. } = first.unwrap() else { continue };
        assert!(matches!(reason, KeptReason::Vm { .. }), "{reason:?}");
        assert!(pair.source.vm.guest.is_running());
        // The target drops the first copy before it takes another offer, at the latest after this.
        thread::sleep(limits().relink_grace * 3 / 2);
        assert!(matches!(pair.run(), End::Moved), "after {reason}");
    }
}

/// The handoff fails, and then the guest cannot be set running here either: an error that says both,
/// and a record that lets it be started from its disk.
#[test]
fn a_guest_that_cannot_go_on_can_be_started_again() {
    let there = Ills::none();
    let here = Ills { stuck: Arc::new(AtomicI64::new(1)), ..Ills::none() };
    let mut pair = pair(here, there);
    pair.source.vm.fail_save = true;
    let clock = MonotonicClock::default();
    let mut journal = pair.journal("source");
    let base = Arc::clone(&pair.base) as Arc<dyn BaseView>;
    let error = send(
        &mut pair.source,
        base.into(),
        &mut pair.connect,
        &mut journal,
        &pair.options,
        &clock,
        &mut |_| {},
        &AtomicBool::new(false),
    )
    .unwrap_err();
    assert!(matches!(error, SendError::NotResumed { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("no state today") && text.contains("no thread"), "{text}");
    assert!(journal.record().unwrap().may_run());
    drop(pair.connect);
    assert!(pair.target.join().unwrap().iter().all(Result::is_err));
    assert_eq!(pair.runners.now(), 0);
}

/// A target that is told to give way at any operation: the source's user cancels just then.
#[test]
fn cancelled_at_any_operation() {
    let (_, operations) = operations();
    for n in (0..operations).step_by(3) {
        let there = Ills::nth(i64::MIN / 2, false);
        let pair = pair(Ills::none(), there.clone());
        let cancel = Arc::clone(&pair.cancel);
        let watcher = thread::spawn(move || {
            let since = std::time::Instant::now();
            while there.counted.load(SeqCst) < n && since.elapsed() < Duration::from_secs(2) {
                thread::sleep(Duration::from_micros(200));
            }
            cancel.store(true, SeqCst);
        });
        match pair.run() {
            End::Kept(why) => assert_eq!(why, "cancelled"),
            End::Moved => {}
        }
        watcher.join().unwrap();
    }
}
