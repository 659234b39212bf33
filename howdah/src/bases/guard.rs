//! What bases may come and go, and how much room they may take.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use base_sync::{Host, No, Why};
use guest_images::{Base, BaseId, Store, store::is_name};

use crate::{
    commands::base::allowed,
    failure::Failure,
    home::Home,
    peers::{Peer, Right},
    receive::free_disk_bytes,
};

/// Bounds on what comes in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// What must stay free on the store's file system.
    pub(crate) min_free_bytes: u64,
    /// What all bases together may take; no bound of its own if none.
    pub(crate) quota_bytes: Option<u64>,
}

/// Watches over one session.
pub(super) struct Guard<'a> {
    home: &'a Home,
    store: &'a Store,
    /// The caller; none where this side called.
    caller: Option<&'a Peer>,
    bounds: Bounds,
    used_bytes: u64,
}

impl<'a> Guard<'a> {
    pub(super) fn new(
        home: &'a Home,
        store: &'a Store,
        caller: Option<&'a Peer>,
        bounds: Bounds,
    ) -> Self {
        // Only a quota asks for it, and it reads every base's directory.
        let used_bytes = bounds.quota_bytes.map_or(0, |_| allocated_bytes(store.dir()));
        Self { home, store, caller, bounds, used_bytes }
    }

    fn may(&self, right: Right) -> Result<&Peer, No> {
        let Some(peer) = self.caller else {
            return Err(No::new(Why::NotAllowed, "this side called"));
        };
        let denied = |failure: Failure| No::new(Why::NotAllowed, failure.message);
        peer.check(right).map(|()| peer).map_err(denied)
    }
}

impl Host for Guard<'_> {
    fn room(&self, more_bytes: u64) -> Result<(), No> {
        let free = free_disk_bytes(self.store.dir());
        let free = free.map_err(|error| No::new(Why::Failed, format!("its disk: {error}")))?;
        let mut available = free.saturating_sub(self.bounds.min_free_bytes);
        if let Some(quota_bytes) = self.bounds.quota_bytes {
            available = available.min(quota_bytes.saturating_sub(self.used_bytes));
        }
        if more_bytes > available {
            return Err(No::no_space(more_bytes, available));
        }
        Ok(())
    }

    fn machine(&self, state: &[u8]) -> Result<(), No> {
        let checked = vmm::MachineSnapshot::decode(state);
        checked.map(drop).map_err(|error| No::new(Why::Damaged, format!("its machine: {error}")))
    }

    fn may_pull(&self, base: &Base) -> Result<(), No> {
        let peer = self.may(Right::Pull)?;
        if allowed(self.home, peer, base.id()) {
            return Ok(());
        }
        let text = format!("peer {} may not have base {}", peer.name, base.id());
        Err(No::new(Why::NotAllowed, text))
    }

    fn may_push(&self, id: &BaseId, name: &str) -> Result<(), No> {
        let peer = self.may(Right::Push)?;
        if !is_name(name) {
            return Err(No::new(Why::Failed, format!("{name:?} cannot name a base")));
        }
        // A name that is allowed and not there yet may come with its base.
        if peer.allows_base(*id, |listed| (listed == name).then_some(*id)) {
            return Ok(());
        }
        let text = format!("peer {} may not push a base as {name}", peer.name);
        Err(No::new(Why::NotAllowed, text))
    }
}

/// What files below a directory take on disk.
pub(crate) fn allocated_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let of = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => allocated_bytes(&entry.path()),
        Ok(_) => entry.metadata().map_or(0, |meta| meta.blocks() * 512),
        Err(_) => 0,
    };
    entries.flatten().map(of).sum()
}
