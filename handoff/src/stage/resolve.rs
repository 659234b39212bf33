//! The first stage in reverse: makes chunks out of a batch and keeps account of what it wrote.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
};

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash, chunk::ZERO_CHUNK};

use super::{
    delta::{self, DeltaError},
    delta_cache::SentCache,
    inspect::{Fact, Inspected, Inspector},
    pack::{BatchError, Step, What},
    stats::Class,
    write_group::WriteGroup,
};
use crate::{
    base_view::{BasePlace, Bases},
    chunks::{ChunkId, Geometry},
    root::{GROUP_CHUNKS, GroupKey, StateRoot, StateTable, group_of},
    vm::{TargetVm, VmError},
};

/// Why a batch was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// It is not a batch. Nothing was written.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// It speaks of a chunk that the guest has not. Nothing was written.
    #[error("the batch speaks of {id:?}, outside the guest's {geometry:?}")]
    Outside {
        /// The chunk.
        id: ChunkId,
        /// What there is.
        geometry: Geometry,
    },
    /// It refers to a place that the bases have not. Nothing was written.
    #[error("the batch refers to {at:?} for {id:?}, but that part has {chunks} chunks")]
    NoSuchPlace {
        /// The chunk.
        id: ChunkId,
        /// What it refers to.
        at: BasePlace,
        /// Chunks in that part.
        chunks: u64,
    },
    /// It refers to a chunk that was never sent or equals its base by now.
    #[error("the batch takes {id:?} from {source_id:?}, which was not received")]
    NotReceived {
        /// The chunk.
        id: ChunkId,
        /// What it refers to.
        source_id: ChunkId,
    },
    /// A chunk received before is not what was written.
    #[error("{source_id:?} holds {found} where {written} was written: memory or disk is not sound")]
    Altered {
        /// The chunk.
        source_id: ChunkId,
        /// The hash of what was written.
        written: ChunkHash,
        /// The hash of what is there.
        found: ChunkHash,
    },
    /// A delta does not fit what it is to change.
    #[error("cannot make {id:?} from what was there: {source}")]
    Delta {
        /// The chunk.
        id: ChunkId,
        /// What is wrong.
        source: DeltaError,
    },
    /// The base could not be read.
    #[error("cannot read the base for {id:?}: {source}")]
    Base {
        /// The chunk.
        id: ChunkId,
        /// What the read said.
        source: io::Error,
    },
    /// The VM could not read or write.
    #[error("cannot apply {id:?} to the VM: {source}")]
    Vm {
        /// The chunk.
        id: ChunkId,
        /// What the VM said.
        source: VmError,
    },
    /// The VM could not write chunks that it was given at once.
    #[error("cannot write {chunks} chunks to the VM's disk, the first {first:?}: {source}")]
    Group {
        /// How many.
        chunks: usize,
        /// One of them.
        first: ChunkId,
        /// What the VM said.
        source: VmError,
    },
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Chunks written, of all classes.
    pub chunks: u64,
    /// Chunks written of each class, by its number.
    pub classes: [u64; Class::ALL.len()],
    /// Chunks left alone because a newer generation of them is in place.
    pub stale: u64,
}

/// The newest generation of each chunk received, in groups like those of the state table. Kept
/// apart from it because a chunk that went back to its base state still has a generation.
#[derive(Default)]
struct Generations {
    groups: BTreeMap<GroupKey, Box<[u32; GROUP_CHUNKS as usize]>>,
}

impl Generations {
    fn memory_bytes(&self) -> usize {
        self.groups.len() * (size_of::<GroupKey>() + 8 + size_of::<[u32; GROUP_CHUNKS as usize]>())
    }

    /// Takes note of a generation; `false` if a newer one was noted.
    fn advance(&mut self, id: ChunkId, generation: u32) -> bool {
        let (key, slot) = group_of(id);
        let group = match self.groups.entry(key) {
            Entry::Occupied(group) => group.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Box::new([0; GROUP_CHUNKS as usize])),
        };
        let newest = generation >= group[slot];
        if newest {
            group[slot] = generation;
        }
        newest
    }
}

/// Applies batches to a VM and keeps the table of what it holds.
///
/// After an error the VM and the table no longer go together: the handoff must be aborted.
pub struct Resolver {
    inspector: Inspector,
    table: StateTable,
    generations: Generations,
    received: SentCache,
    /// Empty between batches.
    group: WriteGroup,
    /// For batches that nobody else inspects.
    scratch: Inspected,
}

impl Resolver {
    /// For a VM on which every chunk has its base state.
    pub fn new(bases: Bases, geometry: Geometry) -> Self {
        Self {
            table: StateTable::new(bases.own().id(), geometry),
            inspector: Inspector::new(bases, geometry),
            generations: Generations::default(),
            received: SentCache::new(0),
            group: WriteGroup::default(),
            scratch: Inspected::default(),
        }
    }

    /// The same, and keeps up to so many bytes of what came as itself: when the guest goes back,
    /// that is what the other side knows.
    pub fn keeping(self, bytes: usize) -> Self {
        Self { received: SentCache::new(bytes), ..self }
    }

    /// The same for a VM that holds what `table` says, verified. It must be of the same base: its
    /// geometry is the guest's.
    pub fn with_start(self, table: StateTable) -> Self {
        Self { table, ..self }
    }

    /// Applies one batch. All of it is checked before any of it is written.
    pub fn apply(&mut self, vm: &mut dyn TargetVm, body: &[u8]) -> Result<Applied, ResolveError> {
        let mut inspected = std::mem::take(&mut self.scratch);
        inspected.body_mut().clear();
        inspected.body_mut().extend_from_slice(body);
        let checked = self.inspector.inspect(&mut inspected);
        let applied = checked.and_then(|()| self.apply_inspected(vm, &inspected));
        self.scratch = inspected;
        applied
    }

    /// Applies one batch that an [`Inspector`] of the same bases and geometry has looked at.
    pub fn apply_inspected(
        &mut self,
        vm: &mut dyn TargetVm,
        inspected: &Inspected,
    ) -> Result<Applied, ResolveError> {
        let mut applied = Applied::default();
        for (step, fact) in inspected.steps() {
            if self.generations.advance(step.id, inspected.generation()) {
                let class = self.take(vm, &step, fact)?;
                applied.chunks += 1;
                applied.classes[class as usize] += 1;
            } else {
                applied.stale += 1;
            }
        }
        self.group.flush(vm)?;
        Ok(applied)
    }

    /// What inspects batches for it.
    pub fn inspector(&self) -> &Inspector {
        &self.inspector
    }

    fn take(
        &mut self,
        vm: &mut dyn TargetVm,
        step: &Step<'_>,
        fact: Option<Fact>,
    ) -> Result<Class, ResolveError> {
        let id = step.id;
        let mut copy = [0; CHUNK_SIZE];
        match step.what {
            What::Reset => {
                self.group.reset(vm, id)?;
                self.table.clear(id);
                Ok(Class::Reset)
            }
            What::Zero => self.write(vm, id, ZERO_CHUNK, fact).map(|_| Class::Zero),
            What::FromBase(at) => {
                // Shared, so that the chunk borrowed from it leaves `self` to be written to.
                let bases = self.inspector.bases().clone();
                let missing = || self.inspector.no_such_place(id, at);
                let chunk = bases.chunk(at).ok_or_else(missing)?;
                self.write(vm, id, chunk, fact).map(|_| Class::of_place(at))
            }
            What::FromSeen(source_id) => {
                let hash = self.read_received(vm, id, source_id, &mut copy)?;
                let fact = self.inspector.fact(id, &copy, Some(hash))?;
                self.write(vm, id, &copy, Some(fact)).map(|_| Class::Seen)
            }
            What::Data(chunk) => self.write_kept(vm, id, chunk, fact).map(|()| Class::Data),
            What::Delta(codec, bytes) => {
                self.group.read(vm, id, &mut copy)?;
                delta::apply(codec, bytes, &mut copy)
                    .map_err(|source| ResolveError::Delta { id, source })?;
                self.write_kept(vm, id, &copy, None).map(|()| Class::Delta)
            }
        }
    }

    /// Copies a chunk received before and checks that it is still what was written.
    fn read_received(
        &self,
        vm: &mut dyn TargetVm,
        id: ChunkId,
        source_id: ChunkId,
        into: &mut Chunk,
    ) -> Result<ChunkHash, ResolveError> {
        let written =
            self.table.get(source_id).ok_or(ResolveError::NotReceived { id, source_id })?;
        self.group.read(vm, source_id, into)?;
        let found = ChunkHash::of(into);
        if found != written {
            return Err(ResolveError::Altered { source_id, written, found });
        }
        Ok(found)
    }

    /// Writes a chunk and enters it in the table by what it holds, not by how it came. Returns its
    /// hash and whether the table had another of it.
    fn write(
        &mut self,
        vm: &mut dyn TargetVm,
        id: ChunkId,
        chunk: &Chunk,
        fact: Option<Fact>,
    ) -> Result<(ChunkHash, bool), ResolveError> {
        let Fact { hash, is_base } = match fact {
            Some(fact) => fact,
            None => self.inspector.fact(id, chunk, None)?,
        };
        self.group.write(vm, id, chunk)?;
        let before = if is_base { self.table.clear(id) } else { self.table.set(id, hash) };
        Ok((hash, before.is_some()))
    }

    /// The same for content that came as itself.
    fn write_kept(
        &mut self,
        vm: &mut dyn TargetVm,
        id: ChunkId,
        chunk: &Chunk,
        fact: Option<Fact>,
    ) -> Result<(), ResolveError> {
        let (hash, again) = self.write(vm, id, chunk, fact)?;
        self.received.insert(id, hash, chunk, again);
        Ok(())
    }

    /// Bytes of memory that the tables take: what grows with the chunks that came.
    pub fn table_bytes(&self) -> usize {
        self.table.memory_bytes() + self.generations.memory_bytes()
    }

    /// Keeps no more than so many bytes of what came.
    pub fn keep_at_most(&mut self, bytes: usize) {
        self.received.shrink_to(bytes);
    }

    /// Prepares [`Resolver::root`]: [`StateTable::tidy`].
    pub fn tidy(&mut self, groups: usize) -> bool {
        self.table.tidy(groups)
    }

    /// The root of what the VM holds.
    pub fn root(&mut self) -> StateRoot {
        self.table.root()
    }

    /// The table behind [`Resolver::root`].
    pub fn table(&self) -> &StateTable {
        &self.table
    }

    /// The same, for good.
    pub fn into_table(self) -> StateTable {
        self.table
    }

    /// The same, and what was kept.
    pub fn into_parts(self) -> (StateTable, SentCache) {
        (self.table, self.received)
    }
}
