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

use crossbeam_channel::Sender;
use handoff::{
    Refusal,
    engine::{Incoming, Limits, accept},
    tcp::MonotonicClock,
};

use super::{
    events::Event,
    link::{Peek, Seen},
};
use crate::{
    cli::ReceiveArgs,
    control::{Envelope, Request, VERSION, channel::Channel, client},
    failure::{Exit, Failure, one_line},
    home::{Home, VmDir, VmName},
    lock::Probe,
    output::Output,
    spawn, vmproc,
};

/// Links that are looked at at once; more wait in the kernel.
const MAX_LINKS: usize = 16;
/// How long a process just started may take to take its link.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// What every link is handled with.
struct Listener {
    home: Home,
    output: Output,
    verbose: u8,
    args: ReceiveArgs,
    busy: AtomicUsize,
}

/// Listens until killed, or with `--once` until one handoff came to an end here.
pub(crate) fn listen(
    args: ReceiveArgs,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let listener = bind(args.listen)?;
    vmproc::check_host()?;
    vmproc::warn_of_slow_host(output);
    if !args.listen.ip().is_loopback() {
        output.note(&format!(
            "howdah: {} is not loopback, and links are neither encrypted nor authenticated yet: \
             whoever reaches this port can send VMs here",
            args.listen
        ));
    }
    let address = listener.local_addr().map_or(args.listen, |address| address).to_string();
    Event::Listening { address }.tell(output);
    let once = args.once;
    let shared =
        Arc::new(Listener { home: home.clone(), output, verbose, args, busy: AtomicUsize::new(0) });
    let (done, ended) = crossbeam_channel::bounded(MAX_LINKS);
    std::thread::spawn(move || accept_links(&listener, &shared, &done));
    loop {
        match ended.recv() {
            Ok(Event::Received { .. }) if once => return Ok(()),
            Ok(Event::NotReceived { vm, why, .. }) if once => {
                return Err(Failure::line(Exit::NotMoved, &format!("VM {vm}: {why}")).into());
            }
            Ok(_) => {}
            Err(_) => anyhow::bail!("the listener ended"),
        }
    }
}

/// Takes links as they come, each on a thread of its own.
fn accept_links(listener: &TcpListener, shared: &Arc<Listener>, done: &Sender<Event>) {
    loop {
        let link = listener.accept();
        while shared.busy.load(Ordering::Relaxed) >= MAX_LINKS {
            std::thread::sleep(Duration::from_millis(50));
        }
        let (shared, done) = (Arc::clone(shared), done.clone());
        let handled = link.and_then(|(stream, peer)| {
            shared.busy.fetch_add(1, Ordering::Relaxed);
            let working = Arc::clone(&shared);
            let work = move || {
                let event = working.link(stream, peer);
                working.busy.fetch_sub(1, Ordering::Relaxed);
                if let Some(event) = event {
                    event.tell(working.output);
                    let _ = done.send(event);
                }
            };
            let started = std::thread::Builder::new().name("link".into()).spawn(work);
            started.map(drop).inspect_err(|_| {
                shared.busy.fetch_sub(1, Ordering::Relaxed);
            })
        });
        if let Err(e) = handled {
            // Out of descriptors or threads, most likely: let some links end.
            tracing::warn!("a link could not be taken: {e}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).map_err(|e| {
        let way_out = match e.kind() {
            io::ErrorKind::AddrInUse => {
                "another program listens there: choose another with --listen"
            }
            io::ErrorKind::AddrNotAvailable => "no interface of this host has that address",
            io::ErrorKind::PermissionDenied => "ports below 1024 need root: choose a higher one",
            _ => "choose another with --listen",
        };
        Failure::new(Exit::Failed, format!("listen on {address}"), e, way_out)
    })
}

impl Listener {
    /// Handles one link; what is worth telling.
    fn link(&self, stream: TcpStream, address: SocketAddr) -> Option<Event> {
        let peer = address.to_string();
        let dropped =
            |why: String| Some(Event::Dropped { peer: peer.clone(), why: one_line(&why) });
        let opened =
            stream.try_clone().map(OwnedFd::from).and_then(|fd| Ok((fd, Peek::new(stream)?)));
        let (socket, (peek, seen)) = match opened {
            Ok(opened) => opened,
            Err(e) => return dropped(e.to_string()),
        };
        let incoming = match accept(peek, &Limits::default(), &MonotonicClock::default()) {
            Ok(incoming) => incoming,
            Err(e) => return dropped(e.to_string()),
        };
        let name = match incoming.hello.vm_name.parse::<VmName>() {
            Ok(name) => name,
            Err(why) => {
                let _ = incoming.refuse(Refusal::Other(format!("the VM's name: {why}")));
                return dropped(why);
            }
        };
        let dir = self.home.vm(&name);
        let handed = Handed { socket, seen, handoff: incoming.hello.id().to_string() };
        if incoming.is_new() {
            Event::Receiving { vm: name.to_string(), peer: peer.clone() }.tell(self.output);
            return Some(self.new_handoff(&name, peer, handed));
        }
        match self.known_handoff(&dir, incoming, &handed) {
            Ok(()) => None,
            Err(e) => dropped(format!("{e:#}")),
        }
    }

    /// Starts a process that receives the VM, and waits for how it went.
    fn new_handoff(&self, name: &VmName, peer: String, handed: Handed) -> Event {
        let vm = name.to_string();
        match self.spawn(name, &handed) {
            Ok(details) => Event::Received { vm, peer, details },
            Err(failure) => {
                self.home.vm(name).remove_if_empty();
                Event::NotReceived { vm, peer, why: failure.message }
            }
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
        spawn::await_ready(child, &log)
    }

    fn child_arguments(&self, name: &VmName) -> Vec<OsString> {
        let mut words = vec![OsString::from("--home"), self.home.root().into()];
        words.extend((0..self.verbose).map(|_| "-v".into()));
        words.extend(["receive-process".into(), name.to_string().into()]);
        if let Some(tap) = &self.args.tap {
            words.extend(["--tap".into(), tap.into()]);
        }
        words.extend(["--min-free-mib".into(), self.args.min_free_mib.to_string().into()]);
        words.extend(self.args.jail.words());
        if let Some(workers) = self.args.workers {
            words.extend(["--workers".into(), workers.to_string().into()]);
        }
        words
    }

    /// A later link: for the process that receives, or answered from the record.
    fn known_handoff(
        &self,
        dir: &VmDir,
        incoming: Incoming<Peek>,
        handed: &Handed,
    ) -> anyhow::Result<()> {
        if matches!(dir.probe()?, Probe::Held { .. }) {
            let request = handed.envelope().request;
            let mut channel = client::ask(dir, request, Some(handed.socket.as_fd()))?;
            if let Ok(crate::control::Reply::Done) = client::next_reply(dir, &mut channel) {
                return Ok(());
            }
            // It does not receive this handoff (any more): its record has the answer.
            return Ok(incoming.answer(dir.record()?.as_ref())?);
        }
        if !dir.path().is_dir() {
            return Ok(incoming.answer(None)?);
        }
        // With the lock, so that no process starts between reading the record and answering.
        let _lock = dir.lock()?;
        let mut journal = dir.journal()?;
        Ok(incoming.settle(&mut journal, &Limits::default(), &MonotonicClock::default())?)
    }
}

/// A link on its way to another process.
struct Handed {
    socket: OwnedFd,
    seen: Seen,
    handoff: String,
}

impl Handed {
    fn envelope(&self) -> Envelope {
        let hello = hex::encode(self.seen.bytes());
        let request = Request::AdoptLink { handoff: self.handoff.clone(), hello };
        Envelope { version: VERSION, request }
    }
}
