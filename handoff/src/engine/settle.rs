//! How a handoff that was cut short is brought to its end.

use super::{KeptReason, Limits, SendError};
use crate::{
    Clock, Connect, SourceVm,
    ownership::{Journal, JournalError, OwnershipError},
};

/// What may be done with a VM after its process started again, or after a doubt was settled.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Recovery {
    /// The guest may run here: the paused copy if there is one, else from its disk.
    MayRun,
    /// It runs at the peer. What is here may be deleted.
    Gone {
        /// Where it went.
        peer: String,
    },
    /// It was never here as a whole. What is here may be deleted.
    NeverHere {
        /// Why.
        reason: String,
    },
    /// The peer owns the epoch or may own it, and cannot be asked now. It must not run here. Try
    /// again, or let an operator take it over.
    InDoubt {
        /// Whom to ask.
        peer: String,
        /// Why it could not be settled, for a person.
        reason: String,
    },
}

/// Settles a VM's ownership after its process started again: asks the peer where the record says
/// so, within `limits.commit`. Must be called before a VM is started from its directory.
pub fn recover<C: Connect>(
    journal: &mut Journal,
    connect: &mut C,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Recovery, SettleError> {
    let _ = (journal, connect, limits, clock);
    unimplemented!()
}

/// Goes on with a handoff that ended [`super::SendOutcome::InDoubt`]; `vm` still holds the paused
/// guest, which is resumed if the peer durably declined.
pub fn send_resume<C: Connect>(
    vm: &mut dyn SourceVm,
    journal: &mut Journal,
    connect: &mut C,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Recovery, SendError> {
    let _ = (vm, KeptReason::Cancelled);
    recover(journal, connect, limits, clock).map_err(|e| match e {
        SettleError::Journal(e) => e.into(),
        SettleError::Ownership(e) => e.into(),
    })
}

/// Why ownership could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The record cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record and the peer contradict each other.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
}
