//! The messages.

use serde::{Deserialize, Serialize};

use crate::{
    Offer, Refusal,
    ownership::{Epoch, HandoffId, Question, Verdict},
    root::StateRoot,
    stage::Segment,
    vm::MAX_ALSO,
};

/// The oldest protocol version that this program speaks.
pub const VERSION_MIN: u32 = 3;
/// The newest protocol version that this program speaks.
pub const VERSION_MAX: u32 = 5;
/// Since this version a source may commit right behind the last segment.
pub const VERSION_EARLY_COMMIT: u32 = 4;
/// Since this version a target keeps the part of a segment that came before a link broke.
pub const VERSION_REST: u32 = 5;

/// A range of protocol versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u32,
    /// The newest.
    pub max: u32,
}

impl Versions {
    /// What this program speaks.
    pub const OURS: Self = Self { min: VERSION_MIN, max: VERSION_MAX };

    /// Whether a version is one of these.
    pub fn holds(self, version: u32) -> bool {
        (self.min..=self.max).contains(&version)
    }

    /// The newest version that both speak.
    pub fn agree(self, theirs: Self) -> Result<u32, Refusal> {
        let newest = self.max.min(theirs.max);
        if newest < self.min.max(theirs.min) {
            return Err(Refusal::Version { ours: self.max, theirs: theirs.max });
        }
        Ok(newest)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Source: the first frame of every link.
    Hello(Box<Hello>),
    /// Target: the handoff is taken, or goes on.
    Welcome(Welcome),
    /// Target: the handoff is not taken. Nothing of it remains.
    Refuse(Refusal),
    /// Source: chunks, or the machine's state.
    Segment(Segment),
    /// Source: what follows, in the encoding of a segment, what the target holds of it. Since
    /// [`VERSION_REST`].
    Rest(Vec<u8>),
    /// Target: how far segments are applied.
    Ack(Ack),
    /// Source: this was all; verify it.
    Prepare(Prepare),
    /// Target: verified, in place, durable.
    Prepared {
        /// The handoff and its epoch.
        handoff: Question,
        /// The root that the target computed.
        root: StateRoot,
        /// Hash of all RAM and disk, if it was asked for.
        full_hash: Option<[u8; 32]>,
    },
    /// Target: durably declined.
    Declined {
        /// The handoff and its epoch.
        handoff: Question,
        /// Why, for a person.
        reason: String,
    },
    /// Source: the epoch is the target's.
    Commit(Commit),
    /// Target: the guest runs or has run here.
    Resumed(Resumed),
    /// Source: it has let go.
    Released(Question),
    /// Either: the handoff is over without a commit.
    Abort {
        /// The handoff and its epoch.
        handoff: Question,
        /// Why, for a person.
        reason: String,
    },
    /// Either: are you there?
    Ping(u64),
    /// Either: the answer, with the number of the question.
    Pong(u64),
    /// The first frame of a link that is for something else than a handoff.
    Call(Call),
    /// The called side: what was called for goes on from here, by rules of its own.
    Called {
        /// The version of the service that both speak.
        version: u32,
    },
    /// Either: how does this handoff stand?
    Query(Question),
    /// Either: the answer.
    Status {
        /// What was asked.
        question: Question,
        /// What the record says.
        verdict: Verdict,
    },
}

/// The first frame: who, what and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the source speaks. At a fixed place in all versions.
    pub versions: Versions,
    /// The handoff and the epoch that it gives to the target.
    pub handoff: Question,
    /// The VM's name at the source, by which the target finds what it knows of it.
    pub vm_name: String,
    /// Why this link was made.
    pub intent: Intent,
    /// Whether both sides hash all RAM and disk at cutover, for tests and audits.
    pub audit: bool,
}

/// What a link is for that is not for a handoff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Versions of the service that the caller speaks.
    pub versions: Versions,
    /// The name of the service.
    pub service: String,
}

/// Why a link was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Intent {
    /// A handoff begins with this offer.
    New(Offer),
    /// The link of a running handoff broke; it goes on here.
    Resume,
    /// Only to learn, or to say again, how a handoff ended.
    Settle,
}

/// The target takes the handoff, or goes on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version both speak from now on.
    pub version: u32,
    /// The last segment applied; zero if none.
    pub applied_up_to: u64,
    /// How many bytes of segments may be on their way unacknowledged.
    pub window_bytes: u64,
    /// What of the offer's choices the target took. The same on every link of a handoff.
    pub agreed: Agreed,
    /// Bytes that the target holds of the encoding of the next segment, which an earlier link broke
    /// off. If there are any, the frame is of a type of its own, since [`VERSION_REST`].
    #[serde(skip)]
    pub held_bytes: u32,
}

/// What a target holds of what a source offered to build on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Bit n: the target holds base n of [`Offer::also`], and references to it may be sent.
    pub bases: u8,
    /// The number in [`Offer::known`] of the state in which the target begins; none where it
    /// begins in the base state.
    pub known: Option<u8>,
}

impl Agreed {
    /// Whether this answers the offer: nothing is taken that was not offered.
    pub fn answers(&self, offer: &Offer) -> bool {
        let also = offer.also.len().min(MAX_ALSO);
        u32::from(self.bases) >> also == 0
            && self.known.is_none_or(|n| usize::from(n) < offer.known.len())
    }

    /// Whether base n of [`Offer::also`] is held.
    pub fn holds(&self, n: usize) -> bool {
        n < MAX_ALSO && self.bases >> n & 1 == 1
    }
}

/// How far segments are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The last segment applied.
    pub applied_up_to: u64,
}

/// All was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The handoff and its epoch.
    pub handoff: Question,
    /// The number of the last segment.
    pub last_seq: u64,
    /// The root that the source computed.
    pub root: StateRoot,
    /// Hash of all RAM and disk, if auditing.
    pub full_hash: Option<[u8; 32]>,
    /// Whether Commit comes without waiting for Prepared. Said by the frame's type, since
    /// [`VERSION_EARLY_COMMIT`].
    #[serde(skip)]
    pub early: bool,
}

/// The epoch is the target's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The handoff and its epoch.
    pub handoff: Question,
}

/// The guest runs or has run at the target. Times are the target's own, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The handoff and its epoch.
    pub handoff: Question,
    /// From the Prepare frame to Prepared durable.
    pub prepare_us: u64,
    /// From the Commit frame to the ownership record durable.
    pub commit_us: u64,
    /// From there until the guest ran.
    pub resume_us: u64,
}

impl Resumed {
    /// Said from the record alone, by a process that did not take the times.
    pub fn untimed(handoff: Question) -> Self {
        Self { handoff, prepare_us: 0, commit_us: 0, resume_us: 0 }
    }
}

/// The part of a Hello that depends on the version.
#[derive(Serialize, Deserialize)]
pub(super) struct HelloBody {
    pub(super) handoff: Question,
    pub(super) vm_name: String,
    pub(super) intent: Intent,
    pub(super) audit: bool,
}

impl Frame {
    /// The name of the message, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Welcome(_) => "Welcome",
            Self::Refuse(_) => "Refuse",
            Self::Segment(_) => "Segment",
            Self::Rest(_) => "Rest",
            Self::Ack(_) => "Ack",
            Self::Prepare(_) => "Prepare",
            Self::Prepared { .. } => "Prepared",
            Self::Declined { .. } => "Declined",
            Self::Commit(_) => "Commit",
            Self::Resumed(_) => "Resumed",
            Self::Released(_) => "Released",
            Self::Abort { .. } => "Abort",
            Self::Ping(_) => "Ping",
            Self::Pong(_) => "Pong",
            Self::Call(_) => "Call",
            Self::Called { .. } => "Called",
            Self::Query(_) => "Query",
            Self::Status { .. } => "Status",
        }
    }
}

impl Hello {
    /// The handoff, for logs.
    pub fn id(&self) -> HandoffId {
        self.handoff.handoff
    }

    /// What is offered, if a handoff begins.
    pub fn offer(&self) -> Option<&Offer> {
        match &self.intent {
            Intent::New(offer) => Some(offer),
            Intent::Resume | Intent::Settle => None,
        }
    }

    /// The epoch that the handoff gives to the target.
    pub fn epoch(&self) -> Epoch {
        self.handoff.epoch
    }
}
