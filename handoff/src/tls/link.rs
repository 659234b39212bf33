//! A link whose bytes are sealed, as the engine sees it: a [`Transport`] around another.

use std::{
    io::{self, IoSlice, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::{
    key::PeerKey,
    record::{
        HEADER_BYTES, MAX_EXPANSION_BYTES, MAX_PLAIN_BYTES, Opened, Opening, Sealing, Session,
        body_length,
    },
};
use crate::link::{LinkGauge, LinkReading, Transport, WRITE_TICK, is_tick};

/// Data that is sealed for one write of the link below.
const MAX_WRITE_BYTES: usize = 256 << 10;
/// What is read from the link below at once, besides the rest of a record.
const READ_BYTES: usize = 64 << 10;
/// The longest record.
const MAX_RECORD_BYTES: usize = HEADER_BYTES + MAX_PLAIN_BYTES + MAX_EXPANSION_BYTES;

/// A link between two cloudlets that know each other.
pub struct TlsLink<L> {
    link: L,
    session: Session,
    peer: PeerKey,
    overhead: Arc<Overhead>,
}

/// Bytes on the link that are not the engine's: the handshake's, and what is around data.
#[derive(Debug, Default)]
struct Overhead {
    sent: AtomicU64,
    received: AtomicU64,
}

impl<L> TlsLink<L> {
    /// Goes on over `link`, where the handshake of `session` left it.
    pub fn new(link: L, session: Session, peer: PeerKey) -> Self {
        Self { link, session, peer, overhead: Arc::default() }
    }

    /// Takes note of what the handshake sent and received, for who counts all bytes.
    pub(super) fn count(self, sent: u64, received: u64) -> Self {
        self.overhead.sent.fetch_add(sent, Relaxed);
        self.overhead.received.fetch_add(received, Relaxed);
        self
    }

    /// Who is at the other end.
    pub fn peer(&self) -> PeerKey {
        self.peer
    }

    /// The link below.
    pub fn link(&self) -> &L {
        &self.link
    }
}

impl<L: Transport> Transport for TlsLink<L> {
    type Tx = TlsTx<L::Tx>;
    type Rx = TlsRx<L::Rx>;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        let inner = self.link.gauge()?;
        Some(Box::new(TlsGauge { inner, overhead: Arc::clone(&self.overhead) }))
    }

    fn split(self) -> io::Result<(Self::Tx, Self::Rx)> {
        let (sealing, opening) = self.session.split().map_err(io::Error::other)?;
        let (tx, rx) = self.link.split()?;
        let tx = TlsTx::new(tx, sealing, Arc::clone(&self.overhead));
        Ok((tx, TlsRx::new(rx, opening, self.overhead)))
    }
}

/// Measures the link below, and what is around data.
struct TlsGauge {
    inner: Box<dyn LinkGauge>,
    overhead: Arc<Overhead>,
}

impl LinkGauge for TlsGauge {
    fn read(&self) -> Option<LinkReading> {
        self.inner.read()
    }

    fn limit_unsent(&self, bytes: u64) {
        self.inner.limit_unsent(bytes);
    }

    fn overhead_bytes(&self) -> (u64, u64) {
        (self.overhead.sent.load(Relaxed), self.overhead.received.load(Relaxed))
    }
}

/// The half that sends.
pub struct TlsTx<W> {
    inner: W,
    sealing: Sealing,
    records: Vec<u8>,
    /// Bytes of the records that the link below has taken.
    sent: usize,
    /// Bytes of data that are in the records; none once all of them were taken.
    taken: usize,
    broken: bool,
    overhead: Arc<Overhead>,
}

impl<W: Write> TlsTx<W> {
    fn new(inner: W, sealing: Sealing, overhead: Arc<Overhead>) -> Self {
        let records = Vec::new();
        Self { inner, sealing, records, sent: 0, taken: 0, broken: false, overhead }
    }

    /// Makes records of what the pieces hold, up to [`MAX_WRITE_BYTES`]; how much that was.
    fn seal(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.records.clear();
        let mut pieces = pieces.iter().map(|piece| &**piece).filter(|piece| !piece.is_empty());
        let (mut rest, mut taken) = (pieces.next(), 0);
        while rest.is_some() && taken < MAX_WRITE_BYTES {
            let start = self.records.len();
            self.records.extend_from_slice(&[0; HEADER_BYTES]);
            let mut room = MAX_PLAIN_BYTES;
            while let Some(piece) = rest.filter(|_| room > 0) {
                let (now, later) = piece.split_at(piece.len().min(room));
                self.records.extend_from_slice(now);
                room -= now.len();
                rest = if later.is_empty() { pieces.next() } else { Some(later) };
            }
            taken += MAX_PLAIN_BYTES - room;
            self.sealing.seal(&mut self.records, start)?;
        }
        Ok(taken)
    }
}

impl<W: Write> TlsTx<W> {
    /// Gives what is left of the records to the link below, for a tick or so.
    fn push(&mut self) -> io::Result<()> {
        let began = Instant::now();
        while let Some(rest) = self.records.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.inner.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => self.sent += taken,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.sent < self.records.len() && began.elapsed() > WRITE_TICK {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }
}

impl<W: Write> Write for TlsTx<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.taken == 0 {
            self.broken = true;
            (self.taken, self.sent) = (self.seal(pieces)?, 0);
        }
        // A record that went out in part can only be followed by the rest of it. Where the link has no
        // room now, what comes next is the same data again, and that is sealed already.
        self.broken = false;
        if let Err(e) = self.push() {
            self.broken = !is_tick(&e);
            return Err(e);
        }
        let taken = std::mem::take(&mut self.taken);
        self.overhead.sent.fetch_add((self.records.len() - taken) as u64, Relaxed);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The half that receives.
pub struct TlsRx<R> {
    inner: R,
    opening: Opening,
    buffer: Vec<u8>,
    /// Where opened data is in the buffer.
    data: std::ops::Range<usize>,
    /// Where records begin that are not opened.
    next: usize,
    /// Where what was read ends.
    end: usize,
    ended: bool,
    overhead: Arc<Overhead>,
}

impl<R: Read> TlsRx<R> {
    fn new(inner: R, opening: Opening, overhead: Arc<Overhead>) -> Self {
        let buffer = vec![0; MAX_RECORD_BYTES + READ_BYTES];
        Self { inner, opening, buffer, data: 0..0, next: 0, end: 0, ended: false, overhead }
    }

    /// Opens the next record, if it is there whole.
    fn open(&mut self) -> io::Result<bool> {
        let there = self.buffer.get_mut(self.next..self.end).unwrap_or_default();
        let Some((header, rest)) = there.split_first_chunk_mut::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let header = *header;
        let length = body_length(header)?;
        let Some(body) = rest.get_mut(..length) else { return Ok(false) };
        let start = self.next + HEADER_BYTES;
        match self.opening.open(header, body)? {
            Opened::Data(bytes) => self.data = start..start + bytes,
            Opened::End => self.ended = true,
        }
        self.next = start + length;
        let around = HEADER_BYTES + length - self.data.len();
        self.overhead.received.fetch_add(around as u64, Relaxed);
        Ok(true)
    }

    /// Reads more behind what is there, which is moved to the front first.
    fn fill(&mut self) -> io::Result<usize> {
        self.buffer.copy_within(self.next..self.end, 0);
        self.end -= self.next;
        self.next = 0;
        let count = self.inner.read(self.buffer.get_mut(self.end..).unwrap_or_default())?;
        self.end += count;
        Ok(count)
    }
}

impl<R: Read> Read for TlsRx<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.data.is_empty() || into.is_empty() {
                let data = self.buffer.get(self.data.clone()).unwrap_or_default();
                let count = data.len().min(into.len());
                if let (Some(into), Some(data)) = (into.get_mut(..count), data.get(..count)) {
                    into.copy_from_slice(data);
                }
                self.data.start += count;
                return Ok(count);
            }
            if self.ended || (!self.open()? && self.fill()? == 0) {
                return Ok(0);
            }
        }
    }
}

/// A link as both ends wanted it.
pub enum Guarded<L> {
    /// Anyone can read and alter it.
    Plain(L),
    /// TLS.
    Tls(TlsLink<L>),
}

impl<L> Guarded<L> {
    /// Who is at the other end, where that is certain.
    pub fn peer(&self) -> Option<PeerKey> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(link) => Some(link.peer()),
        }
    }

    /// The link below.
    pub fn link(&self) -> &L {
        match self {
            Self::Plain(link) => link,
            Self::Tls(link) => link.link(),
        }
    }
}

/// The half of a [`Guarded`] that sends.
#[allow(missing_docs)]
pub enum GuardedTx<W> {
    Plain(W),
    Tls(Box<TlsTx<W>>),
}

/// The half of a [`Guarded`] that receives.
#[allow(missing_docs)]
pub enum GuardedRx<R> {
    Plain(R),
    Tls(Box<TlsRx<R>>),
}

impl<L: Transport> Transport for Guarded<L> {
    type Tx = GuardedTx<L::Tx>;
    type Rx = GuardedRx<L::Rx>;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        match self {
            Self::Plain(link) => link.gauge(),
            Self::Tls(link) => link.gauge(),
        }
    }

    fn split(self) -> io::Result<(Self::Tx, Self::Rx)> {
        Ok(match self {
            Self::Plain(link) => {
                let (tx, rx) = link.split()?;
                (GuardedTx::Plain(tx), GuardedRx::Plain(rx))
            }
            Self::Tls(link) => {
                let (tx, rx) = link.split()?;
                (GuardedTx::Tls(Box::new(tx)), GuardedRx::Tls(Box::new(rx)))
            }
        })
    }
}

impl<W: Write> Write for GuardedTx<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tx) => tx.write(bytes),
            Self::Tls(tx) => tx.write(bytes),
        }
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(tx) => tx.write_vectored(pieces),
            Self::Tls(tx) => tx.write_vectored(pieces),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tx) => tx.flush(),
            Self::Tls(tx) => tx.flush(),
        }
    }
}

impl<R: Read> Read for GuardedRx<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(rx) => rx.read(into),
            Self::Tls(rx) => rx.read(into),
        }
    }
}
