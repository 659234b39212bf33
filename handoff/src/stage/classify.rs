//! The first stage, forward: the cheapest way to tell the target what a chunk holds.
//! Its reverse is [`super::resolve`]; both share [`Op`]'s meaning and [`is_base_state`].
//!
//! Chunks come in groups: all of a group are compared and hashed, then looked up in the bases at
//! once, and then decided upon one after the other.

use std::io;

use guest_images::{
    Chunk, ChunkHash, Place,
    chunk::{ZERO_CHUNK, is_zero},
};

use super::{
    options::StageOptions,
    pack::What,
    stats::{Class, CpuWatch},
};
use crate::{
    base_view::{BasePlace, Bases, is_base_state},
    chunks::{ChunkId, ChunkSet, Geometry, Space},
    root::{StateRoot, StateTable},
};

/// What is to become of a chunk at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The target holds exactly this: nothing is sent.
    Unchanged,
    /// The same, and it holds it from an earlier visit of this VM.
    Known,
    /// Its base state again.
    Reset,
    /// Zeros, where its base state is something else.
    Zero,
    /// The content of a place in a base.
    FromBase(BasePlace),
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
            Op::Known => Class::Known,
            Op::Reset => Class::Reset,
            Op::Zero => Class::Zero,
            Op::FromBase(at) => Class::of_place(at),
            Op::FromSeen(_) => Class::Seen,
            Op::Data => Class::Data,
        }
    }

    /// What is sent for it, if anything is: `chunk` is the content.
    pub fn what(self, chunk: &Chunk) -> Option<What<'_>> {
        match self {
            Op::Unchanged | Op::Known => None,
            Op::Reset => Some(What::Reset),
            Op::Zero => Some(What::Zero),
            Op::FromBase(at) => Some(What::FromBase(at)),
            Op::FromSeen(source) => Some(What::FromSeen(source)),
            Op::Data => Some(What::Data(chunk)),
        }
    }
}

/// How a chunk travels, and what that changes at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What becomes of it.
    pub op: Op,
    /// The hash of what the target holds until then; `None` where that is its base state.
    pub before: Option<ChunkHash>,
    /// The same from then on.
    pub after: Option<ChunkHash>,
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

/// Slots of the table of chunks sent before: 1 MiB.
const SEEN_SLOTS: usize = 1 << 17;

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
        let [a, b, c, d, ..] = hash.0;
        u32::from_le_bytes([a, b, c, d]) as usize % SEEN_SLOTS
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
#[derive(Clone, Copy)]
enum Content {
    BaseState,
    Zero,
    Other(ChunkHash),
}

/// Decides how chunks travel, and keeps the table of what the target will hold.
///
/// Every op returned must reach the target, in the order in which they were returned: later ones
/// build on earlier ones. If one is dropped, the handoff is over for this classifier.
pub struct Classifier {
    bases: Bases,
    options: StageOptions,
    table: StateTable,
    /// Chunks that the target still holds as it did before this handoff.
    from_start: Option<ChunkSet>,
    seen: Seen,
    zero: ChunkHash,
    lookup: Lookup,
}

/// Buffers of one group.
#[derive(Default)]
struct Lookup {
    contents: Vec<Content>,
    /// Hashes to be looked up, and the number of each one's chunk in the group.
    hashes: Vec<ChunkHash>,
    numbers: Vec<usize>,
    /// For each chunk of the group where its content was found.
    found: Vec<Option<BasePlace>>,
    places: Vec<Option<Place>>,
}

impl Classifier {
    /// For a target on which every chunk has its base state.
    pub fn new(bases: Bases, geometry: Geometry) -> Self {
        Self {
            table: StateTable::new(bases.own().id(), geometry),
            bases,
            options: StageOptions::default(),
            from_start: None,
            seen: Seen::new(),
            zero: ChunkHash::of(ZERO_CHUNK),
            lookup: Lookup::default(),
        }
    }

    /// The same with some ways switched off.
    pub fn with_options(self, options: StageOptions) -> Self {
        Self { options, ..self }
    }

    /// The same for a target that holds what `table` says, which must be of the same base: its
    /// geometry is the guest's.
    pub fn with_start(mut self, table: StateTable) -> Self {
        let mut from_start = ChunkSet::new(table.geometry());
        for (id, hash) in table.iter() {
            from_start.insert(id);
            if self.options.known {
                self.seen.insert(&hash, id);
            }
        }
        Self { table, from_start: Some(from_start), ..self }
    }

    /// Decides how `chunk`, a copy of what `id` holds, travels.
    pub fn classify(&mut self, id: ChunkId, chunk: &Chunk) -> Result<Decision, ClassifyError> {
        let mut decisions = Vec::with_capacity(1);
        self.classify_group(&[id], std::slice::from_ref(chunk), &mut decisions, None)?;
        // One chunk, one decision.
        decisions.pop().ok_or(ClassifyError::Outside { id, geometry: self.table.geometry() })
    }

    /// Decides how a group of chunks travels: `chunks` are copies of what `ids` hold, in the same
    /// order as the decisions that are appended. `cpu_ns`, if given, gets the CPU time that each
    /// chunk took by itself.
    pub fn classify_group(
        &mut self,
        ids: &[ChunkId],
        chunks: &[Chunk],
        decisions: &mut Vec<Decision>,
        mut cpu_ns: Option<&mut Vec<u64>>,
    ) -> Result<(), ClassifyError> {
        let mut lookup = std::mem::take(&mut self.lookup);
        let examined = self.examine_group(ids, chunks, &mut lookup, cpu_ns.as_deref_mut());
        if examined.is_ok() {
            let watch = cpu_ns.is_some().then(CpuWatch::start);
            let searched = lookup.hashes.len() as u64;
            self.look_up(&mut lookup);
            if let (Some(mut watch), Some(cpu_ns)) = (watch, cpu_ns) {
                let each = watch.lap_ns() / searched.max(1);
                let hashed = lookup.contents.iter().map(|c| matches!(c, Content::Other(_)));
                cpu_ns.iter_mut().zip(hashed).filter(|(_, h)| *h).for_each(|(ns, _)| *ns += each);
            }
            let all = ids.iter().zip(chunks).zip(lookup.contents.iter().zip(&lookup.found));
            decisions.extend(
                all.map(|((id, chunk), (content, at))| self.decide(*id, chunk, *content, *at)),
            );
        }
        self.lookup = lookup;
        examined
    }

    /// What would be decided now, were it to be sent: nothing is noted.
    pub fn foresee_group(
        &mut self,
        ids: &[ChunkId],
        chunks: &[Chunk],
        decisions: &mut Vec<Decision>,
    ) -> Result<(), ClassifyError> {
        let mut lookup = std::mem::take(&mut self.lookup);
        let examined = self.examine_group(ids, chunks, &mut lookup, None);
        if examined.is_ok() {
            self.look_up(&mut lookup);
            let all = ids.iter().zip(chunks).zip(lookup.contents.iter().zip(&lookup.found));
            decisions.extend(
                all.map(|((id, chunk), (content, at))| self.judge(*id, chunk, *content, *at)),
            );
        }
        self.lookup = lookup;
        examined
    }

    /// The part that costs CPU and depends on nothing sent before.
    fn examine_group(
        &self,
        ids: &[ChunkId],
        chunks: &[Chunk],
        lookup: &mut Lookup,
        mut cpu_ns: Option<&mut Vec<u64>>,
    ) -> Result<(), ClassifyError> {
        lookup.contents.clear();
        lookup.hashes.clear();
        lookup.numbers.clear();
        let mut watch = cpu_ns.is_some().then(CpuWatch::start);
        for (number, (id, chunk)) in ids.iter().zip(chunks).enumerate() {
            let content = self.examine(*id, chunk)?;
            lookup.contents.push(content);
            let hash = match content {
                Content::Other(hash) => Some(hash),
                Content::Zero if !self.options.zero => Some(self.zero),
                _ => None,
            };
            if let Some(hash) = hash {
                lookup.hashes.push(hash);
                lookup.numbers.push(number);
            }
            if let (Some(watch), Some(cpu_ns)) = (&mut watch, &mut cpu_ns) {
                cpu_ns.push(watch.lap_ns());
            }
        }
        Ok(())
    }

    fn examine(&self, id: ChunkId, chunk: &Chunk) -> Result<Content, ClassifyError> {
        let geometry = self.table.geometry();
        if !geometry.contains(id) {
            return Err(ClassifyError::Outside { id, geometry });
        }
        let is_base = is_base_state(self.bases.own(), id, chunk)
            .map_err(|source| ClassifyError::Base { id, source })?;
        Ok(if is_base {
            Content::BaseState
        } else if is_zero(chunk) {
            Content::Zero
        } else {
            Content::Other(ChunkHash::of(chunk))
        })
    }

    /// Looks all hashes of the group up, base by base, as long as some were not found.
    fn look_up(&self, lookup: &mut Lookup) {
        let Lookup { contents, hashes, numbers, found, places } = lookup;
        found.clear();
        found.resize(contents.len(), None);
        for (number, base) in self.bases.iter() {
            if hashes.is_empty() {
                break;
            }
            if !self.searches(number) {
                continue;
            }
            places.clear();
            places.resize(hashes.len(), None);
            base.lookup_batch(hashes, places);
            let mut missing = 0;
            for i in 0..hashes.len() {
                let at = places[i].map(|place| BasePlace { base: number, place });
                match at.filter(|at| self.allows(*at) && base.holds(at.place)) {
                    Some(at) => found[numbers[i]] = Some(at),
                    None => {
                        (hashes[missing], numbers[missing]) = (hashes[i], numbers[i]);
                        missing += 1;
                    }
                }
            }
            hashes.truncate(missing);
            numbers.truncate(missing);
        }
    }

    /// Whether places in this base may be named at all.
    fn searches(&self, number: u8) -> bool {
        match number {
            0 => self.options.base_disk || self.options.base_memory,
            _ => self.options.other_bases,
        }
    }

    fn allows(&self, at: BasePlace) -> bool {
        match Class::of_place(at) {
            Class::BaseDisk => self.options.base_disk,
            Class::BaseMemory => self.options.base_memory,
            _ => self.options.other_bases,
        }
    }

    /// Decides, and notes what the target will hold.
    fn decide(
        &mut self,
        id: ChunkId,
        chunk: &Chunk,
        content: Content,
        at: Option<BasePlace>,
    ) -> Decision {
        let decision = self.judge(id, chunk, content, at);
        let Decision { op, before, after } = decision;
        if before != after
            && let Some(from_start) = &mut self.from_start
        {
            from_start.remove(id);
        }
        match after {
            None => _ = self.table.clear(id),
            Some(hash) => {
                self.table.set(id, hash);
                if op == Op::Data {
                    self.seen.insert(&hash, id);
                }
            }
        }
        decision
    }

    fn judge(
        &self,
        id: ChunkId,
        chunk: &Chunk,
        content: Content,
        at: Option<BasePlace>,
    ) -> Decision {
        let before = self.table.get(id);
        let (op, after) = match content {
            Content::BaseState => (self.to_base_state(id, chunk, before), None),
            Content::Zero => {
                (self.to_content(id, self.zero, before, at, self.options.zero), Some(self.zero))
            }
            Content::Other(hash) => (self.to_content(id, hash, before, at, false), Some(hash)),
        };
        Decision { op, before, after }
    }

    fn to_base_state(&self, id: ChunkId, chunk: &Chunk, before: Option<ChunkHash>) -> Op {
        let options = &self.options;
        if before.is_none() && options.unchanged {
            return Op::Unchanged;
        }
        if options.reset {
            return Op::Reset;
        }
        if options.zero && is_zero(chunk) {
            return Op::Zero;
        }
        // Rare enough to be looked up by itself.
        let hash = ChunkHash::of(chunk);
        let at = self.bases.iter().filter(|(number, _)| self.searches(*number)).find_map(
            |(number, base)| {
                let place = base.lookup(&hash).filter(|place| base.holds(*place))?;
                Some(BasePlace { base: number, place }).filter(|at| self.allows(*at))
            },
        );
        self.by_reference(id, &hash, at)
    }

    fn to_content(
        &self,
        id: ChunkId,
        hash: ChunkHash,
        before: Option<ChunkHash>,
        at: Option<BasePlace>,
        as_zero: bool,
    ) -> Op {
        if before == Some(hash) {
            let from_start = self.from_start.as_ref().is_some_and(|set| set.contains(id));
            match from_start {
                true if self.options.known => return Op::Known,
                false if self.options.unchanged => return Op::Unchanged,
                _ => {}
            }
        }
        match as_zero {
            true => Op::Zero,
            false => self.by_reference(id, &hash, at),
        }
    }

    /// Asked before the table changes. A chunk never refers to itself: that would say nothing.
    fn by_reference(&self, id: ChunkId, hash: &ChunkHash, at: Option<BasePlace>) -> Op {
        let seen = || self.seen.find(hash, &self.table).filter(|source| *source != id);
        at.map(Op::FromBase)
            .or_else(|| self.options.seen.then(seen).flatten().map(Op::FromSeen))
            .unwrap_or(Op::Data)
    }

    /// The root of what the target holds once it applied every op returned so far.
    pub fn root(&mut self) -> StateRoot {
        self.table.root()
    }

    /// The table behind [`Classifier::root`].
    pub fn table(&self) -> &StateTable {
        &self.table
    }

    /// The same, for good.
    pub fn into_table(self) -> StateTable {
        self.table
    }

    /// The bases that it looks into.
    pub fn bases(&self) -> &Bases {
        &self.bases
    }
}
