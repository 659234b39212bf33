//! Whether a VM may be started from its directory, asked of the peer where only it knows.

use handoff::{
    engine::{self, Limits, Recovery},
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
    match recover(dir, journal, None)? {
        Recovery::MayRun => Ok(()),
        Recovery::Gone { peer } => {
            let why = format!("it was handed off and runs at {peer}");
            let way_out = format!("use it there, or `howdah vm rm {name}` to reuse the name");
            Err(Failure::new(Exit::Conflict, what, why, way_out))
        }
        Recovery::NeverHere { reason } => {
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

/// Settles who owns the VM, asking the peer where only it knows: where the record says, or at `peer`.
/// The disk of one that turns out to be elsewhere is removed. The VM's lock must be held.
pub(crate) fn recover(
    dir: &VmDir,
    journal: &mut Journal,
    peer: Option<&str>,
) -> Result<Recovery, Failure> {
    let name = dir.name();
    let what = format!("VM {name}");
    let Some(record) = journal.record().cloned() else {
        return Err(Failure::new(
            Exit::Corrupt,
            what,
            "it has no ownership record",
            format!("`howdah vm rm {name}`, then create it again"),
        ));
    };
    let recorded = match &record.state {
        State::Owner(Tenure::Unconfirmed { peer, .. })
        | State::HandingOff { peer, .. }
        | State::Committed { peer, .. } => peer.as_str(),
        // Decided by the record alone.
        State::Owner(_)
        | State::Released { .. }
        | State::Receiving { .. }
        | State::Prepared { .. }
        | State::Declined { .. } => "",
    };
    let mut connect = TcpConnect::new(peer.unwrap_or(recorded));
    let limits = Limits::default();
    let clock = MonotonicClock::default();
    let recovery = engine::recover(journal, name.as_ref(), Some(&mut connect), &limits, &clock)
        .map_err(|e| Failure::plain(Exit::Failed, &what, e))?;
    let changed = journal.record() != Some(&record);
    if changed {
        tracing::warn!("settled: {recovery:?} (the record said: {record})");
    }
    match recovery {
        Recovery::NeverHere { .. } => dir.remove_disk()?,
        // Of what was released before, a visit may be kept.
        Recovery::Gone { .. } if changed => dir.remove_disk()?,
        _ => {}
    }
    Ok(recovery)
}
