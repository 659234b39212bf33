//! What the drivers are told, and how they end.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, never};

use super::{Backoff, PipelineOptions, Untold};
use crate::{
    Refusal,
    order::Sequence,
    ownership::{JournalError, OwnershipError, Question, Record},
    policy::CutOverPolicy,
    report::Report,
    root::StateTable,
    stage::{SentCache, StageOptions},
    step::StepHook,
    vm::VmError,
    wire::Versions,
};

/// Bounds on every wait. The defaults suit a wide-area link of a few Mbps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// To make the first link.
    pub connect: Duration,
    /// One attempt to make a later one.
    pub attempt: Duration,
    /// Between two of those.
    pub retry: Backoff,
    /// From a link to the peer's first frame.
    pub greeting: Duration,
    /// From then until the target is ready for the guest: it opens bases, reserves memory and disk,
    /// and verifies what it holds of an earlier visit.
    pub ready: Duration,
    /// A link on which nothing was heard for so long is given up.
    pub silence: Duration,
    /// How often the source says something, so that silence means a broken link.
    pub ping_every: Duration,
    /// How long a broken link may stay broken while the guest runs on the source, before the handoff
    /// is aborted; at the target, before what came is dropped.
    pub relink_grace: Duration,
    /// The same while the guest is paused and nothing is committed: then it runs again on the source.
    pub relink_paused: Duration,
    /// How long a side that lost all but its record asks the other, where the answer changes nothing.
    pub ask: Duration,
    /// How long the target may leave segments unapplied while the link works.
    pub stall: Duration,
    /// From Prepare sent until Prepared; disk and verification at the target fall into it. Before an
    /// early commit is confirmed, they fall into that wait.
    pub prepare: Duration,
    /// After Committed, how long the source keeps trying before it reports
    /// [`SendOutcome::InDoubt`].
    pub commit: Duration,
    /// How long a target keeps a prepared copy whose source is silent before it declines.
    pub hold_prepared: Duration,
    /// How long a target waits for Released after the guest runs.
    pub release: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            connect: s(5),
            attempt: s(2),
            retry: Backoff::default(),
            greeting: s(20),
            ready: s(120),
            silence: s(10),
            ping_every: s(1),
            relink_grace: s(120),
            relink_paused: s(5),
            ask: s(10),
            stall: s(180),
            prepare: s(120),
            commit: s(60),
            hold_prepared: s(600),
            release: s(5),
        }
    }
}

/// When the source commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CommitMode {
    /// Right behind the last segment: the guest waits for one way of the link only. From then on the
    /// source waits for the target's word, with the guest paused.
    #[default]
    Early,
    /// When the target has said that it holds everything, verified: a round trip more, in which the
    /// source can still go back by itself. With a target that knows nothing else, always.
    Prepared,
}

impl CommitMode {
    const ALL: [Self; 2] = [Self::Early, Self::Prepared];

    /// As it is written on command lines and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Early => "early",
            Self::Prepared => "prepared",
        }
    }
}

impl fmt::Display for CommitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CommitMode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.name() == s);
        found.ok_or_else(|| format!("`{s}` is neither early nor prepared"))
    }
}

/// How to send.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// The VM's name, as the target will know it.
    pub vm_name: String,
    /// Where to, for the ownership record: after a crash the peer is asked there.
    pub peer: String,
    /// [`crate::Offer::machine`].
    pub machine: Vec<u8>,
    /// Protocol versions offered.
    pub versions: Versions,
    /// When to commit.
    pub commit: CommitMode,
    /// Whether both sides hash all RAM and disk at cutover. Costs downtime.
    pub audit: bool,
    /// What this side received of the newest of these states, as [`Received::contents`] had it:
    /// what changed since then can be sent as what changed in it.
    pub contents: Option<Arc<SentCache>>,
    /// Which optimisations are used.
    pub stages: StageOptions,
    /// How the stages work together.
    pub pipeline: PipelineOptions,
    /// When to cut over.
    pub policy: CutOverPolicy,
    /// How the chunks of a round are ordered.
    pub order: Sequence,
    /// States of this VM that were left at this peer, the likeliest first; those beyond
    /// [`MAX_KNOWN`](crate::vm::MAX_KNOWN) are not offered. If the peer still holds one, only what
    /// changed since is sent.
    pub known: Vec<StateTable>,
    /// Bounds on waits.
    pub limits: Limits,
    /// Called at each step.
    pub steps: StepHook,
}

impl SendOptions {
    /// The defaults for a VM and a peer.
    pub fn new(vm_name: impl Into<String>, peer: impl Into<String>, machine: Vec<u8>) -> Self {
        Self {
            vm_name: vm_name.into(),
            peer: peer.into(),
            machine,
            versions: Versions::OURS,
            commit: CommitMode::default(),
            audit: false,
            stages: StageOptions::default(),
            pipeline: PipelineOptions::default(),
            policy: CutOverPolicy::default(),
            order: Sequence::default(),
            known: Vec::new(),
            contents: None,
            limits: Limits::default(),
            steps: StepHook::default(),
        }
    }
}

/// How a handoff ended at the source.
#[derive(Debug)]
#[must_use]
pub enum SendOutcome {
    /// The guest runs at the peer; the paused copy here may be deleted.
    Moved {
        /// What was done.
        report: Report,
        /// What the peer holds: with it and the paused copy, [`SendOptions::known`] of a handoff
        /// on the way back at the peer, and [`crate::vm::Prepared::start`] here.
        table: StateTable,
    },
    /// The guest goes on running here.
    KeptHere {
        /// Why.
        reason: KeptReason,
        /// What was done until then.
        report: Report,
        /// The handoff, if the target may go on waiting for it: [`super::say_farewell`].
        untold: Option<Untold>,
    },
    /// Committed, but the peer did not confirm in time: the guest stays paused here and may run
    /// there. Keep the VM and call [`super::send_resume`] when the peer can be reached.
    InDoubt {
        /// What was done until then.
        report: Report,
    },
}

impl SendOutcome {
    /// The same, with what the target was not told.
    pub(super) fn leaving(self, untold: Option<Untold>) -> Self {
        match self {
            Self::KeptHere { reason, report, .. } => Self::KeptHere { reason, report, untold },
            decided => decided,
        }
    }
}

/// Why the guest stayed.
#[derive(Debug, thiserror::Error)]
pub enum KeptReason {
    /// The user cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The target did not take it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The target took it back: it could not verify or run the guest.
    #[error("the peer declined: {0}")]
    Declined(String),
    /// The target gave up while receiving.
    #[error("the peer gave up: {0}")]
    PeerAborted(String),
    /// No link, or a link that broke and did not come back.
    #[error("{0}")]
    Link(String),
    /// The peer does not follow the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// A wait ran out.
    #[error("{what} took longer than {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// The VM or its base could not be read.
    #[error("{doing}: {source}")]
    Vm {
        /// What was being done.
        doing: &'static str,
        /// What the VM said.
        source: VmError,
    },
    /// The states of the two sides differ.
    #[error(transparent)]
    Ownership(OwnershipError),
    /// The decision could not be made durable.
    #[error(transparent)]
    Journal(JournalError),
}

/// What leaves the guest in a state that a person must look at, or keeps a handoff from beginning.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The VM is not here to be handed off. Nothing happened.
    #[error(transparent)]
    NotHere(#[from] OwnershipError),
    /// There is no ownership record. Nothing happened.
    #[error("this VM has no ownership record: it cannot be handed off")]
    NoRecord,
    /// The record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The handoff failed and the guest could not be set running again.
    #[error(
        "the handoff failed ({reason}), and then the guest could not be resumed here: {source}"
    )]
    NotResumed {
        /// Why the handoff failed.
        reason: String,
        /// Why the guest does not run.
        source: VmError,
    },
}

impl Limits {
    /// For how long a target with bounds like these waits for its source, `complete` or not: what a copy
    /// that is whole may wait for is worth more.
    pub(super) fn target_waits(&self, complete: bool) -> Duration {
        match complete {
            true => self.hold_prepared,
            false => self.relink_grace + self.silence * 2,
        }
    }

    /// The defaults of a target: it waits for its source for longer than the source tries, which may
    /// have noticed later that the link is broken.
    pub fn at_target() -> Self {
        let limits = Self::default();
        Self { relink_grace: limits.relink_grace + limits.silence * 2, ..limits }
    }
}

/// The default of [`ReceiveOptions::contents_bytes`].
pub const CONTENTS_BYTES: usize = 24 << 20;

/// How to receive.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// Where the VM comes from, for the ownership record and messages.
    pub peer: String,
    /// Protocol versions accepted.
    pub versions: Versions,
    /// Bounds on waits.
    pub limits: Limits,
    /// How many bytes of segments the source may have on their way.
    pub window_bytes: u64,
    /// Bytes of what comes that are kept in memory for the way back: [`Received::contents`]. Fewer
    /// where the tables of a guest that changed much need the room: both together take no more than
    /// [`TABLES_BYTES`], if the tables alone do not.
    pub contents_bytes: usize,
    /// Threads that decode segments, from 1 to [`MAX_DECODERS`]. One more applies what they decoded.
    pub workers: usize,
    /// Brings later offers of the VM by the same source: this one is given up for them, unless it is
    /// decided already. Whose they are is for whoever sends them to know.
    pub newer: Receiver<Question>,
    /// Called at each step.
    pub steps: StepHook,
}

/// What tables and kept contents of one guest may take together: what a window, frames and decoders
/// leave of 64 MiB.
pub const TABLES_BYTES: usize = 24 << 20;

/// The most threads that decode for one guest: each has the memory of a decoder.
pub const MAX_DECODERS: usize = 4;

impl ReceiveOptions {
    /// The defaults for a peer.
    pub fn new(peer: impl Into<String>) -> Self {
        let peer = peer.into();
        let window_bytes = crate::source::DEFAULT_WINDOW_BYTES;
        Self {
            peer,
            versions: Versions::OURS,
            limits: Limits::at_target(),
            window_bytes,
            contents_bytes: CONTENTS_BYTES,
            workers: default_decoders(),
            newer: never(),
            steps: StepHook::default(),
        }
    }
}

/// One decoder for each core, at most [`MAX_DECODERS`].
fn default_decoders() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_DECODERS)
}

/// A guest that arrived and runs here.
#[derive(Debug)]
pub struct Received<Vm> {
    /// The VM, running.
    pub vm: Vm,
    /// The ownership record, as it is on disk.
    pub record: Record,
    /// Whether the source confirmed that it let go.
    pub released: bool,
    /// Hash of all RAM and disk at cutover, if the source asked for it.
    pub full_hash: Option<[u8; 32]>,
    /// The state in which it arrived: what the source knows too.
    pub table: StateTable,
    /// Some of that state: what a handoff back can build on. Good for [`SendOptions::contents`] as
    /// long as the VM is here.
    pub contents: SentCache,
    /// Bytes received sent on all links of this handoff.
    pub bytes_received: u64,
    /// Bytes sent on all links of this handoff.
    pub bytes_sent: u64,
}

/// Why no guest arrived. In each case nothing runs here.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// This side did not take the offer.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The source aborted.
    #[error("the source aborted: {0}")]
    Aborted(String),
    /// This side declined, durably.
    #[error("declined: {0}")]
    Declined(String),
    /// The link broke and did not come back in time.
    #[error("the link was lost and did not come back: {0}")]
    Link(String),
    /// The record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// This side owns the guest, but could not start it. It can be booted from its disk.
    #[error("the guest is here but could not be started: {0}; boot it from its disk")]
    NotStarted(VmError),
}
