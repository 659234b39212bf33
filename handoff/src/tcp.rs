//! Links over TCP.

mod shape;

use std::{
    io,
    mem::{MaybeUninit, size_of},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

pub use shape::{Dscp, LEAST_RATE_BYTES_PER_S, Shape};

use crate::link::{Clock, Connect, LinkGauge, LinkReading, READ_TICK, Transport, WRITE_TICK};

/// How long sent bytes may go unacknowledged before the kernel gives the connection up, unless it
/// is told otherwise.
pub const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Questions to a silent peer within that time, ...
const KEEPALIVE_PROBES: u32 = 3;
/// ... the first after half of it.
const KEEPALIVE_SHARE: u32 = 2;
/// Bytes that wait in the kernel unsent, until the link is known and
/// [`LinkGauge::limit_unsent`] says otherwise.
const NOTSENT_LOWAT_BYTES: u32 = 256 << 10;

/// One TCP connection.
#[derive(Debug)]
pub struct TcpLink {
    stream: TcpStream,
}

impl TcpLink {
    /// Sets up a connected stream.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Self::with_timeout(stream, USER_TIMEOUT)
    }

    /// Sets up a connected stream, which the kernel gives up when the peer's has not answered for
    /// so long.
    pub fn with_timeout(stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TICK))?;
        stream.set_write_timeout(Some(WRITE_TICK))?;
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let whole_s = |time: Duration| u32::try_from(time.as_secs().max(1)).unwrap_or(u32::MAX);
        let idle = timeout / KEEPALIVE_SHARE;
        set(&stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, whole_s(idle))?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, whole_s(idle / KEEPALIVE_PROBES))?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, timeout_ms)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)?;
        Ok(Self { stream })
    }

    /// The connection itself, for what comes before the first frame.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The other end.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }
}

fn set(stream: &TcpStream, level: i32, option: i32, value: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call, and the pointer and length describe `value`,
    // an integer, which is what each option passed to this function takes.
    let status = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The half of a link that sends. Dropping it closes the connection, the other half's too.
#[derive(Debug)]
pub struct TcpTx(TcpStream);

/// The half of a link that receives. Dropping it closes the connection, the other half's too.
#[derive(Debug)]
pub struct TcpRx(TcpStream);

impl io::Write for TcpTx {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // WouldBlock, once the tick is over. A link that the kernel gave up says ETIMEDOUT, which
        // must not look like that.
        self.0.write(bytes).map_err(given_up)
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(pieces).map_err(given_up)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for TcpRx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into).map_err(given_up)
    }
}

/// The kernel gave the connection up: not the end of a tick, which has the same kind.
fn given_up(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ETIMEDOUT) => {
            io::Error::new(io::ErrorKind::ConnectionAborted, "the peer's host does not answer")
        }
        _ => error,
    }
}

impl Drop for TcpTx {
    fn drop(&mut self) {
        // What was written still goes out; a connection that is gone already needs no closing.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Drop for TcpRx {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Transport for TcpLink {
    type Tx = TcpTx;
    type Rx = TcpRx;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        self.stream.try_clone().ok().map(|stream| Box::new(TcpGauge(stream)) as Box<dyn LinkGauge>)
    }

    fn split(self) -> io::Result<(TcpTx, TcpRx)> {
        let second = self.stream.try_clone()?;
        Ok((TcpTx(self.stream), TcpRx(second)))
    }
}

struct TcpGauge(TcpStream);

impl LinkGauge for TcpGauge {
    fn read(&self) -> Option<LinkReading> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the descriptor is open for the call; pointer and length describe `info`, which
        // the kernel fills up to that length.
        let status = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if status != 0 {
            return None;
        }
        // SAFETY: `tcp_info` is made of integers only, and every byte was zeroed before the kernel
        // wrote, so the value is valid whatever length the kernel filled.
        let info = unsafe { info.assume_init() };
        Some(LinkReading {
            rtt: Duration::from_micros(info.tcpi_rtt.into()),
            min_rtt: Duration::from_micros(info.tcpi_min_rtt.into()),
            // The kernel counts the connecting side's SYN as one byte (RFC 4898).
            delivered_bytes: info.tcpi_bytes_acked.saturating_sub(1),
            unacked_bytes: u64::from(info.tcpi_unacked) * u64::from(info.tcpi_snd_mss)
                + u64::from(info.tcpi_notsent_bytes),
            busy: Duration::from_micros(info.tcpi_busy_time),
            delivery_bytes_per_s: info.tcpi_delivery_rate,
        })
    }

    fn limit_unsent(&self, bytes: u64) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // Without it more waits in the kernel, and nothing else.
        let _ = set(&self.0, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes);
    }
}

/// After so many attempts in vain a name is looked up again.
const LOOK_UP_EVERY: u32 = 4;

/// Connects to one peer, again and again.
///
/// Each connection comes from whatever address this host has then. The address that worked is tried
/// first: the name server may be behind the same broken link as the peer.
#[derive(Clone, Debug)]
pub struct TcpConnect {
    address: String,
    timeout: Duration,
    shape: Shape,
    worked: Option<SocketAddr>,
    /// Attempts in vain since it worked.
    misses: u32,
}

impl TcpConnect {
    /// `address` is `host:port`.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            timeout: USER_TIMEOUT,
            shape: Shape::default(),
            worked: None,
            misses: 0,
        }
    }

    /// From now on, links are given up when the peer's host has not answered for so long.
    pub fn give_up_after(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// From now on, links are held to this rate and class, from their first byte.
    pub fn shape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    fn candidates(&self) -> io::Result<Vec<SocketAddr>> {
        match self.worked {
            Some(address) if !(self.misses + 1).is_multiple_of(LOOK_UP_EVERY) => Ok(vec![address]),
            _ => Ok(self.address.to_socket_addrs()?.collect()),
        }
    }

    fn try_each(&self, timeout: Duration) -> io::Result<(SocketAddr, TcpStream)> {
        let start = Instant::now();
        let addresses = self.candidates()?;
        let mut last = None;
        for (tried, address) in addresses.iter().enumerate() {
            // One that does not answer leaves time for the others.
            let others = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let share = timeout.saturating_sub(start.elapsed()) / others;
            if share.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(address, share) {
                Ok(stream) => return Ok((*address, stream)),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| {
            let what = format!("no address for {} within {timeout:?}", self.address);
            io::Error::new(io::ErrorKind::TimedOut, what)
        }))
    }
}

impl Connect for TcpConnect {
    type Link = TcpLink;

    fn connect(&mut self, timeout: Duration) -> io::Result<TcpLink> {
        match self.try_each(timeout) {
            Ok((address, stream)) => {
                (self.worked, self.misses) = (Some(address), 0);
                let link = TcpLink::with_timeout(stream, self.timeout)?;
                self.shape.apply(link.stream())?;
                Ok(link)
            }
            Err(e) => {
                self.misses = self.misses.wrapping_add(1);
                Err(e)
            }
        }
    }
}

/// Takes the next connection of a listener.
pub fn accept_tcp(listener: &TcpListener) -> io::Result<TcpLink> {
    TcpLink::new(listener.accept()?.0)
}

/// The system's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    origin: Instant,
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn bytes_cross_and_are_measured() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut connect = TcpConnect::new(address);
        let near = connect.connect(Duration::from_secs(5)).unwrap();
        let (mut tx, _rx) = accept_tcp(&listener).unwrap().split().unwrap();
        let gauge = near.gauge().unwrap();
        let (mut near_tx, mut near_rx) = near.split().unwrap();

        let mut into = [0; 4];
        let idle = near_rx.read(&mut into).unwrap_err();
        assert!(matches!(idle.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
        near_tx.write_all(&[7; 1000]).unwrap();
        tx.write_all(b"back").unwrap();
        near_rx.read_exact(&mut into).unwrap();
        assert_eq!(&into, b"back");
        let reading = gauge.read().unwrap();
        assert!(reading.delivered_bytes <= 1000, "{reading:?}");
        assert!(reading.busy < Duration::from_secs(5), "{reading:?}");
        drop(tx);
        assert_eq!(near_rx.read(&mut into).unwrap(), 0);
    }

    #[test]
    fn nobody_there_is_an_error_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        TcpConnect::new(address).connect(Duration::from_secs(1)).unwrap_err();
    }
}
