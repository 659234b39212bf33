//! Bases: what VMs start from, and what peers need not be sent.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A base of a cloudlet's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Base {
    /// What it is made of, as 64 hex digits: the same id is the same base, on every cloudlet.
    pub id: String,
    /// What it is called here.
    pub names: Vec<String>,
    /// Length of its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Of a base with memory, that of its VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A base that was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseRemoved {
    /// Its id.
    pub id: String,
}

/// Which bases are to be removed: those that nothing uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BasesGc {
    /// Those with a name too, if no VM is made from them and nothing has them open.
    #[serde(default)]
    pub named: bool,
    /// Only say what would be removed.
    #[serde(default)]
    pub dry_run: bool,
}

/// A base, and what a collection made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseJudged {
    /// Its id.
    pub id: String,
    /// What it is called here.
    pub names: Vec<String>,
    /// What it takes on disk.
    pub bytes: u64,
    /// Why it stays; not said of one that does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

/// What a collection did, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BasesCollected {
    /// Every base.
    pub bases: Vec<BaseJudged>,
    /// What was freed, or would be.
    pub freed_bytes: u64,
    /// Whether nothing was removed, as was asked for.
    pub dry_run: bool,
}

/// How a base is sent to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BasePush {
    /// The peer: its name, its `HOST:PORT`, or `NAME@HOST:PORT`.
    #[schema(min_length = 1, max_length = 300)]
    pub peer: String,
    /// What to call it there; as here, if not said.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    pub called: Option<String>,
}

/// How a base is fetched from a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BasePull {
    /// The peer: its name, its `HOST:PORT`, or `NAME@HOST:PORT`.
    #[schema(min_length = 1, max_length = 300)]
    pub peer: String,
    /// What to call it here; as there, if not said. A name that another base has moves to it.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    pub called: Option<String>,
}

/// Who mends a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BaseHeal {
    /// The peer: its name, its `HOST:PORT`, or `NAME@HOST:PORT`.
    #[schema(min_length = 1, max_length = 300)]
    pub peer: String,
}

/// A base that came, went or was mended: the result of such an operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BaseMoved {
    /// Its id.
    pub id: String,
    /// What it is called where it is now, if it has a name there.
    pub name: Option<String>,
    /// The peer.
    pub peer: String,
    /// Whether it was there before.
    pub already: bool,
    /// Chunks whose contents went over the link.
    pub chunks_on_link: u64,
    /// Chunks that the taker found in its own bases, or twice in this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks_local: Option<u64>,
    /// Chunks that an earlier try had left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks_resumed: Option<u64>,
    /// Bytes of messages that were sent, encryption not counted.
    pub sent_bytes: u64,
    /// Bytes of messages that were received.
    pub received_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}
