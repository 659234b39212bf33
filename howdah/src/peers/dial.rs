//! Links to a peer, as an endpoint says.

use std::{io, sync::Arc, time::Duration};

use handoff::{
    Connect,
    tcp::{Shape, TcpConnect, TcpLink},
    tls::{Guarded, Identity, TlsConnect},
};

use super::{Book, Endpoint, identity};
use crate::{
    failure::{Exit, Failure},
    home::Home,
};

/// Makes links to one peer.
#[derive(Debug)]
pub(crate) enum Dial {
    /// Without TLS: whoever answers.
    Plain(TcpConnect),
    /// To one key only, at the first of these addresses where it answers.
    Tls(Vec<TlsConnect>),
}

impl Dial {
    /// To an endpoint; without `identity` only to one without a key.
    pub(crate) fn to(
        endpoint: &Endpoint,
        identity: Option<Arc<Identity>>,
    ) -> Result<Self, Failure> {
        let address = endpoint.address.clone();
        match (endpoint.key, identity) {
            (None, _) => Ok(Self::Plain(TcpConnect::new(address))),
            (Some(key), Some(own)) => Ok(Self::Tls(vec![TlsConnect::new(address, own, key)])),
            (Some(_), None) => {
                let why = "this process was not given the key of its cloudlet";
                let way_out = "use the howdah that started it";
                Err(Failure::new(Exit::Failed, format!("peer {endpoint}"), why, way_out))
            }
        }
    }

    /// To an endpoint, as this cloudlet.
    pub(crate) fn from(home: &Home, endpoint: &Endpoint) -> Result<Self, Failure> {
        let own = endpoint.key.map(|_| identity(home)).transpose()?;
        Self::to(endpoint, own)
    }

    /// To the peer of an ownership record. A source is known by the address that it called from, where it
    /// does not listen: where the book says that it listens is tried first.
    pub(crate) fn back_to(home: &Home, book: &Book, peer: &str) -> Result<Self, Failure> {
        let endpoint = Endpoint::recorded(peer)?;
        let Some(key) = endpoint.key else { return Self::to(&endpoint, None) };
        let identity = identity(home)?;
        let known = book.by_key(key).and_then(|peer| peer.address.clone());
        let mut addresses: Vec<String> = known.into_iter().chain([endpoint.address]).collect();
        addresses.dedup();
        let to = |address| TlsConnect::new(address, Arc::clone(&identity), key);
        Ok(Self::Tls(addresses.into_iter().map(to).collect()))
    }
}

impl Dial {
    /// Links are given up when the peer's host has not answered for so long.
    pub(crate) fn give_up_after(&mut self, timeout: Duration) {
        match self {
            Self::Plain(connect) => connect.give_up_after(timeout),
            Self::Tls(peers) => peers.iter_mut().for_each(|peer| peer.give_up_after(timeout)),
        }
    }

    /// Links are held to this rate and class.
    pub(crate) fn shape(&mut self, shape: Shape) {
        match self {
            Self::Plain(connect) => connect.shape(shape),
            Self::Tls(peers) => peers.iter_mut().for_each(|peer| peer.shape(shape)),
        }
    }
}

impl Connect for Dial {
    type Link = Guarded<TcpLink>;

    fn connect(&mut self, timeout: Duration) -> io::Result<Self::Link> {
        let peers = match self {
            Self::Plain(connect) => return connect.connect(timeout).map(Guarded::Plain),
            Self::Tls(peers) => peers,
        };
        let each = timeout / u32::try_from(peers.len().max(1)).unwrap_or(u32::MAX);
        let mut failed = io::ErrorKind::AddrNotAvailable.into();
        for peer in peers {
            match peer.connect(each) {
                Ok(link) => return Ok(Guarded::Tls(link)),
                Err(e) => failed = e,
            }
        }
        Err(failed)
    }
}
