//! Who comes in. In this order, each step within bounds: the link is made private and who calls is
//! known ([`Gate`]), what the caller wants is read. Nothing of a VM is looked at before.

use std::{
    fmt, io,
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
};

use handoff::{
    engine::{AcceptError, Greeting, Incoming, IncomingCall, Limits, greet},
    tcp::MonotonicClock,
    tls::{Guarded, PeerKey},
};

use super::link::{Peek, Seen};
use crate::{
    control::{Adopted, AdoptedTls, Envelope, Request, VERSION},
    failure::Failure,
    home::Home,
    peers::{Endpoint, Gate, Peer, Turned},
};

/// What a TLS link begins with.
const TLS_RECORD: &[u8] = &[22, 3];

/// What callers are let in by.
pub(super) struct Door {
    /// None: anyone, without TLS.
    gate: Option<Gate>,
}

/// Somebody at the other end of a link.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    address: SocketAddr,
    /// Who it is; nobody in particular on a plain link.
    peer: Option<Peer>,
}

/// A caller that said what it wants.
pub(super) struct Greeted {
    pub(super) caller: Caller,
    pub(super) incoming: Incoming<Guarded<Peek>>,
    pub(super) handed: Handed,
}

/// Somebody who came in.
pub(super) enum Guest {
    /// It brings a VM, or asks about one.
    Handoff(Box<Greeted>),
    /// It wants something else.
    Call(Box<Called>),
}

/// A caller that wants something else than to hand a VM off.
pub(super) struct Called {
    pub(super) caller: Caller,
    pub(super) incoming: IncomingCall<Guarded<Peek>>,
    pub(super) socket: OwnedFd,
}

/// Why a link came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Dropped {
    /// Its caller was not let in.
    #[error(transparent)]
    Turned(#[from] Turned),
    /// It speaks TLS, and this listener does not.
    #[error("the peer speaks TLS, and this listener was started with --plain")]
    NotPlain,
    /// It said nothing of use.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// It could not be used.
    #[error("cannot use the link: {0}")]
    Io(#[from] io::Error),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.peer {
            Some(peer) => write!(f, "{} ({})", peer.name, self.address),
            None => self.address.fmt(f),
        }
    }
}

impl Caller {
    /// What is known of it.
    pub(super) fn peer(&self) -> Option<&Peer> {
        self.peer.as_ref()
    }

    /// Its key; none of one that is nobody in particular.
    pub(super) fn key(&self) -> Option<PeerKey> {
        self.peer.as_ref().map(|peer| peer.key)
    }

    /// Whether it is the other side of a handoff with the peer of a record.
    pub(super) fn is(&self, recorded: &str) -> bool {
        recorded.parse::<Endpoint>().is_ok_and(|endpoint| endpoint.is(self.key()))
    }
}

impl Door {
    /// For a cloudlet's peers, or with `plain` for anyone.
    pub(super) fn new(home: &Home, plain: bool) -> Result<Self, Failure> {
        Ok(Self { gate: if plain { None } else { Some(Gate::of(home)?) } })
    }

    /// This cloudlet's key, if it shows one.
    pub(super) fn key(&self) -> Option<PeerKey> {
        self.gate.as_ref().map(Gate::key)
    }

    /// Whether nobody can come in.
    pub(super) fn is_shut(&self) -> Result<bool, Failure> {
        self.gate.as_ref().map_or(Ok(false), Gate::is_shut)
    }

    /// Lets a caller in and reads what it wants.
    pub(super) fn greet(&self, stream: TcpStream, address: SocketAddr) -> Result<Guest, Dropped> {
        let socket = OwnedFd::from(stream.try_clone()?);
        let admitted = self.gate.as_ref().map(|gate| gate.admit(&stream)).transpose()?;
        let (peek, seen) = Peek::new(stream)?;
        let (peer, link, tls) = match admitted {
            None => (None, Guarded::Plain(peek), None),
            Some((peer, done)) => {
                let session = hex::encode(&*done.session.to_bytes());
                let tls = AdoptedTls { peer: peer.clone(), session };
                (Some(peer), Guarded::Tls(done.over(peek)), Some(tls))
            }
        };
        let caller = Caller { address, peer };
        let incoming = match greet(link, &Limits::default(), &MonotonicClock::default()) {
            Err(_) if tls.is_none() && seen.bytes().starts_with(TLS_RECORD) => {
                return Err(Dropped::NotPlain);
            }
            Ok(Greeting::Call(incoming)) => {
                // Nobody else will read this link from its begin.
                seen.forget();
                return Ok(Guest::Call(Box::new(Called { caller, incoming, socket })));
            }
            Ok(Greeting::Handoff(incoming)) => incoming,
            Err(error) => return Err(error.into()),
        };
        let handoff = incoming.hello.id().to_string();
        let handed = Handed { socket, seen, handoff, tls };
        Ok(Guest::Handoff(Box::new(Greeted { caller, incoming, handed })))
    }
}

/// A link on its way to another process.
pub(super) struct Handed {
    pub(super) socket: OwnedFd,
    seen: Seen,
    handoff: String,
    tls: Option<AdoptedTls>,
}

impl Handed {
    /// The handoff, in hex.
    pub(super) fn id(&self) -> &str {
        &self.handoff
    }

    /// What asks a process whether the link is its.
    pub(super) fn question(&self) -> Request {
        Request::Expects { handoff: self.handoff.clone() }
    }

    /// What goes with the link.
    pub(super) fn request(&self) -> Request {
        Request::AdoptLink(Adopted {
            handoff: self.handoff.clone(),
            hello: hex::encode(self.seen.bytes()),
            tls: self.tls.clone(),
        })
    }

    /// The same, for a process that was just started.
    pub(super) fn envelope(&self) -> Envelope {
        Envelope { version: VERSION, request: self.request() }
    }
}
