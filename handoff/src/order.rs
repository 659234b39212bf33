//! In which order a round's chunks are sent.
//!
//! Dirty memory has locality: a run of pages that all compress to nothing, then one of pages that
//! do not compress at all. Sent in order, such runs make now the link and now the CPU wait. So a
//! round goes out shuffled, but in blocks of neighbours: within one, pages of a file stay together,
//! which keeps reads and the encoded references cheap, and what is alike meets in one batch.

use std::{fmt, str::FromStr};

use rand::{SeedableRng, rngs::SmallRng, seq::SliceRandom};

use crate::chunks::{ChunkId, ChunkSet, Space};

/// How a round is ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sequence {
    /// At random, in blocks of neighbours.
    #[default]
    Random,
    /// As the chunks are numbered: to measure what chance is worth.
    Ascending,
}

impl Sequence {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Random, Self::Ascending];

    /// Its name, for people and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Ascending => "ascending",
        }
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sequence {
    type Err = UnknownSequence;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|one| one.name() == name);
        found.ok_or_else(|| UnknownSequence(name.to_owned()))
    }
}

/// No order has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no order {0}: there are random and ascending")]
pub struct UnknownSequence(pub String);

/// Words of a block: 4 MiB. Of a guest that looks at pictures, batches compress 4 % better than with
/// words by themselves, and 1 % worse than in ascending order; a link of 10 Mbps takes less than a second
/// for what is left of a block.
const BLOCK_WORDS: u64 = 16;

fn block(word: u64) -> u64 {
    word / BLOCK_WORDS
}

/// The chunks of one round in the order in which they are to be sent.
///
/// Memory besides the set itself: 8 bytes for each word of 64 chunks that holds any.
#[derive(Debug)]
pub struct RoundOrder {
    left: ChunkSet,
    words: Vec<(Space, u64)>,
    remaining: u64,
    /// What comes after all of these.
    last: Option<Box<Self>>,
}

impl RoundOrder {
    /// Orders `set` at random; the same seed gives the same order.
    pub fn shuffled(set: ChunkSet, seed: u64) -> Self {
        let mut order = Self::ascending(set);
        let mut blocks: Vec<&[(Space, u64)]> = order
            .words
            .chunk_by(|(a, one), (b, other)| a == b && block(*one) == block(*other))
            .collect();
        blocks.shuffle(&mut SmallRng::seed_from_u64(seed));
        order.words = blocks.concat();
        order
    }

    /// Orders `set` as the chunks are numbered: to measure what the shuffle is worth.
    pub fn ascending(set: ChunkSet) -> Self {
        // Words are taken from the end, so the last in line is the first to go.
        let words = [Space::Disk, Space::Ram]
            .into_iter()
            .flat_map(|space| (0..set.word_count(space)).rev().map(move |word| (space, word)))
            .filter(|&(space, word)| set.word(space, word) != 0)
            .collect();
        let remaining = set.len();
        Self { left: set, words, remaining, last: None }
    }

    /// Orders `set` in a sequence.
    pub fn new(set: ChunkSet, sequence: Sequence) -> Self {
        match sequence {
            Sequence::Random => Self::shuffled(set, rand::random()),
            Sequence::Ascending => Self::ascending(set),
        }
    }

    /// Orders `set` in a sequence, what is in `hot` after all the rest: the guest writes it all the
    /// time, and the later it is sent the more likely it is not to be sent again.
    pub fn hot_last(mut set: ChunkSet, hot: &ChunkSet, sequence: Sequence) -> Self {
        let mut last = ChunkSet::new(set.geometry());
        for id in hot.iter().filter(|id| set.contains(*id)) {
            last.insert(id);
        }
        last.iter().for_each(|id| set.remove(id));
        let last = (!last.is_empty()).then(|| Box::new(Self::new(last, sequence)));
        let first = Self::new(set, sequence);
        Self { last, ..first }
    }

    /// Whether the chunk has not been taken.
    pub fn holds(&self, id: ChunkId) -> bool {
        self.left.contains(id) || self.last.as_ref().is_some_and(|last| last.holds(id))
    }

    /// How many chunks have not been taken.
    pub fn remaining(&self) -> u64 {
        self.remaining + self.last.as_ref().map_or(0, |last| last.remaining())
    }

    /// Takes out those of `chunks` that have not been taken, and says how many that were.
    pub fn leave_out(&mut self, chunks: &ChunkSet) -> u64 {
        let before = self.remaining;
        for id in chunks.iter() {
            if self.left.contains(id) {
                self.left.remove(id);
                self.remaining -= 1;
            }
        }
        before - self.remaining + self.last.as_mut().map_or(0, |last| last.leave_out(chunks))
    }

    /// Puts what is next to `dirty` chunks and has not been taken behind all but what goes last anyway:
    /// what a guest writes next is mostly near what it wrote.
    pub fn put_off(&mut self, dirty: &ChunkSet) {
        let mut near = ChunkSet::new(self.left.geometry());
        for space in [Space::Ram, Space::Disk] {
            for word in (0..dirty.word_count(space)).filter(|word| dirty.word(space, *word) != 0) {
                near.insert_word(space, word as usize, self.left.word(space, word));
            }
        }
        if near.is_empty() {
            return;
        }
        near.iter().for_each(|id| self.left.remove(id));
        self.remaining -= near.len();
        match &mut self.last {
            None => self.last = Some(Box::new(Self::ascending(near))),
            Some(last) => {
                last.left.union(&near);
                last.remaining = last.left.len();
                last.words.append(&mut Self::ascending(near).words);
            }
        }
    }

    /// The chunks that have not been taken: an abort puts them back.
    pub fn into_rest(self) -> ChunkSet {
        let mut rest = self.left;
        if let Some(last) = self.last {
            rest.union(&last.into_rest());
        }
        rest
    }
}

impl Iterator for RoundOrder {
    type Item = ChunkId;

    fn next(&mut self) -> Option<ChunkId> {
        loop {
            let Some(&(space, word)) = self.words.last() else {
                return self.last.as_mut()?.next();
            };
            let bits = self.left.word(space, word);
            if bits == 0 {
                self.words.pop();
                continue;
            }
            let id = ChunkId { space, index: word * 64 + u64::from(bits.trailing_zeros()) };
            self.left.remove(id);
            self.remaining -= 1;
            return Some(id);
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let remaining = usize::try_from(self.remaining()).ok();
        (remaining.unwrap_or(usize::MAX), remaining)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunks::Geometry;

    const GEOMETRY: Geometry = Geometry { ram_chunks: 5000, disk_chunks: 3001 };

    fn set_of(ids: &[(bool, u64)]) -> ChunkSet {
        let mut set = ChunkSet::new(GEOMETRY);
        for &(disk, index) in ids {
            set.insert(ChunkId { space: if disk { Space::Disk } else { Space::Ram }, index });
        }
        set
    }

    proptest! {
        #[test]
        fn every_chunk_once(
            ids in prop::collection::vec((any::<bool>(), 0u64..6000), 0..400),
            seed: u64,
            taken in 0usize..400,
        ) {
            let set = set_of(&ids);
            let mut order = RoundOrder::shuffled(set.clone(), seed);
            prop_assert_eq!(order.remaining(), set.len());
            let mut seen = ChunkSet::new(GEOMETRY);
            for id in order.by_ref().take(taken) {
                prop_assert!(set.contains(id) && !seen.contains(id));
                seen.insert(id);
            }
            prop_assert_eq!(order.remaining() + seen.len(), set.len());
            let rest = order.into_rest();
            prop_assert!(rest.iter().all(|id| !seen.contains(id)));
            seen.union(&rest);
            prop_assert_eq!(seen, set);
        }
    }

    #[test]
    fn hot_chunks_go_last() {
        let ids: Vec<_> = (0..300).map(|index| (index % 3 == 0, index)).collect();
        let hot =
            set_of(&ids.iter().copied().filter(|(_, index)| index % 7 == 0).collect::<Vec<_>>());
        for sequence in Sequence::ALL {
            let mut order = RoundOrder::hot_last(set_of(&ids), &hot, sequence);
            assert_eq!(order.remaining(), 300);
            let left_out = set_of(&[(true, 0), (false, 1)]);
            assert_eq!(order.leave_out(&left_out), 2);
            let sent: Vec<_> = order.by_ref().take(290).collect();
            let first_hot = sent.iter().position(|id| hot.contains(*id)).unwrap();
            assert!(sent[first_hot..].iter().all(|id| hot.contains(*id)));
            assert_eq!(order.into_rest().len(), 8);
        }
    }

    #[test]
    fn what_is_near_dirty_chunks_waits() {
        let ram =
            |range: std::ops::Range<u64>| set_of(&range.map(|i| (false, i)).collect::<Vec<_>>());
        let mut order = RoundOrder::hot_last(ram(0..640), &ram(600..610), Sequence::Ascending);
        order.by_ref().take(10).for_each(drop);
        order.put_off(&ram(70..71));
        order.put_off(&ram(3..4));
        order.put_off(&ram(70..71));
        assert_eq!(order.remaining(), 630);
        let sent: Vec<u64> = order.map(|id| id.index).collect();
        let expected = [128..600, 610..640, 10..64, 64..128, 600..610];
        assert_eq!(sent, expected.into_iter().flatten().collect::<Vec<_>>());
    }

    #[test]
    fn shuffles_blocks_and_keeps_neighbours() {
        let mut all = ChunkSet::new(GEOMETRY);
        for word in 0..all.word_count(Space::Ram) {
            all.insert_word(Space::Ram, word as usize, u64::MAX);
        }
        let order: Vec<u64> = RoundOrder::shuffled(all.clone(), 1).map(|id| id.index).collect();
        let again: Vec<u64> = RoundOrder::shuffled(all.clone(), 1).map(|id| id.index).collect();
        let other: Vec<u64> = RoundOrder::shuffled(all.clone(), 2).map(|id| id.index).collect();
        assert_eq!(order, again);
        assert_ne!(order, other);
        assert!(!order.is_sorted());
        let breaks = order.windows(2).filter(|w| w[1] != w[0] + 1).count();
        assert!(breaks < order.len() / (64 * BLOCK_WORDS as usize) + 1, "{breaks} breaks");
        assert!(RoundOrder::ascending(all.clone()).eq(all.iter()));
    }
}
