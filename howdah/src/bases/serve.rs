//! A caller that brings a base or wants one.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    sync::atomic::AtomicBool,
};

use base_sync::{Link, Served, Taking};
use handoff::tcp::TcpLink;

pub(crate) use super::guard::Bounds;
use super::guard::Guard;
use crate::{commands::base::store, home::Home, peers::Peer};

/// What a caller is served with.
pub(crate) struct Session<'a> {
    /// This cloudlet.
    pub(crate) home: &'a Home,
    /// Who calls.
    pub(crate) peer: &'a Peer,
    /// What may come in.
    pub(crate) bounds: Bounds,
    /// The connection below the link.
    pub(crate) socket: &'a OwnedFd,
}

/// Serves one caller; what it did.
pub(crate) fn serve<R: Read, W: Write>(
    session: &Session<'_>,
    rx: R,
    tx: W,
) -> anyhow::Result<Served> {
    // A session is long: one whose peer is gone must not hold its place.
    TcpLink::new(TcpStream::from(session.socket.try_clone()?)).map(drop)?;
    let store = store(session.home)?;
    let host = Guard::new(session.home, &store, Some(session.peer), session.bounds);
    let (never, mut progress) = (AtomicBool::new(false), |_| {});
    let mut link = Link::new(rx, tx, &never);
    let mut taking = Taking { store: &store, host: &host, progress: &mut progress, heal: false };
    base_sync::serve(&mut link, &mut taking).map_err(|error| match error {
        base_sync::SyncError::Link(source) if is_gone(&source) => {
            anyhow::anyhow!("it went away before the base was across; it may go on later")
        }
        error => error.into(),
    })
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}
