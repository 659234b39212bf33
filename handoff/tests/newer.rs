//! A source that begins anew: what it began before is given up at the target at once.
#![allow(clippy::unwrap_used)]

#[path = "outages/world.rs"]
mod world;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded, never, unbounded};
use handoff::{
    BaseView, Bases,
    base_view::testing::MemBase,
    engine::{
        Limits, ReceiveError, ReceiveOptions, Received, SendOptions, SendOutcome, accept, receive,
        send,
    },
    ownership::{Epoch, HandoffId, Journal, Question, Record, State, VmId},
    sim::{LinkShape, MemHost, MemTarget, SimConnect, SimLink},
    tcp::MonotonicClock,
};
use world::{Cable, Done, Guest, Hand, Over};

const MS: Duration = Duration::from_millis(1);
const VM: VmId = VmId([1; 16]);
/// Nothing here may wait for so long.
const LONG: Duration = Duration::from_secs(60);

fn limits() -> Limits {
    Limits { silence: LONG, relink_grace: LONG, hold_prepared: LONG, ..Limits::default() }
}

fn bases() -> Bases {
    let base: Arc<dyn BaseView> = Arc::new(MemBase::new(vec![], vec![], vec![]));
    Bases::from(base)
}

/// Receives what the next link begins.
fn take(
    links: &Receiver<SimLink>,
    journal: &Path,
    newer: Receiver<Question>,
) -> Result<Received<MemTarget>, ReceiveError> {
    let clock = MonotonicClock::default();
    let options = ReceiveOptions { limits: limits(), newer, ..ReceiveOptions::new("source") };
    let first = accept(links.recv().unwrap(), &options.limits, &clock).unwrap();
    let mut journal = Journal::open(journal).unwrap();
    let mut host = MemHost::new(bases());
    receive(first, &mut host, &mut journal, &never(), &options, &clock)
}

fn hand_off(
    guest: &Guest,
    connect: &mut Over<SimConnect>,
    journal: &Path,
    cancel: &AtomicBool,
) -> SendOutcome {
    let mut options = SendOptions::new("vm", "target", Vec::new());
    options.limits = limits();
    let (clock, mut guest) = (MonotonicClock::default(), guest.clone());
    let mut journal = Journal::open(journal).unwrap();
    send(&mut guest, bases(), connect, &mut journal, &options, &clock, &mut |_| {}, cancel).unwrap()
}

/// Waits until the record on disk is of this kind; what it is about.
fn await_record(journal: &Path, kind: impl Fn(&State) -> bool) -> Question {
    let began = Instant::now();
    loop {
        // Between two of its files there is one at any time, but not always to be opened.
        if let Ok(journal) = Journal::open(journal)
            && let Some(Record { vm, epoch, state }) = journal.record()
            && kind(state)
        {
            let handoff = journal.record().and_then(Record::handoff).unwrap();
            return Question { vm: *vm, handoff, epoch: *epoch };
        }
        assert!(began.elapsed() < LONG, "the record does not get there");
        thread::sleep(5 * MS);
    }
}

fn is_receiving(state: &State) -> bool {
    matches!(state, State::Receiving { .. })
}

/// Tells the reception of an offer.
fn tell(newer: &Sender<Question>, of: Question, vm: VmId, epoch: u64) {
    let handoff = HandoffId([of.handoff.0[0].wrapping_add(1); 16]);
    newer.send(Question { vm, handoff, epoch: Epoch(epoch) }).unwrap();
}

/// What becomes of the first handoff in its middle.
#[derive(Clone, Copy, Debug, PartialEq)]
enum First {
    /// The link is cut, and then the source gives up.
    Cut,
    /// Its link is as good as ever. (As far as the target knows: for seconds a dead one is no other.)
    Linked,
}

#[test]
fn what_the_source_gave_up_unheard_makes_way() {
    for first in [First::Cut, First::Linked] {
        let dir = tempfile::tempdir().unwrap();
        let [ours, theirs] = ["source", "target"].map(|name| dir.path().join(name));
        Journal::open(&ours).unwrap().write(Record::created(VM)).unwrap();
        // The first handoff stands still in its middle until it is let go on.
        let (let_go, go_on) = bounded::<()>(0);
        let guest = Guest::noise(100).hook(move |done| {
            if done == Done::Harvested {
                let _ = go_on.recv();
            }
        });
        let (inner, links) = SimConnect::new(LinkShape::unlimited());
        let hand = Hand::default();
        let mut connect = Over { inner, hand: hand.clone() };
        let (newer, offers) = unbounded();
        let (cancel, began) = (AtomicBool::new(false), Instant::now());
        let outcome = thread::scope(|scope| {
            let taken = scope.spawn(|| take(&links, &theirs, offers));
            let sent = scope.spawn(|| hand_off(&guest, &mut connect, &ours, &cancel));
            let held = await_record(&theirs, is_receiving);
            if first == First::Cut {
                hand.set(Cable::Cut);
                cancel.store(true, SeqCst);
            }
            // None of these is the source's next offer of this VM.
            tell(&newer, held, held.vm, held.epoch.0);
            tell(&newer, held, held.vm, held.epoch.0 - 1);
            tell(&newer, held, VmId([2; 16]), held.epoch.0 + 2);
            thread::sleep(50 * MS);
            assert_eq!(await_record(&theirs, is_receiving), held);
            tell(&newer, held, held.vm, held.epoch.0 + 2);
            match taken.join().unwrap().map(|received| received.record) {
                Err(ReceiveError::Declined(why)) => assert!(why.contains("began anew"), "{why}"),
                other => panic!("{first:?}: {other:?}"),
            }
            let declined = await_record(&theirs, |state| matches!(state, State::Declined { .. }));
            assert_eq!(declined, held);
            drop(let_go);
            sent.join().unwrap()
        });
        assert!(matches!(outcome, SendOutcome::KeptHere { .. }), "{first:?}: {outcome:?}");
        // The way is free.
        hand.set(Cable::Whole);
        thread::scope(|scope| {
            let taken = scope.spawn(|| take(&links, &theirs, never()));
            let outcome = hand_off(&guest, &mut connect, &ours, &AtomicBool::new(false));
            assert!(matches!(outcome, SendOutcome::Moved { .. }), "{outcome:?}");
            assert!(taken.join().unwrap().unwrap().vm.is_running());
        });
        assert!(began.elapsed() < LONG, "{first:?}: something was waited for");
    }
}
