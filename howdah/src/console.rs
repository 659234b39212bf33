//! The guest's serial console: kept in a bounded log, shown to whoever is attached.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::failure::Failure;

/// The log is moved aside (to `console.log.1`) when it is longer.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// What somebody who attaches is shown of what was before.
const TAIL_BYTES: usize = 4096;
/// Pieces of output that wait for a slow viewer; more is dropped, because the guest does not wait.
const MAX_WAITING_PIECES: usize = 1024;

/// Takes what a user typed.
pub(crate) type Input = Box<dyn Fn(&[u8]) + Send + Sync>;

/// One VM's console.
pub(crate) struct Console {
    state: Mutex<State>,
}

struct State {
    path: PathBuf,
    log: File,
    log_bytes: u64,
    tail: VecDeque<u8>,
    viewers: Vec<Sender<Vec<u8>>>,
    input: Option<Input>,
}

impl Console {
    /// Appends to the log at `path`.
    pub(crate) fn new(path: &Path) -> Result<Self, Failure> {
        let failed = |e: io::Error| Failure::file("open", path, &e);
        let log = open_log(path).map_err(failed)?;
        let log_bytes = log.metadata().map_err(failed)?.len();
        let state = State {
            path: path.to_owned(),
            log,
            log_bytes,
            tail: VecDeque::new(),
            viewers: Vec::new(),
            input: None,
        };
        Ok(Self { state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Output of a guest is worth showing even after a viewer's thread panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where typed bytes go from now on.
    pub(crate) fn set_input(&self, input: Input) {
        self.state().input = Some(input);
    }

    /// Takes what the guest wrote. Never waits for a viewer.
    pub(crate) fn output(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.tail.extend(bytes);
        let surplus = state.tail.len().saturating_sub(TAIL_BYTES);
        state.tail.drain(..surplus);
        state
            .viewers
            .retain(|v| !matches!(v.try_send(bytes.to_vec()), Err(TrySendError::Disconnected(_))));
        if let Err(e) = state.keep(bytes) {
            tracing::warn!("console log {}: {e}", state.path.display());
        }
    }

    /// Types at the guest.
    pub(crate) fn type_in(&self, bytes: &[u8]) {
        if let Some(input) = &self.state().input {
            input(bytes);
        }
    }

    /// What the guest writes from now on, after the end of what it wrote before.
    pub(crate) fn view(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = bounded(MAX_WAITING_PIECES);
        let mut state = self.state();
        let tail: Vec<u8> = state.tail.iter().copied().collect();
        let _ = sender.try_send(tail);
        state.viewers.push(sender);
        receiver
    }

    /// Joins a user at `stream` to the console until either end closes. `typed` was read before.
    pub(crate) fn serve(&self, typed: Vec<u8>, stream: UnixStream) -> io::Result<()> {
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
        self.type_in(&typed);
        let mut stream = stream;
        let mut buffer = [0; 256];
        loop {
            match stream.read(&mut buffer)? {
                0 => return stream.shutdown(std::net::Shutdown::Both),
                count => self.type_in(buffer.get(..count).unwrap_or_default()),
            }
        }
    }
}

impl State {
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
    use std::sync::{Arc, mpsc};

    use super::*;

    #[test]
    fn viewers_see_the_tail_then_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let console = Console::new(&path).unwrap();
        console.output(&[b'x'; TAIL_BYTES]);
        console.output(b"before");
        let view = console.view();
        console.output(b"after");
        let tail = view.recv().unwrap();
        assert_eq!((tail.len(), tail.ends_with(b"xbefore")), (TAIL_BYTES, true));
        assert_eq!(view.recv().unwrap(), b"after");
        assert!(fs::read(&path).unwrap().ends_with(b"beforeafter"));
    }

    #[test]
    fn a_viewer_that_does_not_read_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(&dir.path().join("console.log")).unwrap();
        let view = console.view();
        for _ in 0..MAX_WAITING_PIECES * 2 {
            console.output(b"y");
        }
        assert_eq!(view.len(), MAX_WAITING_PIECES);
        drop(view);
        console.output(b"z");
        assert!(console.state().viewers.is_empty());
    }

    #[test]
    fn an_attached_user_types_and_sees() {
        let dir = tempfile::tempdir().unwrap();
        let console = Arc::new(Console::new(&dir.path().join("console.log")).unwrap());
        let (typed, heard) = mpsc::channel();
        console.set_input(Box::new(move |bytes| typed.send(bytes.to_vec()).unwrap()));
        let (mut user, end) = UnixStream::pair().unwrap();
        let serving = Arc::clone(&console);
        let thread = std::thread::spawn(move || serving.serve(b"a".to_vec(), end));
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
