//! Whether a VM may be started from its directory, asked of the peer where only it knows.

use handoff::{
    engine::{Limits, Recovery, recover},
    ownership::{Journal, State, Tenure},
    tcp::{MonotonicClock, TcpConnect},
};

use crate::{
    failure::{Exit, Failure},
    home::VmDir,
};

/// Settles who owns the VM. `Ok` means that it may run here; its disk is removed where it runs
/// elsewhere for certain.
pub(crate) fn settle(dir: &VmDir, journal: &mut Journal) -> Result<(), Failure> {
    let name = dir.name();
    let what = format!("VM {name}");
    let Some(record) = journal.record() else {
        return Err(Failure::new(
            Exit::Corrupt,
            what,
            "it has no ownership record",
            format!("`howdah vm rm {name}`, then create it again"),
        ));
    };
    let peer = match &record.state {
        State::Owner(Tenure::Settled | Tenure::TakenOver { .. }) => return Ok(()),
        State::Owner(Tenure::Unconfirmed { peer, .. })
        | State::HandingOff { peer, .. }
        | State::Committed { peer, .. }
        | State::Released { peer, .. }
        | State::Prepared { peer, .. } => peer.clone(),
        State::Declined { .. } => String::new(),
    };
    let before = record.to_string();
    let mut connect = TcpConnect::new(peer);
    let recovery = recover(
        journal,
        name.as_ref(),
        Some(&mut connect),
        &Limits::default(),
        &MonotonicClock::default(),
    )
    .map_err(|e| Failure::plain(Exit::Failed, &what, e))?;
    match recovery {
        Recovery::MayRun => {
            tracing::warn!("settled: it may run here (the record said: {before})");
            Ok(())
        }
        Recovery::Gone { peer } => {
            dir.remove_disk()?;
            let why = format!("it was handed off and runs at {peer}");
            let way_out = format!("use it there, or `howdah vm rm {name}` to reuse the name");
            Err(Failure::new(Exit::Conflict, what, why, way_out))
        }
        Recovery::NeverHere { reason } => {
            dir.remove_disk()?;
            let why = format!("it never ran here: {reason}");
            let way_out = format!("its source has it; `howdah vm rm {name}` to reuse the name");
            Err(Failure::new(Exit::Conflict, what, why, way_out))
        }
        Recovery::InDoubt { peer, reason } => {
            let why = format!("it was committed to {peer}, which cannot be asked: {reason}");
            let way_out = format!(
                "try again when the peer is back; if it never will be, `howdah vm takeover {name}`"
            );
            Err(Failure::new(Exit::InDoubt, what, why, way_out))
        }
    }
}
