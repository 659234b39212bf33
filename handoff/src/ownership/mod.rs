//! Who may run the guest: pure state machines of both sides, and the durable record under them.
//!
//! The rule that everything rests on: **a side writes its decision to disk before it says it or
//! acts on it**. So each machine is a function from the record on disk and an event to a [`Step`]:
//! the record to write first (if any), then what to say to the peer, then what to do with the guest.
//!
//! ```text
//! source: Owner ─► HandingOff ─► Committed ─► Released      target: (none) ─► Receiving ──► Owner
//!           ▲──────────┘ abort       │                                         │ └► Prepared ─┘
//!           ▲────────────────────────┘ Declined, or never said                 └──► Declined
//! ```
//!
//! The source commits either after the target's Prepared, or *early*, right behind the last segment: the
//! target has durably noted the offer, so it will answer a Commit with the guest or with Declined.
//!
//! Only a side whose record is [`State::Owner`] or [`State::HandingOff`] may run the guest. The
//! record names an *epoch*: it grows by one with each offer, and once more when that came to
//! nothing or an operator took over, so that no epoch has two owners and no offer is taken for
//! another. ADR 0001 argues
//! the protocol; `tests/ownership_model.rs` walks through every interleaving of these functions.

mod answer;
mod journal;
mod record;
pub mod source;
pub mod target;

pub use answer::{Question, Verdict, answer};
pub use journal::{Journal, JournalError};
pub use record::{Epoch, HandoffId, MAX_TEXT_BYTES, Record, State, Tenure, VmId, bounded_text};

use crate::root::StateRoot;

/// What a machine asks of its driver, in this order: write, say, act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<Say> {
    /// The record to make durable first. Neither `say` nor `guest` may happen before it is.
    pub write: Option<Record>,
    /// What to tell the peer.
    pub say: Option<Say>,
    /// What becomes of the guest here.
    pub guest: Guest,
}

/// What becomes of this side's copy of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guest {
    /// Leave it as it is: running, paused or absent.
    Leave,
    /// It may run here: resume the paused copy if there is one, else boot from the disk.
    Run,
    /// It must never run here in this epoch again: drop the copy. Its disk may be deleted.
    Drop,
}

impl<Say> Step<Say> {
    fn nothing() -> Self {
        Self { write: None, say: None, guest: Guest::Leave }
    }

    fn saying(say: Say) -> Self {
        Self { say: Some(say), ..Self::nothing() }
    }
}

/// Why an event does not fit the record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// The VM is not here to be handed off.
    #[error("the VM may not be handed off from here: {why}")]
    NotOwner {
        /// The state that forbids it, for a person.
        why: String,
    },
    /// The peer's state differs from what was sent.
    #[error("the peer prepared state {theirs}, this side has {ours}: not handed over")]
    RootMismatch {
        /// What this side computed.
        ours: StateRoot,
        /// What the peer said.
        theirs: StateRoot,
    },
    /// A takeover where there is nothing to take over.
    #[error("nothing to take over: {why}")]
    NoTakeover {
        /// The state that forbids it, for a person.
        why: String,
    },
    /// Epochs ran out, or a peer sent one that cannot be.
    #[error("epoch {0} cannot be followed by another: the record is damaged or forged")]
    EpochExhausted(u64),
}
