//! `base push`, `base pull` and `base verify --heal`: what is done and what came of it.

use std::{sync::atomic::AtomicBool, time::Instant};

use base_sync::{Link, No, Progress, SyncError, Taken, Taking, Why};
use guest_images::{BaseId, Store, store::is_name};
use howdah_api::BaseMoved;

use super::{
    SERVICE, VERSIONS,
    guard::{Bounds, Guard},
};
use crate::{
    commands::base::{store, store_failure},
    failure::{Exit, Failure},
    home::Home,
    peers::{self, BookFile, Endpoint},
};

/// What must stay free where a command of this cloudlet's own brings a base.
const OWN: Bounds = Bounds { min_free_bytes: 64 << 20, quota_bytes: None };

/// What looks on.
pub(crate) struct Watch<'a> {
    /// Becomes true when it is to stop.
    pub(crate) cancel: &'a AtomicBool,
    /// Hears how far it is.
    pub(crate) progress: &'a mut dyn FnMut(Progress),
}

/// Gives a base of this cloudlet to a peer, under a name that is free there.
pub(crate) fn push(
    home: &Home,
    which: &str,
    name: Option<&str>,
    peer: &str,
    watch: Watch<'_>,
) -> Result<BaseMoved, Failure> {
    let store = store(home)?;
    let base = store.get(which).map_err(store_failure)?;
    let name = match name.or_else(|| Some(which).filter(|which| !is_id(which, &base.id()))) {
        Some(name) => name.to_owned(),
        None => a_name_of(&store, &base.id())?,
    };
    check_name(&name)?;
    let begun = Instant::now();
    let line = call(home, peer)?;
    let mut link = Link::new(line.rx, line.tx, watch.cancel);
    let given = base_sync::push(&mut link, &store, &base, &name, watch.progress);
    let given = given.map_err(|error| failure(&format!("base {which}"), error))?;
    Ok(BaseMoved {
        id: base.id().to_string(),
        name: Some(name),
        peer: peer.to_owned(),
        already: given.already,
        chunks_on_link: given.sent_chunks,
        chunks_local: None,
        chunks_resumed: None,
        sent_bytes: link.sent_bytes,
        received_bytes: link.received_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Fetches a base of a peer. A name that exists here moves to it, as with an import.
pub(crate) fn pull(
    home: &Home,
    which: &str,
    name: Option<&str>,
    peer: &str,
    watch: Watch<'_>,
) -> Result<BaseMoved, Failure> {
    if let Some(name) = name {
        check_name(name)?;
    }
    let mut moved = fetch(home, which, peer, watch, false)?;
    let id: BaseId = moved.id.parse().map_err(|e| Failure::plain(Exit::Failed, "base id", e))?;
    let name = name.or_else(|| Some(which).filter(|which| !is_id(which, &id)));
    if let Some(name) = name {
        store(home)?.name(name, &id).map_err(store_failure)?;
        moved.name = Some(name.to_owned());
    }
    Ok(moved)
}

/// Mends a damaged base of this cloudlet with what a peer has of it.
pub(crate) fn heal(
    home: &Home,
    which: &str,
    peer: &str,
    watch: Watch<'_>,
) -> Result<BaseMoved, Failure> {
    let id = store(home)?.resolve(which).map_err(store_failure)?;
    fetch(home, &id.to_string(), peer, watch, true)
}

fn fetch(
    home: &Home,
    which: &str,
    peer: &str,
    watch: Watch<'_>,
    heal: bool,
) -> Result<BaseMoved, Failure> {
    let store = store(home)?;
    let begun = Instant::now();
    let line = call(home, peer)?;
    let mut link = Link::new(line.rx, line.tx, watch.cancel);
    let host = Guard::new(home, &store, None, OWN);
    let mut taking = Taking { store: &store, host: &host, progress: watch.progress, heal };
    let pulled = base_sync::pull(&mut link, which, &mut taking);
    let (id, taken) = pulled.map_err(|error| failure(&format!("base {which}"), error))?;
    let Taken { resumed_chunks, local_chunks, received_chunks, already, .. } = taken;
    Ok(BaseMoved {
        id: id.to_string(),
        name: None,
        peer: peer.to_owned(),
        already,
        chunks_on_link: received_chunks,
        chunks_local: Some(local_chunks),
        chunks_resumed: Some(resumed_chunks),
        sent_bytes: link.sent_bytes,
        received_bytes: link.received_bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

fn call(home: &Home, peer: &str) -> Result<peers::Line, Failure> {
    peers::call(home, &endpoint(home, peer)?, SERVICE, VERSIONS)
}

/// Where that peer is.
fn endpoint(home: &Home, peer: &str) -> Result<Endpoint, Failure> {
    let book = BookFile::of(home).read()?;
    // What this cloudlet asks for or gives of its own will needs no right of the peer's here.
    peers::resolve_for(&book, peer, false, None)
}

/// Finds a peer before anything is begun; who it is, for people.
pub(crate) fn find(home: &Home, peer: &str) -> Result<String, Failure> {
    let book = BookFile::of(home).read()?;
    Ok(endpoint(home, peer)?.shown(&book))
}

/// Whether that is the beginning of an id, and so no name that somebody chose.
fn is_id(which: &str, id: &BaseId) -> bool {
    id.to_string().starts_with(&which.to_ascii_lowercase())
}

fn a_name_of(store: &Store, id: &BaseId) -> Result<String, Failure> {
    let listed = store.list().map_err(store_failure)?;
    let names = listed.into_iter().find(|listed| listed.id == *id).map(|listed| listed.names);
    names.and_then(|names| names.into_iter().next()).ok_or_else(|| {
        let why = "it has no name here";
        Failure::new(Exit::Usage, format!("base {id}"), why, "say what to call it there, with --as")
    })
}

/// Whether a base may have this name.
pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
    if is_name(name) {
        return Ok(());
    }
    let why = "use 1 to 64 of a-z A-Z 0-9 . _ -, the first a letter or digit";
    Err(Failure::new(Exit::Usage, format!("the name {name:?}"), why, "choose another with --as"))
}

/// For whoever asked for it.
fn failure(what: &str, error: SyncError) -> Failure {
    let of_no = |no: &No| match no.why {
        Why::NotFound => Exit::NotFound,
        Why::NotAllowed | Why::Taken => Exit::Conflict,
        Why::Damaged => Exit::Corrupt,
        Why::NoSpace | Why::Failed => Exit::Failed,
    };
    let exit = match error {
        SyncError::Cancelled => Exit::Cancelled,
        SyncError::Refused(ref no) | SyncError::Unwilling(ref no) => of_no(no),
        SyncError::Damaged(_) | SyncError::Read { .. } => Exit::Corrupt,
        SyncError::Store(error) => return store_failure(error),
        SyncError::Link(_) | SyncError::Protocol(_) | SyncError::Reception(_) => Exit::Failed,
    };
    Failure::plain(exit, what, error)
}
