//! Makes a link that came in private, and tells whose it is; before a byte of what it wants is read.

use std::{
    io::{self, Read},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use handoff::{
    Refusal, Transport,
    link::READ_TICK,
    tcp::{MonotonicClock, TcpLink, USER_TIMEOUT},
    tls::{self, Handshake, Identity, PeerKey, Speech, TlsError},
    wire::{Frame, write_frame},
};

use super::{BookFile, Peer, identity};
use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName},
};

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
    /// It is known, and may not do that.
    #[error("{0}")]
    Forbidden(Failure),
    /// So many links of it, or of all peers, are served that there is no room for another.
    #[error("peer {0} has too many connections to the API, or all peers together have")]
    Crowd(VmName),
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

    /// Makes sure who calls over `stream` to hand a VM off or for a service. Whoever is not let in is told why, where that helps it.
    pub(crate) fn admit(&self, stream: &TcpStream) -> Result<(Peer, Handshake), Turned> {
        let done = match self.shake(stream, Speech::Frames) {
            Err(Turned::Tls(error @ TlsError::Plain)) => {
                let why = "links without TLS are not taken here (both ends need --plain for that)";
                refuse(stream, &mut &*stream, why);
                return Err(error.into());
            }
            done => done?,
        };
        let key = done.peer;
        if let Some(peer) = self.known(key)? {
            return Ok((peer, done));
        }
        // The halves close the connection when they are dropped, which is after the last word.
        let (mut tx, _rx) = done.over(TcpLink::new(stream.try_clone()?)?).split()?;
        let why = format!("your key {key} is not known here (`howdah peer add` there)");
        refuse(stream, &mut tx, &why);
        Err(Turned::Unknown(key))
    }

    /// Finds out who calls over `stream`, to speak like that; whether it may is not asked.
    pub(crate) fn shake(&self, stream: &TcpStream, speech: Speech) -> Result<Handshake, Turned> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TICK))?;
        stream.set_write_timeout(Some(USER_TIMEOUT))?;
        let (mut io, clock) = (stream, MonotonicClock::default());
        Ok(tls::accept_for(speech, &mut io, &self.identity, HANDSHAKE, &clock)?)
    }

    /// What is said of a key here.
    pub(crate) fn known(&self, key: PeerKey) -> Result<Option<Peer>, Failure> {
        Ok(self.book.read()?.by_key(key).cloned())
    }
}

/// Listens for peers; `flag` is what says where.
pub(crate) fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).map_err(|e| {
        let way_out = match e.kind() {
            io::ErrorKind::AddrInUse => {
                format!("another program listens there: choose another with {flag}")
            }
            io::ErrorKind::AddrNotAvailable => "no interface of this host has that address".into(),
            io::ErrorKind::PermissionDenied => {
                "ports below 1024 need root: choose a higher one".into()
            }
            _ => format!("choose another with {flag}"),
        };
        Failure::new(Exit::Failed, format!("listen on {address}"), e, way_out)
    })
}

/// Nobody of that key is known.
pub(crate) fn unknown_key(key: PeerKey) -> Failure {
    Failure::line(Exit::Conflict, &Turned::Unknown(key).to_string())
}

/// Says no in a frame.
fn refuse(stream: &TcpStream, tx: &mut impl io::Write, why: &str) {
    let mut frame = Vec::new();
    let no = Frame::Refuse(Refusal::Other(why.into()));
    if write_frame(&mut frame, &no, &mut Vec::new()).is_ok() {
        last_word(stream, tx, &frame);
    }
}

/// Says something for the last time, and waits until that was read: closing with bytes unread may destroy it on its way.
pub(crate) fn last_word(mut stream: &TcpStream, tx: &mut impl io::Write, word: &[u8]) {
    let told = tx.write_all(word);
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
