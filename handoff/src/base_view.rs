//! The engine's view of bases: what both ends hold before a handoff starts.

use std::{fmt, io, sync::Arc};

use guest_images::{
    Base, BaseId, Chunk, ChunkHash, Part, Place,
    chunk::{ZERO_CHUNK, is_zero},
};

use crate::chunks::{ChunkId, Space};

/// The most bases that one handoff refers to: what two bits on the wire can name.
pub const MAX_BASES: usize = 4;

/// A base as the stages see it. Its memory does not grow with its disk.
pub trait BaseView: Send + Sync {
    /// The identity that both ends compared.
    fn id(&self) -> BaseId;

    /// Where a chunk with this content can be found, if the index knows it.
    fn lookup(&self, hash: &ChunkHash) -> Option<Place>;

    /// Looks several contents up at once, each into its slot; what lies beyond the shorter of both
    /// is left alone. An implementation may sort them, and wait for memory once and not each time.
    fn lookup_batch(&self, hashes: &[ChunkHash], places: &mut [Option<Place>]) {
        for (hash, place) in hashes.iter().zip(places) {
            *place = self.lookup(hash);
        }
    }

    /// The chunk at `place`; nothing for a place outside its part.
    fn chunk(&self, place: Place) -> Option<&Chunk>;

    /// Copies the chunk at `place`. A place outside its part is an error.
    fn read(&self, place: Place, into: &mut Chunk) -> io::Result<()> {
        *into = *self.chunk(place).ok_or_else(|| no_such_place(self.id(), place))?;
        Ok(())
    }

    /// How many chunks `part` has, its padded last one included.
    fn part_chunks(&self, part: Part) -> u64;

    /// Whether the base has such a place.
    fn holds(&self, place: Place) -> bool {
        place.index < self.part_chunks(place.part)
    }
}

impl BaseView for Base {
    fn id(&self) -> BaseId {
        self.id()
    }

    fn lookup(&self, hash: &ChunkHash) -> Option<Place> {
        self.lookup(hash)
    }

    fn lookup_batch(&self, hashes: &[ChunkHash], places: &mut [Option<Place>]) {
        self.lookup_batch(hashes, places);
    }

    fn chunk(&self, place: Place) -> Option<&Chunk> {
        self.chunk(place)
    }

    fn part_chunks(&self, part: Part) -> u64 {
        self.part_chunks(part)
    }
}

/// A place in one of the bases of a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BasePlace {
    /// The base's number in [`Bases`]; 0 is the VM's own.
    pub base: u8,
    /// Where in it.
    pub place: Place,
}

/// More bases than a handoff can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bases are more than the {MAX_BASES} that one handoff can refer to")]
pub struct TooManyBases(pub usize);

/// The bases that both ends of a handoff hold, in the order on which they agreed: first the VM's
/// own, from which its chunks begin, then others that may hold equal contents.
#[derive(Clone)]
pub struct Bases {
    own: Arc<dyn BaseView>,
    also: Arc<[Arc<dyn BaseView>]>,
}

impl Bases {
    /// The VM's own base and others.
    pub fn new(own: Arc<dyn BaseView>, also: Vec<Arc<dyn BaseView>>) -> Result<Self, TooManyBases> {
        match also.len() + 1 {
            all if all > MAX_BASES => Err(TooManyBases(all)),
            _ => Ok(Self { own, also: also.into() }),
        }
    }

    /// The VM's own base, and those of the others, counted from 0, for which `keep` says so.
    pub fn only(&self, keep: impl Fn(usize) -> bool) -> Self {
        let kept = self.also.iter().enumerate().filter(|(n, _)| keep(*n));
        Self { own: Arc::clone(&self.own), also: kept.map(|(_, base)| Arc::clone(base)).collect() }
    }

    /// The VM's own base.
    pub fn own(&self) -> &dyn BaseView {
        &*self.own
    }

    /// The bases with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &dyn BaseView)> {
        (0u8..).zip(std::iter::once(&self.own).chain(&*self.also).map(|base| &**base))
    }

    /// The base with this number.
    pub fn get(&self, number: u8) -> Option<&dyn BaseView> {
        match number.checked_sub(1) {
            None => Some(self.own()),
            Some(other) => self.also.get(usize::from(other)).map(|base| &**base),
        }
    }

    /// Whether there is such a place.
    pub fn holds(&self, at: BasePlace) -> bool {
        self.get(at.base).is_some_and(|base| base.holds(at.place))
    }

    /// How many chunks the part that `at` names has; zero if there is no such base.
    pub fn part_chunks(&self, at: BasePlace) -> u64 {
        self.get(at.base).map_or(0, |base| base.part_chunks(at.place.part))
    }

    /// The chunk at a place; nothing for a place outside.
    pub fn chunk(&self, at: BasePlace) -> Option<&Chunk> {
        self.get(at.base)?.chunk(at.place)
    }
}

impl From<Arc<dyn BaseView>> for Bases {
    fn from(own: Arc<dyn BaseView>) -> Self {
        Self { own, also: Arc::new([]) }
    }
}

impl fmt::Debug for Bases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(_, base)| base.id())).finish()
    }
}

/// The place in the VM's own base whose content chunk `id` has before the guest ever wrote it, or
/// `None` where it begins as zeros: RAM beyond the end of the base's memory, all of it if the base
/// has none, and disk beyond the end of the base's disk.
pub fn own_place(base: &dyn BaseView, id: ChunkId) -> Option<Place> {
    let part = match id.space {
        Space::Ram => Part::Memory,
        Space::Disk => Part::Disk,
    };
    let place = Place { part, index: id.index };
    base.holds(place).then_some(place)
}

/// What chunk `id` holds before the guest ever wrote it.
pub fn own_chunk(base: &dyn BaseView, id: ChunkId) -> io::Result<&Chunk> {
    match own_place(base, id) {
        None => Ok(ZERO_CHUNK),
        Some(place) => base.chunk(place).ok_or_else(|| no_such_place(base.id(), place)),
    }
}

/// Whether `chunk` is what chunk `id` holds before the guest ever wrote it.
///
/// Both ends decide by this one function, on bytes and not on how the chunk travelled, whether a
/// chunk counts in the state root.
pub fn is_base_state(base: &dyn BaseView, id: ChunkId, chunk: &Chunk) -> io::Result<bool> {
    match own_place(base, id) {
        None => Ok(is_zero(chunk)),
        Some(_) => Ok(own_chunk(base, id)? == chunk),
    }
}

fn no_such_place(base: BaseId, place: Place) -> io::Error {
    let Place { part, index } = place;
    io::Error::new(io::ErrorKind::InvalidInput, format!("base {base} has no {part} chunk {index}"))
}

pub mod testing {
    //! A base in memory, for tests of this crate and of those above it.

    use std::collections::HashMap;

    use guest_images::{BaseId, Chunk, ChunkHash, Part, Place};

    use super::BaseView;

    /// A base held in memory.
    #[derive(Clone, Debug)]
    pub struct MemBase {
        id: BaseId,
        parts: [Vec<Chunk>; Part::ALL.len()],
        index: HashMap<ChunkHash, Place>,
    }

    impl MemBase {
        /// A base of a disk, a kernel and an initramfs; its id is the hash of their content.
        pub fn new(disk: Vec<Chunk>, kernel: Vec<Chunk>, initramfs: Vec<Chunk>) -> Self {
            Self::of([disk, kernel, initramfs, Vec::new()])
        }

        /// The same base with a memory.
        pub fn with_memory(self, memory: Vec<Chunk>) -> Self {
            let [disk, kernel, initramfs, _] = self.parts;
            Self::of([disk, kernel, initramfs, memory])
        }

        fn of(parts: [Vec<Chunk>; Part::ALL.len()]) -> Self {
            let mut hasher = blake3::Hasher::new();
            let mut index = HashMap::new();
            for (part, chunks) in Part::ALL.iter().zip(&parts) {
                hasher.update(&(chunks.len() as u64).to_le_bytes());
                for (i, chunk) in chunks.iter().enumerate() {
                    hasher.update(chunk);
                    let place = Place { part: *part, index: i as u64 };
                    index.entry(ChunkHash::of(chunk)).or_insert(place);
                }
            }
            Self { id: BaseId(*hasher.finalize().as_bytes()), parts, index }
        }

        fn part(&self, part: Part) -> &[Chunk] {
            &self.parts[part as usize]
        }
    }

    impl BaseView for MemBase {
        fn id(&self) -> BaseId {
            self.id
        }

        fn lookup(&self, hash: &ChunkHash) -> Option<Place> {
            self.index.get(hash).copied()
        }

        fn chunk(&self, place: Place) -> Option<&Chunk> {
            usize::try_from(place.index).ok().and_then(|i| self.part(place.part).get(i))
        }

        fn part_chunks(&self, part: Part) -> u64 {
            self.part(part).len() as u64
        }
    }
}
