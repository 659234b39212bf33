//! What a target's frames mean to the source, and what is wrong with them.

use crate::{
    Refusal,
    ownership::Verdict,
    root::StateRoot,
    wire::{Agreed, Resumed},
};

/// What the target's frames mean to the source's driver.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEvent {
    /// The target takes the handoff; segments flow.
    Welcomed {
        /// The version both speak.
        version: u32,
        /// What of the offer the target holds.
        agreed: Agreed,
        /// Whether the commit may be said without waiting for Prepared.
        early: bool,
    },
    /// A later link goes on after this segment.
    Relinked {
        /// The last segment that the target had applied.
        applied_up_to: u64,
    },
    /// The target does not take the handoff, or no longer knows it.
    Refused(Refusal),
    /// The target verified everything, and its copy is durable where it must be.
    Prepared {
        /// The root it computed.
        root: StateRoot,
        /// Its hash of all RAM and disk, if auditing.
        full_hash: Option<[u8; 32]>,
    },
    /// The target durably declined.
    Declined(String),
    /// The guest runs or has run at the target.
    Resumed(Resumed),
    /// The target gave up.
    Aborted(String),
    /// The target holds only its record of this handoff, which says this.
    Answer(Verdict),
}

/// Why a frame of the target is not accepted. The link is given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A frame that has no place here and now.
    #[error("{frame} came {when}")]
    Unexpected {
        /// The frame.
        frame: &'static str,
        /// The phase.
        when: &'static str,
    },
    /// An acknowledgement of what was not sent, or that takes one back.
    #[error("segment {acked} was acknowledged; {from} to {to} are possible")]
    Ack {
        /// What came.
        acked: u64,
        /// The last acknowledged before.
        from: u64,
        /// The last sent.
        to: u64,
    },
    /// A frame of another handoff.
    #[error("{0} is about another handoff")]
    OtherHandoff(&'static str),
    /// A version that was not offered, or another than on the link before.
    #[error("the peer chose version {0}, which was not agreed")]
    Version(u32),
    /// Bases or a state that were not offered, or others than on the link before.
    #[error("the peer builds on {0:?}, which was not agreed")]
    Agreed(Agreed),
    /// A part of a segment that no link can have left.
    #[error("the peer holds {0} bytes of the next segment, which cannot be")]
    Held(u32),
}
