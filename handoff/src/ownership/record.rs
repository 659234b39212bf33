//! What a side knows durably about one VM, and the names in it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::root::StateRoot;

/// The longest text a record or a frame carries; longer text is cut when it is made.
pub const MAX_TEXT_BYTES: usize = 1024;

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), hex::encode(&self.0[..4]))
            }
        }
    };
}

bytes_id! {
    /// A VM's identity through all its handoffs; its name may be used again, this may not.
    VmId, 16
}
bytes_id! {
    /// One handoff, from its first Hello to its end. Never used twice.
    HandoffId, 16
}
impl VmId {
    /// A fresh random identity.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl HandoffId {
    /// A fresh random identity.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// How often the right to run a VM has changed. Of two records, the higher epoch knows more.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a VM that was never handed off.
    pub const FIRST: Self = Self(1);

    /// The next one.
    pub fn next(self) -> Result<Self, super::OwnershipError> {
        self.0.checked_add(1).map(Self).ok_or(super::OwnershipError::EpochExhausted(self.0))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The durable record of one VM on one side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// Which VM.
    pub vm: VmId,
    /// The newest epoch this side knows of, and what it means here.
    pub epoch: Epoch,
    /// What this side may do.
    pub state: State,
}

/// What one side may do with a VM in the record's epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// It runs or has run here, and nobody else may run it.
    Owner(Tenure),
    /// Owner as before, with a handoff under way: not committed, so the guest may run here.
    HandingOff {
        /// The handoff.
        handoff: HandoffId,
        /// Where to, as the driver can find it again.
        peer: String,
    },
    /// The epoch belongs to the peer: the guest must not run here unless the peer durably declined.
    Committed {
        /// The handoff.
        handoff: HandoffId,
        /// Where to, as the driver can find it again.
        peer: String,
        /// The state that was handed over.
        root: StateRoot,
    },
    /// The peer runs the guest. What is here may be deleted.
    Released {
        /// The handoff.
        handoff: HandoffId,
        /// Where it went.
        peer: String,
    },
    /// A complete verified copy is in memory here, waiting for the word. It must not run yet.
    Prepared {
        /// The handoff.
        handoff: HandoffId,
        /// Where it comes from.
        peer: String,
        /// The state that was verified.
        root: StateRoot,
    },
    /// This side never ran the epoch and never will.
    Declined {
        /// The handoff.
        handoff: HandoffId,
        /// Why, for a person.
        reason: String,
    },
    /// An offer was taken and its copy is coming in. From here on the source may commit at any
    /// moment, so this side owes it an answer, whatever happens: it becomes the owner, or declines.
    Receiving {
        /// The handoff.
        handoff: HandoffId,
        /// Where it comes from.
        peer: String,
    },
}

/// How an owner came to own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Tenure {
    /// Created here, or received and confirmed by the source, or back after a failed handoff.
    Settled,
    /// Received; the source has not yet said that it let go, so it may have been taken over there.
    Unconfirmed {
        /// The handoff.
        handoff: HandoffId,
        /// Where it came from.
        peer: String,
    },
    /// Taken by an operator while the other side could not be asked.
    TakenOver {
        /// The operator's reason.
        reason: String,
    },
}

impl Record {
    /// The record of a VM that was just created here.
    pub fn created(vm: VmId) -> Self {
        Self { vm, epoch: Epoch::FIRST, state: State::Owner(Tenure::Settled) }
    }

    /// Whether the guest may run here.
    pub fn may_run(&self) -> bool {
        matches!(self.state, State::Owner(_) | State::HandingOff { .. })
    }

    /// The handoff this record waits on or ended with, if any.
    pub fn handoff(&self) -> Option<HandoffId> {
        match &self.state {
            State::Owner(Tenure::Unconfirmed { handoff, .. }) => Some(*handoff),
            State::Owner(_) => None,
            State::HandingOff { handoff, .. }
            | State::Committed { handoff, .. }
            | State::Released { handoff, .. }
            | State::Receiving { handoff, .. }
            | State::Prepared { handoff, .. }
            | State::Declined { handoff, .. } => Some(*handoff),
        }
    }

    /// Whether the record means a copy in the memory of the process that wrote it: once that process
    /// is gone there is nothing left to run.
    pub fn is_volatile(&self) -> bool {
        matches!(self.state, State::Receiving { .. } | State::Prepared { .. })
    }

    /// The other side of that handoff, as the driver can find it again; none where it does not matter
    /// any more.
    pub fn peer(&self) -> Option<&str> {
        match &self.state {
            State::Owner(Tenure::Unconfirmed { peer, .. })
            | State::HandingOff { peer, .. }
            | State::Committed { peer, .. }
            | State::Released { peer, .. }
            | State::Receiving { peer, .. }
            | State::Prepared { peer, .. } => Some(peer),
            State::Owner(_) | State::Declined { .. } => None,
        }
    }

    pub(super) fn with(&self, epoch: Epoch, state: State) -> Self {
        Self { vm: self.vm, epoch, state }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let epoch = self.epoch;
        match &self.state {
            State::Owner(Tenure::Settled) => write!(f, "owner of epoch {epoch}"),
            State::Owner(Tenure::Unconfirmed { peer, .. }) => {
                write!(f, "owner of epoch {epoch}, not yet confirmed by {peer}")
            }
            State::Owner(Tenure::TakenOver { reason }) => {
                write!(f, "owner of epoch {epoch}, taken over: {reason}")
            }
            State::HandingOff { peer, .. } => {
                write!(f, "owner of epoch {epoch}, handing off to {peer}")
            }
            State::Committed { peer, .. } => {
                write!(f, "epoch {epoch} committed to {peer}, which has not confirmed")
            }
            State::Released { peer, .. } => write!(f, "epoch {epoch} runs at {peer}"),
            State::Receiving { peer, .. } => {
                write!(f, "epoch {epoch} coming in from {peer}")
            }
            State::Prepared { peer, .. } => {
                write!(f, "epoch {epoch} prepared, waiting for {peer}")
            }
            State::Declined { reason, .. } => write!(f, "epoch {epoch} declined: {reason}"),
        }
    }
}

/// Cuts text to [`MAX_TEXT_BYTES`], at a character.
pub fn bounded_text(text: impl fmt::Display) -> String {
    let mut text = text.to_string();
    if text.len() > MAX_TEXT_BYTES {
        let mut end = MAX_TEXT_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}
