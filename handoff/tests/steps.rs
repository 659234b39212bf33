//! Every named step: reached, in order, and survived by a handoff whose link is cut right there.
#![allow(clippy::unwrap_used)]

mod sim;

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, unbounded};
use handoff::{
    BaseView, Connect, Transport,
    engine::{Backoff, Limits, ReceiveOptions, SendOptions, SendOutcome, accept, receive, send},
    ownership::{Journal, Record, VmId},
    sim::{LinkShape, SimConnect, SimLink},
    step::{Step, StepHook},
    tcp::MonotonicClock,
};
use sim::{Host, HostFaults, Runners, Source, base};

/// Links that all break when the number changes.
#[derive(Clone, Default)]
struct Cutter(Arc<AtomicU64>);

impl Cutter {
    fn cut(&self) {
        self.0.fetch_add(1, SeqCst);
    }

    fn wrap<T>(&self, inner: T) -> Breakable<T> {
        Breakable { inner, all: Arc::clone(&self.0), mine: self.0.load(SeqCst) }
    }
}

struct Breakable<T> {
    inner: T,
    all: Arc<AtomicU64>,
    mine: u64,
}

impl<T> Breakable<T> {
    fn whole(&mut self) -> io::Result<&mut T> {
        match self.all.load(SeqCst) == self.mine {
            true => Ok(&mut self.inner),
            false => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

impl<T: io::Read> io::Read for Breakable<T> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.whole()?.read(into)
    }
}

impl<T: io::Write> io::Write for Breakable<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.whole()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.whole()?.flush()
    }
}

impl Transport for Breakable<SimLink> {
    type Tx = Breakable<<SimLink as Transport>::Tx>;
    type Rx = Breakable<<SimLink as Transport>::Rx>;

    fn split(self) -> io::Result<(Self::Tx, Self::Rx)> {
        let Self { inner, all, mine } = self;
        let (tx, rx) = inner.split()?;
        let whole = Arc::clone(&all);
        Ok((Breakable { inner: tx, all, mine }, Breakable { inner: rx, all: whole, mine }))
    }
}

struct Connecting(SimConnect, Cutter);

impl Connect for Connecting {
    type Link = Breakable<SimLink>;

    fn connect(&mut self, timeout: Duration) -> io::Result<Self::Link> {
        Ok(self.1.wrap(self.0.connect(timeout)?))
    }
}

fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        connect: ms(2000),
        greeting: ms(5000),
        ready: ms(10_000),
        silence: ms(5000),
        ping_every: ms(100),
        relink_grace: ms(10_000),
        stall: ms(20_000),
        prepare: ms(20_000),
        commit: ms(10_000),
        hold_prepared: ms(20_000),
        release: ms(1000),
        attempt: ms(200),
        retry: Backoff { first: ms(20), most: ms(100) },
        ..Limits::default()
    }
}

/// Receives one handoff; links that come when it is over are settled from its record.
fn target(
    links: &Receiver<SimLink>,
    cutter: &Cutter,
    journal: &Path,
    host: &mut Host,
    steps: StepHook,
) -> bool {
    let (clock, limits) = (MonotonicClock::default(), limits());
    let mut options = ReceiveOptions::new("source");
    (options.limits, options.steps) = (limits.clone(), steps);
    let mut arrived = None;
    while let Ok(link) = links.recv() {
        let Ok(first) = accept(cutter.wrap(link), &limits, &clock) else { continue };
        let mut journal = Journal::open(journal).unwrap();
        if !first.is_new() {
            let _ = first.settle(&mut journal, &limits, &clock);
            continue;
        }
        let (relink, relinks) = unbounded();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    if let Ok(link) = links.recv_timeout(Duration::from_millis(5))
                        && let Ok(link) = accept(cutter.wrap(link), &limits, &clock)
                    {
                        let _ = relink.send(link);
                    }
                }
            });
            let received = receive(first, host, &mut journal, &relinks, &options, &clock);
            over.store(true, SeqCst);
            // Kept: dropping it would stop its guest.
            arrived = received.ok().or(arrived.take());
        });
    }
    arrived.is_some_and(|received| received.vm.guest.is_running())
}

/// One handoff; `at` is called at each step of either side.
fn hand_off(cutter: &Cutter, at: impl Fn(Step) + Send + Sync + 'static) {
    let (base, runners) = (base(), Runners::default());
    let journals = tempfile::tempdir().unwrap();
    let (source_journal, target_journal) =
        (journals.path().join("source"), journals.path().join("target"));
    let (connect, links) = SimConnect::new(LinkShape::unlimited());
    let mut connecting = Connecting(connect, cutter.clone());
    let mut host =
        Host { base: Arc::clone(&base), runners: runners.clone(), faults: HostFaults::default() };
    let steps = StepHook::new(at);
    let mut options = SendOptions::new("vm", "target", b"one vCPU".to_vec());
    (options.limits, options.steps) = (limits(), steps.clone());
    let mut source = Source::new(&base, &runners, 200);
    let mut journal = Journal::open(&source_journal).unwrap();
    journal.write(Record::created(VmId::random())).unwrap();
    let arrived = thread::scope(|scope| {
        let receiving = scope.spawn(|| target(&links, cutter, &target_journal, &mut host, steps));
        let bases = (Arc::clone(&base) as Arc<dyn BaseView>).into();
        let (clock, cancel) = (MonotonicClock::default(), AtomicBool::new(false));
        let sent = send(
            &mut source,
            bases,
            &mut connecting,
            &mut journal,
            &options,
            &clock,
            &mut |_| {},
            &cancel,
        );
        assert!(matches!(sent, Ok(SendOutcome::Moved { .. })), "{sent:?}");
        // While the target still holds it: its guest ends with it.
        assert_eq!(runners.now(), 1);
        drop(connecting);
        receiving.join().unwrap()
    });
    assert!(arrived, "nothing runs at the target");
    assert!(!source.guest.is_running());
    assert!(!runners.ever_two());
}

/// The steps of a handoff that nothing disturbs.
fn undisturbed() -> Vec<Step> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let reached = Arc::clone(&seen);
    hand_off(&Cutter::default(), move |step| reached.lock().unwrap().push(step));
    let mut seen = seen.lock().unwrap().clone();
    let mut known = std::collections::HashSet::new();
    seen.retain(|step| known.insert(*step));
    seen
}

fn assert_order(seen: &[Step], order: &[Step]) {
    let places = order.iter().map(|step| seen.iter().position(|s| s == step));
    let places: Vec<usize> = places.map(|place| place.expect("a step was not reached")).collect();
    assert!(places.is_sorted(), "{order:?} came as {seen:?}");
}

#[test]
fn steps_come_in_the_order_of_the_protocol() {
    use Step::{
        BegunDurable, CommitGot, CommitSent, CommittedDurable, HelloGot, HelloSent, OwnerDurable,
        Paused, PrepareGot, PrepareSent, ReleasedDurable, ReleasedGot, ReleasedSent, Reserved,
        ResumedGot, ResumedSent, RoundApplied, RoundSegment, Running, SettledDurable, StateSaved,
        StateSegment, Verified, WelcomeGot, WelcomeSent,
    };
    let seen = undisturbed();
    assert_order(&seen, &[BegunDurable, HelloSent, WelcomeGot, RoundSegment(1), Paused]);
    assert_order(&seen, &[Paused, StateSaved, StateSegment, PrepareSent, PrepareGot, Verified]);
    assert_order(&seen, &[HelloGot, Reserved, WelcomeSent, RoundApplied(1), PrepareGot]);
    // What is said is durable before.
    assert_order(&seen, &[Paused, CommittedDurable, CommitSent]);
    assert_order(&seen, &[CommittedDurable, CommitGot, OwnerDurable, Running, ResumedSent]);
    assert_order(&seen, &[Verified, OwnerDurable]);
    assert_order(&seen, &[Running, ResumedGot, ReleasedDurable, ReleasedSent]);
    assert_order(&seen, &[ReleasedDurable, ReleasedGot, SettledDurable]);
}

#[test]
fn a_link_cut_at_any_step_costs_a_link_and_nothing_else() {
    let steps = undisturbed();
    thread::scope(|scope| {
        // Most of the time each waits for something.
        for some in steps.chunks(steps.len().div_ceil(4)) {
            scope.spawn(move || some.iter().for_each(|step| cut_at(*step)));
        }
    });
}

fn cut_at(step: Step) {
    let cutter = Cutter::default();
    let (first, cut) = (AtomicBool::new(true), cutter.clone());
    hand_off(&cutter, move |reached| {
        if reached == step && first.swap(false, SeqCst) {
            cut.cut();
        }
    });
    assert_eq!(cutter.0.load(SeqCst), 1, "{step} was not reached");
}
