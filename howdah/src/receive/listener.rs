//! The listening process: sorts links, decides nothing.

use std::{
    ffi::OsString,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use guest_images::BaseId;
use handoff::{
    Clock, Refusal,
    engine::{Incoming, Limits, decline_lost_copy},
    ownership::{Record, State},
    tcp::MonotonicClock,
    tls::Guarded,
};

use super::{
    door::{Called, Caller, Door, Greeted, Guest, Handed},
    events::Event,
    link::Peek,
    newer::GivenUp,
};
use crate::{
    about::{self, About},
    bases,
    cli::ReceiveArgs,
    commands::base,
    control::{Reply, channel::Channel, client},
    failure::{Exit, Failure, one_line},
    home::{Home, VmDir, VmName},
    lock::{Lock, Probe},
    net,
    output::Output,
    peers::{Peer, Place, Quota, QuotaLimits, Refusals, Right, bind},
    spawn, vmproc,
};

/// Links of peers that are served at once; strangers have bounds of their own ([`Quota`]).
const MAX_LINKS: usize = 64;
/// How long a process just started may take to take its link.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// What every link is handled with.
struct Listener {
    home: Home,
    tell: Tell,
    verbose: u8,
    args: ReceiveArgs,
    door: Door,
    quota: Quota,
    refusals: Refusals,
    given_up: GivenUp,
    clock: MonotonicClock,
    busy: AtomicUsize,
}

/// Who is told what a listener does.
pub(crate) type Tell = Arc<dyn Fn(&Event) + Send + Sync>;

/// Listens until killed, or with `--once` until one handoff came to an end here.
pub(crate) fn listen(
    args: ReceiveArgs,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let once = args.once;
    let (done, ended) = crossbeam_channel::unbounded();
    let tell = move |event: &Event| {
        event.tell(output);
        let _ = done.send(event.clone());
    };
    start(args, home, output, verbose, Arc::new(tell))?;
    net::keep(home);
    loop {
        match ended.recv() {
            Ok(Event::Received { .. }) if once => return Ok(()),
            Ok(Event::NotReceived { vm, why, superseded: false, .. }) if once => {
                return Err(Failure::line(Exit::NotMoved, &format!("VM {vm}: {why}")).into());
            }
            Ok(_) => {}
            Err(_) => anyhow::bail!("the listener ended"),
        }
    }
}

/// Listens on threads of this process until it ends; where.
pub(crate) fn start(
    args: ReceiveArgs,
    home: &Home,
    output: Output,
    verbose: u8,
    tell: Tell,
) -> anyhow::Result<SocketAddr> {
    let door = Door::new(home, args.plain)?;
    let listener = bind(args.listen, "--listen")?;
    vmproc::check_host()?;
    vmproc::warn_of_slow_host(output);
    if args.plain && !args.listen.ip().is_loopback() {
        output.note(&format!(
            "howdah: {} is not loopback, and links are neither encrypted nor authenticated (--plain): \
             whoever reaches this port can send VMs here",
            args.listen
        ));
    }
    if door.is_shut()? {
        output.note(
            "howdah: no peer is known, so that nobody can send VMs here; \
             `howdah peer add NAME KEY` lets one in, also while this listens",
        );
    }
    vmproc::decline_lost_copies(home)?;
    let address = listener.local_addr().map_or(args.listen, |address| address);
    tell(&Event::Listening { address: address.to_string(), key: door.key() });
    let shared = Arc::new(Listener {
        home: home.clone(),
        tell,
        verbose,
        args,
        door,
        quota: Quota::new(QuotaLimits::DEFAULT),
        refusals: Refusals::default(),
        given_up: GivenUp::default(),
        clock: MonotonicClock::default(),
        busy: AtomicUsize::new(0),
    });
    std::thread::spawn(move || accept_links(&listener, &shared));
    Ok(address)
}

/// Takes links as they come, each on a thread of its own.
fn accept_links(listener: &TcpListener, shared: &Arc<Listener>) {
    loop {
        let link = listener.accept();
        let handled = link.and_then(|(stream, address)| {
            let place = match shared.quota.enter(address.ip(), shared.clock.now()) {
                Ok(place) => place,
                Err(full) => {
                    shared.refused(address, &full);
                    return Ok(());
                }
            };
            let working = Arc::clone(shared);
            let work = move || {
                if let Some(event) = working.link(stream, address, place) {
                    (working.tell)(&event);
                }
            };
            std::thread::Builder::new().name("link".into()).spawn(work).map(drop)
        });
        if let Err(e) = handled {
            // Out of descriptors or threads, most likely: let some links end.
            tracing::warn!("a link could not be taken: {e}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Listener {
    /// Handles one link; what is worth telling.
    fn link(&self, stream: TcpStream, address: SocketAddr, place: Place) -> Option<Event> {
        let guest = match self.door.greet(stream, address) {
            Ok(guest) => guest,
            Err(dropped) => {
                self.refused(address, &dropped);
                return None;
            }
        };
        // From here on it is a peer's, and not a stranger's.
        drop(place);
        let served = Served::begin(&self.busy);
        let full = || Refusal::Other(format!("{MAX_LINKS} links are being served there already"));
        let Greeted { caller, incoming, handed } = match guest {
            Guest::Call(called) if served.is_some() => return self.call(*called, address),
            Guest::Call(called) => {
                self.refused(address, &format!("{}: {}", called.caller, full()));
                let _ = called.incoming.refuse(full());
                return None;
            }
            Guest::Handoff(greeted) => *greeted,
        };
        if served.is_none() {
            return self.turn_away(address, &caller, incoming, full());
        }
        let name = match self.allowed(&caller, &incoming) {
            Ok(name) => name,
            Err(refusal) => return self.turn_away(address, &caller, incoming, refusal),
        };
        if incoming.is_new() {
            // A source that missed the Welcome of a link that broke offers again.
            if Self::is_expected(&self.home.vm(&name), &handed) {
                drop(incoming);
                return match Self::pass_on(&self.home.vm(&name), &handed) {
                    Ok(()) => None,
                    Err(failure) => {
                        self.refused(address, &format!("{caller}: {failure}"));
                        None
                    }
                };
            }
            self.given_up.make_way(&self.home.vm(&name), incoming.hello.handoff, caller.key());
            // The process that is started has the word from here on.
            drop(incoming);
            (self.tell)(&Event::Receiving { vm: name.to_string(), peer: caller.to_string() });
            return Some(self.new_handoff(&name, caller.to_string(), handed));
        }
        match self.known_handoff(&self.home.vm(&name), &caller, incoming, &handed) {
            Ok(()) => None,
            Err(e) => {
                self.refused(address, &format!("{caller}: {e:#}"));
                None
            }
        }
    }

    /// Serves a caller that wants something else than to hand a VM off.
    fn call(&self, called: Called, address: SocketAddr) -> Option<Event> {
        let Called { caller, incoming, socket } = called;
        let service = incoming.call.service.clone();
        let version = match service.as_str() {
            about::SERVICE => about::VERSIONS.agree(incoming.call.versions),
            bases::SERVICE => bases::VERSIONS.agree(incoming.call.versions),
            other => Err(Refusal::Other(format!("nothing called {other:?} is served there"))),
        };
        // Without TLS nobody knows who it is, and what it may.
        let who = caller.peer().ok_or_else(|| Refusal::Other("only peers are served that".into()));
        let (version, peer) = match version.and_then(|version| Ok((version, who?))) {
            Ok(agreed) => agreed,
            Err(refusal) => {
                self.refused(address, &format!("{caller}: {refusal}"));
                let _ = incoming.refuse(refusal);
                return None;
            }
        };
        if service == about::SERVICE {
            let (tap, network) = (self.args.tap.as_deref(), self.args.network.as_ref());
            let about = About::here(&self.home, peer, about::incoming(&self.home, tap, network));
            let taken = incoming.take(version);
            let answered =
                taken.and_then(|(mut rx, mut tx)| about::answer(&about, &mut rx, &mut tx));
            if let Err(error) = answered {
                self.refused(address, &format!("{caller}: {error}"));
            }
            return None;
        }
        let session = bases::Session {
            home: &self.home,
            peer,
            bounds: bases::Bounds {
                min_free_bytes: self.args.min_free_mib << 20,
                quota_bytes: self.args.base_quota_gib.map(|gib| gib << 30),
            },
            socket: &socket,
        };
        let served = incoming.take(version).map_err(anyhow::Error::from);
        match served.and_then(|(rx, tx)| bases::serve(&session, rx, tx)) {
            Ok(served) => Some(Event::of_base(served, caller.to_string())),
            Err(error) => {
                self.refused(address, &format!("{caller}: {error:#}"));
                None
            }
        }
    }

    /// Tells why a caller came to nothing, unless that was told lately.
    fn refused(&self, address: SocketAddr, why: &dyn std::fmt::Display) {
        let why = one_line(&why.to_string());
        if let Some(why) = self.refusals.line(address.ip(), &why, self.clock.now()) {
            (self.tell)(&Event::Dropped { peer: address.to_string(), why });
        }
    }

    /// Tells a peer no, and the user that it was.
    fn turn_away(
        &self,
        address: SocketAddr,
        caller: &Caller,
        incoming: Incoming<Guarded<Peek>>,
        refusal: Refusal,
    ) -> Option<Event> {
        self.refused(address, &format!("{caller}: {refusal}"));
        // A peer that is gone need not be told.
        let _ = incoming.refuse(refusal);
        None
    }

    /// Whether the caller may want what it wants: the VM's name, if so.
    fn allowed(
        &self,
        caller: &Caller,
        incoming: &Incoming<Guarded<Peek>>,
    ) -> Result<VmName, Refusal> {
        let name: VmName = incoming
            .hello
            .vm_name
            .parse()
            .map_err(|why| Refusal::Other(format!("the VM's name: {why}")))?;
        // Rights are asked when a handoff begins; what has begun is between its two sides.
        if let (Some(offer), Some(peer)) = (incoming.hello.offer(), caller.peer()) {
            self.check_offer(peer, offer.base)?;
        }
        Ok(name)
    }

    fn check_offer(&self, peer: &Peer, id: BaseId) -> Result<(), Refusal> {
        peer.check(Right::Send).map_err(|failure| Refusal::Other(failure.message))?;
        if base::allowed(&self.home, peer, id) {
            return Ok(());
        }
        let why = format!("peer {} may not hand off VMs of base {id} to there", peer.name);
        Err(Refusal::Other(why))
    }

    /// Brings the host's network to what VMs are now: their processes cannot, they are confined.
    fn refresh_network(&self, vm: &VmName) {
        if let Err(failure) = net::refresh(&self.home) {
            tracing::warn!("network of VM {vm}: {failure}");
        }
    }

    /// Starts a process that receives the VM, and waits for how it went.
    fn new_handoff(&self, name: &VmName, peer: String, handed: Handed) -> Event {
        let vm = name.to_string();
        match self.spawn(name, &handed) {
            Ok(details) => {
                self.refresh_network(name);
                Event::Received { vm, peer, details }
            }
            Err(failure) => {
                self.tidy(name);
                let superseded = self.given_up.take(handed.id());
                Event::NotReceived { vm, peer, why: failure.message, superseded }
            }
        }
    }

    /// Removes what a reception left that did not come to tidying up, because it was killed: what
    /// belongs to nobody, and holds room that the next try may need.
    fn tidy(&self, name: &VmName) {
        let dir = self.home.vm(name);
        dir.remove_if_empty();
        if !dir.path().is_dir() {
            return;
        }
        // A name that somebody has taken since is not touched.
        let Ok(lock) = dir.lock() else { return };
        if let Err(e) = tidy(&dir, lock) {
            tracing::warn!("VM {name}: {e:#}");
        }
    }

    fn spawn(&self, name: &VmName, handed: &Handed) -> Result<Option<serde_json::Value>, Failure> {
        let failed = |e: io::Error| Failure::plain(Exit::Failed, format!("VM {name}"), e);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let log = self.home.receive_log()?;
        let child =
            spawn::start(self.child_arguments(name), Stdio::from(OwnedFd::from(theirs)), &log)?;
        let mut channel = Channel::new(ours, Some(TAKE_TIMEOUT)).map_err(failed)?;
        channel.send(&handed.envelope(), Some(handed.socket.as_fd())).map_err(failed)?;
        // What its guest says first, when it runs here, must find the way back already.
        spawn::await_ready_noting(child, &log, || self.refresh_network(name))
    }

    fn child_arguments(&self, name: &VmName) -> Vec<OsString> {
        let mut words = vec![OsString::from("--home"), self.home.root().into()];
        words.extend((0..self.verbose).map(|_| "-v".into()));
        words.extend(["receive-process".into(), name.to_string().into()]);
        if let Some(tap) = &self.args.tap {
            words.extend(["--tap".into(), tap.into()]);
        }
        if let Some(network) = &self.args.network {
            words.extend(["--network".into(), network.to_string().into()]);
        }
        words.extend(["--min-free-mib".into(), self.args.min_free_mib.to_string().into()]);
        words.extend(self.args.jail.words());
        if let Some(workers) = self.args.workers {
            words.extend(["--workers".into(), workers.to_string().into()]);
        }
        words.extend(self.args.wait.words().into_iter().map(OsString::from));
        words
    }

    /// Whether a process is there that receives the very handoff of this link.
    fn is_expected(dir: &VmDir, handed: &Handed) -> bool {
        let asked = |dir| {
            let mut channel = client::ask(dir, handed.question(), None)?;
            client::next_reply(dir, &mut channel)
        };
        matches!(dir.probe(), Ok(Probe::Held { .. })) && matches!(asked(dir), Ok(Reply::Done))
    }

    /// Gives the link to that process.
    fn pass_on(dir: &VmDir, handed: &Handed) -> Result<(), Failure> {
        let mut channel = client::ask(dir, handed.request(), Some(handed.socket.as_fd()))?;
        match client::next_reply(dir, &mut channel)? {
            Reply::Failed(failure) => Err(failure),
            _ => Ok(()),
        }
    }

    /// A later link: for the process that receives, or answered from the record.
    fn known_handoff(
        &self,
        dir: &VmDir,
        caller: &Caller,
        incoming: Incoming<Guarded<Peek>>,
        handed: &Handed,
    ) -> anyhow::Result<()> {
        if matches!(dir.probe()?, Probe::Held { .. }) {
            // Asked first: once it has the link, only it may send on it.
            if Self::is_expected(dir, handed) {
                drop(incoming);
                return Ok(Self::pass_on(dir, handed)?);
            }
            // It does not receive this handoff (any more): its record has the answer.
            let record = dir.record()?;
            let incoming = party(caller, incoming, record.as_ref())?;
            return Ok(incoming.answer(record.as_ref())?);
        }
        if !dir.path().is_dir() {
            return Ok(incoming.answer(None)?);
        }
        // With the lock, so that no process starts between reading the record and answering.
        let _lock = dir.lock()?;
        let mut journal = dir.journal()?;
        let incoming = party(caller, incoming, journal.record())?;
        incoming.settle(&mut journal, &Limits::default(), &MonotonicClock::default())?;
        if matches!(journal.record().map(|record| &record.state), Some(State::Declined { .. })) {
            dir.remove_disk()?;
        }
        Ok(())
    }
}

/// What no process has in hand any more: nobody's directory goes, and a copy that was in memory is
/// declined before anybody asks.
fn tidy(dir: &VmDir, lock: Lock) -> anyhow::Result<()> {
    let mut journal = dir.journal()?;
    match journal.record() {
        None => dir.remove(lock)?,
        Some(record) if record.is_volatile() => {
            decline_lost_copy(&mut journal)?;
            dir.remove_disk()?;
        }
        Some(_) => {}
    }
    Ok(())
}

/// The link, if its caller is the other side of the handoff that it asks about, as far as the record
/// knows that handoff.
fn party(
    caller: &Caller,
    incoming: Incoming<Guarded<Peek>>,
    record: Option<&Record>,
) -> anyhow::Result<Incoming<Guarded<Peek>>> {
    let asked = incoming.hello.handoff.handoff;
    let known = record.filter(|record| record.handoff() == Some(asked));
    match known.and_then(Record::peer) {
        Some(peer) if !caller.is(peer) => {
            let refusal = Refusal::Other("that handoff is between other cloudlets".into());
            let _ = incoming.refuse(refusal);
            anyhow::bail!("it asked about a handoff with {peer}")
        }
        _ => Ok(incoming),
    }
}

/// One of the links that are served at once; no more when dropped.
struct Served<'a>(&'a AtomicUsize);

impl<'a> Served<'a> {
    fn begin(busy: &'a AtomicUsize) -> Option<Self> {
        let served = Self(busy);
        // Dropped, and so counted back, where that is too many.
        (busy.fetch_add(1, Ordering::Relaxed) < MAX_LINKS).then_some(served)
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
