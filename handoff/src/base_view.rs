//! The engine's view of a base: what both ends hold before a handoff starts.

use std::io;

use guest_images::{Base, BaseId, Chunk, ChunkHash, Part, Place, chunk::is_zero};

use crate::chunks::{ChunkId, Space};

/// A base as the stages see it. Its memory does not grow with its disk.
pub trait BaseView: Send + Sync {
    /// The identity that both ends compared.
    fn id(&self) -> BaseId;

    /// Where a chunk with this content can be found, if the index knows it.
    fn lookup(&self, hash: &ChunkHash) -> Option<Place>;

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

    fn chunk(&self, place: Place) -> Option<&Chunk> {
        self.chunk(place)
    }

    fn part_chunks(&self, part: Part) -> u64 {
        self.part_chunks(part)
    }
}

/// The place in the base whose content chunk `id` has before the guest ever wrote it, or `None`
/// where it begins as zeros: RAM beyond the end of the base's memory, all of it if the base has
/// none, and disk beyond the end of the base's disk.
pub fn own_place(base: &dyn BaseView, id: ChunkId) -> Option<Place> {
    let part = match id.space {
        Space::Ram => Part::Memory,
        Space::Disk => Part::Disk,
    };
    let place = Place { part, index: id.index };
    base.holds(place).then_some(place)
}

/// Whether `chunk` is what chunk `id` holds before the guest ever wrote it.
///
/// Both ends decide by this one function, on bytes and not on how the chunk travelled, whether a
/// chunk counts in the state root.
pub fn is_base_state(base: &dyn BaseView, id: ChunkId, chunk: &Chunk) -> io::Result<bool> {
    match own_place(base, id) {
        None => Ok(is_zero(chunk)),
        Some(place) => {
            Ok(base.chunk(place).ok_or_else(|| no_such_place(base.id(), place))? == chunk)
        }
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
