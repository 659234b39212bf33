//! The unit of everything: 4 KiB of memory, disk or file, and its hash.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a chunk: the guest page size, and the granularity of the disk overlay.
pub const CHUNK_SIZE: usize = 4096;

/// One chunk's content.
pub type Chunk = [u8; CHUNK_SIZE];

/// A chunk of zeros.
pub const ZERO_CHUNK: &Chunk = &[0; CHUNK_SIZE];

/// The BLAKE3 hash of one chunk's content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkHash(pub [u8; 32]);

impl ChunkHash {
    /// Hashes one chunk.
    pub fn of(chunk: &Chunk) -> Self {
        Self(*blake3::hash(chunk).as_bytes())
    }
}

impl fmt::Display for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkHash({})", hex::encode(&self.0[..6]))
    }
}

/// Whether every byte of `chunk` is zero.
pub fn is_zero(chunk: &Chunk) -> bool {
    // The first bytes decide almost every non-zero chunk; the rest compares as wide as the CPU can.
    chunk[..16] == ZERO_CHUNK[..16] && chunk == ZERO_CHUNK
}
