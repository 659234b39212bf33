//! Names of chunks and sets of them.

use serde::{Deserialize, Serialize};

/// What a chunk is a chunk of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Space {
    /// Guest RAM, counted without the hole below 4 GiB.
    Ram = 0,
    /// The guest's disk.
    Disk = 1,
}

/// The name of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId {
    /// The space it belongs to.
    pub space: Space,
    /// Its number in that space.
    pub index: u64,
}

/// How many chunks each space has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Chunks of guest RAM.
    pub ram_chunks: u64,
    /// Chunks of the guest's disk.
    pub disk_chunks: u64,
}

impl Geometry {
    /// How many chunks `space` has.
    pub fn space_len(&self, space: Space) -> u64 {
        match space {
            Space::Ram => self.ram_chunks,
            Space::Disk => self.disk_chunks,
        }
    }

    /// Whether there is such a chunk.
    pub fn contains(&self, id: ChunkId) -> bool {
        id.index < self.space_len(id.space)
    }
}

/// A set of chunks: one bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSet {
    geometry: Geometry,
    ram: Vec<u64>,
    disk: Vec<u64>,
}

impl ChunkSet {
    /// The empty set.
    pub fn new(geometry: Geometry) -> Self {
        let words = |chunks: u64| vec![0; chunks.div_ceil(64) as usize];
        Self { geometry, ram: words(geometry.ram_chunks), disk: words(geometry.disk_chunks) }
    }

    /// The geometry that bounds this set.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How many chunks `space` has in this set's geometry.
    pub fn space_len(&self, space: Space) -> u64 {
        self.geometry.space_len(space)
    }

    /// 64 chunks at once: bit b is chunk `word * 64 + b`. Zero outside the geometry.
    pub fn word(&self, space: Space, word: u64) -> u64 {
        usize::try_from(word).ok().and_then(|w| self.words(space).get(w)).copied().unwrap_or(0)
    }

    /// How many words of 64 chunks `space` has.
    pub fn word_count(&self, space: Space) -> u64 {
        self.words(space).len() as u64
    }

    fn words(&self, space: Space) -> &[u64] {
        match space {
            Space::Ram => &self.ram,
            Space::Disk => &self.disk,
        }
    }

    fn words_mut(&mut self, space: Space) -> &mut [u64] {
        match space {
            Space::Ram => &mut self.ram,
            Space::Disk => &mut self.disk,
        }
    }

    /// Adds a chunk; one outside the geometry is ignored and `false` is returned.
    pub fn insert(&mut self, id: ChunkId) -> bool {
        let inside = id.index < self.space_len(id.space);
        if inside {
            self.words_mut(id.space)[(id.index / 64) as usize] |= 1 << (id.index % 64);
        }
        inside
    }

    /// Takes a chunk out.
    pub fn remove(&mut self, id: ChunkId) {
        if id.index < self.space_len(id.space) {
            self.words_mut(id.space)[(id.index / 64) as usize] &= !(1 << (id.index % 64));
        }
    }

    /// Whether the chunk is in the set.
    pub fn contains(&self, id: ChunkId) -> bool {
        id.index < self.space_len(id.space)
            && self.words(id.space)[(id.index / 64) as usize] >> (id.index % 64) & 1 == 1
    }

    /// Adds 64 chunks at once, as bitmaps come from KVM: bit b of `bits` is chunk `word * 64 + b`.
    /// Bits outside the geometry are ignored.
    pub fn insert_word(&mut self, space: Space, word: usize, bits: u64) {
        let len = self.space_len(space);
        if let Some(slot) = self.words_mut(space).get_mut(word) {
            let valid = (len - word as u64 * 64).min(64);
            *slot |= if valid == 64 { bits } else { bits & ((1 << valid) - 1) };
        }
    }

    /// Adds every chunk of `other`, which must have the same geometry.
    pub fn union(&mut self, other: &ChunkSet) {
        debug_assert_eq!(self.geometry, other.geometry);
        for (mine, theirs) in [(&mut self.ram, &other.ram), (&mut self.disk, &other.disk)] {
            mine.iter_mut().zip(theirs).for_each(|(m, t)| *m |= t);
        }
    }

    /// How many chunks are in the set.
    pub fn len(&self) -> u64 {
        self.ram.iter().chain(&self.disk).map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.ram.iter().chain(&self.disk).all(|w| *w == 0)
    }

    /// The chunks in order: RAM, then disk, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ChunkId> + '_ {
        [Space::Ram, Space::Disk].into_iter().flat_map(move |space| {
            self.words(space).iter().enumerate().flat_map(move |(word, &bits)| {
                let mut left = bits;
                std::iter::from_fn(move || {
                    (left != 0).then(|| {
                        let bit = left.trailing_zeros();
                        left &= left - 1;
                        ChunkId { space, index: word as u64 * 64 + u64::from(bit) }
                    })
                })
            })
        })
    }
}
