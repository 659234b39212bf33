//! The stage between classifying and packing: a chunk as what changed in it.
//!
//! The reference is what the target holds in the same chunk at that moment: its base state, or the
//! content that was sent last, as long as the source still has it in a cache of bounded size.

use guest_images::{CHUNK_SIZE, Chunk};

/// The longest delta: one as long as the chunk says no less than the chunk.
pub const MAX_DELTA_BYTES: usize = CHUNK_SIZE;

/// How a delta is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DeltaCodec {
    /// The runs of bytes that changed.
    Runs = 0,
    /// Every byte combined with that of the reference by exclusive or.
    Xor = 1,
}

impl DeltaCodec {
    /// The codec with this number on the wire.
    pub fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Runs),
            1 => Some(Self::Xor),
            _ => None,
        }
    }
}

/// Which deltas are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeltaMode {
    /// Runs of changed bytes, for each chunk where they pay.
    #[default]
    Auto,
    /// None.
    None,
    /// Exclusive or, for every chunk that has a reference.
    Xor,
}

/// A delta that cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {codec:?} delta of {len} bytes is malformed")]
pub struct DeltaError {
    /// Its codec.
    pub codec: DeltaCodec,
    /// Its length.
    pub len: usize,
}

/// Changes `chunk`, the reference, into what the delta says. After an error its content is
/// undefined.
pub fn apply(codec: DeltaCodec, delta: &[u8], chunk: &mut Chunk) -> Result<(), DeltaError> {
    let done = match codec {
        DeltaCodec::Runs => None,
        DeltaCodec::Xor => (delta.len() == CHUNK_SIZE)
            .then(|| chunk.iter_mut().zip(delta).for_each(|(byte, change)| *byte ^= change)),
    };
    done.ok_or(DeltaError { codec, len: delta.len() })
}
