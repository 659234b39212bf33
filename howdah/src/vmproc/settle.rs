//! Whether a VM may be started from its directory, asked of the peer where only it knows.

use std::sync::Arc;

use handoff::{
    engine::{self, Limits, Recovery},
    ownership::{Journal, State, Tenure},
    tcp::MonotonicClock,
};

use crate::{
    failure::{Exit, Failure},
    home::{Home, VmDir},
    lock::Probe,
    peers::{Book, BookFile, Dial, Endpoint},
};

/// What is needed to ask a peer: looked up first, because the process of a VM sees the files of its
/// VM only.
#[derive(Debug, Default)]
pub(crate) struct Asking {
    /// The peer of the record, as it was, and what makes links to it.
    peer: Option<(String, Dial)>,
    book: Arc<Book>,
}

impl Asking {
    /// For the VM of `dir`, as its record stands now: the peer where the record says, or at another
    /// address.
    pub(crate) fn prepare(dir: &VmDir, home: &Home, at: Option<&str>) -> Result<Self, Failure> {
        // What is wrong with a record is told of when it is settled.
        let Ok(Some(record)) = dir.record() else { return Ok(Self::default()) };
        let book = BookFile::of(home).read()?;
        let recorded = match &record.state {
            State::Owner(Tenure::Unconfirmed { peer, .. })
            | State::HandingOff { peer, .. }
            | State::Committed { peer, .. } => peer,
            // Decided by the record alone.
            State::Owner(_)
            | State::Released { .. }
            | State::Receiving { .. }
            | State::Prepared { .. }
            | State::Declined { .. } => return Ok(Self { peer: None, book }),
        };
        let dial = match at {
            None => Dial::back_to(home, &book, recorded)?,
            Some(address) => {
                let endpoint = Endpoint::recorded(recorded)?;
                Dial::from(home, &Endpoint { address: address.into(), ..endpoint })?
            }
        };
        Ok(Self { peer: Some((recorded.clone(), dial)), book })
    }
}

/// Settles who owns the VM. `Ok` means that it may run here; its disk is removed where it runs
/// elsewhere for certain.
pub(crate) fn settle(dir: &VmDir, asking: Asking, journal: &mut Journal) -> Result<(), Failure> {
    let name = dir.name();
    let what = format!("VM {name}");
    let before = journal.record().map(ToString::to_string).unwrap_or_default();
    let recovery = recover(dir, asking, journal, &Limits::default())?;
    if journal.record().is_some_and(|record| record.to_string() != before) {
        tracing::warn!("settled: {recovery:?} (the record said: {before})");
    }
    match recovery {
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

/// Settles who owns the VM, asking the peer where only it knows. The disk of one that turns out to be
/// elsewhere is removed. The VM's lock must be held. Peers in the answer are as people call them.
pub(crate) fn recover(
    dir: &VmDir,
    asking: Asking,
    journal: &mut Journal,
    limits: &Limits,
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
    let Asking { peer, book } = asking;
    // If the record has changed since, another peer is meant, which the next try asks.
    let peer = peer.filter(|(recorded, _)| record.peer() == Some(recorded.as_str()));
    let mut connect = peer.map(|(_, dial)| dial);
    let clock = MonotonicClock::default();
    let recovery = engine::recover(journal, name.as_ref(), connect.as_mut(), limits, &clock)
        .map_err(|e| Failure::plain(Exit::Failed, &what, e))?;
    let changed = journal.record() != Some(&record);
    match recovery {
        Recovery::NeverHere { .. } => dir.remove_disk()?,
        // Of what was released before, a visit may be kept.
        Recovery::Gone { .. } if changed => dir.remove_disk()?,
        _ => {}
    }
    Ok(match recovery {
        Recovery::Gone { peer } => Recovery::Gone { peer: book.name_all(&peer) },
        Recovery::InDoubt { peer, reason } => {
            Recovery::InDoubt { peer: book.name_all(&peer), reason }
        }
        other => other,
    })
}

/// Declines what processes that are gone were receiving, and removes what came of it: nobody can
/// complete it, and a source may be waiting for that word. What is wrong with one VM does not matter to
/// the others.
pub(crate) fn decline_lost_copies(home: &Home) -> Result<(), Failure> {
    for dir in home.vms()? {
        if let Err(failure) = decline_lost_copy(&dir) {
            tracing::warn!("{failure}");
        }
    }
    Ok(())
}

fn decline_lost_copy(dir: &VmDir) -> Result<(), Failure> {
    let is_volatile = || Ok::<_, Failure>(dir.record()?.is_some_and(|record| record.is_volatile()));
    if !is_volatile()? || matches!(dir.probe()?, Probe::Held { .. }) {
        return Ok(());
    }
    let _lock = dir.lock()?;
    if is_volatile()? {
        engine::decline_lost_copy(&mut dir.journal()?)
            .map_err(|e| Failure::plain(Exit::Failed, format!("VM {}", dir.name()), e))?;
        dir.remove_disk()?;
        tracing::info!("VM {} was coming in when its process ended: declined", dir.name());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use handoff::ownership::{HandoffId, Record, VmId};

    use super::*;

    #[test]
    fn what_was_coming_in_is_declined_unless_it_still_is() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(root.path()).unwrap();
        let handoff = HandoffId([2; 16]);
        let receiving = State::Receiving { handoff, peer: "b:7070".into() };
        let mine = Record::created(VmId([1; 16]));
        let states = [("lost", receiving.clone()), ("live", receiving), ("mine", mine.state)];
        for (name, state) in states {
            let dir = home.vm(&name.parse().unwrap());
            dir.create().unwrap();
            let record = Record { state, ..Record::created(VmId([1; 16])) };
            dir.journal().unwrap().write(record).unwrap();
            std::fs::write(dir.path().join("disk.data"), b"data").unwrap();
        }
        // Damage elsewhere stops nothing.
        let damaged = home.vm(&"damaged".parse().unwrap());
        damaged.create().unwrap();
        std::fs::write(damaged.path().join("ownership"), b"?").unwrap();
        let lock = home.vm(&"live".parse().unwrap()).lock().unwrap();
        decline_lost_copies(&home).unwrap();
        drop(lock);
        let state = |name: &str| {
            let dir = home.vm(&name.parse().unwrap());
            let record = dir.record().unwrap().unwrap();
            (record.state, dir.path().join("disk.data").exists())
        };
        assert!(matches!(state("lost"), (State::Declined { .. }, false)));
        assert!(matches!(state("live"), (State::Receiving { .. }, true)));
        assert!(matches!(state("mine"), (State::Owner(_), true)));
    }
}
