//! Links that break: what that costs, and what the guest notices of it.
#![allow(clippy::unwrap_used)]

#[path = "outages/world.rs"]
mod world;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, unbounded};
use handoff::{
    BaseView, Bases, Connect, Offer, Refusal, TargetHost, Transport,
    adapt::ModeChoice,
    base_view::testing::MemBase,
    engine::{
        Backoff, CommitMode, KeptReason, Limits, PipelineOptions, ReceiveError, ReceiveOptions,
        SendOptions, SendOutcome, accept, receive, send,
    },
    ownership::{Journal, Record, VmId},
    sim::{LinkShape, MemHost, MemTarget, Outage, SimConnect},
    stage::Mode,
    tcp::{MonotonicClock, TcpLink, accept_tcp},
    vm::Prepared,
};
use world::{Cable, Done, Guest, Hand, Over};

const MS: Duration = Duration::from_millis(1);

fn limits() -> Limits {
    Limits {
        connect: 500 * MS,
        attempt: 200 * MS,
        retry: Backoff { first: 20 * MS, most: 100 * MS },
        silence: 600 * MS,
        ping_every: 100 * MS,
        relink_grace: 2500 * MS,
        relink_paused: 400 * MS,
        ask: 1000 * MS,
        commit: 2000 * MS,
        hold_prepared: 2000 * MS,
        release: 500 * MS,
        ..Limits::default()
    }
}

fn bases() -> Bases {
    let base: Arc<dyn BaseView> = Arc::new(MemBase::new(vec![], vec![], vec![]));
    Bases::from(base)
}

/// A host that takes its time.
struct Slow {
    host: MemHost,
    prepare: Duration,
}

impl TargetHost for Slow {
    type Vm = MemTarget;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<MemTarget>, Refusal> {
        thread::sleep(self.prepare);
        self.host.prepare(offer)
    }
}

type Arrived = Result<MemTarget, ReceiveError>;

/// A cloudlet that receives until no link comes any more.
fn target<L: Transport>(links: &Receiver<L>, prepare: Duration) -> Vec<Arrived> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("target");
    let clock = MonotonicClock::default();
    let options = ReceiveOptions { limits: limits(), ..ReceiveOptions::new("source") };
    let mut host = Slow { host: MemHost::new(bases()), prepare };
    let mut arrived = Vec::new();
    while let Ok(link) = links.recv() {
        let Ok(first) = accept(link, &options.limits, &clock) else { continue };
        let mut journal = Journal::open(&path).unwrap();
        if !first.is_new() {
            let _ = first.settle(&mut journal, &options.limits, &clock);
            continue;
        }
        let (relink, relinks) = unbounded();
        let over = AtomicBool::new(false);
        arrived.push(thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    if let Ok(link) = links.recv_timeout(5 * MS)
                        && let Ok(link) = accept(link, &options.limits, &clock)
                    {
                        let _ = relink.send(link);
                    }
                }
            });
            let received = receive(first, &mut host, &mut journal, &relinks, &options, &clock);
            over.store(true, SeqCst);
            received.map(|received| received.vm)
        }));
    }
    arrived
}

/// One handoff.
struct Trial {
    guest: Guest,
    options: SendOptions,
    cancel: AtomicBool,
    /// How long the target takes to get ready.
    prepare: Duration,
}

impl Trial {
    fn new(guest: &Guest) -> Self {
        let mut options = SendOptions::new("vm", "target", Vec::new());
        options.limits = limits();
        options.pipeline = PipelineOptions {
            choice: ModeChoice::Fixed(Mode::NONE),
            batch_bytes: 256 << 10,
            ..PipelineOptions::default()
        };
        let (guest, cancel) = (guest.clone(), AtomicBool::new(false));
        Self { guest, options, cancel, prepare: Duration::ZERO }
    }

    /// Runs it, and what `meanwhile` does.
    fn run<C: Connect + Send>(
        &self,
        connect: &mut C,
        meanwhile: impl FnOnce() + Send,
    ) -> SendOutcome {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path().join("source")).unwrap();
        journal.write(Record::created(VmId::random())).unwrap();
        thread::scope(|scope| {
            scope.spawn(meanwhile);
            send(
                &mut self.guest.clone(),
                bases(),
                connect,
                &mut journal,
                &self.options,
                &MonotonicClock::default(),
                &mut |_| {},
                &self.cancel,
            )
            .unwrap()
        })
    }

    /// The same over a simulated link with a hand on its cable.
    fn over(
        &self,
        shape: LinkShape,
        meanwhile: impl FnOnce(&Hand) + Send,
    ) -> (SendOutcome, Vec<Arrived>) {
        self.over_cable(shape, Hand::default(), meanwhile)
    }

    fn over_cable(
        &self,
        shape: LinkShape,
        hand: Hand,
        meanwhile: impl FnOnce(&Hand) + Send,
    ) -> (SendOutcome, Vec<Arrived>) {
        let (inner, links) = SimConnect::new(shape);
        let mut connect = Over { inner, hand: hand.clone() };
        thread::scope(|scope| {
            let prepare = self.prepare;
            let target = scope.spawn(move || target(&links, prepare));
            let outcome = self.run(&mut connect, || meanwhile(&hand));
            drop(connect);
            (outcome, target.join().unwrap())
        })
    }
}

fn assert_same(guest: &Guest, arrived: Vec<Arrived>) {
    let vm = arrived.into_iter().last().unwrap().unwrap();
    let ram = guest.ram();
    for (index, chunk) in (0..).zip(&ram) {
        let id = handoff::ChunkId { space: handoff::Space::Ram, index };
        assert!(vm.chunk(id) == Some(chunk), "chunk {index} differs");
    }
}

fn moved(outcome: SendOutcome) -> handoff::report::Report {
    match outcome {
        SendOutcome::Moved { report, .. } => report,
        other => panic!("{other:?}"),
    }
}

fn kept(outcome: SendOutcome) -> KeptReason {
    match outcome {
        SendOutcome::KeptHere { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

/// What was on its way is sent again, and nothing else. `bench --only cut` has it for 30 s over 10 Mbps.
#[test]
fn a_cut_costs_its_time_and_what_was_on_its_way() {
    // Also in the midst of a large segment.
    for batch_bytes in [64 << 10, 1 << 20] {
        a_cut_costs_little(batch_bytes);
    }
}

fn a_cut_costs_little(batch_bytes: usize) {
    let (bytes_per_s, cut) = (3_000_000.0, 1500 * MS);
    let guest = Guest::noise(2000);
    let mut shape = LinkShape::mbps(bytes_per_s * 8e-6, 5 * MS);
    shape.outages.push(Outage { from: 1200 * MS, until: 1200 * MS + cut });
    let mut trial = Trial::new(&guest);
    trial.options.pipeline.batch_bytes = batch_bytes;
    let (outcome, arrived) = trial.over(shape, |_| {});
    let report = moved(outcome);
    assert_same(&guest, arrived);
    assert_eq!((report.links, report.outages.len()), (2, 1), "{report:?}");
    let needed = report.stages.iter().find(|stage| stage.name == "seal").unwrap().bytes_out;
    let more = report.bytes_sent - needed;
    assert!((more as f64) < 0.15 * bytes_per_s, "{more} more bytes");
    let without_s = needed as f64 / bytes_per_s;
    let costs_s = report.total_ms / 1e3 - without_s;
    assert!(costs_s > cut.as_secs_f64(), "{report:?}");
    assert!(costs_s < cut.as_secs_f64() + 1.0, "{costs_s} s for a cut of {cut:?}: {report:?}");
    assert!((report.outage_ms / 1e3 - cut.as_secs_f64()).abs() < 0.4, "{report:?}");
    // Neither the time without a link nor what was stuck in it makes the link look slow.
    let rate = report.link_rate_bytes_per_s.unwrap();
    assert!((0.75..1.25).contains(&(rate / bytes_per_s)), "{rate} B/s");
}

/// A link over which nothing comes any more is found, and costs no more than one that is cut.
#[test]
fn a_dead_link_is_found_and_the_guest_runs_on() {
    for cable in [Cable::Cut, Cable::Dead] {
        let guest = Guest::noise(1200);
        let writer = guest.writing(2 * MS, 20);
        let writes = || guest.writes.load(SeqCst);
        let (outcome, arrived) = Trial::new(&guest).over(LinkShape::mbps(24.0, 2 * MS), |hand| {
            thread::sleep(300 * MS);
            let restored = hand.pull(cable, 1500 * MS);
            let before = writes();
            restored.join().unwrap();
            assert!(writes() > before + 50, "it ran on");
        });
        let report = moved(outcome);
        guest.end();
        writer.join().unwrap();
        assert_same(&guest, arrived);
        assert!(report.outage_ms >= 500.0, "{cable:?}: {report:?}");
        assert!(report.total_ms < 1640.0 + 1500.0 + 1500.0, "{cable:?}: {report:?}");
        assert!(report.downtime_ms.unwrap() < 600.0, "{report:?}");
        assert!(report.rounds.iter().any(|round| round.outage_ms > 0.0), "{report:?}");
        assert_eq!(guest.when(Done::Paused).len(), 1);
    }
}

/// Where the link is gone when the last round is due, the guest runs until it is back.
#[test]
fn a_guest_is_not_paused_for_a_link_that_is_gone() {
    for cable in [Cable::Cut, Cable::Dead] {
        let hand = Hand::default();
        let (pulled, back) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
        let guest = {
            let (hand, pulled, back) = (hand.clone(), Arc::clone(&pulled), Arc::clone(&back));
            Guest::noise(100).hook(move |done| {
                if done == Done::Harvested && pulled.lock().unwrap().is_none() {
                    *pulled.lock().unwrap() = Some(Instant::now());
                    let (hand, back) = (hand.clone(), Arc::clone(&back));
                    hand.set(cable);
                    // Longer than a peer that lives says nothing.
                    thread::sleep(350 * MS);
                    thread::spawn(move || {
                        thread::sleep(900 * MS);
                        *back.lock().unwrap() = Some(Instant::now());
                        hand.set(Cable::Whole);
                    });
                }
            })
        };
        let (outcome, arrived) =
            Trial::new(&guest).over_cable(LinkShape::mbps(80.0, MS), hand, |_| {});
        let report = moved(outcome);
        assert_same(&guest, arrived);
        let paused = guest.when(Done::Paused);
        let back = back.lock().unwrap().unwrap();
        assert_eq!(paused.len(), 1);
        let early = back.saturating_duration_since(paused[0]);
        assert!(early.is_zero(), "{cable:?}: {early:?} before it was back");
        assert!(report.downtime_ms.unwrap() < 1500.0, "{report:?}");
    }
}

/// A guest that is paused does not wait for a link for as long as one that runs.
#[test]
fn a_paused_guest_waits_for_a_link_for_a_short_time_only() {
    for (cut, moves) in [(100 * MS, true), (3000 * MS, false)] {
        let hand = Hand::default();
        let pull = hand.clone();
        let guest = Guest::noise(200).hook(move |done| {
            if done == Done::Paused {
                pull.pull(Cable::Cut, cut);
            }
        });
        let mut trial = Trial::new(&guest);
        // The other way it is committed at once, and waits for the peer's word.
        trial.options.commit = CommitMode::Prepared;
        let (outcome, arrived) = trial.over_cable(LinkShape::mbps(80.0, MS), hand, |_| {});
        if moves {
            moved(outcome);
            assert_same(&guest, arrived);
            continue;
        }
        let reason = kept(outcome);
        assert!(matches!(&reason, KeptReason::Link(why) if why.contains("paused")), "{reason}");
        assert!(guest.is_free());
        let waited = guest.when(Done::Resumed)[0] - guest.when(Done::Paused)[0];
        assert!(waited >= limits().relink_paused && waited < 1000 * MS, "{waited:?}");
    }
}

/// What answers there is no cloudlet: that need not be tried for minutes.
#[test]
fn a_peer_that_never_welcomes_is_not_tried_for_long() {
    let guest = Guest::noise(10);
    let (mut connect, links) = SimConnect::new(LinkShape::mbps(80.0, MS));
    let began = Instant::now();
    let outcome = thread::scope(|scope| {
        scope.spawn(move || links.iter().for_each(|link| drop(link.split())));
        let outcome = Trial::new(&guest).run(&mut connect, || {});
        drop(connect);
        outcome
    });
    assert!(matches!(kept(outcome), KeptReason::Link(_)));
    assert!(began.elapsed() < 2 * limits().connect + 1000 * MS, "{:?}", began.elapsed());
    assert!(guest.is_free());
}

/// When the user gives up.
#[derive(Clone, Copy, Debug)]
enum When {
    Connecting,
    Sending,
    Broken(Cable),
    Relinking,
}

/// Whatever is waited for when the user gives up: within a second the guest runs at full speed.
#[test]
fn a_cancelled_guest_is_free_within_a_second() {
    use When::{Broken, Connecting, Relinking, Sending};
    for when in [Connecting, Sending, Broken(Cable::Cut), Broken(Cable::Dead), Relinking] {
        let guest = Guest::noise(1500);
        let writer = guest.writing(2 * MS, 20);
        let mut trial = Trial::new(&guest);
        if matches!(when, Connecting) {
            trial.prepare = 3000 * MS;
        }
        // What is on its way takes seconds, and a dead link is found late.
        trial.options.limits.silence = 5000 * MS;
        let took = Mutex::new(None);
        let began = Instant::now();
        let (outcome, arrived) = trial.over(LinkShape::mbps(8.0, 2 * MS), |hand| {
            thread::sleep(400 * MS);
            match when {
                Connecting | Sending => {}
                Broken(cable) => hand.set(cable),
                Relinking => {
                    hand.set(Cable::Cut);
                    thread::sleep(500 * MS);
                }
            }
            assert!(!guest.is_free(), "{when:?}");
            let asked = Instant::now();
            trial.cancel.store(true, SeqCst);
            while !guest.is_free() && asked.elapsed() < Duration::from_secs(20) {
                thread::sleep(MS);
            }
            *took.lock().unwrap() = Some(asked.elapsed());
            hand.set(Cable::Whole);
        });
        assert!(matches!(kept(outcome), KeptReason::Cancelled), "{when:?}");
        let took = took.lock().unwrap().unwrap();
        assert!(took < 1000 * MS, "{when:?}: {took:?}");
        assert!(began.elapsed() < 10 * 1000 * MS, "{when:?}: the command ends soon");
        assert!(arrived.iter().all(Result::is_err));
        guest.end();
        writer.join().unwrap();
    }
}

/// Connects from another address of this host each time.
struct Roaming {
    to: SocketAddr,
    from: Vec<Ipv4Addr>,
    present: Arc<Mutex<Option<TcpStream>>>,
}

impl Connect for Roaming {
    type Link = TcpLink;

    fn connect(&mut self, _: Duration) -> std::io::Result<TcpLink> {
        let from = self.from.pop().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((from, 0)).into())?;
        socket.connect(&self.to.into())?;
        let stream = TcpStream::from(socket);
        *self.present.lock().unwrap() = Some(stream.try_clone()?);
        TcpLink::new(stream)
    }
}

/// A source whose address changes goes on where it was.
#[test]
fn a_source_comes_back_from_another_address() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let present = Arc::new(Mutex::new(None));
    let mut connect = Roaming {
        to: listener.local_addr().unwrap(),
        from: vec![Ipv4Addr::new(127, 0, 0, 3), Ipv4Addr::new(127, 0, 0, 2)],
        present: Arc::clone(&present),
    };
    // Broken in the midst of it: when the first round is over.
    let mut broken = false;
    let guest = Guest::noise(400).hook(move |done| {
        if done == Done::Harvested
            && !std::mem::replace(&mut broken, true)
            && let Some(stream) = present.lock().unwrap().take()
        {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
    });
    let (to_target, links) = unbounded();
    let peers = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&peers);
    thread::spawn(move || {
        while let Ok(link) = accept_tcp(&listener) {
            seen.lock().unwrap().push(link.peer_addr().unwrap().ip().to_string());
            if to_target.send(link).is_err() || seen.lock().unwrap().len() == 2 {
                return;
            }
        }
    });
    let (outcome, arrived) = thread::scope(|scope| {
        let target = scope.spawn(move || target(&links, Duration::ZERO));
        let outcome = Trial::new(&guest).run(&mut connect, || {});
        (outcome, target.join().unwrap())
    });
    let report = moved(outcome);
    assert_same(&guest, arrived);
    assert_eq!(*peers.lock().unwrap(), ["127.0.0.2", "127.0.0.3"], "{report:?}");
    assert_eq!(report.links, 2);
}
