//! Removing the bases that nothing uses.

use guest_images::{BaseId, StoreError, store::Listed};
use serde::Serialize;

use super::guard::allocated_bytes;
use crate::{
    commands::base::{store, store_failure},
    failure::Failure,
    home::Home,
};

/// One base, and what becomes of it.
#[derive(Debug, Serialize)]
pub(crate) struct Judged {
    /// Its id.
    pub(crate) id: String,
    /// Its names.
    pub(crate) names: Vec<String>,
    /// What it takes on disk.
    pub(crate) bytes: u64,
    /// Why it stays; nothing if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kept: Option<String>,
}

/// What a collection did, or would do.
#[derive(Debug, Serialize)]
pub(crate) struct Collected {
    /// Every base.
    pub(crate) bases: Vec<Judged>,
    /// What was freed, or would be.
    pub(crate) freed_bytes: u64,
    /// Whether nothing was removed, as was asked for.
    pub(crate) dry_run: bool,
}

/// Removes the bases that no VM is made from, no process has open and, unless `named`, that have no name.
///
/// A base that is damaged is judged like others. Where it cannot be told what a VM is made from, nothing
/// is removed.
pub(crate) fn gc(home: &Home, named: bool, dry_run: bool) -> Result<Collected, Failure> {
    let store = store(home)?;
    let mut bases = Vec::new();
    for listed in store.list().map_err(store_failure)? {
        let Listed { id, names, base } = listed;
        // It is open here too until this is gone, and what is open is not removed.
        drop(base);
        let bytes = allocated_bytes(&store.base_path(&id));
        let mut kept = used_by(home, &id)?;
        if kept.is_none() && !named && !names.is_empty() {
            kept = Some(format!("it is called {}", names.join(", ")));
        }
        if kept.is_none() {
            kept = match store.in_use(&id) {
                Err(StoreError::InUse { holder, .. }) => Some(format!("it is {holder}")),
                other => other.map(|()| None).map_err(store_failure)?,
            };
        }
        if kept.is_none() && !dry_run {
            kept = match store.remove(&id) {
                // Somebody opened it just now.
                Err(StoreError::InUse { holder, .. }) => Some(format!("it is {holder}")),
                other => other.map(|()| None).map_err(store_failure)?,
            };
        }
        bases.push(Judged { id: id.to_string(), names, bytes, kept });
    }
    let freed_bytes = bases.iter().filter(|base| base.kept.is_none()).map(|base| base.bytes).sum();
    Ok(Collected { bases, freed_bytes, dry_run })
}

/// The VM that is made from a base, if any is. One that has gone counts as long as anything of it is here:
/// its way back is short with the base, and long without.
fn used_by(home: &Home, id: &BaseId) -> Result<Option<String>, Failure> {
    for dir in home.vms()? {
        // A directory without a record is one in the making, or an empty one.
        let config = match dir.config() {
            Err(_) if dir.record()?.is_none() => continue,
            config => config?,
        };
        if config.base == id.to_string() {
            return Ok(Some(format!("VM {} is made from it", dir.name())));
        }
    }
    Ok(None)
}
