//! Links whose first frame is read by one process and used by another.

use std::{
    io::{self, Read},
    net::TcpStream,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use handoff::{
    link::{LinkGauge, READ_TICK, Transport},
    tcp::{TcpLink, TcpRx, TcpTx, USER_TIMEOUT},
};

/// What was read from a link; nothing once that was forgotten.
#[derive(Clone, Debug)]
pub(super) struct Seen(Arc<Mutex<Option<Vec<u8>>>>);

impl Seen {
    /// A copy of it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }

    /// Forgets it, and all that is read from now on.
    pub(super) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A link of which only the first frame is read here. Dropping it leaves the connection to whoever
/// else has its descriptor.
#[derive(Debug)]
pub(super) struct Peek {
    stream: TcpStream,
    seen: Seen,
}

impl Peek {
    /// Looks at a connected stream; all that is read goes into the second part too.
    pub(super) fn new(stream: TcpStream) -> io::Result<(Self, Seen)> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(READ_TICK))?;
        stream.set_write_timeout(Some(USER_TIMEOUT))?;
        let seen = Seen(Arc::new(Mutex::new(Some(Vec::new()))));
        Ok((Self { stream, seen: seen.clone() }, seen))
    }
}

/// The receiving half of a [`Peek`].
#[derive(Debug)]
pub(super) struct PeekRx {
    stream: TcpStream,
    seen: Seen,
}

impl Read for PeekRx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(into)?;
        let mut seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = seen.as_mut() {
            seen.extend_from_slice(into.get(..count).unwrap_or_default());
        }
        Ok(count)
    }
}

impl Transport for Peek {
    type Tx = TcpStream;
    type Rx = PeekRx;

    fn split(self) -> io::Result<(TcpStream, PeekRx)> {
        let tx = self.stream.try_clone()?;
        Ok((tx, PeekRx { stream: self.stream, seen: self.seen }))
    }
}

/// A link that begins with what another process read from it.
#[derive(Debug)]
pub(super) struct Replayed {
    first: Vec<u8>,
    link: TcpLink,
}

impl Replayed {
    /// Goes on with a link of which `first` was read; the kernel gives it up after `timeout`.
    pub(super) fn new(first: Vec<u8>, socket: OwnedFd, timeout: Duration) -> io::Result<Self> {
        let link = TcpLink::with_timeout(TcpStream::from(socket), timeout)?;
        Ok(Self { first, link })
    }

    /// The other end, for people and the record.
    pub(super) fn peer(&self) -> String {
        self.link.peer_addr().map_or_else(|_| "an unknown address".into(), |a| a.to_string())
    }
}

/// The receiving half of a [`Replayed`].
#[derive(Debug)]
pub(super) struct ReplayedRx {
    first: io::Cursor<Vec<u8>>,
    rest: TcpRx,
}

impl Read for ReplayedRx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.first.read(into)? {
            0 => self.rest.read(into),
            count => Ok(count),
        }
    }
}

impl Transport for Replayed {
    type Tx = TcpTx;
    type Rx = ReplayedRx;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        self.link.gauge()
    }

    fn split(self) -> io::Result<(TcpTx, ReplayedRx)> {
        let (tx, rest) = self.link.split()?;
        Ok((tx, ReplayedRx { first: io::Cursor::new(self.first), rest }))
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpListener};

    use super::*;

    /// The first half of a stream is read by one owner of the socket, all of it by the next.
    #[test]
    fn a_link_changes_hands_without_losing_a_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.write_all(b"hello").unwrap();
        let stream = listener.accept().unwrap().0;
        let socket = OwnedFd::from(stream.try_clone().unwrap());
        let (peek, seen) = Peek::new(stream).unwrap();
        let (tx, mut rx) = peek.split().unwrap();
        let mut first = [0; 5];
        rx.read_exact(&mut first).unwrap();
        drop((tx, rx));
        peer.write_all(b" world").unwrap();
        let (mut tx, mut rx) =
            Replayed::new(seen.bytes(), socket, USER_TIMEOUT).unwrap().split().unwrap();
        let mut all = [0; 11];
        rx.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"hello world");
        tx.write_all(b"back").unwrap();
        let mut back = [0; 4];
        peer.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"back");
    }
}
