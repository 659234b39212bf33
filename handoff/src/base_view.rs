//! The engine's view of a base: what both ends hold before a handoff starts.

use std::io;

use guest_images::{Base, BaseId, CHUNK_SIZE, Chunk, ChunkHash, Part, Place, chunk::is_zero};

use crate::chunks::{ChunkId, Space};

/// A base as the stages see it. Its memory does not grow with its disk.
pub trait BaseView: Send + Sync {
    /// The identity that both ends compared.
    fn id(&self) -> BaseId;

    /// Where a chunk with this content can be found, if the index knows it.
    fn lookup(&self, hash: &ChunkHash) -> Option<Place>;

    /// Copies the chunk at `place`. A place outside its part is an error.
    fn read(&self, place: Place, into: &mut Chunk) -> io::Result<()>;

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

    fn read(&self, place: Place, into: &mut Chunk) -> io::Result<()> {
        self.read(place, into)
    }

    fn part_chunks(&self, part: Part) -> u64 {
        self.part_chunks(part)
    }
}

/// The place in the base whose content chunk `id` has before the guest ever wrote it, or `None`
/// where it begins as zeros: all of RAM, and disk beyond the end of the base's disk.
pub fn own_place(base: &dyn BaseView, id: ChunkId) -> Option<Place> {
    let place = Place { part: Part::Disk, index: id.index };
    (id.space == Space::Disk && base.holds(place)).then_some(place)
}

/// Whether `chunk` is what chunk `id` holds before the guest ever wrote it.
///
/// Both ends decide by this one function, on bytes and not on how the chunk travelled, whether a
/// chunk counts in the state root.
pub fn is_base_state(base: &dyn BaseView, id: ChunkId, chunk: &Chunk) -> io::Result<bool> {
    match own_place(base, id) {
        None => Ok(is_zero(chunk)),
        Some(place) => {
            let mut own = [0; CHUNK_SIZE];
            base.read(place, &mut own)?;
            Ok(own == *chunk)
        }
    }
}

pub mod testing {
    //! A base in memory, for tests of this crate and of those above it.

    use std::{collections::HashMap, io};

    use guest_images::{BaseId, Chunk, ChunkHash, Part, Place};

    use super::BaseView;

    /// A base held in memory.
    #[derive(Clone, Debug)]
    pub struct MemBase {
        id: BaseId,
        parts: [Vec<Chunk>; 3],
        index: HashMap<ChunkHash, Place>,
    }

    impl MemBase {
        /// A base of a disk, a kernel and an initramfs; its id is the hash of their content.
        pub fn new(disk: Vec<Chunk>, kernel: Vec<Chunk>, initramfs: Vec<Chunk>) -> Self {
            let mut hasher = blake3::Hasher::new();
            let mut index = HashMap::new();
            let parts = [disk, kernel, initramfs];
            for (part, chunks) in [Part::Disk, Part::Kernel, Part::Initramfs].iter().zip(&parts) {
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
            match part {
                Part::Disk => &self.parts[0],
                Part::Kernel => &self.parts[1],
                Part::Initramfs => &self.parts[2],
            }
        }
    }

    impl BaseView for MemBase {
        fn id(&self) -> BaseId {
            self.id
        }

        fn lookup(&self, hash: &ChunkHash) -> Option<Place> {
            self.index.get(hash).copied()
        }

        fn read(&self, place: Place, into: &mut Chunk) -> io::Result<()> {
            let chunk =
                usize::try_from(place.index).ok().and_then(|i| self.part(place.part).get(i));
            *into = *chunk.ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("no {place:?} in this base"))
            })?;
            Ok(())
        }

        fn part_chunks(&self, part: Part) -> u64 {
            self.part(part).len() as u64
        }
    }
}
