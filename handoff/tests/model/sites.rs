//! Two cloudlets, and a guest that is handed off between them.

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
        Backoff, KeptReason, Limits, ReceiveError, ReceiveOptions, Received, SendOptions,
        SendOutcome, accept, receive, send,
    },
    ownership::{Journal, Record, VmId},
    report::Report,
    sim::{Fault, LinkShape, SimConnect, SimLink},
    stage::SentCache,
    tcp::MonotonicClock,
};

use super::{Host, Incoming, Memory, Vm, all, base};

pub fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        connect: ms(500),
        attempt: ms(200),
        retry: Backoff { first: ms(20), most: ms(100) },
        greeting: ms(2000),
        ready: ms(5000),
        silence: ms(2000),
        ping_every: ms(100),
        relink_grace: ms(1000),
        ask: ms(1000),
        stall: ms(5000),
        prepare: ms(5000),
        commit: ms(3000),
        hold_prepared: ms(3000),
        release: ms(1000),
        ..Limits::default()
    }
}

/// One cloudlet.
pub struct Site {
    pub host: Host,
    pub journal: PathBuf,
    pub vm: Option<Vm>,
    /// What the other one holds of the guest that runs here.
    pub known: Vec<StateTable>,
    pub contents: Option<Arc<SentCache>>,
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

    pub fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
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
pub fn hand_off(
    from: &mut Site,
    to: &mut Site,
    faults: &[Fault],
    without: &[&str],
) -> Option<Report> {
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
pub fn sites(dir: &Path) -> (Site, Site) {
    sites_with(dir, false)
}

pub fn sites_with(dir: &Path, base_memory: bool) -> (Site, Site) {
    let base = base(base_memory);
    let (mut a, b) = (Site::new(&base, dir, "a"), Site::new(&base, dir, "b"));
    let record = Record::created(VmId::random());
    Journal::open(&a.journal).unwrap().write(record).unwrap();
    let mut memory = Memory::fresh(&base);
    memory.running = true;
    a.vm = Some(Vm::new(memory));
    (a, b)
}
