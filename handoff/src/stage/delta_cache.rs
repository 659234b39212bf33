//! What was sent or received lately: references for deltas, in bounded memory.

use std::{collections::HashMap, fmt};

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash};

use crate::chunks::ChunkId;

/// How many slots are looked at for the one to give up.
const CANDIDATES: usize = 4;

/// Chunks as they were sent; at a target, as they were received.
///
/// Rounds go over the same chunks again and again: what was used longest ago is what comes next,
/// so that the usual choice of what to drop would drop just the wrong ones. A chunk that was sent
/// again counts as hot; a new one takes the place of the coldest of a few at random, and none if
/// all of them are hotter than it is.
#[derive(Clone)]
pub struct SentCache {
    capacity: usize,
    slots: Vec<Slot>,
    by_id: HashMap<ChunkId, usize>,
}

#[derive(Clone)]
struct Slot {
    id: ChunkId,
    hash: ChunkHash,
    heat: u8,
    chunk: Box<Chunk>,
}

impl SentCache {
    /// A cache of so many bytes of chunks. It takes them as it fills.
    pub fn new(bytes: usize) -> Self {
        Self { capacity: bytes / CHUNK_SIZE, slots: Vec::new(), by_id: HashMap::new() }
    }

    /// Bytes of chunks that it takes at most.
    pub(super) fn capacity_bytes(&self) -> usize {
        self.capacity * CHUNK_SIZE
    }

    /// How many chunks are in it.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Takes no more than so many bytes from now on, and gives back what it has beyond that.
    pub fn shrink_to(&mut self, bytes: usize) {
        self.capacity = self.capacity.min(bytes / CHUNK_SIZE);
        while self.slots.len() > self.capacity {
            if let Some(slot) = self.slots.pop() {
                self.by_id.remove(&slot.id);
            }
        }
        if self.slots.capacity() > 2 * self.capacity {
            self.slots.shrink_to(self.capacity);
            self.by_id.shrink_to(self.capacity);
        }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The content that chunk `id` had when its hash was `hash`, if it is still here.
    pub fn get(&self, id: ChunkId, hash: &ChunkHash) -> Option<&Chunk> {
        let slot = self.slots.get(*self.by_id.get(&id)?)?;
        (slot.hash == *hash).then_some(&*slot.chunk)
    }

    /// Keeps what was sent, perhaps. `again`: another content of it was sent before.
    pub(super) fn insert(&mut self, id: ChunkId, hash: ChunkHash, chunk: &Chunk, again: bool) {
        if let Some(slot) = self.by_id.get(&id).and_then(|at| self.slots.get_mut(*at)) {
            slot.hash = hash;
            slot.heat = slot.heat.saturating_add(1);
            *slot.chunk = *chunk;
            return;
        }
        let heat = u8::from(again);
        if self.slots.len() < self.capacity {
            self.by_id.insert(id, self.slots.len());
            self.slots.push(Slot { id, hash, heat, chunk: Box::new(*chunk) });
            return;
        }
        let Some(slot) = self.coldest_of_some(&hash) else { return };
        if slot.heat > heat {
            slot.heat -= 1;
            return;
        }
        let gone = std::mem::replace(&mut slot.id, id);
        (slot.hash, slot.heat, *slot.chunk) = (hash, heat, *chunk);
        if let Some(at) = self.by_id.remove(&gone) {
            self.by_id.insert(id, at);
        }
    }

    /// A hash is as good a random number as any.
    fn coldest_of_some(&mut self, hash: &ChunkHash) -> Option<&mut Slot> {
        let (numbers, _) = hash.0.as_chunks::<4>();
        let picks = numbers.iter().take(CANDIDATES).map(|n| u32::from_le_bytes(*n) as usize);
        let len = self.slots.len();
        let coldest = picks
            .filter_map(|n| n.checked_rem(len))
            .min_by_key(|at| self.slots.get(*at).map(|slot| slot.heat))?;
        self.slots.get_mut(coldest)
    }
}

impl fmt::Debug for SentCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SentCache({} of {} chunks)", self.len(), self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::Space;

    fn put(cache: &mut SentCache, index: u64, n: u64, again: bool) -> (ChunkId, ChunkHash) {
        let mut chunk = [0; CHUNK_SIZE];
        chunk[..8].copy_from_slice(&n.to_le_bytes());
        let (id, hash) = (ChunkId { space: Space::Ram, index }, ChunkHash::of(&chunk));
        cache.insert(id, hash, &chunk, again);
        if let Some(kept) = cache.get(id, &hash) {
            assert!(*kept == chunk);
        }
        (id, hash)
    }

    #[test]
    fn bounded_and_never_wrong() {
        let mut cache = SentCache::new(10 * CHUNK_SIZE + 17);
        for n in 0..1000 {
            put(&mut cache, n % 37, n, n >= 37);
            assert!(cache.slots.len() <= 10 && cache.by_id.len() == cache.slots.len());
            assert!(cache.by_id.iter().all(|(id, at)| cache.slots[*at].id == *id));
        }
        let (id, hash) = put(&mut cache, 5, 5000, true);
        put(&mut cache, 5, 5001, true);
        assert!(cache.get(id, &hash).is_none(), "an older content of it");
        assert!(SentCache::new(100).get(id, &hash).is_none());
        put(&mut SentCache::new(0), 1, 1, true);
    }

    /// A first round of many chunks does not keep out the few that are sent again and again.
    #[test]
    fn hot_chunks_stay() {
        let mut cache = SentCache::new(100 * CHUNK_SIZE);
        (0..1000).for_each(|n| _ = put(&mut cache, n, n, false));
        let mut hits = 0;
        for round in 1..=6u64 {
            // 60 hot chunks, and as many that change but once.
            for n in 0..60 {
                let before = if round == 1 { n } else { 10_000 * (round - 1) + n };
                let mut chunk = [0; CHUNK_SIZE];
                chunk[..8].copy_from_slice(&before.to_le_bytes());
                let id = ChunkId { space: Space::Ram, index: n };
                hits += u64::from(round > 2 && cache.get(id, &ChunkHash::of(&chunk)).is_some());
                put(&mut cache, n, 10_000 * round + n, true);
                put(&mut cache, 2000 + round * 60 + n, n, false);
            }
        }
        assert!(hits >= 4 * 60 * 9 / 10, "{hits} of 240");
    }
}
