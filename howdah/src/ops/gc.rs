//! Removing the bases that nothing uses.

use guest_images::{BaseId, StoreError, store::Listed};
use howdah_api::{BaseJudged, BasesCollected, BasesGc};

use crate::{
    bases::allocated_bytes,
    commands::base::{store, store_failure},
    failure::Failure,
    home::Home,
};

/// Removes the bases that no VM is made from, no process has open and, unless `named`, that have no name.
///
/// A base that is damaged is judged like others. Where it cannot be told what a VM is made from, nothing
/// is removed.
pub(crate) fn gc(home: &Home, asked: BasesGc) -> Result<BasesCollected, Failure> {
    let BasesGc { named, dry_run } = asked;
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
        bases.push(BaseJudged { id: id.to_string(), names, bytes, kept });
    }
    let freed_bytes = bases.iter().filter(|base| base.kept.is_none()).map(|base| base.bytes).sum();
    Ok(BasesCollected { bases, freed_bytes, dry_run })
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
