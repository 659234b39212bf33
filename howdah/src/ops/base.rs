//! Bases of the store.

use guest_images::{Base, BaseId, store::Progress};
use handoff::ownership::State;
use howdah_api as api;

use crate::{
    commands::base::{store, store_failure},
    failure::{Exit, Failure},
    home::Home,
};

/// Every base of the store.
pub(crate) fn list(home: &Home) -> Result<Vec<api::Base>, Failure> {
    let listed = store(home)?.list().map_err(store_failure)?;
    let bases = listed.into_iter().map(|listed| api::Base {
        id: listed.id.to_string(),
        names: listed.names,
        disk_bytes: listed.base.as_ref().ok().map(Base::disk_bytes),
        memory_bytes: listed.base.as_ref().ok().and_then(memory_bytes),
        error: listed.base.err().map(|e| e.to_string()),
    });
    Ok(bases.collect())
}

fn memory_bytes(base: &Base) -> Option<u64> {
    base.manifest().memory.as_ref().map(|memory| memory.ram.bytes)
}

/// One base, by name or id.
pub(crate) fn look(name: &str, home: &Home) -> Result<api::Base, Failure> {
    let id = store(home)?.resolve(name).map_err(store_failure)?.to_string();
    list(home)?.into_iter().find(|base| base.id == id).ok_or_else(|| {
        let why = "it was removed just now";
        Failure::new(Exit::NotFound, format!("base {name}"), why, "`howdah base ls` lists bases")
    })
}

/// Reads all of a base and compares it with its manifest.
pub(crate) fn verify(
    name: &str,
    home: &Home,
    progress: &mut dyn FnMut(Progress),
) -> Result<BaseId, Failure> {
    let store = store(home)?;
    let id = store.resolve(name).map_err(store_failure)?;
    let problems = store.verify(&id, progress).map_err(store_failure)?;
    match problems.first() {
        None => Ok(id),
        Some(first) => {
            let what = format!("base {name} is damaged in {} places, the first", problems.len());
            Err(Failure::plain(Exit::Corrupt, what, first))
        }
    }
}

/// Removes a base that no VM of this cloudlet needs.
pub(crate) fn remove(name: &str, home: &Home) -> Result<BaseId, Failure> {
    let store = store(home)?;
    let id = store.resolve(name).map_err(store_failure)?;
    for dir in home.vms()? {
        // A VM whose files cannot be read may need the base: then it stays.
        let gone = |state: &State| matches!(state, State::Released { .. } | State::Declined { .. });
        let needed = dir.record()?.is_some_and(|record| !gone(&record.state));
        if needed && dir.config()?.base == id.to_string() {
            let why = format!("VM {} is made from it", dir.name());
            let way_out = format!("`howdah vm rm {}` first", dir.name());
            return Err(Failure::new(Exit::Conflict, format!("base {name}"), why, way_out));
        }
    }
    store.remove(&id).map_err(store_failure)?;
    Ok(id)
}
