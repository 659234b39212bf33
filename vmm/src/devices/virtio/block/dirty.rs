//! Which chunks of the disk changed since they were last harvested.

use std::sync::atomic::{AtomicU64, Ordering};

/// One bit a chunk, set by the block device when a change has completed, taken by a handoff.
///
/// Always on: it costs an atomic OR a chunk written, and a handoff can begin at any time.
#[derive(Debug)]
pub struct DiskDirty {
    chunks: u64,
    words: Box<[AtomicU64]>,
}

impl DiskDirty {
    /// Nothing changed yet on a disk of `chunks` chunks.
    pub fn new(chunks: u64) -> Self {
        let words = (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { chunks, words }
    }

    /// How many chunks the disk has.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Marks chunks; those outside the disk are ignored.
    pub fn mark(&self, chunks: impl IntoIterator<Item = u64>) {
        for chunk in chunks {
            if chunk < self.chunks
                && let Some(word) = self.words.get((chunk / 64) as usize)
            {
                // Release: whoever takes the bit sees the data whose completion set it.
                word.fetch_or(1 << (chunk % 64), Ordering::Release);
            }
        }
    }

    /// Takes all bits: bit `b` of word `w` is chunk `64 w + b`.
    pub fn harvest(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.swap(0, Ordering::Acquire)).collect()
    }

    /// Puts bits back that [`DiskDirty::harvest`] gave: what they stand for was not sent after all.
    pub fn put_back(&self, words: &[u64]) {
        for (word, bits) in self.words.iter().zip(words) {
            word.fetch_or(*bits, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_harvests_and_puts_back() {
        let dirty = DiskDirty::new(70);
        dirty.mark([0, 63, 64, 69, 70, u64::MAX]);
        let words = dirty.harvest();
        assert_eq!(words, [1 | 1 << 63, 1 | 1 << 5]);
        assert_eq!(dirty.harvest(), [0, 0]);
        dirty.mark([1]);
        dirty.put_back(&words);
        assert_eq!(dirty.harvest(), [0b11 | 1 << 63, 1 | 1 << 5]);
    }
}
