//! Makes a link that came in private, and tells whose it is; before a byte of what it wants is read.

use std::{
    io::{self, Read},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use handoff::{
    Refusal, Transport,
    link::READ_TICK,
    tcp::{MonotonicClock, TcpLink, USER_TIMEOUT},
    tls::{self, Handshake, Identity, PeerKey, TlsError},
    wire::{Frame, write_frame},
};

use super::{BookFile, Peer, identity};
use crate::{failure::Failure, home::Home};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long, and for how many bytes, a caller that was refused is listened to, so that what it was
/// told reaches it.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// Lets peers in.
pub(crate) struct Gate {
    identity: Arc<Identity>,
    book: BookFile,
}

/// Why a caller was not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Turned {
    /// It is not known.
    #[error("{0} is not known here; `howdah peer add NAME {0}` lets it in")]
    Unknown(PeerKey),
    /// No TLS link came about.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The link could not be used.
    #[error("cannot use the link: {0}")]
    Io(#[from] io::Error),
    /// The peers that are known cannot be read.
    #[error(transparent)]
    Book(#[from] Failure),
}

impl Gate {
    /// That of a cloudlet.
    pub(crate) fn of(home: &Home) -> Result<Self, Failure> {
        Ok(Self { identity: identity(home)?, book: BookFile::of(home) })
    }

    /// This cloudlet's key.
    pub(crate) fn key(&self) -> PeerKey {
        self.identity.key()
    }

    /// Whether nobody can come in.
    pub(crate) fn is_shut(&self) -> Result<bool, Failure> {
        Ok(self.book.read()?.peers().is_empty())
    }

    /// Makes sure who calls over `stream`. Whoever is not let in is told why, where that helps it.
    pub(crate) fn admit(&self, stream: &TcpStream) -> Result<(Peer, Handshake), Turned> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TICK))?;
        stream.set_write_timeout(Some(USER_TIMEOUT))?;
        let mut io = stream;
        let done = match tls::accept(&mut io, &self.identity, HANDSHAKE, &MonotonicClock::default())
        {
            Err(error @ TlsError::Plain) => {
                let why = "links without TLS are not taken here (both ends need --plain for that)";
                refuse(stream, &mut io, why);
                return Err(error.into());
            }
            done => done?,
        };
        let key = done.peer;
        if let Some(peer) = self.book.read()?.by_key(key) {
            return Ok((peer.clone(), done));
        }
        // The halves close the connection when they are dropped, which is after the last word.
        let (mut tx, _rx) = done.over(TcpLink::new(stream.try_clone()?)?).split()?;
        let why = format!("your key {key} is not known here (`howdah peer add` there)");
        refuse(stream, &mut tx, &why);
        Err(Turned::Unknown(key))
    }
}

/// Says no, and waits until that was read: closing with bytes unread may destroy it on its way.
fn refuse(mut stream: &TcpStream, tx: &mut impl io::Write, why: &str) {
    let told = write_frame(tx, &Frame::Refuse(Refusal::Other(why.into())), &mut Vec::new());
    if told.is_err() || stream.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let (begun, mut heard, mut scratch) = (Instant::now(), 0, vec![0; 16 << 10]);
    while begun.elapsed() < LINGER && heard < LINGER_BYTES {
        match stream.read(&mut scratch) {
            Ok(0) => return,
            Ok(count) => heard += count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
