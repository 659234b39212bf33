//! `howdah vm takeover`: an operator decides what no protocol can.

use handoff::{
    engine::{self, Recovery, SettleError},
    ownership::OwnershipError,
};

use crate::{
    failure::{Exit, Failure},
    home::VmDir,
};

/// Takes the VM, durably. It is not started.
pub(crate) fn take(dir: &VmDir, reason: &str) -> Result<(), Failure> {
    let what = format!("VM {}", dir.name());
    let _lock = dir.lock()?;
    match engine::takeover(&mut dir.journal()?, reason) {
        Ok(Recovery::MayRun) => Ok(()),
        Ok(other) => Err(Failure::plain(Exit::Failed, what, format!("still {other:?}"))),
        Err(SettleError::Ownership(OwnershipError::NoTakeover { why })) => {
            let way_out = "only a VM that waits for a peer can be taken over";
            Err(Failure::new(Exit::Conflict, what, why, way_out))
        }
        Err(e) => Err(Failure::plain(Exit::Failed, what, e)),
    }
}
