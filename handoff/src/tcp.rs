//! Links over TCP.

use std::{
    io,
    mem::{MaybeUninit, size_of},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use crate::link::{Clock, Connect, LinkGauge, LinkReading, READ_TICK, Transport};

/// How long sent bytes may go unacknowledged before the kernel gives the connection up. Also
/// bounds every write.
pub const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time before the kernel asks whether the peer is there, and between asking again.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Unanswered questions after which it gives up.
const KEEPALIVE_PROBES: u32 = 3;
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
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TICK))?;
        stream.set_write_timeout(Some(USER_TIMEOUT))?;
        let user_timeout_ms = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
        let keepalive_s = u32::try_from(KEEPALIVE.as_secs()).unwrap_or(u32::MAX);
        set(&stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, keepalive_s)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, keepalive_s)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, user_timeout_ms)?;
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
        // The kernel reports a write that timed out as WouldBlock, which is not a reason to retry.
        self.0.write(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        })
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(pieces).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for TcpRx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
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

/// Connects to one address.
#[derive(Clone, Debug)]
pub struct TcpConnect {
    address: String,
}

impl TcpConnect {
    /// `address` is `host:port`; a name is looked up at each connection.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into() }
    }
}

impl Connect for TcpConnect {
    type Link = TcpLink;

    fn connect(&mut self, timeout: Duration) -> io::Result<TcpLink> {
        let start = Instant::now();
        let mut last = None;
        for address in self.address.to_socket_addrs()? {
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => return TcpLink::new(stream),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| {
            let what = format!("no address for {} within {timeout:?}", self.address);
            io::Error::new(io::ErrorKind::TimedOut, what)
        }))
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
