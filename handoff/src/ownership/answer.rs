//! What a side says about a handoff when it is asked, from its record alone.

use serde::{Deserialize, Serialize};

use super::{Epoch, HandoffId, Record, State, VmId, record::bounded_text};

/// A question about one handoff, asked by either side when it cannot know how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Question {
    /// Which VM.
    pub vm: VmId,
    /// Which handoff.
    pub handoff: HandoffId,
    /// The epoch that the handoff gives to the target.
    pub epoch: Epoch,
}

/// What a record says about the handoff it was asked about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// A source: not decided yet.
    Pending,
    /// A source: it is committed, the target is the owner.
    Committed,
    /// A source: it has let go, the target runs the guest.
    Released,
    /// A source: it was aborted and will never be committed.
    Aborted,
    /// A target: not settled, waiting for the word. The copy is there, or on its way.
    Prepared,
    /// A target: it owns the epoch; the guest runs or has run there.
    Owner,
    /// A target: it never ran the guest and never will.
    Declined {
        /// Why, for a person.
        reason: String,
    },
    /// The VM has moved on to a higher epoch: whoever holds a lower one stays down.
    Superseded {
        /// The higher epoch.
        epoch: Epoch,
    },
    /// Nothing is known. The one who asked must not guess.
    Unknown,
}

/// Answers from the record, `None` if there is none. Changes nothing.
pub fn answer(record: Option<&Record>, question: Question) -> Verdict {
    let Some(record) = record.filter(|r| r.vm == question.vm) else { return Verdict::Unknown };
    let same = record.handoff() == Some(question.handoff);
    if record.epoch > question.epoch {
        return Verdict::Superseded { epoch: record.epoch };
    }
    if record.epoch == question.epoch {
        return match &record.state {
            // One side alone can own an epoch, so owning it means having received it.
            State::Owner(_) | State::HandingOff { .. } => Verdict::Owner,
            State::Committed { .. } if same => Verdict::Committed,
            State::Released { .. } if same => Verdict::Released,
            // This side gave the epoch to another handoff than the one asked about.
            State::Committed { .. } | State::Released { .. } => Verdict::Aborted,
            State::Receiving { .. } | State::Prepared { .. } if same => Verdict::Prepared,
            State::Declined { reason, .. } if same => {
                Verdict::Declined { reason: bounded_text(reason) }
            }
            State::Receiving { .. } | State::Prepared { .. } | State::Declined { .. } => {
                Verdict::Unknown
            }
        };
    }
    // Only the owner of the epoch right before can have offered the one asked about.
    match &record.state {
        _ if record.epoch.next().ok() != Some(question.epoch) => Verdict::Unknown,
        State::HandingOff { .. } if same => Verdict::Pending,
        State::Owner(_) | State::HandingOff { .. } => Verdict::Aborted,
        _ => Verdict::Unknown,
    }
}
