//! The hash over all RAM and disk by which two guests are compared from outside the engine.

use guest_images::{Chunk, chunk::is_zero};

/// What an audit hashes: for each space, RAM first, the number and content of each chunk that is
/// not zero, in order, then `u64::MAX`, which is no chunk's number, and how many chunks the space
/// has. [`SourceVm::full_hash`](crate::SourceVm::full_hash) and
/// [`TargetVm::full_hash`](crate::TargetVm::full_hash) are both this.
#[derive(Clone, Debug, Default)]
pub struct Audit(blake3::Hasher);

impl Audit {
    /// Takes the next chunk of a space; one that is zero may be left out.
    pub fn chunk(&mut self, index: u64, chunk: &Chunk) {
        if !is_zero(chunk) {
            self.0.update(&index.to_le_bytes());
            self.0.update(chunk);
        }
    }

    /// A space is over; it has so many chunks.
    pub fn end_of_space(&mut self, chunks: u64) {
        self.0.update(&u64::MAX.to_le_bytes());
        self.0.update(&chunks.to_le_bytes());
    }

    /// The hash.
    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}
