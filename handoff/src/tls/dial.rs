//! Calling a peer whose key is pinned.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    handshake::{self, Handshake, Speech},
    key::{Identity, PeerKey},
    link::TlsLink,
};
use crate::{
    Connect,
    tcp::{MonotonicClock, Shape, TcpConnect, TcpLink},
};

/// The handshake gets so long even if the connection took nearly all the time there was.
const LEAST_HANDSHAKE: Duration = Duration::from_secs(1);

/// Makes TLS links over TCP to one peer.
#[derive(Clone, Debug)]
pub struct TlsConnect {
    tcp: TcpConnect,
    identity: Arc<Identity>,
    peer: PeerKey,
    speech: Speech,
}

impl TlsConnect {
    /// To the cloudlet of key `peer` at `address` (`host:port`), and to no other.
    pub fn new(address: impl Into<String>, identity: Arc<Identity>, peer: PeerKey) -> Self {
        Self { tcp: TcpConnect::new(address), identity, peer, speech: Speech::Frames }
    }

    /// The same, to speak something else than frames.
    pub fn speaking(self, speech: Speech) -> Self {
        Self { speech, ..self }
    }

    /// Connects within `timeout`: what was agreed on, and the connection below, which goes on behind it.
    pub fn shake(&mut self, timeout: Duration) -> io::Result<(Handshake, TcpLink)> {
        let begun = Instant::now();
        let link = self.tcp.connect(timeout)?;
        let left = timeout.saturating_sub(begun.elapsed()).max(LEAST_HANDSHAKE);
        let (mut stream, clock) = (link.stream(), MonotonicClock::default());
        let (own, peer) = (&self.identity, self.peer);
        handshake::connect_for(self.speech, &mut stream, own, peer, left, &clock)
            .map(|done| (done, link))
            .map_err(io::Error::other)
    }

    /// From now on, links are given up when the peer's host has not answered for so long.
    pub fn give_up_after(&mut self, timeout: Duration) {
        self.tcp.give_up_after(timeout);
    }

    /// From now on, links are held to this rate and class.
    pub fn shape(&mut self, shape: Shape) {
        self.tcp.shape(shape);
    }
}

impl Connect for TlsConnect {
    type Link = TlsLink<TcpLink>;

    fn connect(&mut self, timeout: Duration) -> io::Result<Self::Link> {
        self.shake(timeout).map(|(done, link)| done.over(link))
    }
}
