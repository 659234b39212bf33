//! The engine's view of a link and of time.

use std::{io, time::Duration};

/// A reliable, ordered byte stream to the peer, as two halves used by two threads.
pub trait Transport: Send {
    /// The half that sends. A write that finds no room returns `WouldBlock` or `TimedOut` after at
    /// most [`WRITE_TICK`], and has then taken nothing: its owner looks at clocks and cancellation,
    /// and writes the same again. Whether the link is dead is for its owner to say.
    type Tx: io::Write + Send;
    /// The half that receives. A read returns `TimedOut` or `WouldBlock` after at most
    /// [`READ_TICK`] without data, so that its owner can look at clocks and cancellation.
    type Rx: io::Read + Send;

    /// What measures the link, if the transport can.
    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        None
    }

    /// Splits the link. Dropping either half closes the link for the peer.
    fn split(self) -> io::Result<(Self::Tx, Self::Rx)>;
}

/// Measures a link while both halves are in use elsewhere.
pub trait LinkGauge: Send {
    /// A reading, or `None` once the link is gone.
    fn read(&self) -> Option<LinkReading>;

    /// Asks the transport to take no more than about so many bytes that it does not send yet: what
    /// waits there can no longer be changed. It may ignore that.
    fn limit_unsent(&self, _bytes: u64) {}

    /// Bytes that the transport itself has sent and received on the link, besides what it was given
    /// and gave: those of a handshake, and what encryption adds.
    fn overhead_bytes(&self) -> (u64, u64) {
        (0, 0)
    }
}

/// What a transport knows of its link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkReading {
    /// The smoothed round-trip time.
    pub rtt: Duration,
    /// The smallest round-trip time seen.
    pub min_rtt: Duration,
    /// Payload bytes that the peer's transport has acknowledged.
    pub delivered_bytes: u64,
    /// Bytes handed to the transport and not acknowledged.
    pub unacked_bytes: u64,
    /// For how long there were any: the time in which the link was the one to wait for.
    pub busy: Duration,
    /// The transport's estimate of the rate at which the link delivers, in bytes a second; zero if it
    /// has none.
    pub delivery_bytes_per_s: u64,
}

/// The longest a receiving half may block.
pub const READ_TICK: Duration = Duration::from_millis(100);
/// The longest a sending half may block.
pub const WRITE_TICK: Duration = Duration::from_millis(100);

/// Whether an error of a link's half only says that there was nothing to do within its tick.
pub fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Makes links to one peer; called again when a link broke.
pub trait Connect {
    /// The links it makes.
    type Link: Transport;

    /// Connects within `timeout`.
    fn connect(&mut self, timeout: Duration) -> io::Result<Self::Link>;
}

/// Monotonic time. The engine has no other.
pub trait Clock: Send + Sync {
    /// Time since an arbitrary origin.
    fn now(&self) -> Duration;
}
