//! The guest's serial console: kept in a bounded log, shown to whoever is attached.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::failure::{Exit, Failure};

/// The log is moved aside (to `console.log.1`) when it is longer.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// What somebody who attaches is shown of what was before.
const TAIL_BYTES: usize = 4096;
/// Pieces of output that wait for a slow viewer; more is dropped, because the guest does not wait.
const MAX_WAITING_PIECES: usize = 1024;
/// Output that waits for a slow disk; more is dropped.
const MAX_WAITING_BYTES: usize = 1 << 20;
/// Output of so long goes out as one piece: a serial port writes single bytes.
const GATHER: Duration = Duration::from_millis(5);

/// Takes what a user typed.
pub(crate) type Input = Box<dyn Fn(&[u8]) + Send + Sync>;

/// One VM's console. A thread of its own writes the log and feeds viewers, so that the vCPU that
/// prints pays for a copy only.
pub(crate) struct Console {
    waiting: Arc<Waiting>,
    state: Arc<Mutex<State>>,
    input: Mutex<Option<Input>>,
}

/// What the guest wrote and the thread has not taken.
#[derive(Default)]
struct Waiting {
    bytes: Mutex<Gathered>,
    changed: Condvar,
}

#[derive(Default)]
struct Gathered {
    bytes: Vec<u8>,
    /// Whether the thread is writing what it took.
    busy: bool,
    /// Whether the console is gone.
    closed: bool,
}

struct State {
    path: PathBuf,
    log: File,
    log_bytes: u64,
    tail: VecDeque<u8>,
    viewers: Vec<Sender<Vec<u8>>>,
}

/// Output of a guest is worth keeping even after some thread panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Appends to the log at `path`.
    pub(crate) fn new(path: &Path) -> Result<Self, Failure> {
        let failed = |e: io::Error| Failure::file("open", path, &e);
        let log = open_log(path).map_err(failed)?;
        let log_bytes = log.metadata().map_err(failed)?.len();
        let (tail, viewers) = (VecDeque::new(), Vec::new());
        let state = State { path: path.to_owned(), log, log_bytes, tail, viewers };
        let console = Self {
            waiting: Arc::default(),
            state: Arc::new(Mutex::new(state)),
            input: Mutex::new(None),
        };
        let (waiting, state) = (Arc::clone(&console.waiting), Arc::clone(&console.state));
        std::thread::Builder::new()
            .name("console-log".into())
            .spawn(move || waiting.drain(&state))
            .map_err(|e| Failure::new(Exit::Failed, "console", e, "raise the limit on threads"))?;
        Ok(console)
    }

    /// Where typed bytes go from now on.
    pub(crate) fn set_input(&self, input: Input) {
        *lock(&self.input) = Some(input);
    }

    /// Takes what the guest wrote. Waits for nobody.
    pub(crate) fn output(&self, bytes: &[u8]) {
        let mut gathered = lock(&self.waiting.bytes);
        let room = MAX_WAITING_BYTES.saturating_sub(gathered.bytes.len());
        let was_empty = gathered.bytes.is_empty();
        gathered.bytes.extend_from_slice(bytes.get(..room.min(bytes.len())).unwrap_or_default());
        if was_empty {
            self.waiting.changed.notify_all();
        }
    }

    /// Returns when all that the guest wrote is in the log and with its viewers.
    pub(crate) fn flush(&self) {
        let mut gathered = lock(&self.waiting.bytes);
        while gathered.busy || !gathered.bytes.is_empty() {
            gathered = self.waiting.changed.wait(gathered).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Types at the guest.
    pub(crate) fn type_in(&self, bytes: &[u8]) {
        if let Some(input) = &*lock(&self.input) {
            input(bytes);
        }
    }

    /// What the guest writes from now on, after the end of what it wrote before.
    pub(crate) fn view(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = bounded(MAX_WAITING_PIECES);
        let mut state = lock(&self.state);
        let tail: Vec<u8> = state.tail.iter().copied().collect();
        let _ = sender.try_send(tail);
        state.viewers.push(sender);
        receiver
    }

    /// Joins a user at `stream` to the console until either end closes. `typed` was read before.
    pub(crate) fn serve(&self, typed: &[u8], mut stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(None)?;
        let mut shown = stream.try_clone()?;
        let view = self.view();
        std::thread::Builder::new().name("console-out".into()).spawn(move || {
            for piece in view {
                if shown.write_all(&piece).is_err() {
                    break;
                }
            }
            let _ = shown.shutdown(std::net::Shutdown::Both);
        })?;
        self.type_in(typed);
        let mut buffer = [0; 256];
        loop {
            match stream.read(&mut buffer)? {
                0 => return stream.shutdown(std::net::Shutdown::Both),
                count => self.type_in(buffer.get(..count).unwrap_or_default()),
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        lock(&self.waiting.bytes).closed = true;
        self.waiting.changed.notify_all();
    }
}

/// The guest's end: what a machine writes its serial output to.
pub(crate) struct Sink(pub(crate) Arc<Console>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.output(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Waiting {
    /// The console's thread.
    fn drain(&self, state: &Mutex<State>) {
        loop {
            let mut gathered = lock(&self.bytes);
            while gathered.bytes.is_empty() {
                if gathered.closed {
                    return;
                }
                gathered = self.changed.wait(gathered).unwrap_or_else(PoisonError::into_inner);
            }
            gathered.busy = true;
            drop(gathered);
            std::thread::sleep(GATHER);
            let bytes = std::mem::take(&mut lock(&self.bytes).bytes);
            lock(state).take(&bytes);
            lock(&self.bytes).busy = false;
            self.changed.notify_all();
        }
    }
}

impl State {
    fn take(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let surplus = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
        let gone = |viewer: &Sender<Vec<u8>>| {
            matches!(viewer.try_send(bytes.to_vec()), Err(TrySendError::Disconnected(_)))
        };
        self.viewers.retain(|viewer| !gone(viewer));
        if let Err(e) = self.keep(bytes) {
            tracing::warn!("console log {}: {e}", self.path.display());
        }
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.log_bytes > MAX_LOG_BYTES {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
            self.log = open_log(&self.path)?;
            self.log_bytes = 0;
        }
        self.log_bytes += bytes.len() as u64;
        self.log.write_all(bytes)
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn viewers_see_the_tail_then_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let console = Console::new(&path).unwrap();
        console.output(&[b'x'; TAIL_BYTES]);
        console.output(b"before");
        console.flush();
        let view = console.view();
        b"after".iter().for_each(|byte| console.output(&[*byte]));
        console.flush();
        let tail = view.recv().unwrap();
        assert_eq!((tail.len(), tail.ends_with(b"xbefore")), (TAIL_BYTES, true));
        assert_eq!(view.try_iter().collect::<Vec<_>>().concat(), b"after");
        assert!(fs::read(&path).unwrap().ends_with(b"beforeafter"));
    }

    #[test]
    fn a_viewer_that_does_not_read_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(&dir.path().join("console.log")).unwrap();
        let view = console.view();
        let mut state = lock(&console.state);
        for _ in 0..MAX_WAITING_PIECES * 2 {
            state.take(b"y");
        }
        assert_eq!(view.len(), MAX_WAITING_PIECES);
        drop(view);
        state.take(b"z");
        assert!(state.viewers.is_empty());
    }

    #[test]
    fn output_is_bounded_while_it_waits() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(&dir.path().join("console.log")).unwrap();
        let state = lock(&console.state);
        for _ in 0..4 {
            console.output(&vec![b'x'; MAX_WAITING_BYTES]);
        }
        assert!(lock(&console.waiting.bytes).bytes.len() <= MAX_WAITING_BYTES);
        drop(state);
        console.flush();
    }

    #[test]
    fn an_attached_user_types_and_sees() {
        let dir = tempfile::tempdir().unwrap();
        let console = Arc::new(Console::new(&dir.path().join("console.log")).unwrap());
        let (typed, heard) = mpsc::channel();
        console.set_input(Box::new(move |bytes| typed.send(bytes.to_vec()).unwrap()));
        let (mut user, end) = UnixStream::pair().unwrap();
        let serving = Arc::clone(&console);
        let thread = std::thread::spawn(move || serving.serve(b"a", end));
        assert_eq!(heard.recv().unwrap(), b"a");
        user.write_all(b"b").unwrap();
        assert_eq!(heard.recv().unwrap(), b"b");
        console.output(b"login:");
        let mut shown = [0; 6];
        user.read_exact(&mut shown).unwrap();
        assert_eq!(&shown, b"login:");
        drop(user);
        let _ = thread.join().unwrap();
    }
}
