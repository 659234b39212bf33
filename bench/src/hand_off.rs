//! One handoff, both ends in this process.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never, unbounded};
use handoff::{
    Bases, Connect, SourceVm, Transport,
    engine::{
        Incoming, ReceiveOptions, SendError, SendOptions, SendOutcome, accept, receive, send,
    },
    ownership::{Journal, Record, VmId},
    report::Report,
    sim::{LinkShape, MemHost, SimConnect},
    tcp::{MonotonicClock, TcpLink, accept_tcp},
    tls::{self, Guarded, Identity},
};

use crate::{
    guest::Host,
    link::{Link, Namespace},
    sink,
};

/// How often it is looked for a later link.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What is between the two ends.
#[derive(Clone, Copy)]
pub(crate) enum Road<'a> {
    /// This machine's own loopback interface.
    Loopback,
    /// A link between two namespaces, and what its TCP does about congestion, if that is not what
    /// the system has chosen.
    Link(&'a Link, Option<&'a str>),
    /// A link that is only made up, where namespaces are not permitted.
    Simulated(&'a LinkShape),
}

/// What waits at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Far {
    /// A target for guests that have RAM and no base.
    Target,
    /// One for guests that differ from a base and have a disk.
    TargetOnBase,
    /// One that opens segments and does nothing with them.
    Sink,
}

/// How a handoff is done.
pub(crate) struct Plan<'a> {
    pub(crate) road: Road<'a>,
    pub(crate) far: Far,
    pub(crate) send: SendOptions,
    pub(crate) receive: ReceiveOptions,
    /// It is cancelled after so long.
    pub(crate) give_up_after: Option<Duration>,
    /// The keys of both ends, if the link is to be TLS. Not on a simulated road.
    pub(crate) keys: Option<Keys>,
}

/// Two cloudlets that know each other.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    near: Arc<Identity>,
    far: Arc<Identity>,
}

impl Keys {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { near: Arc::new(Identity::generate()?), far: Arc::new(Identity::generate()?) })
    }
}

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

impl<'a> Plan<'a> {
    pub(crate) fn new(road: Road<'a>, far: Far) -> Self {
        let send = SendOptions::new("bench", "target", Vec::new());
        Self {
            road,
            far,
            send,
            receive: ReceiveOptions::new("source"),
            give_up_after: None,
            keys: None,
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) report: Report,
    /// When it began.
    pub(crate) began: Instant,
    /// Whether the guest moved; if not, it was given up.
    pub(crate) moved: bool,
}

/// Hands a guest off.
pub(crate) fn hand_off(
    vm: &mut (dyn SourceVm + Send),
    bases: &Bases,
    plan: &Plan<'_>,
) -> anyhow::Result<Ran> {
    let dir = scratch()?;
    if let Road::Simulated(shape) = plan.road {
        return simulated(vm, bases, shape, plan, dir.path());
    }
    thread::scope(|scope| {
        let (tell, told) = bounded(1);
        let (dir, near) = (dir.path(), vm);
        let target = scope.spawn(move || far_end(plan, bases, dir, tell));
        let source = scope.spawn(move || {
            enter(plan.road, |link| &link.near)?;
            let address = told.recv().context("nobody listens")?;
            let congestion_control = match plan.road {
                Road::Link(_, congestion_control) => congestion_control,
                Road::Loopback | Road::Simulated(_) => None,
            };
            let mut connect = To { address, congestion_control, keys: plan.keys.as_ref() };
            near_end(near, bases, &mut connect, plan, dir)
        });
        let ran = source.join().map_err(|_| anyhow!("the source panicked"))??;
        let target = target.join().map_err(|_| anyhow!("the target panicked"))?;
        if ran.moved {
            target.context("at the target")?;
        }
        Ok(ran)
    })
}

fn simulated(
    vm: &mut (dyn SourceVm + Send),
    bases: &Bases,
    shape: &LinkShape,
    plan: &Plan<'_>,
    dir: &Path,
) -> anyhow::Result<Ran> {
    let (mut connect, ends) = SimConnect::new(shape.clone());
    thread::scope(|scope| {
        let (later, relinks) = unbounded();
        let target = scope.spawn(move || {
            let first = ends.recv()?;
            thread::scope(|scope| {
                // Until the source makes no more.
                scope.spawn(|| ends.iter().for_each(|link| pass_on(link, plan, &later)));
                take_over(first, relinks, plan, bases, dir)
            })
        });
        let ran = near_end(vm, bases, &mut connect, plan, dir)?;
        drop(connect);
        let target = target.join().map_err(|_| anyhow!("the target panicked"))?;
        if ran.moved {
            target.context("at the target")?;
        }
        Ok(ran)
    })
}

/// A directory for what must be durable, on no disk if that can be: disks are not measured here.
pub(crate) fn scratch() -> io::Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

fn enter(road: Road<'_>, end: impl FnOnce(&Link) -> &Namespace) -> io::Result<()> {
    match road {
        Road::Loopback | Road::Simulated(_) => Ok(()),
        Road::Link(link, _) => end(link).enter(),
    }
}

/// The source: sends the guest to what `connect` reaches.
pub(crate) fn near_end<C: Connect + Send>(
    vm: &mut dyn SourceVm,
    bases: &Bases,
    connect: &mut C,
    plan: &Plan<'_>,
    dir: &Path,
) -> anyhow::Result<Ran> {
    let mut journal = Journal::open(dir.join("source"))?;
    journal.write(Record::created(VmId::random()))?;
    let (cancel, began) = (AtomicBool::new(false), Instant::now());
    let (done, over) = bounded::<()>(0);
    let outcome: Result<SendOutcome, SendError> = thread::scope(|scope| {
        scope.spawn(|| {
            let limit = plan.give_up_after.unwrap_or(Duration::from_secs(3600));
            let in_time = over.recv_timeout(limit) != Err(TIMEOUT);
            cancel.store(!in_time, Relaxed);
        });
        let clock = MonotonicClock::default();
        let (vm, bases) = (vm, bases.clone());
        let ended =
            send(vm, bases, connect, &mut journal, &plan.send, &clock, &mut |_| {}, &cancel);
        drop(done);
        ended
    });
    match outcome? {
        SendOutcome::Moved { report, .. } => Ok(Ran { report, began, moved: true }),
        SendOutcome::KeptHere { report, .. } if cancel.load(Relaxed) => {
            Ok(Ran { report, began, moved: false })
        }
        SendOutcome::KeptHere { reason, .. } => Err(anyhow!("the guest did not move: {reason}")),
        SendOutcome::InDoubt { .. } => Err(anyhow!("it is not known where the guest is")),
    }
}

const TIMEOUT: RecvTimeoutError = RecvTimeoutError::Timeout;

/// Listens where the road ends, says where that is, and takes what comes.
fn far_end(
    plan: &Plan<'_>,
    bases: &Bases,
    dir: &Path,
    tell: Sender<SocketAddr>,
) -> anyhow::Result<()> {
    enter(plan.road, |link| &link.far)?;
    let address = match plan.road {
        Road::Loopback | Road::Simulated(_) => Ipv4Addr::LOCALHOST,
        Road::Link(..) => Link::FAR,
    };
    let listener = TcpListener::bind((address, 0))?;
    tell.send(listener.local_addr()?)?;
    match &plan.keys {
        None => take_all(&listener, Ok, plan, bases, dir),
        Some(keys) => {
            let clock = MonotonicClock::default();
            let open = |link: TcpLink| {
                let done = tls::accept(&mut link.stream(), &keys.far, HANDSHAKE, &clock)?;
                Ok(done.over(link))
            };
            take_all(&listener, open, plan, bases, dir)
        }
    }
}

/// Takes the guest over the first link that comes, and over those that come when it breaks.
fn take_all<L: Transport>(
    listener: &TcpListener,
    open: impl Fn(TcpLink) -> anyhow::Result<L> + Sync,
    plan: &Plan<'_>,
    bases: &Bases,
    dir: &Path,
) -> anyhow::Result<()> {
    let first = open(accept_tcp(listener)?)?;
    listener.set_nonblocking(true)?;
    let (later, relinks) = unbounded();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                match accept_tcp(listener) {
                    // One that cannot be opened is of no use.
                    Ok(link) => _ = open(link).map(|link| pass_on(link, plan, &later)),
                    Err(_) => thread::sleep(LOOK_AGAIN),
                }
            }
        });
        let taken = take_over(first, relinks, plan, bases, dir);
        over.store(true, Relaxed);
        taken
    })
}

/// Gives a later link to the target.
fn pass_on<L: Transport>(link: L, plan: &Plan<'_>, to: &Sender<Incoming<L>>) {
    // One that says nothing is of no use.
    if let Ok(link) = accept(link, &plan.receive.limits, &MonotonicClock::default()) {
        let _ = to.send(link);
    }
}

/// The target: takes the guest that comes over a link.
pub(crate) fn take<L: Transport>(
    link: L,
    plan: &Plan<'_>,
    bases: &Bases,
    dir: &Path,
) -> anyhow::Result<()> {
    take_over(link, never(), plan, bases, dir)
}

/// The same, over later links too.
fn take_over<L: Transport>(
    link: L,
    relinks: Receiver<Incoming<L>>,
    plan: &Plan<'_>,
    bases: &Bases,
    dir: &Path,
) -> anyhow::Result<()> {
    if plan.far == Far::Sink {
        return sink::swallow(link, &plan.receive);
    }
    let clock = MonotonicClock::default();
    let first: Incoming<L> = accept(link, &plan.receive.limits, &clock)?;
    let mut journal = Journal::open(dir.join("target"))?;
    let options = &plan.receive;
    if plan.far == Far::TargetOnBase {
        let mut host = MemHost::new(bases.clone());
        receive(first, &mut host, &mut journal, &relinks, options, &clock)?;
    } else {
        receive(first, &mut Host(bases.clone()), &mut journal, &relinks, options, &clock)?;
    }
    Ok(())
}

/// Connects to an address, with a congestion control of its own.
struct To<'a> {
    address: SocketAddr,
    congestion_control: Option<&'a str>,
    keys: Option<&'a Keys>,
}

impl Connect for To<'_> {
    type Link = Guarded<TcpLink>;

    fn connect(&mut self, timeout: Duration) -> io::Result<Guarded<TcpLink>> {
        let stream = TcpStream::connect_timeout(&self.address, timeout)?;
        if let Some(name) = self.congestion_control {
            choose(&stream, name)?;
        }
        let link = TcpLink::new(stream)?;
        let Some(Keys { near, far }) = self.keys else { return Ok(Guarded::Plain(link)) };
        let clock = MonotonicClock::default();
        let done = tls::connect(&mut link.stream(), near, far.key(), timeout, &clock);
        Ok(Guarded::Tls(done.map_err(io::Error::other)?.over(link)))
    }
}

fn choose(stream: &TcpStream, congestion_control: &str) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call; pointer and length describe the name.
    let status = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            congestion_control.as_ptr().cast(),
            congestion_control.len() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A base that has nothing.
pub(crate) fn no_bases() -> Bases {
    let base = handoff::base_view::testing::MemBase::new(Vec::new(), Vec::new(), Vec::new());
    Bases::from(std::sync::Arc::new(base) as std::sync::Arc<dyn handoff::BaseView>)
}
