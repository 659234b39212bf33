//! A source and a target over a simulated link, each on threads of its own.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::unbounded;
use handoff::{
    BaseView, Transport,
    engine::{
        Backoff, KeptReason, Limits, ReceiveError, ReceiveOptions, Received, SendOptions,
        SendOutcome, accept, receive, send,
    },
    ownership::{Journal, Record, State, VmId},
    report::Progress,
    sim::{Fault, LinkShape, Rate, Shape, SimConnect},
    tcp::MonotonicClock,
};

use super::{Host, HostFaults, Runners, Source, Target, base};

pub type Outcome = Result<Received<Target>, ReceiveError>;

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
        commit: ms(1500),
        hold_prepared: ms(3000),
        release: ms(500),
        ..Limits::default()
    }
}

/// A slow link with little under way.
pub fn mib_per_s(rate: u32) -> LinkShape {
    let rate = Rate::bytes_per_s(f64::from(rate << 20));
    let up = Shape { queue_bytes: 16 << 10, ..Shape::new(rate, Duration::ZERO) };
    LinkShape { down: up.clone(), up, outages: Vec::new() }
}

pub struct Pair {
    pub source: Source,
    pub connect: SimConnect,
    pub runners: Runners,
    pub base: Arc<handoff::base_view::testing::MemBase>,
    pub journals: tempfile::TempDir,
    pub target: JoinHandle<Vec<Outcome>>,
    pub options: SendOptions,
    pub clock: MonotonicClock,
}

/// A cloudlet that receives: links of a handoff under way go to it, others are settled from disk.
pub fn target_side<L: Transport + Send + 'static>(
    links: crossbeam_channel::Receiver<L>,
    path: PathBuf,
    mut host: Host,
    workers: usize,
) -> JoinHandle<Vec<Outcome>> {
    thread::spawn(move || {
        let clock = MonotonicClock::default();
        let mut outcomes = Vec::new();
        let mut options = ReceiveOptions::new("source");
        options.limits = limits();
        options.workers = workers;
        while let Ok(link) = links.recv() {
            let Ok(first) = accept(link, &limits(), &clock) else { continue };
            if !first.is_new() {
                let mut journal = Journal::open(&path).unwrap();
                let _ = first.settle(&mut journal, &limits(), &clock);
                continue;
            }
            let (relink, relinks) = unbounded();
            let over = AtomicBool::new(false);
            let outcome = thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(SeqCst) {
                        if let Ok(link) = links.recv_timeout(Duration::from_millis(5))
                            && let Ok(link) = accept(link, &limits(), &clock)
                        {
                            let _ = relink.send(link);
                        }
                    }
                });
                let mut journal = Journal::open(&path).unwrap();
                let outcome = receive(first, &mut host, &mut journal, &relinks, &options, &clock);
                over.store(true, SeqCst);
                outcome
            });
            outcomes.push(outcome);
        }
        outcomes
    })
}

pub fn pair(faults: &[Fault], host_faults: HostFaults, writes_per_s: u64) -> Pair {
    pair_over(LinkShape::unlimited(), faults, host_faults, writes_per_s, 2)
}

pub fn pair_over(
    shape: LinkShape,
    faults: &[Fault],
    host_faults: HostFaults,
    writes_per_s: u64,
    workers: usize,
) -> Pair {
    let (base, runners) = (base(), Runners::default());
    let journals = tempfile::tempdir().unwrap();
    let (mut connect, links) = SimConnect::new(shape);
    connect.faults.extend(faults);
    let host = Host { base: Arc::clone(&base), runners: runners.clone(), faults: host_faults };
    let target = target_side(links, journals.path().join("target"), host, workers);
    let mut options = SendOptions::new("vm", "target", b"one vCPU".to_vec());
    options.limits = limits();
    options.audit = true;
    Journal::open(journals.path().join("source"))
        .unwrap()
        .write(Record::created(VmId::random()))
        .unwrap();
    Pair {
        source: Source::new(&base, &runners, writes_per_s),
        connect,
        runners,
        base,
        journals,
        target,
        options,
        clock: MonotonicClock::default(),
    }
}

impl Pair {
    pub fn journal(&self, side: &str) -> Journal {
        Journal::open(self.journals.path().join(side)).unwrap()
    }

    pub fn send(&mut self) -> SendOutcome {
        self.send_until(&AtomicBool::new(false))
    }

    pub fn send_until(&mut self, cancel: &AtomicBool) -> SendOutcome {
        self.send_watched(cancel, &mut |_| {})
    }

    pub fn send_watched(
        &mut self,
        cancel: &AtomicBool,
        progress: &mut dyn FnMut(&Progress),
    ) -> SendOutcome {
        let mut journal = self.journal("source");
        let base = Arc::clone(&self.base) as Arc<dyn BaseView>;
        send(
            &mut self.source,
            base.into(),
            &mut self.connect,
            &mut journal,
            &self.options,
            &self.clock,
            progress,
            cancel,
        )
        .unwrap()
    }

    /// Ends both sides; what the target has.
    pub fn finish(self) -> (Source, Runners, Vec<Outcome>) {
        let Self { source, connect, runners, target, .. } = self;
        drop(connect);
        (source, runners, target.join().unwrap())
    }
}

pub fn state(path: &Path) -> State {
    Journal::open(path).unwrap().record().unwrap().state.clone()
}

pub fn assert_moved(mut pair: Pair) {
    let outcome = pair.send();
    let SendOutcome::Moved { report, .. } = outcome else { panic!("{outcome:?}") };
    let sent = pair.source.guest.memory.lock().unwrap().hash();
    assert!(!pair.source.guest.is_running());
    assert!(matches!(state(&pair.journals.path().join("source")), State::Released { .. }));
    assert!(report.downtime_ms.is_some() && report.full_hash.is_some(), "{report:?}");
    assert!(report.bytes_on_link > 0 && !report.rounds.is_empty());
    let target = pair.journals.path().join("target");
    let (links, kept) = (pair.connect.links, pair.journals.path().to_owned());
    assert!(kept.exists() && links >= 1);
    let after = {
        let path = target.clone();
        move || state(&path)
    };
    let Pair { source, connect, runners, target, journals, .. } = pair;
    drop(connect);
    let mut outcomes = target.join().unwrap();
    let received = outcomes.pop().unwrap().unwrap();
    assert!(received.vm.guest.is_running());
    assert_eq!(received.vm.guest.memory.lock().unwrap().hash(), sent);
    assert_eq!(received.full_hash, Some(sent));
    assert!(matches!(after(), State::Owner(_)));
    assert_eq!(runners.now(), 1);
    assert!(!runners.ever_two());
    drop((source, journals));
}

pub fn assert_kept(mut pair: Pair, why: impl Fn(&KeptReason) -> bool) -> Vec<Outcome> {
    let outcome = pair.send();
    let SendOutcome::KeptHere { reason, report, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why(&reason), "{reason:?}");
    assert!(report.reason.is_some());
    assert!(pair.source.guest.is_running(), "{reason}");
    assert!(pair.journal("source").record().unwrap().may_run());
    // It can be tried again: bits are back and nothing is left half done.
    let (_source, runners, outcomes) = pair.finish();
    assert!(outcomes.iter().all(Result::is_err));
    assert_eq!(runners.now(), 1);
    assert!(!runners.ever_two());
    outcomes
}
