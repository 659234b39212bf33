//! The peers that are known.

use howdah_api as api;

use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName},
    peers::{BookFile, Peer, Rights, check_address, identity},
};

/// The longest name of a base that is kept.
const MAX_BASE_BYTES: usize = 128;
/// The end of the year 9999: later has no date.
const MAX_UNTIL: u64 = 253_402_300_799;
/// More bases than this are not listed for a peer.
const MAX_BASES: usize = 64;

impl From<&Peer> for api::Peer {
    fn from(peer: &Peer) -> Self {
        Self {
            name: peer.name.to_string(),
            key: peer.key.to_string(),
            address: peer.address.clone(),
            api: peer.api.clone(),
            rights: peer.rights.into(),
            bases: peer.bases.clone(),
            until: peer.until,
        }
    }
}

impl From<Rights> for api::Rights {
    fn from(Rights { send, receive, push, pull, observe, operate }: Rights) -> Self {
        Self { send, receive, push, pull, observe, operate }
    }
}

impl From<api::Rights> for Rights {
    fn from(rights: api::Rights) -> Self {
        let api::Rights { send, receive, push, pull, observe, operate } = rights;
        Self { send, receive, push, pull, observe, operate }
    }
}

/// What is said of a peer of this name, checked.
pub(crate) fn described(name: &str, spec: api::PeerSpec) -> Result<Peer, Failure> {
    let api::PeerSpec { key, address, api, rights, bases, until } = spec;
    let what = || format!("peer {name}");
    let way_out = "correct it and try again";
    let usage = |why: &dyn std::fmt::Display| Failure::new(Exit::Usage, what(), why, way_out);
    let peer = Peer::new(name.parse().map_err(|e| usage(&e))?, key.parse().map_err(|e| usage(&e))?);
    if until.is_some_and(|until| until > MAX_UNTIL) {
        return Err(usage(&"`until` is later than the year 9999"));
    }
    let rights = rights.map_or(Rights::VMS, Rights::from);
    Ok(Peer { address, api, rights, bases, until, ..peer })
}

/// Every peer that is known, by name.
pub(crate) fn list(home: &Home) -> Result<Vec<api::Peer>, Failure> {
    Ok(BookFile::of(home).read()?.peers().iter().map(api::Peer::from).collect())
}

/// One of them.
pub(crate) fn look(name: &VmName, home: &Home) -> Result<api::Peer, Failure> {
    let book = BookFile::of(home).read()?;
    book.by_name(name.as_ref()).map(api::Peer::from).ok_or_else(|| unknown(name))
}

/// Forgets a peer; none if it was not known.
pub(crate) fn remove(name: &VmName, home: &Home) -> Result<Option<api::Peer>, Failure> {
    let removed = BookFile::of(home).change(home, |book| Ok(book.remove(name)))?;
    Ok(removed.as_ref().map(api::Peer::from))
}

/// There is no such peer.
pub(crate) fn unknown(name: &VmName) -> Failure {
    let why = "there is none of that name";
    Failure::new(Exit::NotFound, format!("peer {name}"), why, "`howdah peer ls` lists them")
}

/// Lets a peer in, or changes what is said of one.
pub(crate) fn put(peer: &Peer, home: &Home) -> Result<api::Peer, Failure> {
    for address in [&peer.address, &peer.api].into_iter().flatten() {
        check_address(address)?;
    }
    let what = || format!("peer {}", peer.name);
    let odd = |base: &String| base.is_empty() || base.len() > MAX_BASE_BYTES;
    if let Some(bases) = &peer.bases
        && (bases.len() > MAX_BASES || bases.iter().any(odd))
    {
        let why = format!("--bases takes up to {MAX_BASES} names or ids");
        return Err(Failure::new(Exit::Usage, what(), why, "`howdah base ls` shows them"));
    }
    if peer.key == identity(home)?.key() {
        let way_out = "take the key that `howdah identity` shows on the other cloudlet";
        let why = "that is this cloudlet's own key";
        return Err(Failure::new(Exit::Usage, what(), why, way_out));
    }
    BookFile::of(home).change(home, |book| book.put(peer.clone()))?;
    Ok(peer.into())
}
