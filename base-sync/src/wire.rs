//! The messages of a session. `docs/protocol.md` has them to the byte.

use guest_images::{BaseId, StoreError, store::ReceptionError};
use serde::{Deserialize, Serialize};

/// No frame is longer.
pub const MAX_FRAME_BYTES: usize = 1 << 20 | 64 << 10;
/// Chunks of which hashes are asked at once: those of a slab.
pub(crate) const MAX_HASHES: u64 = 16 << 10;
/// Chunks that are asked for at once: 1 MiB of them.
pub(crate) const MAX_CHUNKS: usize = 256;
/// Bases that a taker names.
pub(crate) const MAX_BASES: usize = 64;
/// Bytes of a machine state that are asked for at once.
pub(crate) const MAX_PIECE_BYTES: usize = 1 << 20;
/// The longest text.
pub(crate) const MAX_TEXT_BYTES: usize = 1024;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Caller: take this base.
    Push {
        /// What to call it there.
        name: String,
        /// Its manifest, as in its file.
        #[serde(with = "serde_bytes")]
        manifest: Vec<u8>,
    },
    /// Caller: give me this base: a name, an id, or the beginning of one.
    Pull(String),
    /// Called: the base that was asked for.
    Offer(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Either: no, and the end of the session.
    No(No),
    /// Taker: bases that it holds.
    Have(Vec<[u8; 32]>),
    /// Giver: which of these it holds too, by their place in the list.
    Both(Vec<u8>),
    /// Taker: what are the chunks?
    Hashes {
        /// Of which part.
        part: u8,
        /// The first chunk.
        first: u64,
        /// How many.
        count: u32,
        /// Whether the answer may refer to the bases that both hold.
        refer: bool,
    },
    /// Giver: all of them that are not zero, in order.
    HashesAre(Vec<Run>),
    /// Taker: the contents of these chunks.
    Chunks {
        /// Of which part.
        part: u8,
        /// Neighbours: the first, and how many.
        runs: Vec<(u64, u32)>,
    },
    /// Giver: them, one after the other, as one zstd frame.
    ChunksAre(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Taker: the machine state from this byte on.
    Machine(u64),
    /// Giver: a piece of it.
    MachineIs(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Taker: the base is in its store. The end of the session.
    Done {
        /// Whether it was there before.
        already: bool,
    },
}

/// Neighbours that are told alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Run {
    /// Chunks that a base holds which both have.
    Base {
        /// The number of the first chunk.
        at: u64,
        /// How many.
        count: u32,
        /// Which base, by its place in what the giver answered to Have.
        base: u8,
        /// Which part of that.
        part: u8,
        /// The number of the first there.
        first: u64,
    },
    /// Chunks by their hashes, 32 bytes each.
    Hashes {
        /// The number of the first chunk.
        at: u64,
        /// The hashes.
        #[serde(with = "serde_bytes")]
        hashes: Vec<u8>,
    },
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct No {
    /// For programs.
    pub why: Why,
    /// For people.
    pub text: String,
}

/// Kinds of no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// There is no such base.
    NotFound,
    /// The caller may not.
    NotAllowed,
    /// There is no room.
    NoSpace,
    /// The name is another base's.
    Taken,
    /// What is there is damaged.
    Damaged,
    /// Anything else.
    Failed,
}

impl No {
    /// A no, with its reason for people.
    pub fn new(why: Why, text: impl Into<String>) -> Self {
        let mut text = text.into();
        let end = (0..=MAX_TEXT_BYTES.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        Self { why, text }
    }
}

impl std::fmt::Display for No {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a base did not come across.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The link broke, or nothing came for too long.
    #[error("the link broke: {0}; the same command again goes on where this one ended")]
    Link(#[from] std::io::Error),
    /// Somebody here said stop.
    #[error("cancelled; the same command again goes on where this one ended")]
    Cancelled,
    /// The other side says no.
    #[error("the peer says no: {0}")]
    Refused(No),
    /// This side says no.
    #[error("{0}")]
    Unwilling(No),
    /// The other side does not follow the protocol.
    #[error("the peer does not follow the protocol: {0}")]
    Protocol(&'static str),
    /// What the other side gives is not the base.
    #[error("the base at the peer is damaged: {0}; `howdah base verify` there says where")]
    Damaged(ReceptionError),
    /// What came is not taken.
    #[error(transparent)]
    Reception(ReceptionError),
    /// The store here has none of that.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The base here cannot be read.
    #[error("reading base {id}: {source}; `howdah base verify` says what is damaged")]
    Read {
        /// Which.
        id: BaseId,
        /// Why.
        source: std::io::Error,
    },
}

impl From<ReceptionError> for SyncError {
    fn from(error: ReceptionError) -> Self {
        match error {
            ReceptionError::Store(error) => Self::Store(error),
            ReceptionError::Order { what, .. } => Self::Protocol(what),
            ReceptionError::Machine
            | ReceptionError::Root { .. }
            | ReceptionError::Content { .. } => Self::Damaged(error),
        }
    }
}

impl SyncError {
    /// What the other side is told of it, if it should be.
    pub(crate) fn told(&self) -> Option<No> {
        match self {
            Self::Link(_) | Self::Refused(_) => None,
            Self::Unwilling(no) => Some(no.clone()),
            Self::Damaged(_) => Some(No::new(Why::Damaged, self.to_string())),
            Self::Store(StoreError::NotFound { .. }) => {
                Some(No::new(Why::NotFound, "there is no such base"))
            }
            // Paths are nobody else's business.
            Self::Store(_) | Self::Read { .. } => {
                Some(No::new(Why::Failed, "its store cannot do that; its log says why"))
            }
            Self::Cancelled => Some(No::new(Why::Failed, "it was cancelled")),
            Self::Protocol(_) | Self::Reception(_) => Some(No::new(Why::Failed, self.to_string())),
        }
    }
}
