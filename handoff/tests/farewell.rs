//! A source that gave a handoff up and could not say so says it later; and the target lets go at once.
#![allow(clippy::unwrap_used)]

#[path = "outages/world.rs"]
mod world;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded, unbounded};
use handoff::{
    BaseView, Bases,
    base_view::testing::MemBase,
    engine::{
        Backoff, CommitMode, Farewell, Limits, ReceiveError, ReceiveOptions, SendOptions,
        SendOutcome, Untold, accept, receive, say_farewell, send,
    },
    ownership::{Epoch, HandoffId, Journal, Question, Record, State, Tenure, VmId},
    sim::{LinkShape, MemHost, SimConnect, SimLink},
    step::{Step, StepHook},
    tcp::MonotonicClock,
};
use tempfile::TempDir;
use world::{Cable, Done, Guest, Hand, Over};

const MS: Duration = Duration::from_millis(1);
const VM: VmId = VmId([1; 16]);
/// Nothing here may wait for so long.
const LONG: Duration = Duration::from_secs(60);

fn limits() -> Limits {
    Limits {
        connect: 2000 * MS,
        attempt: 200 * MS,
        retry: Backoff { first: 20 * MS, most: 100 * MS },
        silence: LONG,
        relink_grace: LONG,
        relink_paused: 200 * MS,
        hold_prepared: 2 * LONG,
        release: 2000 * MS,
        ..Limits::default()
    }
}

fn bases() -> Bases {
    let base: Arc<dyn BaseView> = Arc::new(MemBase::new(vec![], vec![], vec![]));
    Bases::from(base)
}

/// A cloudlet: receives, and answers from its record what it does not receive. How receptions ended.
fn cloudlet(
    links: &Receiver<SimLink>,
    journal: &Path,
    steps: &StepHook,
) -> Vec<Result<(), ReceiveError>> {
    let (clock, limits) = (MonotonicClock::default(), limits());
    let mut options = ReceiveOptions::new("source");
    (options.limits, options.steps) = (limits.clone(), steps.clone());
    let mut ended = Vec::new();
    while let Ok(link) = links.recv() {
        let Ok(first) = accept(link, &limits, &clock) else { continue };
        let mut journal = Journal::open(journal).unwrap();
        if !first.is_new() {
            let _ = first.settle(&mut journal, &limits, &clock);
            continue;
        }
        let (relink, relinks) = unbounded();
        let over = AtomicBool::new(false);
        ended.push(thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    if let Ok(link) = links.recv_timeout(5 * MS)
                        && let Ok(link) = accept(link, &limits, &clock)
                    {
                        let _ = relink.send(link);
                    }
                }
            });
            let mut host = MemHost::new(bases());
            let received = receive(first, &mut host, &mut journal, &relinks, &options, &clock);
            over.store(true, SeqCst);
            received.map(drop)
        }));
    }
    ended
}

/// Two cloudlets and a cable.
struct Pair {
    _dir: TempDir,
    ours: PathBuf,
    theirs: PathBuf,
    hand: Hand,
    connect: Over<SimConnect>,
    links: Receiver<SimLink>,
}

/// All of them but what makes links.
#[derive(Clone, Copy)]
struct Ends<'a> {
    ours: &'a Path,
    theirs: &'a Path,
    hand: &'a Hand,
    links: &'a Receiver<SimLink>,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [ours, theirs] = ["source", "target"].map(|name| dir.path().join(name));
        Journal::open(&ours).unwrap().write(Record::created(VM)).unwrap();
        let (inner, links) = SimConnect::new(LinkShape::unlimited());
        let hand = Hand::default();
        let connect = Over { inner, hand: hand.clone() };
        Self { _dir: dir, ours, theirs, hand, connect, links }
    }

    fn parts(&mut self) -> (&mut Over<SimConnect>, Ends<'_>) {
        let Self { ours, theirs, hand, connect, links, .. } = self;
        (connect, Ends { ours, theirs, hand, links })
    }

    fn target_record(&self) -> Option<Record> {
        Journal::open(&self.theirs).unwrap().record().cloned()
    }
}

/// A handoff that is not to succeed: what the target was not told.
fn give_up(
    guest: &Guest,
    connect: &mut Over<SimConnect>,
    journal: &Path,
    commit: CommitMode,
    cancel: &AtomicBool,
) -> Option<Untold> {
    let mut options = SendOptions::new("vm", "target", Vec::new());
    (options.limits, options.commit) = (limits(), commit);
    let (clock, mut held) = (MonotonicClock::default(), guest.clone());
    let mut journal = Journal::open(journal).unwrap();
    let sent =
        send(&mut held, bases(), connect, &mut journal, &options, &clock, &mut |_| {}, cancel);
    let SendOutcome::KeptHere { untold, .. } = sent.unwrap() else { panic!("it moved") };
    assert!(guest.is_free());
    assert_eq!(journal.record().unwrap().state, State::Owner(Tenure::Settled));
    untold
}

fn farewell(untold: &Untold, connect: &mut Over<SimConnect>, stop: &Receiver<()>) -> Farewell {
    say_farewell(untold, "vm", connect, &limits(), &MonotonicClock::default(), stop)
}

/// The link is cut in the middle, the user gives up, and later the link is back.
#[test]
fn a_target_that_was_not_told_is_told_later() {
    let mut pair = Pair::new();
    let (let_go, go_on) = bounded::<()>(0);
    let guest = Guest::noise(100).hook(move |done| {
        if done == Done::Harvested {
            let _ = go_on.recv();
        }
    });
    let began = Instant::now();
    let cancel = AtomicBool::new(false);
    let (connect, Ends { links, ours, theirs, hand }) = pair.parts();
    thread::scope(|scope| {
        let target = scope.spawn(|| cloudlet(links, theirs, &StepHook::default()));
        let sent = scope.spawn(|| {
            give_up(&guest, connect, ours, CommitMode::Early, &cancel).map(|told| (told, connect))
        });
        let is_receiving = || {
            let record = Journal::open(theirs).ok().and_then(|journal| journal.record().cloned());
            record.is_some_and(|record| matches!(record.state, State::Receiving { .. }))
        };
        while !is_receiving() {
            assert!(began.elapsed() < LONG);
            thread::sleep(5 * MS);
        }
        hand.set(Cable::Cut);
        cancel.store(true, SeqCst);
        drop(let_go);
        let (untold, connect) = sent.join().unwrap().unwrap();
        assert_eq!(untold.reason, "cancelled");
        assert_eq!(untold.patience, limits().relink_grace + 2 * limits().silence);
        let (stop, stopped) = bounded(0);
        // As long as there is no link it is tried in vain.
        let short = Untold { patience: 200 * MS, ..untold.clone() };
        assert!(matches!(farewell(&short, connect, &stopped), Farewell::Unheard(_)));
        assert!(is_receiving());
        hand.set(Cable::Whole);
        assert_eq!(farewell(&untold, connect, &stopped), Farewell::Heard);
        // Once more does no harm.
        assert_eq!(farewell(&untold, connect, &stopped), Farewell::Heard);
        drop(stop);
        hand.set(Cable::Cut);
        assert_eq!(farewell(&untold, connect, &stopped), Farewell::Stopped);
        let (inner, _) = SimConnect::new(LinkShape::unlimited());
        *connect = Over { inner, hand: hand.clone() };
        let ended = target.join().unwrap();
        assert!(matches!(&ended[..], [Err(ReceiveError::Aborted(why))] if why == "cancelled"));
    });
    assert!(began.elapsed() < LONG, "the target waited");
    assert_eq!(pair.target_record(), None, "a VM that was never there leaves nothing");
    assert!(guest.is_free());
}

/// A copy that is whole and verified is held for longer, and so is its source's breath.
#[test]
fn a_prepared_copy_is_dropped_too() {
    let mut pair = Pair::new();
    let hand = pair.hand.clone();
    // The link is gone before the target says so, and the source before the link is back.
    let (let_go, go_on) = bounded::<()>(0);
    let steps = StepHook::new(move |step| {
        if step == Step::Verified {
            hand.set(Cable::Cut);
            let _ = go_on.recv();
        }
    });
    let guest = Guest::noise(20);
    let began = Instant::now();
    let (connect, Ends { links, ours, theirs, hand }) = pair.parts();
    thread::scope(|scope| {
        let target = scope.spawn(|| cloudlet(links, theirs, &steps));
        let cancel = AtomicBool::new(false);
        let untold = give_up(&guest, connect, ours, CommitMode::Prepared, &cancel).unwrap();
        assert_eq!(untold.patience, limits().hold_prepared);
        drop(let_go);
        hand.set(Cable::Whole);
        let (_stop, stopped) = bounded(0);
        assert_eq!(farewell(&untold, connect, &stopped), Farewell::Heard);
        let (inner, _) = SimConnect::new(LinkShape::unlimited());
        *connect = Over { inner, hand: hand.clone() };
        let ended = target.join().unwrap();
        assert!(matches!(&ended[..], [Err(ReceiveError::Aborted(_))]), "{ended:?}");
    });
    assert!(began.elapsed() < LONG, "the target waited");
    let record = pair.target_record().unwrap();
    assert!(matches!(record.state, State::Declined { .. }), "{record}");
}

/// Where everything was heard, or nothing was ever asked for, nothing is left to say.
#[test]
fn what_was_heard_is_not_said_again() {
    for cable in [Cable::Whole, Cable::Cut] {
        let mut pair = Pair::new();
        pair.hand.set(cable);
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelling = Arc::clone(&cancel);
        let guest = Guest::noise(100).hook(move |done| {
            if done == Done::Harvested {
                cancelling.store(true, SeqCst);
            }
        });
        let (connect, Ends { links, ours, theirs, hand }) = pair.parts();
        thread::scope(|scope| {
            let target = scope.spawn(|| cloudlet(links, theirs, &StepHook::default()));
            let untold = give_up(&guest, connect, ours, CommitMode::Early, &cancel);
            assert_eq!(untold, None, "{cable:?}");
            let (inner, _) = SimConnect::new(LinkShape::unlimited());
            *connect = Over { inner, hand: hand.clone() };
            assert_eq!(target.join().unwrap().len(), usize::from(cable == Cable::Whole));
        });
    }
}

/// Nothing receives any more: the record answers.
#[test]
fn what_a_record_says_ends_it() {
    let handoff = Question { vm: VM, handoff: HandoffId([7; 16]), epoch: Epoch(2) };
    let untold = Untold { handoff, reason: "cancelled".into(), patience: LONG };
    let peer = String::from("source");
    let receiving = State::Receiving { handoff: handoff.handoff, peer: peer.clone() };
    let tenure = Tenure::Unconfirmed { handoff: handoff.handoff, peer };
    for (state, links_needed, ends) in [
        // It was lost with its process: nobody runs it, and now that is written down.
        (Some(receiving), 1, Farewell::Heard),
        (Some(State::Owner(tenure)), 1, Farewell::TakenThere),
        // The offer might have been on its way still.
        (None, 2, Farewell::Heard),
    ] {
        let mut pair = Pair::new();
        if let Some(state) = &state {
            let record = Record { vm: VM, epoch: handoff.epoch, state: state.clone() };
            Journal::open(&pair.theirs).unwrap().write(record).unwrap();
        }
        let (connect, Ends { links, theirs, .. }) = pair.parts();
        thread::scope(|scope| {
            let answering = scope.spawn(|| {
                let (clock, limits) = (MonotonicClock::default(), limits());
                for _ in 0..links_needed {
                    let link = accept(links.recv().unwrap(), &limits, &clock).unwrap();
                    let mut journal = Journal::open(theirs).unwrap();
                    link.settle(&mut journal, &limits, &clock).unwrap();
                }
            });
            let (_stop, stopped) = bounded(0);
            assert_eq!(farewell(&untold, connect, &stopped), ends, "{state:?}");
            answering.join().unwrap();
        });
        let after = pair.target_record().map(|record| record.state);
        match ends {
            Farewell::TakenThere => assert_eq!(after, state),
            _ => assert!(matches!(after, None | Some(State::Declined { .. })), "{after:?}"),
        }
    }
}

/// Something in between closes the link behind the word, and it never arrived.
#[test]
fn a_link_that_was_closed_proves_nothing() {
    let handoff = Question { vm: VM, handoff: HandoffId([7; 16]), epoch: Epoch(2) };
    let untold = Untold { handoff, reason: "cancelled".into(), patience: LONG };
    let state = State::Receiving { handoff: handoff.handoff, peer: "source".into() };
    let record = Record { vm: VM, epoch: handoff.epoch, state };
    let mut pair = Pair::new();
    Journal::open(&pair.theirs).unwrap().write(record.clone()).unwrap();
    let (connect, Ends { links, theirs, .. }) = pair.parts();
    thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let (clock, limits) = (MonotonicClock::default(), limits());
            let next = || accept(links.recv().unwrap(), &limits, &clock).unwrap();
            next().answer(Some(&record)).unwrap();
            assert_eq!(Journal::open(theirs).unwrap().record(), Some(&record));
            next().settle(&mut Journal::open(theirs).unwrap(), &limits, &clock).unwrap();
        });
        let (_stop, stopped) = bounded(0);
        assert_eq!(farewell(&untold, connect, &stopped), Farewell::Heard);
        answering.join().unwrap();
    });
    assert!(matches!(pair.target_record().unwrap().state, State::Declined { .. }));
}
