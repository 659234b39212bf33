//! Pages that the guest called free while its changes are tracked.
//!
//! Such a page may hold anything, if it was not written since the guest was asked: the guest does not
//! look at it. So it need not be sent; but the guest may take it back and write to it at any moment
//! until it is paused, and then it counts as any other.

use std::ops::Range;

use ::handoff::{ChunkId, ChunkSet, Geometry, Space};

pub(super) struct Free {
    /// Called free, and not written since the guest was asked.
    free: ChunkSet,
    /// Written since the guest was asked.
    written: Vec<u64>,
}

impl Free {
    /// Nothing is free, and nothing written.
    pub(super) fn new(geometry: Geometry) -> Self {
        let free = ChunkSet::new(geometry);
        Self { written: vec![0; free.word_count(Space::Ram) as usize], free }
    }

    /// What is in `changed` was written, or may have been.
    pub(super) fn written(&mut self, changed: &ChunkSet) {
        for (at, written) in (0..).zip(&mut self.written) {
            let new = changed.word(Space::Ram, at) & !*written;
            *written |= new;
            let mut lost = new & self.free.word(Space::Ram, at);
            while lost != 0 {
                let index = at * 64 + u64::from(lost.trailing_zeros());
                self.free.remove(ChunkId { space: Space::Ram, index });
                lost &= lost - 1;
            }
        }
    }

    /// The guest called these free; returns those that have not been written and are news.
    pub(super) fn add(&mut self, named: &[Range<u64>]) -> ChunkSet {
        let mut news = ChunkSet::new(self.free.geometry());
        for index in named.iter().cloned().flatten() {
            let id = ChunkId { space: Space::Ram, index };
            let word = self.written.get((index / 64) as usize).copied().unwrap_or(u64::MAX);
            if word >> (index % 64) & 1 == 0 && !self.free.contains(id) && self.free.insert(id) {
                news.insert(id);
            }
        }
        news
    }

    /// All that is free.
    pub(super) fn chunks(&self) -> &ChunkSet {
        &self.free
    }

    /// All that is free, as runs of neighbours.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for id in self.free.iter() {
            match runs.last_mut() {
                Some(last) if last.end == id.index => last.end += 1,
                _ => runs.push(id.index..id.index + 1),
            }
        }
        runs
    }
}
