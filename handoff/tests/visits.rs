//! A guest that goes there and back, again and again: whatever it writes, frees and discards while
//! it is handed off, however often that is cancelled or its link breaks, it finds what it wrote.
#![allow(clippy::unwrap_used)]

mod model;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, unbounded};
use handoff::{
    StateTable,
    base_view::testing::MemBase,
    engine::{
        KeptReason, Limits, ReceiveError, ReceiveOptions, Received, SendOptions, SendOutcome,
        accept, receive, send,
    },
    ownership::{Journal, Record, VmId},
    report::Report,
    sim::{Fault, LinkShape, SimConnect, SimLink},
    stage::SentCache,
    tcp::MonotonicClock,
};
use model::{Act, Host, Incoming, Memory, Vm, acts, all, base, chunk, disk, ram};
use proptest::prelude::*;

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        connect: ms(500),
        greeting: ms(2000),
        ready: ms(5000),
        silence: ms(2000),
        ping_every: ms(100),
        relink_grace: ms(1000),
        stall: ms(5000),
        prepare: ms(5000),
        commit: ms(3000),
        hold_prepared: ms(3000),
        release: ms(1000),
    }
}

/// One cloudlet.
struct Site {
    host: Host,
    journal: PathBuf,
    vm: Option<Vm>,
    /// What the other one holds of the guest that runs here.
    known: Vec<StateTable>,
    contents: Option<Arc<SentCache>>,
}

impl Site {
    fn new(base: &Arc<MemBase>, dir: &Path, name: &str) -> Self {
        Self {
            host: Host::new(base),
            journal: dir.join(name),
            vm: None,
            known: Vec::new(),
            contents: None,
        }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.vm.as_ref().unwrap().memory()
    }
}

type Arrived = Result<Received<Incoming>, ReceiveError>;

/// Receives until no link comes any more.
fn target(host: &mut Host, journal: &Path, links: &Receiver<SimLink>) -> Vec<Arrived> {
    let (clock, limits) = (MonotonicClock::default(), limits());
    let options = ReceiveOptions { limits: limits.clone(), ..ReceiveOptions::new("source") };
    let mut arrived = Vec::new();
    while let Ok(link) = links.recv() {
        let Ok(first) = accept(link, &limits, &clock) else { continue };
        let mut journal = Journal::open(journal).unwrap();
        if !first.is_new() {
            let _ = first.settle(&mut journal, &limits, &clock);
            continue;
        }
        let (relink, relinks) = unbounded();
        let over = AtomicBool::new(false);
        arrived.push(thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    if let Ok(link) = links.recv_timeout(Duration::from_millis(5))
                        && let Ok(link) = accept(link, &limits, &clock)
                    {
                        let _ = relink.send(link);
                    }
                }
            });
            let received = receive(first, host, &mut journal, &relinks, &options, &clock);
            over.store(true, SeqCst);
            received
        }));
    }
    arrived
}

/// Hands the guest off once. Afterwards it runs at exactly one of the sites, and finds all that it
/// wrote there.
fn hand_off(from: &mut Site, to: &mut Site, faults: &[Fault], without: &[&str]) -> Option<Report> {
    let mut vm = from.vm.take().unwrap();
    let cancel = Arc::new(AtomicBool::new(false));
    vm.memory().cancel = Arc::clone(&cancel);
    let mut options = SendOptions::new("vm", "target", Vec::new());
    options.limits = limits();
    options.audit = true;
    options.known = from.known.clone();
    options.contents = from.contents.clone();
    without.iter().for_each(|name| options.stages.switch_off(name).unwrap());
    let (mut connect, links) = SimConnect::new(LinkShape::unlimited());
    connect.faults.extend(faults);
    let (outcome, mut arrived) = thread::scope(|scope| {
        let (host, path) = (&mut to.host, &to.journal);
        let target = scope.spawn(move || target(host, path, &links));
        let mut journal = Journal::open(&from.journal).unwrap();
        let outcome = send(
            &mut vm,
            from.host.bases(),
            &mut connect,
            &mut journal,
            &options,
            &MonotonicClock::default(),
            &mut |_| {},
            &cancel,
        );
        drop(connect);
        (outcome.unwrap(), target.join().unwrap())
    });
    match outcome {
        SendOutcome::Moved { report, mut table } => {
            let mut received = arrived.pop().unwrap().unwrap();
            let root = table.root();
            assert_eq!(received.table.root(), root);
            let here = vm.memory().clone();
            let mut there = received.vm.vm.memory();
            assert!(!here.running && there.running);
            here.assert_as_expected();
            assert!(all().all(|id| here.get(id) == there.get(id)));
            (there.expected, there.free) = (here.expected.clone(), here.free.clone());
            drop(there);
            from.host.visit = Some((here, table));
            to.known = vec![received.table];
            to.contents = Some(Arc::new(received.contents));
            to.vm = Some(received.vm.vm);
            Some(report)
        }
        SendOutcome::KeptHere { reason, .. } => {
            assert!(matches!(reason, KeptReason::Cancelled), "{reason}");
            assert!(arrived.iter().all(Result::is_err));
            let memory = vm.memory();
            assert!(memory.running);
            memory.assert_as_expected();
            drop(memory);
            from.vm = Some(vm);
            None
        }
        other => panic!("{other:?}"),
    }
}

/// Two sites, the guest at the first.
fn sites(dir: &Path) -> (Site, Site) {
    sites_with(dir, false)
}

fn sites_with(dir: &Path, base_memory: bool) -> (Site, Site) {
    let base = base(base_memory);
    let (mut a, b) = (Site::new(&base, dir, "a"), Site::new(&base, dir, "b"));
    let record = Record::created(VmId::random());
    Journal::open(&a.journal).unwrap().write(record).unwrap();
    let mut memory = Memory::fresh(&base);
    memory.running = true;
    a.vm = Some(Vm::new(memory));
    (a, b)
}

#[test]
fn the_way_back_costs_what_changed_since() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = sites(dir.path());
    (10..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
    (0..20).for_each(|i| a.memory().act(Act::Write(disk(i), 700 + i)));
    let there = hand_off(&mut a, &mut b, &[], &[]).unwrap();
    assert_eq!(b.host.started_from, None);

    b.memory().act(Act::Write(ram(11), 1));
    b.memory().act(Act::Write(disk(3), 2));
    // Back to base: the other side holds something else there.
    b.memory().act(Act::Zero(ram(12)));
    b.memory().act(Act::Restore(disk(4)));
    let back = hand_off(&mut b, &mut a, &[], &[]).unwrap();
    assert!(a.host.started_from.is_some());
    assert!(back.bytes_on_link * 4 < there.bytes_on_link, "{back:?} after {there:?}");

    // Switched off, or forgotten by the other side: all of it again.
    for forgets in [false, true] {
        if forgets {
            b.host.visit = None;
        }
        let without: &[&str] = if forgets { &[] } else { &["known"] };
        let again = hand_off(&mut a, &mut b, &[], without).unwrap();
        assert_eq!(b.host.started_from, None);
        assert!(again.bytes_on_link * 2 > there.bytes_on_link, "{again:?}");
        hand_off(&mut b, &mut a, &[], &[]).unwrap();
    }
}

#[test]
fn what_changed_in_what_came_is_sent_as_that() {
    let back = |remembers: bool| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        (10..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
        hand_off(&mut a, &mut b, &[], &[]).unwrap();
        (10..60).for_each(|i| b.memory().act(Act::Touch(ram(i), i as u8)));
        if !remembers {
            b.contents = None;
        }
        hand_off(&mut b, &mut a, &[], &[]).unwrap().bytes_on_link
    };
    let (with, without) = (back(true), back(false));
    assert!(with * 4 < without, "{with} bytes, {without} without what came");
}

#[test]
fn what_the_guest_calls_free_is_not_sent() {
    let sent = |without: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        (0..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
        // At the very start of the handoff, and some of it taken again soon after.
        let free = (10..60).map(Act::Free);
        let taken = (50..60).map(|i| Act::Write(ram(i), 900 + i));
        a.memory().script = free.chain(taken).collect();
        let report = hand_off(&mut a, &mut b, &[], without).unwrap();
        (report.bytes_on_link, a.host.visit.unwrap().0.hints_taken)
    };
    let ((with, hints), (all, none)) = (sent(&[]), sent(&["free"]));
    assert!(hints > 0 && none == 0);
    assert!(with < all, "{with} bytes with {hints} hints, {all} without");
}

#[test]
fn contents_of_another_base_that_both_hold_are_named() {
    let sent = |there: bool, without: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        let others: Vec<_> = [300, 400]
            .map(|from| {
                Arc::new(MemBase::new((0..60).map(|i| chunk(from + i)).collect(), vec![], vec![]))
            })
            .into();
        a.host.also = others.clone();
        // The target holds the second only: numbers must not get mixed up.
        b.host.also = others[1..].iter().filter(|_| there).cloned().collect();
        (0..50).for_each(|i| a.memory().act(Act::Write(ram(i), 400 + i)));
        hand_off(&mut a, &mut b, &[], without).unwrap().bytes_on_link
    };
    let (named, unknown, off) = (sent(true, &[]), sent(false, &[]), sent(true, &["other-bases"]));
    assert!(named * 3 < unknown && named * 3 < off, "{named}, {unknown}, {off}");
}

/// One attempt: what the guest does before and during it, when it is cancelled, where the link
/// breaks, what is switched off, and whether the other side forgot the last visit.
#[derive(Clone, Debug)]
struct Leg {
    before: Vec<Act>,
    during: Vec<Act>,
    cancel_at: Option<usize>,
    cut: Option<u64>,
    without: Vec<&'static str>,
    forgets: bool,
}

fn legs() -> impl Strategy<Value = Vec<Leg>> {
    let switches = handoff::stage::StageOptions::SWITCHES.to_vec();
    let leg = (
        acts(60),
        acts(120),
        prop::option::weighted(0.3, 0usize..150),
        prop::option::weighted(0.2, 50u64..20_000),
        prop::sample::subsequence(switches, 0..3),
        prop::bool::weighted(0.2),
    );
    let leg = leg.prop_map(|(before, during, cancel_at, cut, without, forgets)| Leg {
        before,
        during,
        cancel_at,
        cut,
        without,
        forgets,
    });
    prop::collection::vec(leg, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_the_guest_finds_what_it_wrote(legs in legs(), base_memory: bool) {
        let dir = tempfile::tempdir().unwrap();
        let (mut here, mut there) = sites_with(dir.path(), base_memory);
        for leg in legs {
            let mut during = leg.during;
            if let Some(at) = leg.cancel_at {
                during.insert(at.min(during.len()), Act::Cancel);
            }
            leg.before.iter().for_each(|act| here.memory().act(*act));
            here.memory().script = during.into();
            if leg.forgets {
                there.host.visit = None;
            }
            let faults: Vec<_> =
                leg.cut.map(|cut| Fault { cut_up: Some(cut), ..Fault::default() }).into_iter().collect();
            if hand_off(&mut here, &mut there, &faults, &leg.without).is_some() {
                std::mem::swap(&mut here, &mut there);
            }
        }
    }
}
