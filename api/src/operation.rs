//! Operations: whatever takes longer than a request may.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Hands a VM off to a peer.
    Handoff,
    /// Reads all of a base and compares it with its manifest.
    BaseVerify,
    /// Fetches a base from a peer.
    BasePull,
    /// Sends a base to a peer.
    BasePush,
    /// Mends a damaged base with what a peer has of it.
    BaseHeal,
    /// Makes a base of files.
    BaseImport,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is being done.
    Running,
    /// It is done; `result` has what came of it.
    Done,
    /// It was not done; `error` says why.
    Failed,
    /// It was given up at somebody's word.
    Cancelled,
}

impl State {
    /// Whether nothing changes any more.
    pub fn is_over(self) -> bool {
        self != Self::Running
    }

    /// The word for people, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How much of an operation is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes in all, as far as that is known; a handoff's grows with what the guest changes.
    pub total_bytes: u64,
    /// Bytes a second, lately.
    pub rate_bytes_per_s: u64,
}

/// Something that takes long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: Kind,
    /// The VM or base that it does it with.
    pub subject: String,
    /// The peer, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// How far it is.
    pub state: State,
    /// How much is done.
    pub progress: Progress,
    /// What a handoff does just now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff: Option<crate::HandoffProgress>,
    /// When it began, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// When it was over, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    /// What came of it: of a handoff, its report; of a base that came or went, what moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// Why it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::Problem>,
}
