//! The VM process's end: accepts connections and turns each request into an event.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{
    Envelope, Reply, Request, VERSION,
    channel::{Channel, with_socket_path},
};
use crate::{
    console::Console,
    failure::{Exit, Failure},
    home::VmDir,
};

/// More connections than this at once are turned away: a VM has a handful of users.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take to say what it wants, or to take an answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process that ends waits for clients to take their answers.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// Replies that wait for a slow client; progress beyond this is dropped.
const MAX_WAITING_REPLIES: usize = 16;

/// A request with the way to answer it.
#[derive(Debug)]
pub(crate) struct Asked {
    /// What is asked.
    pub(crate) request: Request,
    /// The descriptor that came along.
    pub(crate) fd: Option<OwnedFd>,
    /// Where answers go. Dropping it ends the connection.
    pub(crate) answer: Answer,
}

/// The way back to a client, which may be gone or slow; neither holds the VM up.
#[derive(Clone, Debug)]
pub(crate) struct Answer(Sender<Reply>);

impl Answer {
    /// A way back that is read from the returned receiver.
    pub(crate) fn new() -> (Self, Receiver<Reply>) {
        let (sender, receiver) = bounded(MAX_WAITING_REPLIES);
        (Self(sender), receiver)
    }

    /// The last answer: waits for the client to take what is before it, but not forever.
    pub(crate) fn last(self, reply: impl Into<Reply>) {
        let _ = self.0.send_timeout(reply.into(), CLIENT_TIMEOUT);
    }

    /// An answer that may be dropped if the client is slow.
    pub(crate) fn passing(&self, reply: Reply) {
        let _ = self.0.try_send(reply);
    }
}

/// A control server that runs.
#[derive(Debug)]
pub(crate) struct Server {
    answering: Arc<AtomicUsize>,
}

impl Server {
    /// Waits until what was answered is on its way to the clients: a process that ends at once would
    /// take its last words with it.
    pub(crate) fn finish(&self) {
        let since = Instant::now();
        while self.answering.load(Ordering::Acquire) > 0 && since.elapsed() < FINISH_TIMEOUT {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Listens in `dir` and sends what is asked to `events`. The caller holds the VM's lock, so a
/// socket that is there is left over from a process that died.
pub(crate) fn start<E: Send + 'static>(
    dir: &VmDir,
    console: Arc<Console>,
    events: Sender<E>,
    event: fn(Asked) -> E,
) -> Result<Server, Failure> {
    let path = dir.path().join(VmDir::SOCKET);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Failure::file("replace", &path, &e));
        }
        _ => {}
    }
    let listener = with_socket_path(dir.path(), VmDir::SOCKET, |p| UnixListener::bind(p))
        .map_err(|e| Failure::file("listen on", &path, &e))?;
    let open = Arc::new(AtomicUsize::new(0));
    let server = Server { answering: Arc::default() };
    let answering = Arc::clone(&server.answering);
    let accept = move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, most likely: let some connections end.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let slot = Slot::take(&open);
            let (events, console) = (events.clone(), Arc::clone(&console));
            let answering = Arc::clone(&answering);
            let serve = move || {
                let to = To { console: &console, events: &events, event, answering: &answering };
                if let Err(e) = serve(stream, slot.is_some(), &to) {
                    tracing::debug!("control connection: {e}");
                }
                drop(slot);
            };
            let _ = std::thread::Builder::new().name("control".into()).spawn(serve);
        }
    };
    std::thread::Builder::new()
        .name("control-accept".into())
        .spawn(accept)
        .map(|_| server)
        .map_err(|e| Failure::new(Exit::Failed, "control", e, "raise the limit on threads"))
}

/// What a connection is served with.
struct To<'a, E> {
    console: &'a Console,
    events: &'a Sender<E>,
    event: fn(Asked) -> E,
    answering: &'a Arc<AtomicUsize>,
}

/// One of those that are counted, until dropped.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        let (slot, others) = Self::count(open);
        (others < MAX_CONNECTIONS).then_some(slot)
    }

    fn count(counter: &Arc<AtomicUsize>) -> (Self, usize) {
        (Self(Arc::clone(counter)), counter.fetch_add(1, Ordering::AcqRel))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve<E>(stream: UnixStream, admitted: bool, to: &To<E>) -> io::Result<()> {
    let mut channel = Channel::new(stream, Some(CLIENT_TIMEOUT))?;
    if !admitted {
        let why = format!("{MAX_CONNECTIONS} connections are open already");
        let busy = Failure::new(Exit::Conflict, "control", why, "close some and try again");
        return channel.send(&Reply::from(busy), None);
    }
    let envelope = match channel.receive::<Envelope>() {
        Ok(Some(envelope)) if envelope.version == VERSION => envelope,
        Ok(None) => return Ok(()),
        Ok(Some(Envelope { version, .. })) => {
            let why = format!("this process speaks version {VERSION}, the command {version}");
            let other =
                Failure::new(Exit::Failed, "control", why, "use the howdah that started it");
            return channel.send(&Reply::from(other), None);
        }
        Err(e) => {
            let foreign =
                Failure::new(Exit::Failed, "control", e, "use the howdah that started it");
            return channel.send(&Reply::from(foreign), None);
        }
    };
    if envelope.request == Request::Console {
        channel.send(&Reply::Attached, None)?;
        let (typed, stream) = channel.into_stream();
        return to.console.serve(&typed, stream);
    }
    let (answer, replies) = Answer::new();
    let asked = Asked { request: envelope.request, fd: channel.take_fd(), answer };
    let _answering = Slot::count(to.answering);
    if to.events.send((to.event)(asked)).is_err() {
        let ending = Failure::new(Exit::Conflict, "VM", "its process is ending", "look again");
        return channel.send(&Reply::from(ending), None);
    }
    for reply in replies {
        channel.send(&reply, None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::{Phase, Status, client},
        home::Home,
    };

    fn status() -> Status {
        Status {
            pid: 1,
            phase: Phase::Running,
            ownership: "owner".into(),
            epoch: 1,
            progress: None,
        }
    }

    /// A process that answers Status, streams a handoff and knows nothing else.
    fn serve_a_vm(dir: &VmDir) {
        let (events, asked) = crossbeam_channel::unbounded::<Asked>();
        let console = Arc::new(Console::new(&dir.console_log()).unwrap());
        start(dir, console, events, |asked| asked).unwrap();
        std::thread::spawn(move || {
            for Asked { request, fd, answer } in asked {
                match request {
                    Request::Status => answer.last(Reply::Status(status())),
                    Request::AdoptLink(_) if fd.is_some() => answer.last(Reply::Done),
                    Request::Pause => drop(answer),
                    _ => answer.last(Failure::new(Exit::Conflict, "x", "y", "z")),
                }
            }
        });
    }

    #[test]
    fn a_client_is_answered() {
        use std::os::fd::AsFd;
        let root = tempfile::tempdir().unwrap();
        let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        // A socket without a process is not a VM.
        std::fs::write(dir.path().join(VmDir::SOCKET), "").unwrap();
        assert_eq!(client::status(&dir).unwrap_err().exit, Exit::Conflict);
        let _lock = dir.lock().unwrap();
        assert_eq!(client::status(&dir).unwrap_err().exit, Exit::Failed);
        serve_a_vm(&dir);
        assert_eq!(client::status(&dir).unwrap(), status());
        let second = Duration::from_secs(1);
        let failure = client::call(&dir, Request::Resume, second).unwrap_err();
        assert_eq!(failure, Failure::new(Exit::Conflict, "x", "y", "z"));
        let ended = client::call(&dir, Request::Pause, second).unwrap_err();
        assert!(ended.message.contains("ended before it answered"), "{ended}");
        let file = std::fs::File::open(root.path()).unwrap();
        let adopt = Request::AdoptLink(crate::control::Adopted::default());
        let mut channel = client::ask(&dir, adopt, Some(file.as_fd())).unwrap();
        assert_eq!(client::next_reply(&dir, &mut channel).unwrap(), Reply::Done);
    }

    #[test]
    fn foreign_versions_and_junk_are_answered() {
        let root = tempfile::tempdir().unwrap();
        let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        serve_a_vm(&dir);
        for sent in
            ["{\"version\":99,\"do\":\"status\"}\n", "[]\n", "{\"version\":1,\"do\":\"fly\"}\n"]
        {
            use std::io::Write;
            let mut stream =
                with_socket_path(dir.path(), VmDir::SOCKET, |p| UnixStream::connect(p)).unwrap();
            stream.write_all(sent.as_bytes()).unwrap();
            let mut channel = Channel::new(stream, Some(CLIENT_TIMEOUT)).unwrap();
            let reply = channel.receive::<Reply>().unwrap().unwrap();
            assert!(matches!(reply, Reply::Failed(_)), "{sent}: {reply:?}");
        }
    }

    #[test]
    fn a_slow_client_never_blocks_progress() {
        let (answer, replies) = Answer::new();
        for _ in 0..MAX_WAITING_REPLIES * 2 {
            answer.passing(Reply::Done);
        }
        drop(answer);
        assert_eq!(replies.iter().count(), MAX_WAITING_REPLIES);
    }
}
