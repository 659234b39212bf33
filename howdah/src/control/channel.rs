//! One end of a control connection: bounded lines, and descriptors that come along.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// No message is longer: reports of long handoffs are the largest.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// A connection that carries messages.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    /// Bytes received and not yet taken as a message.
    pending: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Channel {
    /// Speaks over `stream`; neither direction blocks longer than `timeout`.
    pub(crate) fn new(stream: UnixStream, timeout: Option<Duration>) -> io::Result<Self> {
        let channel = Self { stream, pending: Vec::new(), fd: None };
        channel.set_timeout(timeout)?;
        Ok(channel)
    }

    /// Changes how long a send or receive may block; `None` is forever.
    pub(crate) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    /// Sends a message, with a descriptor if there is one.
    pub(crate) fn send<T: Serialize>(
        &mut self,
        message: &T,
        fd: Option<BorrowedFd>,
    ) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        if line.len() > MAX_MESSAGE_BYTES {
            return Err(io::Error::other("the message is too long"));
        }
        let sent = match fd {
            Some(fd) => self
                .stream
                .send_with_fd(line.as_slice(), fd.as_raw_fd())
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?,
            None => 0,
        };
        self.stream.write_all(line.get(sent..).unwrap_or_default())
    }

    /// Receives a message; `None` when the other end closed.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(line) = self.line()? else { return Ok(None) };
        let message = serde_json::from_slice(&line)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some(message))
    }

    /// The descriptor that came with what was received, if one did.
    pub(crate) fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fd.take()
    }

    /// Gives up the messages: what was received past the last one, and the bare stream.
    pub(crate) fn into_stream(self) -> (Vec<u8>, UnixStream) {
        (self.pending, self.stream)
    }

    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut searched = 0;
        loop {
            let fresh = self.pending.get(searched..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|&b| b == b'\n') {
                let rest = self.pending.split_off(searched + end + 1);
                let line = std::mem::replace(&mut self.pending, rest);
                return Ok(Some(line));
            }
            searched = self.pending.len();
            if searched > MAX_MESSAGE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
            }
            let mut buffer = [0; 16 << 10];
            let (count, file) = match self.stream.recv_with_fd(&mut buffer) {
                Ok(got) => got,
                Err(e) if e.errno() == libc::EINTR => continue,
                Err(e) => return Err(io::Error::from_raw_os_error(e.errno())),
            };
            if let Some(file) = file {
                self.fd = Some(adopt(file)?);
            }
            if count == 0 {
                // A line that was cut off means a peer that died: no message.
                return Ok(None);
            }
            self.pending.extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }
}

/// A received descriptor must not leak into processes started from here.
fn adopt(file: File) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(file.into())
}

/// Runs `f` on a path to `name` in `dir` that fits a socket address however long `dir` is.
pub(crate) fn with_socket_path<T>(
    dir: &Path,
    name: &str,
    f: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    // Socket paths end at 108 bytes; a descriptor of the directory makes any of them short.
    let opened = File::open(dir)?;
    let short = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
    f(Path::new(&short))
}

impl Read for Channel {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.pending.is_empty() {
            return self.stream.read(into);
        }
        let count = self.pending.as_slice().read(into)?;
        self.pending.drain(..count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        let timeout = Some(Duration::from_secs(5));
        (Channel::new(a, timeout).unwrap(), Channel::new(b, timeout).unwrap())
    }

    #[test]
    fn lines_come_apart_where_they_were_joined() {
        let (mut a, mut b) = pair();
        a.stream.write_all(b"1\n2\n3").unwrap();
        assert_eq!(b.receive::<u32>().unwrap(), Some(1));
        assert_eq!(b.receive::<u32>().unwrap(), Some(2));
        a.stream.write_all(b"4\n").unwrap();
        assert_eq!(b.receive::<u32>().unwrap(), Some(34));
        a.stream.write_all(b"cut off").unwrap();
        drop(a);
        assert_eq!(b.receive::<u32>().unwrap(), None);
    }

    #[test]
    fn a_descriptor_comes_along_with_a_long_message() {
        let (mut a, mut b) = pair();
        let (left, mut right) = UnixStream::pair().unwrap();
        let text = "x".repeat(300_000);
        let sender = std::thread::spawn(move || a.send(&text, Some(left.as_fd())).unwrap());
        assert_eq!(b.receive::<String>().unwrap().unwrap().len(), 300_000);
        sender.join().unwrap();
        let mut got = File::from(b.take_fd().unwrap());
        right.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        got.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        assert!(b.take_fd().is_none());
    }

    #[test]
    fn endless_and_foreign_messages_are_refused() {
        let (mut a, mut b) = pair();
        a.stream.write_all(b"{]\n").unwrap();
        assert_eq!(b.receive::<u32>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        let flood = std::thread::spawn(move || {
            let junk = vec![b'x'; MAX_MESSAGE_BYTES * 2];
            let _ = a.stream.write_all(&junk);
        });
        assert_eq!(b.receive::<u32>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(b);
        flood.join().unwrap();
    }

    #[test]
    fn long_directories_are_no_obstacle() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("d".repeat(200));
        std::fs::create_dir(&dir).unwrap();
        let listener =
            with_socket_path(&dir, "s", |p| std::os::unix::net::UnixListener::bind(p)).unwrap();
        with_socket_path(&dir, "s", |p| UnixStream::connect(p)).unwrap();
        listener.accept().unwrap();
    }
}
