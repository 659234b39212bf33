//! The cutover's last steps, by the whole engine: the commit behind the last segment and the one that
//! waits, and what becomes of the guest when something ends in between.
#![allow(clippy::unwrap_used)]

mod sim;

use std::{
    io::{self, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use handoff::{
    BaseView, Connect, LinkGauge, Transport,
    engine::{CommitMode, KeptReason, Recovery, SendOutcome, send, send_resume},
    ownership::{Journal, State},
    policy::{CutOverPolicy, Objective},
    report::{Phase, Progress},
    sim::{Fault, LinkShape, SimConnect, SimLink},
    wire::{VERSION_EARLY_COMMIT, Versions},
};
use sim::{
    HostFaults,
    pair::{Pair, assert_moved, limits, mib_per_s, pair, pair_over, state},
};

/// Links that all break, and can no longer be made, once `down` is set.
struct Cuttable<'a> {
    connect: &'a mut SimConnect,
    down: Arc<AtomicBool>,
}

struct CutLink(SimLink, Arc<AtomicBool>);
struct CutHalf<T>(T, Arc<AtomicBool>);

impl<T> CutHalf<T> {
    fn up(&mut self) -> io::Result<&mut T> {
        match self.1.load(SeqCst) {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(&mut self.0),
        }
    }
}

impl<T: Read> Read for CutHalf<T> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.up()?.read(into)
    }
}

impl<T: Write> Write for CutHalf<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.up()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for CutLink {
    type Tx = CutHalf<<SimLink as Transport>::Tx>;
    type Rx = CutHalf<<SimLink as Transport>::Rx>;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        self.0.gauge()
    }

    fn split(self) -> io::Result<(Self::Tx, Self::Rx)> {
        let (tx, rx) = self.0.split()?;
        Ok((CutHalf(tx, Arc::clone(&self.1)), CutHalf(rx, self.1)))
    }
}

impl Connect for Cuttable<'_> {
    type Link = CutLink;

    fn connect(&mut self, timeout: Duration) -> io::Result<CutLink> {
        if self.down.load(SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(CutLink(self.connect.connect(timeout)?, Arc::clone(&self.down)))
    }
}

/// A guest that is paused at once, over a link that takes most of a second for its last round.
fn busy_pair() -> Pair {
    let mut pair = pair(&[], HostFaults::default(), 1000);
    pair.connect.shape = mib_per_s(1);
    pair.options.audit = false;
    pair.options.policy = CutOverPolicy::new(Objective::Deadline(Duration::ZERO));
    pair
}

/// Calls `act` at the moment in which the commit became durable, while the last segments drain.
fn when_committed(act: impl FnMut()) -> impl FnMut(&Progress) {
    when(Phase::Committing, act)
}

/// Calls `act` once, when that phase begins.
fn when(phase: Phase, mut act: impl FnMut()) -> impl FnMut(&Progress) {
    let mut done = false;
    move |progress| {
        if progress.phase == phase && !std::mem::replace(&mut done, true) {
            act();
        }
    }
}

#[test]
fn either_way_the_guest_moves_and_the_report_says_which() {
    let before = VERSION_EARLY_COMMIT - 1;
    let older = Versions { min: before, max: before };
    for (commit, versions, said) in [
        (CommitMode::Early, Versions::OURS, "early"),
        (CommitMode::Prepared, Versions::OURS, "prepared"),
        (CommitMode::Early, older, "prepared"),
    ] {
        let mut pair = pair(&[], HostFaults::default(), 300);
        (pair.options.commit, pair.options.versions) = (commit, versions);
        let SendOutcome::Moved { report, .. } = pair.send() else { panic!("{commit}") };
        assert_eq!(report.cutover.unwrap().commit, said);
        let target = pair.journals.path().join("target");
        assert!(matches!(state(&target), State::Owner(_)));
        let (_source, runners, _) = pair.finish();
        assert!(!runners.ever_two());
    }
}

/// The same breaks as with an early commit, which is the default of all other tests.
#[test]
fn a_link_cut_anywhere_with_a_commit_that_waits() {
    for cut in [10, 400, 70_000, 300_000, 500_000] {
        let up = Fault { cut_up: Some(cut), ..Fault::default() };
        let down = Fault { cut_down: Some(cut / 100 + 3), ..Fault::default() };
        let mut pair = pair(&[up, down], HostFaults::default(), 500);
        pair.options.commit = CommitMode::Prepared;
        assert_moved(pair);
    }
}

/// The commit is on disk and was said to nobody: the user may still change their mind, and the
/// guest runs on at once.
#[test]
fn cancelled_before_commit_was_said() {
    let mut pair = busy_pair();
    let (cancel, mut cancelled) = (AtomicBool::new(false), None);
    let outcome = pair.send_watched(
        &cancel,
        &mut when_committed(|| {
            cancel.store(true, SeqCst);
            cancelled = Some(Instant::now());
        }),
    );
    let took = cancelled.unwrap().elapsed();
    let SendOutcome::KeptHere { reason: KeptReason::Cancelled, .. } = outcome else {
        panic!("{outcome:?}")
    };
    // The guest runs on first; then the peer gets up to two seconds to hear of it.
    assert!(took < Duration::from_millis(2500), "{took:?}");
    assert_kept_at_epoch_3(pair);
}

fn assert_kept_at_epoch_3(pair: Pair) {
    assert!(pair.source.guest.is_running());
    let record = pair.journal("source").record().unwrap().clone();
    assert!(matches!(record.state, State::Owner(_)), "{record}");
    assert_eq!(record.epoch.0, 3, "the epoch that was given away is not used again");
    let (source, runners, outcomes) = pair.finish();
    assert!(outcomes.iter().all(Result::is_err), "the target runs it too");
    assert_eq!(runners.now(), 1);
    assert!(!runners.ever_two());
    drop(source);
}

/// The same when the link breaks for good: nobody need be asked.
#[test]
fn a_link_that_breaks_before_commit_was_said_leaves_the_guest_here() {
    let mut pair = busy_pair();
    let down = Arc::new(AtomicBool::new(false));
    let mut journal = pair.journal("source");
    let base = Arc::clone(&pair.base) as Arc<dyn BaseView>;
    let outcome = send(
        &mut pair.source,
        base.into(),
        &mut Cuttable { connect: &mut pair.connect, down: Arc::clone(&down) },
        &mut journal,
        &pair.options,
        &pair.clock,
        &mut when_committed(|| down.store(true, SeqCst)),
        &AtomicBool::new(false),
    )
    .unwrap();
    let SendOutcome::KeptHere { reason: KeptReason::Link(_), .. } = outcome else {
        panic!("{outcome:?}")
    };
    drop(journal);
    assert_kept_at_epoch_3(pair);
}

/// Half a round trip, where the one that waits takes one and a half.
#[test]
fn an_early_commit_saves_a_round_trip() {
    const DELAY: Duration = Duration::from_millis(100);
    let downtime_ms = |commit| {
        let shape = LinkShape::mbps(100.0, DELAY);
        let mut pair = pair_over(shape, &[], HostFaults::default(), 0, 2);
        pair.options.commit = commit;
        let SendOutcome::Moved { report, .. } = pair.send() else { panic!("{commit}") };
        println!("{commit}: {:?}", report.cutover);
        report.downtime_ms.unwrap()
    };
    let round_trip_ms = 2.0 * DELAY.as_secs_f64() * 1e3;
    let prepared = downtime_ms(CommitMode::Prepared);
    assert!(prepared >= 1.5 * round_trip_ms, "{prepared} ms");
    // A machine that is busy with other things adds to it.
    let mut early = (0..5).map(|_| downtime_ms(CommitMode::Early));
    assert!(early.any(|early| early < 0.8 * round_trip_ms), "early takes as long");
}

/// The commit cannot be written, and surely is not on disk: the guest goes on at once.
#[test]
fn a_commit_that_cannot_be_written_keeps_the_guest() {
    let mut pair = pair(&[], HostFaults::default(), 100);
    let new = pair.journals.path().join("source.new");
    let outcome = pair.send_watched(
        &AtomicBool::new(false),
        &mut when(Phase::Cutover, || {
            std::fs::remove_file(&new).unwrap();
            std::fs::create_dir(&new).unwrap();
        }),
    );
    let SendOutcome::KeptHere { reason: KeptReason::Journal(_), .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(pair.source.guest.is_running());
    let (_source, runners, outcomes) = pair.finish();
    assert!(outcomes.iter().all(Result::is_err));
    assert_eq!(runners.now(), 1);
}

/// The target refuses what the early commit has given it: the source hears that, durable, and goes on.
#[test]
fn a_target_that_cannot_run_it_gives_it_back() {
    let load = HostFaults { fail_load: true, ..HostFaults::default() };
    let resume = HostFaults { fail_resume: true, ..HostFaults::default() };
    for faults in [load, resume] {
        let mut pair = pair(&[], faults, 100);
        let SendOutcome::KeptHere { reason: KeptReason::Declined(_), .. } = pair.send() else {
            panic!()
        };
        let target = pair.journals.path().join("target");
        assert!(matches!(state(&target), State::Declined { .. }));
        assert_kept_at_epoch_3(pair);
    }
}

/// The target's process dies with an incomplete copy; the source has said Commit and is in doubt.
/// What the target noted before its Welcome is enough to answer it.
#[test]
fn a_target_that_died_receiving_answers_from_its_note() {
    // Nothing of the end comes through, and there is no other link: in doubt, if Commit was said.
    let mut pair = busy_pair();
    pair.connect.faults.push_back(Fault::default());
    pair.connect.reachable_after = false;
    let mut journal = pair.journal("source");
    let base = Arc::clone(&pair.base) as Arc<dyn BaseView>;
    let down = Arc::new(AtomicBool::new(false));
    let mut cut = Cuttable { connect: &mut pair.connect, down };
    let outcome = send(
        &mut pair.source,
        base.into(),
        &mut cut,
        &mut journal,
        &pair.options,
        &pair.clock,
        &mut |_| {},
        &AtomicBool::new(false),
    )
    .unwrap();
    assert!(matches!(outcome, SendOutcome::Moved { .. }), "{outcome:?}");
    // As that target's record would be, had it died before the last segment.
    let moved = journal.record().unwrap().clone();
    let State::Released { handoff, peer } = moved.state.clone() else { panic!("{moved}") };
    drop(journal);
    let Pair { source, connect, target, runners, journals, .. } = pair;
    drop(connect);
    drop(target.join().unwrap());
    assert_eq!(runners.now(), 0, "it died with its process");
    let mut theirs = Journal::open(journals.path().join("target")).unwrap();
    let receiving = State::Receiving { handoff, peer: "source".into() };
    theirs.write(handoff::ownership::Record { state: receiving, ..moved.clone() }).unwrap();
    let mut ours = Journal::open(journals.path().join("source")).unwrap();
    let root = handoff::StateRoot([0; 32]);
    let committed = State::Committed { handoff, peer, root };
    ours.write(handoff::ownership::Record { state: committed, ..moved }).unwrap();

    let (mut connect, links) = SimConnect::new(mib_per_s(1));
    let again = std::thread::spawn(move || {
        let clock = handoff::tcp::MonotonicClock::default();
        let link = handoff::engine::accept(links.recv().unwrap(), &limits(), &clock).unwrap();
        link.settle(&mut theirs, &limits(), &clock).unwrap();
        theirs.record().unwrap().clone()
    });
    let mut source = source;
    let clock = handoff::tcp::MonotonicClock::default();
    let recovery = send_resume(&mut source, &mut ours, "vm", &mut connect, &limits(), &clock);
    assert_eq!(recovery.unwrap(), Recovery::MayRun);
    assert!(source.guest.is_running());
    let record = again.join().unwrap();
    assert!(matches!(record.state, State::Declined { .. }), "{record}");
}
