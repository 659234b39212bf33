//! A TLS link as async code sees it.
//!
//! Its halves seal and open records by themselves and say `WouldBlock` where the connection has nothing for
//! them ([`handoff::tls`]); here that becomes waiting.

use std::{
    io::{self, Read, Write},
    os::fd::AsRawFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use handoff::{
    Transport,
    tls::{Handshake, TlsRx, TlsTx},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// What is taken of a writer before the connection has taken it.
const MAX_HELD_BYTES: usize = 64 << 10;

/// A link that was made private, and whose other end is known.
pub(crate) struct Stream {
    tcp: Arc<TcpStream>,
    rx: TlsRx<Half>,
    tx: TlsTx<Half>,
    /// What a writer was told is taken, and the connection has not taken yet. It is offered to `tx` again
    /// as it is until that takes it: what is sealed cannot become something else.
    held: Vec<u8>,
}

impl Stream {
    /// Goes on where the handshake left a connection. To be called where tokio runs.
    pub(crate) fn new(tcp: std::net::TcpStream, done: Handshake) -> io::Result<Self> {
        tcp.set_nonblocking(true)?;
        let tcp = Arc::new(TcpStream::from_std(tcp)?);
        let (tx, rx) = done.over(Both(Arc::clone(&tcp))).split()?;
        Ok(Self { tcp, rx, tx, held: Vec::new() })
    }

    /// Gives what is held to the connection.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            match self.tx.write(&self.held) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => drop(self.held.drain(..count)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.tcp.poll_write_ready(cx))?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.rx.read(into.initialize_unfilled()) {
                Ok(count) => {
                    into.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    ready!(this.tcp.poll_read_ready(cx))?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        let taken = bytes.get(..MAX_HELD_BYTES).unwrap_or(bytes);
        this.held.extend_from_slice(taken);
        // What does not go out now does before the next write, or at the flush.
        match this.poll_drain(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            _ => Poll::Ready(Ok(taken.len())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_drain(cx)
    }

    /// HTTP says itself how long an answer is, so that the end of the connection need not be sealed.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        let closed =
            nix::sys::socket::shutdown(this.tcp.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        match closed {
            // The other end may have been first.
            Ok(()) | Err(nix::errno::Errno::ENOTCONN) => Poll::Ready(Ok(())),
            Err(e) => Poll::Ready(Err(e.into())),
        }
    }
}

/// The connection, to be split.
struct Both(Arc<TcpStream>);

/// One direction of it: says `WouldBlock` where there is nothing to do, and tokio wakes whoever waits.
struct Half(Arc<TcpStream>);

impl Transport for Both {
    type Tx = Half;
    type Rx = Half;

    fn split(self) -> io::Result<(Half, Half)> {
        Ok((Half(Arc::clone(&self.0)), Half(self.0)))
    }
}

impl Read for Half {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(into)
    }
}

impl Write for Half {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
