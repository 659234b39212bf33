//! The first stage, forward: the cheapest way to tell the target what a chunk holds.
//! Its reverse is [`super::resolve`]; both share [`Op`]'s meaning and [`is_base_state`].

use std::{io, sync::Arc};

use guest_images::{
    CHUNK_SIZE, Chunk, ChunkHash, Place,
    chunk::{ZERO_CHUNK, is_zero},
};

use super::stats::{Class, Stats};
use crate::{
    base_view::{BaseView, is_base_state},
    chunks::{ChunkId, Geometry, Space},
    link::Clock,
    root::{StateRoot, StateTable},
};

/// What is to become of a chunk at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The target holds exactly this: nothing is sent.
    Unchanged,
    /// Its base state again: zeros in RAM, the base disk's content on disk.
    Reset,
    /// Zeros on disk, where the base has something else.
    Zero,
    /// The content of a place in the base.
    FromBase(Place),
    /// The content that another chunk has at the target when this op is applied there.
    FromSeen(ChunkId),
    /// The content itself.
    Data,
}

impl Op {
    /// The class under which it is counted.
    pub fn class(self) -> Class {
        match self {
            Op::Unchanged => Class::Unchanged,
            Op::Reset => Class::Reset,
            Op::Zero => Class::Zero,
            Op::FromBase(_) => Class::Base,
            Op::FromSeen(_) => Class::Seen,
            Op::Data => Class::Data,
        }
    }
}

/// Which ways may be used. All are, but to measure what each is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// [`Op::Unchanged`].
    pub unchanged: bool,
    /// [`Op::Reset`].
    pub reset: bool,
    /// [`Op::Zero`].
    pub zero: bool,
    /// [`Op::FromBase`].
    pub base: bool,
    /// [`Op::FromSeen`].
    pub seen: bool,
}

impl Default for StageOptions {
    fn default() -> Self {
        Self { unchanged: true, reset: true, zero: true, base: true, seen: true }
    }
}

/// A chunk could not be classified.
#[derive(Debug, thiserror::Error)]
pub enum ClassifyError {
    /// There is no such chunk.
    #[error("{id:?} is outside the guest's {geometry:?}")]
    Outside {
        /// The chunk.
        id: ChunkId,
        /// What there is.
        geometry: Geometry,
    },
    /// The base could not be read.
    #[error("cannot read the base to compare {id:?} with it: {source}")]
    Base {
        /// The chunk.
        id: ChunkId,
        /// What the read said.
        source: io::Error,
    },
}

/// A clock is read for one chunk in this many: reading it may cost as much as a hash where the
/// kernel has no fast clock.
const CPU_SAMPLE: u64 = 16;

/// Slots of the table of chunks sent before: 512 KiB.
const SEEN_SLOTS: usize = 1 << 16;

/// Where contents sent before can be found, by the first bits of their hash. Slots are overwritten
/// without a thought: a hit counts only if the state table says that the chunk still has that hash.
struct Seen {
    slots: Vec<Option<ChunkRef>>,
}

/// A chunk's id in eight bytes: the number with the space in its lowest bit, plus one.
#[derive(Clone, Copy)]
struct ChunkRef(std::num::NonZeroU64);

impl ChunkRef {
    fn new(id: ChunkId) -> Option<Self> {
        let shifted = id.index.checked_mul(2)?;
        std::num::NonZeroU64::new((shifted | id.space as u64).checked_add(1)?).map(Self)
    }

    fn id(self) -> ChunkId {
        let bits = self.0.get() - 1;
        ChunkId { space: if bits & 1 == 0 { Space::Ram } else { Space::Disk }, index: bits >> 1 }
    }
}

impl Seen {
    fn new() -> Self {
        Self { slots: vec![None; SEEN_SLOTS] }
    }

    fn slot(hash: &ChunkHash) -> usize {
        usize::from(u16::from_le_bytes([hash.0[0], hash.0[1]]))
    }

    fn find(&self, hash: &ChunkHash, table: &StateTable) -> Option<ChunkId> {
        let id = self.slots[Self::slot(hash)]?.id();
        (table.get(id).as_ref() == Some(hash)).then_some(id)
    }

    fn insert(&mut self, hash: &ChunkHash, id: ChunkId) {
        self.slots[Self::slot(hash)] = ChunkRef::new(id);
    }
}

/// What a chunk's bytes say, whatever was sent before.
enum Content {
    BaseState,
    DiskZero,
    Other(ChunkHash),
}

/// Decides how chunks travel, and keeps the table of what the target will hold.
///
/// Every op returned must reach the target, in the order in which they were returned: later ones
/// build on earlier ones. If one is dropped, the handoff is over for this classifier.
pub struct Classifier {
    base: Arc<dyn BaseView>,
    options: StageOptions,
    clock: Option<Arc<dyn Clock>>,
    table: StateTable,
    seen: Seen,
    zero: ChunkHash,
    stats: Stats,
    classified: u64,
}

impl Classifier {
    /// For a target that begins as `base`: RAM zero, disk equal to the base's.
    pub fn new(base: Arc<dyn BaseView>, geometry: Geometry) -> Self {
        Self {
            table: StateTable::new(base.id(), geometry),
            base,
            options: StageOptions::default(),
            clock: None,
            seen: Seen::new(),
            zero: ChunkHash::of(ZERO_CHUNK),
            stats: Stats::default(),
            classified: 0,
        }
    }

    /// The same with some ways switched off.
    pub fn with_options(self, options: StageOptions) -> Self {
        Self { options, ..self }
    }

    /// The same with CPU time taken by `clock`; without one it is reported as 0.
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// Decides how `chunk`, a copy of what `id` holds, travels.
    pub fn classify(&mut self, id: ChunkId, chunk: &Chunk) -> Result<Op, ClassifyError> {
        let clock = self.clock.clone().filter(|_| self.classified.is_multiple_of(CPU_SAMPLE));
        let start = clock.as_ref().map(|clock| clock.now());
        let content = self.examine(id, chunk)?;
        let op = self.decide(id, chunk, content);
        self.classified += 1;
        let share = &mut self.stats[op.class()];
        share.chunks += 1;
        share.bytes_in += CHUNK_SIZE as u64;
        if let (Some(clock), Some(start)) = (clock, start) {
            share.sample(clock.now().saturating_sub(start));
        }
        Ok(op)
    }

    /// The part that costs CPU and depends on nothing sent before.
    fn examine(&self, id: ChunkId, chunk: &Chunk) -> Result<Content, ClassifyError> {
        let geometry = self.table.geometry();
        if !geometry.contains(id) {
            return Err(ClassifyError::Outside { id, geometry });
        }
        let is_base = is_base_state(&*self.base, id, chunk)
            .map_err(|source| ClassifyError::Base { id, source })?;
        Ok(if is_base {
            Content::BaseState
        } else if id.space == Space::Disk && is_zero(chunk) {
            Content::DiskZero
        } else {
            Content::Other(ChunkHash::of(chunk))
        })
    }

    fn decide(&mut self, id: ChunkId, chunk: &Chunk, content: Content) -> Op {
        let hash = match content {
            Content::BaseState => {
                let before = self.table.clear(id);
                if before.is_none() && self.options.unchanged {
                    return Op::Unchanged;
                }
                if self.options.reset {
                    return Op::Reset;
                }
                return self.by_reference(&ChunkHash::of(chunk)).unwrap_or(Op::Data);
            }
            Content::DiskZero => self.zero,
            Content::Other(hash) => hash,
        };
        if self.options.unchanged && self.table.get(id) == Some(hash) {
            return Op::Unchanged;
        }
        // Looked for before the table changes, so that a chunk never refers to itself.
        let reference = match content {
            Content::DiskZero if self.options.zero => Some(Op::Zero),
            _ => self.by_reference(&hash),
        };
        self.table.set(id, hash);
        reference.unwrap_or_else(|| {
            self.seen.insert(&hash, id);
            Op::Data
        })
    }

    fn by_reference(&self, hash: &ChunkHash) -> Option<Op> {
        let base = || self.base.lookup(hash).filter(|place| self.base.holds(*place));
        let seen = || self.seen.find(hash, &self.table);
        self.options
            .base
            .then(base)
            .flatten()
            .map(Op::FromBase)
            .or_else(|| self.options.seen.then(seen).flatten().map(Op::FromSeen))
    }

    /// The root of what the target holds once it applied every op returned so far.
    pub fn root(&mut self) -> StateRoot {
        self.table.root()
    }

    /// The table behind [`Classifier::root`].
    pub fn table(&self) -> &StateTable {
        &self.table
    }

    /// What the chunks so far were. Bytes out are for the caller to add, from its batches.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        for class in Class::ALL {
            stats[class].estimate();
        }
        stats
    }
}
