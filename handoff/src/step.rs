//! The steps of a handoff, by name: where a crash or a cut link may find it.
//!
//! ```text
//! source                                   target
//! begun-durable  hello-sent ───────────►   hello-got  reserved  offer-durable
//! welcome-got ◄─────────────────────────   welcome-sent
//! round-N-segment ──────────────────────►  round-N-applied
//! paused  state-saved  state-segment
//! prepare-sent ─────────────────────────►  prepare-got  verified
//!                                          prepared-durable    (not with an early commit)
//! prepared-got ◄────────────────────────   prepared-sent       (nor this)
//! committed-durable  commit-sent ───────►  commit-got  owner-durable  running
//! resumed-got ◄─────────────────────────   resumed-sent
//! released-durable  released-sent ──────►  released-got  settled-durable
//! ```
//!
//! With an early commit, committed-durable comes before or after prepare-sent, and commit-got before or
//! after verified: both go on at once.
//!
//! A [`StepHook`] is called at each of them, by the thread that does the step, before anything
//! follows from it. Fault tests stop or kill a process there, and a target tells that a guest comes;
//! without a hook a step costs a test of a pointer.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    ownership::{Record, State, Tenure},
    stage::{Segment, SegmentKind},
    wire::Frame,
};

/// One of the two ends of a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where the guest leaves.
    Source,
    /// Where it arrives.
    Target,
}

/// Defines [`Step`] and the names of those of its steps that have no number.
macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident $side:ident $name:literal,)*) => {
        /// A step of a handoff, at one of its ends. Done, when it is named: what was sent was given to
        /// the link whole, what is durable survives a crash.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Step {
            $($(#[$doc])* $step,)*
            /// Source: a segment of this round was sent.
            RoundSegment(u32),
            /// Target: a segment of this round was applied.
            RoundApplied(u32),
        }

        impl Step {
            /// All steps but those of rounds, the source's first, each side's in the order of a
            /// handoff that goes well.
            pub const PLAIN: &'static [Self] = &[$(Self::$step,)*];

            fn plain_name(self) -> Option<&'static str> {
                match self {
                    $(Self::$step => Some($name),)*
                    Self::RoundSegment(_) | Self::RoundApplied(_) => None,
                }
            }

            /// Whose step it is.
            pub fn side(self) -> Side {
                match self {
                    $(Self::$step => Side::$side,)*
                    Self::RoundSegment(_) => Side::Source,
                    Self::RoundApplied(_) => Side::Target,
                }
            }
        }
    };
}

steps! {
    /// The record says that a handoff began.
    BegunDurable Source "begun-durable",
    /// Hello was sent.
    HelloSent Source "hello-sent",
    /// Welcome came.
    WelcomeGot Source "welcome-got",
    /// The guest is paused.
    Paused Source "paused",
    /// The paused machine's state is saved.
    StateSaved Source "state-saved",
    /// A segment of the machine's state was sent.
    StateSegment Source "state-segment",
    /// Prepare was sent, and all segments before it.
    PrepareSent Source "prepare-sent",
    /// Prepared came.
    PreparedGot Source "prepared-got",
    /// The record says that the epoch is the target's.
    CommittedDurable Source "committed-durable",
    /// Commit was sent.
    CommitSent Source "commit-sent",
    /// Resumed came.
    ResumedGot Source "resumed-got",
    /// The record says that the guest runs at the target.
    ReleasedDurable Source "released-durable",
    /// Released was sent.
    ReleasedSent Source "released-sent",
    /// Declined came.
    DeclinedGot Source "declined-got",
    /// The guest goes on here after a handoff that failed.
    RunsOn Source "runs-on",
    /// The record says that the guest stays.
    KeptDurable Source "kept-durable",
    /// Abort was sent.
    AbortSent Source "abort-sent",
    /// The Hello that begins the handoff came.
    HelloGot Target "hello-got",
    /// Memory, disk and devices are reserved.
    Reserved Target "reserved",
    /// The record says that the offer was taken.
    OfferDurable Target "offer-durable",
    /// Welcome was sent.
    WelcomeSent Target "welcome-sent",
    /// Prepare came.
    PrepareGot Target "prepare-got",
    /// All is in place, verified, and the disk is durable.
    Verified Target "verified",
    /// The record says so.
    PreparedDurable Target "prepared-durable",
    /// Prepared was sent.
    PreparedSent Target "prepared-sent",
    /// Commit came.
    CommitGot Target "commit-got",
    /// The record says that the guest is this side's.
    OwnerDurable Target "owner-durable",
    /// The guest runs.
    Running Target "running",
    /// Resumed was sent.
    ResumedSent Target "resumed-sent",
    /// Released came.
    ReleasedGot Target "released-got",
    /// The record says that the source has let go.
    SettledDurable Target "settled-durable",
    /// The record says that the guest will not run here.
    DeclinedDurable Target "declined-durable",
    /// Declined was sent.
    DeclinedSent Target "declined-sent",
}

impl Step {
    /// What it means that this frame was sent.
    pub(crate) fn sent(frame: &Frame) -> Option<Self> {
        match frame {
            Frame::Hello(_) => Some(Self::HelloSent),
            Frame::Welcome(_) => Some(Self::WelcomeSent),
            Frame::Prepare(_) => Some(Self::PrepareSent),
            Frame::Prepared { .. } => Some(Self::PreparedSent),
            Frame::Declined { .. } => Some(Self::DeclinedSent),
            Frame::Commit(_) => Some(Self::CommitSent),
            Frame::Resumed(_) => Some(Self::ResumedSent),
            Frame::Released(_) => Some(Self::ReleasedSent),
            Frame::Abort { .. } => Some(Self::AbortSent),
            _ => None,
        }
    }

    /// What it means that this segment was sent.
    pub(crate) fn sent_segment(segment: &Segment) -> Self {
        match segment.kind {
            SegmentKind::Chunks => Self::RoundSegment(segment.round),
            SegmentKind::MachineState => Self::StateSegment,
        }
    }

    /// What it means that this frame came.
    pub(crate) fn got(frame: &Frame) -> Option<Self> {
        match frame {
            Frame::Welcome(_) => Some(Self::WelcomeGot),
            Frame::Prepare(_) => Some(Self::PrepareGot),
            Frame::Prepared { .. } => Some(Self::PreparedGot),
            Frame::Declined { .. } => Some(Self::DeclinedGot),
            Frame::Commit(_) => Some(Self::CommitGot),
            Frame::Resumed(_) => Some(Self::ResumedGot),
            Frame::Released(_) => Some(Self::ReleasedGot),
            _ => None,
        }
    }

    /// What it means that this record is on disk.
    pub(crate) fn durable(side: Side, record: &Record) -> Option<Self> {
        match (side, &record.state) {
            (Side::Source, State::HandingOff { .. }) => Some(Self::BegunDurable),
            (Side::Source, State::Committed { .. }) => Some(Self::CommittedDurable),
            (Side::Source, State::Released { .. }) => Some(Self::ReleasedDurable),
            (Side::Source, State::Owner(_)) => Some(Self::KeptDurable),
            (Side::Target, State::Receiving { .. }) => Some(Self::OfferDurable),
            (Side::Target, State::Prepared { .. }) => Some(Self::PreparedDurable),
            (Side::Target, State::Owner(Tenure::Unconfirmed { .. })) => Some(Self::OwnerDurable),
            (Side::Target, State::Owner(_)) => Some(Self::SettledDurable),
            (Side::Target, State::Declined { .. }) => Some(Self::DeclinedDurable),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.plain_name()) {
            (Self::RoundSegment(round), _) => write!(f, "round-{round}-segment"),
            (Self::RoundApplied(round), _) => write!(f, "round-{round}-applied"),
            (_, name) => f.write_str(name.unwrap_or_default()),
        }
    }
}

/// A name that is no step's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no step of a handoff: docs/protocol.md lists them")]
pub struct UnknownStep(String);

impl FromStr for Step {
    type Err = UnknownStep;

    fn from_str(name: &str) -> Result<Self, UnknownStep> {
        let unknown = || UnknownStep(name.into());
        let plain = |step: &&Self| step.plain_name() == Some(name);
        if let Some(step) = Self::PLAIN.iter().find(plain) {
            return Ok(*step);
        }
        let round = name.strip_prefix("round-").and_then(|rest| rest.split_once('-'));
        let (number, what) = round.ok_or_else(unknown)?;
        let number = number.parse().map_err(|_| unknown())?;
        match what {
            "segment" => Ok(Self::RoundSegment(number)),
            "applied" => Ok(Self::RoundApplied(number)),
            _ => Err(unknown()),
        }
    }
}

/// Called at each step that a handoff reaches; by default nobody is.
#[derive(Clone, Default)]
pub struct StepHook(Option<Arc<dyn Fn(Step) + Send + Sync>>);

impl StepHook {
    /// Calls `hook`, on the thread that does the step: the handoff waits for it.
    pub fn new(hook: impl Fn(Step) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    /// A step was done, if this is one. It is logged, within the handoff's span: who measures sees on
    /// both sides when what was done.
    pub(crate) fn reached(&self, step: impl Into<Option<Step>>) {
        let Some(step) = step.into() else { return };
        tracing::debug!(%step, "reached");
        self.call(step);
    }

    /// Calls the hook, if there is one: for a hook that is made of another.
    pub fn call(&self, step: Step) {
        if let Some(hook) = &self.0 {
            hook(step);
        }
    }
}

impl fmt::Debug for StepHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "StepHook(set)" } else { "StepHook(none)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_are_different() {
        let rounds = [Step::RoundSegment(1), Step::RoundApplied(12)];
        let mut names = std::collections::HashSet::new();
        for step in Step::PLAIN.iter().copied().chain(rounds) {
            let name = step.to_string();
            assert_eq!(name.parse(), Ok(step));
            assert!(names.insert(name));
        }
        for bad in ["", "round", "round-x-segment", "round-1", "round--1-applied", "Paused"] {
            assert_eq!(bad.parse::<Step>(), Err(UnknownStep(bad.into())));
        }
    }
}
