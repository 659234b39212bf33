//! How commands talk to a VM's process: JSON lines over a Unix socket in the VM's directory.
//!
//! ```text
//! client                                   VM process
//! {"version":1,"do":"handoff",...}  ──►
//!                                   ◄──    {"progress":{...}}     any number, may be dropped
//!                                   ◄──    {"moved":{...}} or {"failed":{...}}
//! ```
//!
//! One request a connection. A file descriptor (an incoming link, a file to write) travels with the
//! first byte of the request it belongs to: the process opens nothing for its clients, as it may see
//! less than they do. Whoever passes a file makes it durable, and gives it its name. After `attached` the connection carries the raw serial console.
//! Who may open the socket is decided by the directory's mode.

pub(crate) mod channel;
pub(crate) mod client;
pub(crate) mod server;

use handoff::{
    engine::CommitMode,
    order::Sequence,
    ownership::Question,
    policy::Objective,
    stage::{DeltaMode, StageOptions},
    tls::PeerKey,
};
use serde::{Deserialize, Serialize};

use crate::{
    cli::{EncodeArgs, LinkArgs, Means, PaceArgs, PipelineArgs},
    failure::{Exit, Failure},
    peers::Peer,
};

/// What may be kept of a VM that moved, unless said otherwise.
pub(crate) const DEFAULT_KEEP_MIB: u64 = 1024;
/// Threads that compress, at most.
const MAX_WORKERS: u8 = 16;

/// Version of these messages. Both ends are this binary, but an upgrade may happen between.
pub(crate) const VERSION: u32 = 2;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Envelope {
    /// [`VERSION`] of the client.
    pub(crate) version: u32,
    /// The request.
    #[serde(flatten)]
    pub(crate) request: Request,
}

/// A request to a VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// How is the VM?
    Status,
    /// What is its machine?
    Describe,
    /// Stop its vCPUs and drain its devices.
    Pause,
    /// Let it go on.
    Resume,
    /// Flush its disk and end the process.
    Stop {
        /// Even while a handoff is not decided.
        force: bool,
    },
    /// Attach to the serial console.
    Console,
    /// Send it to a peer.
    Handoff(Box<HandoffRequest>),
    /// Give up a handoff that is not committed.
    CancelHandoff,
    /// Write the paused VM's disk, flattened, to the file that comes along.
    ExportDisk {
        /// What the file will be called, for messages.
        path: String,
    },
    /// Write the VM to the file that comes along.
    Save(SaveRequest),
    /// Record what the running guest changes, into the file that comes along.
    Record(RecordRequest),
    /// End a recording early, and write what there is of it.
    EndRecording,
    /// Whether this process receives a handoff: asked before a link of it is handed over.
    Expects {
        /// The handoff, in hex.
        handoff: String,
    },
    /// A handoff of this VM is offered anew: what this process receives is given up for it, if it is older,
    /// of the same source, and not decided. Done means that the reception has been told.
    Newer {
        /// What is offered.
        offered: Question,
        /// Who offers it; nobody in particular without TLS.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        caller: Option<PeerKey>,
    },
    /// A link of the handoff that this process receives; its socket comes along. From then on nobody
    /// else uses the link.
    AdoptLink(Adopted),
}

/// A link that passes from one process to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Adopted {
    /// The handoff, in hex.
    pub(crate) handoff: String,
    /// What was already read from the link, in hex.
    pub(crate) hello: String,
    /// What was agreed on with TLS: with whom, and the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<AdoptedTls>,
}

/// The TLS of a link that passes from one process to another.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AdoptedTls {
    /// Who is at the other end.
    pub(crate) peer: Peer,
    /// The session, in hex: the link's secrets.
    pub(crate) session: String,
}

impl std::fmt::Debug for AdoptedTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AdoptedTls({})", self.peer.key)
    }
}

/// How to hand a VM off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandoffRequest {
    /// Where to, as the ownership record is to name it: see [`crate::peers::Endpoint`].
    pub(crate) peer: String,
    /// With whom, and as whom; none without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<HandoffTls>,
    /// Hash all of RAM and disk on both sides at cutover and compare.
    pub(crate) audit: bool,
    /// When the guest is paused, and how rounds go until then.
    pub(crate) pace: Pace,
    /// What may be kept of the VM when it moved.
    pub(crate) keep_mib: u64,
    /// How it is made small.
    pub(crate) encode: Encode,
    /// How that is compressed, and with how much of this host.
    pub(crate) pipeline: PipelineArgs,
    /// How long links are waited for.
    #[serde(default)]
    pub(crate) link: LinkArgs,
}

impl From<&HandoffRequest> for howdah_api::HandoffSpec {
    /// As far as it can be said; whoever cares compares what [`HandoffRequest::try_from`] makes of it.
    fn from(request: &HandoffRequest) -> Self {
        Self {
            peer: request.peer.clone(),
            plain: false,
            audit: request.audit,
            objective: Some(request.pace.objective.to_string()),
            throttle: request.pace.throttle,
            keep_mib: Some(request.keep_mib),
            mode: Some(request.pipeline.mode.to_string()),
            workers: request.pipeline.workers,
        }
    }
}

impl TryFrom<&howdah_api::HandoffSpec> for HandoffRequest {
    type Error = Failure;

    /// What is not said is as `howdah handoff` has it.
    fn try_from(spec: &howdah_api::HandoffSpec) -> Result<Self, Failure> {
        let wrong = |what: &str, why: &dyn std::fmt::Display| {
            Failure::new(Exit::Usage, what, why, "correct it or leave it out")
        };
        let mut request = Self {
            audit: spec.audit,
            keep_mib: spec.keep_mib.unwrap_or(DEFAULT_KEEP_MIB),
            ..Self::default()
        };
        request.pace.throttle = spec.throttle;
        if let Some(objective) = &spec.objective {
            request.pace.objective = objective.parse().map_err(|e| wrong("objective", &e))?;
        }
        if let Some(mode) = &spec.mode {
            request.pipeline.mode = mode.parse().map_err(|e| wrong("mode", &e))?;
        }
        if let Some(workers) = spec.workers {
            if !(1..=MAX_WORKERS).contains(&workers) {
                return Err(wrong("workers", &format_args!("from 1 to {MAX_WORKERS}")));
            }
            request.pipeline.workers = Some(workers);
        }
        Ok(request)
    }
}

/// Both ends of a TLS link to be made. The process of a VM cannot look them up: it sees the files of its
/// VM only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandoffTls {
    /// The peer, which may receive the VM.
    pub(crate) peer: Peer,
    /// This cloudlet's key pair, in PEM.
    pub(crate) identity: String,
}

impl std::fmt::Debug for HandoffTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HandoffTls({})", self.peer.key)
    }
}

/// What a handoff is to be good at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// The objective.
    #[serde(with = "by_name")]
    pub(crate) objective: Objective,
    /// Whether the guest may be slowed down.
    pub(crate) throttle: bool,
    /// The order of chunks.
    #[serde(with = "by_name")]
    pub(crate) order: Sequence,
    /// When the source commits.
    #[serde(with = "by_name")]
    pub(crate) commit: CommitMode,
}

impl From<PaceArgs> for Pace {
    fn from(PaceArgs { objective, throttle, order, commit }: PaceArgs) -> Self {
        Self { objective, throttle, order, commit }
    }
}

/// How to save a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SaveRequest {
    /// What the file will be called, for messages.
    pub(crate) path: String,
    /// Leave the VM paused when it is written: it is to be stopped when the file is durable.
    pub(crate) hold: bool,
    /// How it is made small.
    pub(crate) encode: Encode,
    /// How that is compressed.
    pub(crate) pipeline: PipelineArgs,
}

/// How to record a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordRequest {
    /// What the file will be called, for messages.
    pub(crate) path: String,
    /// For how long.
    pub(crate) for_ms: u64,
    /// How often it is looked at what changed.
    pub(crate) every_ms: u64,
    /// What may be held of contents.
    pub(crate) most_mib: u64,
}

/// By which means less is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Encode {
    /// Those that are not used.
    pub(crate) without: Vec<Means>,
    /// How deltas are made.
    #[serde(with = "by_name")]
    pub(crate) delta: DeltaMode,
}

/// What has a name, by that name.
mod by_name {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(it: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(it)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl From<EncodeArgs> for Encode {
    fn from(EncodeArgs { without, delta }: EncodeArgs) -> Self {
        Self { without, delta }
    }
}

impl Encode {
    /// As the engine wants it.
    pub(crate) fn options(&self) -> StageOptions {
        let mut options = StageOptions { delta: self.delta, ..StageOptions::default() };
        for means in &self.without {
            *match means {
                Means::Unchanged => &mut options.unchanged,
                Means::Reset => &mut options.reset,
                Means::Zero => &mut options.zero,
                Means::BaseDisk => &mut options.base_disk,
                Means::BaseMemory => &mut options.base_memory,
                Means::OtherBases => &mut options.other_bases,
                Means::Seen => &mut options.seen,
                Means::Known => &mut options.known,
                Means::Free => &mut options.free,
            } = false;
        }
        options
    }
}

/// What a VM's process answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// Done as asked.
    Done,
    /// The answer to [`Request::Status`].
    Status(Status),
    /// The answer to [`Request::Describe`]: the machine's profile, in hex.
    Machine(String),
    /// From here on the connection carries the console.
    Attached,
    /// A handoff goes on.
    Progress(Progress),
    /// The handoff is over and the peer runs the guest; its report.
    Moved(serde_json::Value),
    /// The VM is saved; the report.
    Saved(serde_json::Value),
    /// The guest was recorded; what is in the trace.
    Recorded(serde_json::Value),
    /// Not done.
    Failed(Failure),
}

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What a VM's process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Building the machine.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is paused by a user.
    Paused,
    /// The guest is paused while it is written to a file.
    Saving,
    /// The guest runs, and what it changes is recorded.
    Recording,
    /// The guest runs, or is about to move, and is being sent to a peer.
    HandingOff,
    /// Committed to a peer that has not confirmed: asked again until it does.
    InDoubt,
    /// A guest is being received.
    Receiving,
    /// The process is about to end.
    Stopping,
}

/// How a VM's process stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The process.
    pub(crate) pid: u32,
    /// What it is doing.
    pub(crate) phase: Phase,
    /// The ownership record, for people.
    pub(crate) ownership: String,
    /// The epoch of the record.
    pub(crate) epoch: u64,
    /// The handoff under way, either direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) progress: Option<Progress>,
}

/// How a handoff goes on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// The other side.
    pub(crate) peer: String,
    /// What is being done, in a word.
    pub(crate) stage: String,
    /// The round, from 1.
    pub(crate) round: u32,
    /// Bytes on the link so far.
    pub(crate) sent_bytes: u64,
    /// Guest bytes still to be looked at in this round.
    pub(crate) remaining_bytes: u64,
    /// Bytes a second on the link, lately.
    pub(crate) rate_bytes_per_s: u64,
    /// What a cutover now would cost.
    pub(crate) predicted_downtime_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::failure::Exit;

    /// One that is switched off is off, and no other.
    #[test]
    fn every_means_has_its_switch() {
        use clap::ValueEnum;
        let all = StageOptions::default();
        let mut seen = Vec::new();
        for means in Means::value_variants() {
            let encode = Encode { without: vec![*means], delta: DeltaMode::Auto };
            let less = format!("{:?}", encode.options());
            let missing =
                less.matches("false").count() - format!("{all:?}").matches("false").count();
            assert_eq!(missing, 1, "{means:?}");
            assert!(!seen.contains(&less), "{means:?}");
            seen.push(less);
        }
        for delta in DeltaMode::ALL {
            let encode = Encode { without: Vec::new(), delta };
            assert_eq!(encode.options().delta, delta);
            let text = serde_json::to_string(&encode).unwrap();
            assert_eq!(serde_json::from_str::<Encode>(&text).unwrap(), encode, "{text}");
        }
    }

    fn peer() -> Peer {
        let key = handoff::tls::Identity::generate().unwrap().key();
        Peer { bases: Some(vec!["web".into()]), ..Peer::new("a".parse().unwrap(), key) }
    }

    fn question() -> Question {
        use handoff::ownership::{Epoch, HandoffId, VmId};
        Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(u64::MAX) }
    }

    #[test]
    fn secrets_are_not_logged() {
        let tls = HandoffTls { peer: peer(), identity: "SECRET".into() };
        let request = HandoffRequest { tls: Some(tls), ..HandoffRequest::default() };
        assert!(!format!("{request:?}").contains("SECRET"));
        let tls = Some(AdoptedTls { peer: peer(), session: "SECRET".into() });
        assert!(!format!("{:?}", Adopted { tls, ..Adopted::default() }).contains("SECRET"));
    }

    #[test]
    fn messages_survive_the_wire() {
        let requests = [
            Request::Status,
            Request::Stop { force: true },
            Request::Newer { offered: question(), caller: Some(peer().key) },
            Request::Handoff(Box::new(HandoffRequest {
                peer: "b:1".into(),
                tls: Some(HandoffTls { peer: peer(), identity: "PEM".into() }),
                audit: true,
                pace: Pace {
                    objective: Objective::Deadline(Duration::from_secs(9)),
                    throttle: true,
                    order: Sequence::Ascending,
                    commit: CommitMode::Prepared,
                },
                keep_mib: 7,
                encode: Encode { without: vec![Means::BaseDisk], delta: DeltaMode::None },
                pipeline: PipelineArgs { workers: Some(2), ..PipelineArgs::default() },
                link: LinkArgs { retry_for_s: Some(9), ..LinkArgs::default() },
            })),
            Request::AdoptLink(Adopted {
                handoff: "00".into(),
                hello: "ff".into(),
                tls: Some(AdoptedTls { peer: peer(), session: "13".into() }),
            }),
        ];
        for request in requests {
            let sent = Envelope { version: VERSION, request };
            let text = serde_json::to_string(&sent).unwrap();
            assert_eq!(serde_json::from_str::<Envelope>(&text).unwrap(), sent, "{text}");
        }
        let failure = Failure::new(Exit::Conflict, "a", "b", "c");
        let replies = [
            Reply::Done,
            Reply::Progress(Progress { round: 3, ..Progress::default() }),
            Reply::Failed(Failure { report: Some(serde_json::json!({"rounds": 1})), ..failure }),
        ];
        for sent in replies {
            let text = serde_json::to_string(&sent).unwrap();
            let got: Reply = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&got).unwrap(), text);
        }
    }
}
