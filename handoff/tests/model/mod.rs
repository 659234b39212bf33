//! A VM whose guest is a script, for tests that need to know exactly what happened: the guest acts
//! when the engine calls, and so between any two calls, but never by itself.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod sites;

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use guest_images::{CHUNK_SIZE, Chunk};
use handoff::{
    BaseView, Bases, ChunkId, ChunkSet, Geometry, Offer, Refusal, SourceVm, Space, StateRoot,
    StateTable, TargetHost, TargetVm,
    base_view::{own_place, testing::MemBase},
    vm::{Prepared, VmError},
};
use proptest::prelude::*;

pub const GEOMETRY: Geometry = Geometry { ram_chunks: 70, disk_chunks: 40 };

pub fn chunk(seed: u64) -> Chunk {
    let mut bytes = [0; CHUNK_SIZE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes[..512]);
    bytes[512..].fill(seed as u8);
    bytes
}

pub fn ram(index: u64) -> ChunkId {
    ChunkId { space: Space::Ram, index }
}

pub fn disk(index: u64) -> ChunkId {
    ChunkId { space: Space::Disk, index }
}

/// A base that ends before the guest's disk and RAM do.
pub fn base(with_memory: bool) -> Arc<MemBase> {
    let disk = (0..GEOMETRY.disk_chunks - 4).map(|i| chunk(i % 30)).collect();
    let memory = (0..GEOMETRY.ram_chunks - 6).map(|i| chunk(i % 40 + 20)).collect();
    let base = MemBase::new(disk, vec![chunk(100); 2], Vec::new());
    Arc::new(if with_memory { base.with_memory(memory) } else { base })
}

pub fn ids() -> impl Strategy<Value = ChunkId> {
    prop_oneof![
        3 => (0..GEOMETRY.ram_chunks).prop_map(ram),
        1 => (0..GEOMETRY.disk_chunks).prop_map(disk),
    ]
}

pub fn acts(most: usize) -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (ids(), 0u64..40).prop_map(|(id, seed)| Act::Write(id, seed)),
        3 => (ids(), any::<u8>()).prop_map(|(id, n)| Act::Touch(id, n)),
        1 => (ids(), ids()).prop_map(|(from, to)| Act::Copy(from, to)),
        1 => ids().prop_map(Act::Zero),
        1 => ids().prop_map(Act::Restore),
        1 => ids().prop_map(Act::Discard),
        3 => (0..GEOMETRY.ram_chunks).prop_map(Act::Free),
    ];
    prop::collection::vec(act, 0..most)
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// Writes a whole chunk.
    Write(ChunkId, u64),
    /// Changes a few bytes of one.
    Touch(ChunkId, u8),
    /// Copies one chunk to another.
    Copy(ChunkId, ChunkId),
    /// Writes zeros.
    Zero(ChunkId),
    /// Writes what the base has there.
    Restore(ChunkId),
    /// Reports a chunk free, or trims it: it goes back to its base state at once.
    Discard(ChunkId),
    /// Hints that a RAM chunk is free, and does not care for its content until it writes it again.
    Free(u64),
    /// The user cancels the handoff that is under way.
    Cancel,
}

/// A guest's memory, and what a VMM knows of it.
#[derive(Clone)]
pub struct Memory {
    base: Arc<MemBase>,
    chunks: [Vec<Chunk>; 2],
    /// What the guest wrote, by its own account: no VMM touches it.
    pub expected: [Vec<Chunk>; 2],
    dirty: ChunkSet,
    hinted: ChunkSet,
    fresh_hints: ChunkSet,
    /// Whose content the guest does not care for.
    pub free: ChunkSet,
    tracking: bool,
    pub running: bool,
    pub script: VecDeque<Act>,
    pub cancel: Arc<AtomicBool>,
    pub hints_taken: u64,
}

impl Memory {
    /// A guest that never wrote.
    pub fn fresh(base: &Arc<MemBase>) -> Self {
        let set = ChunkSet::new(GEOMETRY);
        let chunks = [
            vec![[0; CHUNK_SIZE]; GEOMETRY.ram_chunks as usize],
            vec![[0; CHUNK_SIZE]; GEOMETRY.disk_chunks as usize],
        ];
        let mut memory = Self {
            base: Arc::clone(base),
            expected: chunks.clone(),
            chunks,
            dirty: set.clone(),
            hinted: set.clone(),
            fresh_hints: set.clone(),
            free: set,
            tracking: false,
            running: false,
            script: VecDeque::new(),
            cancel: Arc::default(),
            hints_taken: 0,
        };
        all().for_each(|id| *memory.at(id) = memory.base_state(id));
        memory.expected = memory.chunks.clone();
        memory
    }

    pub fn base_state(&self, id: ChunkId) -> Chunk {
        let mut chunk = [0; CHUNK_SIZE];
        if let Some(place) = own_place(&*self.base, id) {
            self.base.read(place, &mut chunk).unwrap();
        }
        chunk
    }

    pub fn at(&mut self, id: ChunkId) -> &mut Chunk {
        &mut self.chunks[id.space as usize][id.index as usize]
    }

    pub fn get(&self, id: ChunkId) -> &Chunk {
        &self.chunks[id.space as usize][id.index as usize]
    }

    fn write(&mut self, id: ChunkId, content: Chunk) {
        *self.at(id) = content;
        self.expected[id.space as usize][id.index as usize] = content;
        self.dirty.insert(id);
        self.free.remove(id);
    }

    pub fn act(&mut self, act: Act) {
        match act {
            Act::Write(id, seed) => self.write(id, chunk(seed)),
            Act::Touch(id, n) => {
                let mut content = *self.get(id);
                let at = usize::from(n) * 16;
                content[at] = content[at].wrapping_add(1);
                self.write(id, content);
            }
            Act::Copy(from, to) => self.write(to, *self.get(from)),
            Act::Zero(id) => self.write(id, [0; CHUNK_SIZE]),
            Act::Restore(id) | Act::Discard(id) => self.write(id, self.base_state(id)),
            Act::Free(index) => {
                let id = ChunkId { space: Space::Ram, index };
                self.hinted.insert(id);
                self.fresh_hints.insert(id);
                self.free.insert(id);
            }
            Act::Cancel => self.cancel.store(true, SeqCst),
        }
    }

    /// The guest gets so far in its script.
    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.script.pop_front().filter(|_| self.running) {
                Some(act) => self.act(act),
                None => return,
            }
        }
    }

    /// The guest finds what it wrote.
    pub fn assert_as_expected(&self) {
        for id in all().filter(|id| !self.free.contains(*id)) {
            let expected = &self.expected[id.space as usize][id.index as usize];
            assert!(self.get(id) == expected, "{id:?} was lost");
        }
    }

    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.chunks.iter().flatten().for_each(|c| _ = hasher.update(c));
        *hasher.finalize().as_bytes()
    }
}

/// Every chunk.
pub fn all() -> impl Iterator<Item = ChunkId> {
    let ids = |space, chunks| (0..chunks).map(move |index| ChunkId { space, index });
    ids(Space::Ram, GEOMETRY.ram_chunks).chain(ids(Space::Disk, GEOMETRY.disk_chunks))
}

/// A VM, as source and as target.
#[derive(Clone)]
pub struct Vm(pub Arc<Mutex<Memory>>);

impl Vm {
    pub fn new(memory: Memory) -> Self {
        Self(Arc::new(Mutex::new(memory)))
    }

    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap()
    }
}

impl SourceVm for Vm {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        let memory = self.memory();
        let differs = |id: &ChunkId| *memory.get(*id) != memory.base_state(*id);
        Ok(all().filter(|id| id.space == Space::Disk).filter(differs).count() as u64)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        let mut memory = self.memory();
        assert!(!std::mem::replace(&mut memory.tracking, true), "tracking twice");
        memory.dirty = ChunkSet::new(GEOMETRY);
        memory.hinted = ChunkSet::new(GEOMETRY);
        memory.fresh_hints = ChunkSet::new(GEOMETRY);
        let mut set = ChunkSet::new(GEOMETRY);
        all().filter(|id| *memory.get(*id) != memory.base_state(*id)).for_each(|id| {
            set.insert(id);
        });
        memory.run(1);
        Ok(set)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        let mut memory = self.memory();
        assert!(memory.tracking);
        memory.run(2);
        let dirty = std::mem::replace(&mut memory.dirty, ChunkSet::new(GEOMETRY));
        for id in dirty.iter() {
            memory.hinted.remove(id);
            memory.fresh_hints.remove(id);
        }
        memory.run(1);
        Ok(dirty)
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        let mut memory = self.memory();
        assert!(std::mem::replace(&mut memory.tracking, false));
        memory.hinted = ChunkSet::new(GEOMETRY);
        memory.fresh_hints = ChunkSet::new(GEOMETRY);
        Ok(())
    }

    fn take_free_hints(&mut self) -> Result<ChunkSet, VmError> {
        let mut memory = self.memory();
        memory.run(1);
        let hints = std::mem::replace(&mut memory.fresh_hints, ChunkSet::new(GEOMETRY));
        memory.hints_taken += hints.len();
        memory.run(1);
        Ok(hints)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        let mut memory = self.memory();
        memory.run(1);
        *into = *memory.get(id);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let mut memory = self.memory();
        memory.run(1);
        memory.running = false;
        let hinted = std::mem::replace(&mut memory.hinted, ChunkSet::new(GEOMETRY));
        memory.fresh_hints = ChunkSet::new(GEOMETRY);
        for id in hinted.iter() {
            if !memory.dirty.contains(id) {
                let base = memory.base_state(id);
                *memory.at(id) = base;
                memory.dirty.insert(id);
            }
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        let mut memory = self.memory();
        assert!(!memory.running);
        // Saving writes to guest memory, as real devices do.
        memory.act(Act::Touch(ChunkId { space: Space::Ram, index: 0 }, 1));
        Ok(b"registers".to_vec())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.memory().hash())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.memory().running = true;
        Ok(())
    }
}

/// A VM that is coming in.
pub struct Incoming {
    pub vm: Vm,
    loaded: bool,
    /// Of all that was ever made by its host.
    discarded: Arc<AtomicU64>,
}

impl TargetVm for Incoming {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        *self.vm.memory().at(id) = *chunk;
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        let mut memory = self.vm.memory();
        let base = memory.base_state(id);
        *memory.at(id) = base;
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.vm.memory().get(id);
        Ok(())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        assert_eq!(state, b"registers");
        assert!(!std::mem::replace(&mut self.loaded, true), "loaded twice");
        Ok(())
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.vm.memory().hash())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert!(self.loaded);
        self.vm.memory().running = true;
        Ok(())
    }

    fn discard(&mut self) {
        assert!(!self.vm.memory().running);
        self.discarded.fetch_add(1, SeqCst);
    }
}

/// A cloudlet: its bases, and what it remembers of a guest that was here.
pub struct Host {
    pub base: Arc<MemBase>,
    pub also: Vec<Arc<MemBase>>,
    pub visit: Option<(Memory, StateTable)>,
    /// VMs prepared, and those of them that were discarded.
    pub prepared: u64,
    pub discarded: Arc<AtomicU64>,
    /// What the last offer was answered with.
    pub started_from: Option<StateRoot>,
}

impl Host {
    pub fn new(base: &Arc<MemBase>) -> Self {
        Self {
            base: Arc::clone(base),
            also: Vec::new(),
            visit: None,
            prepared: 0,
            discarded: Arc::default(),
            started_from: None,
        }
    }

    pub fn bases(&self) -> Bases {
        let own: Arc<dyn BaseView> = self.base.clone();
        let also = self.also.iter().map(|base| Arc::clone(base) as Arc<dyn BaseView>);
        Bases::new(own, also.collect()).unwrap()
    }
}

impl TargetHost for Host {
    type Vm = Incoming;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Incoming>, Refusal> {
        if offer.base != self.base.id() {
            return Err(Refusal::UnknownBase(offer.base));
        }
        assert_eq!(offer.geometry, GEOMETRY);
        let held = |table: &StateTable| offer.known.contains(&table.current_root());
        let visit = self.visit.as_ref().filter(|(_, table)| held(table));
        let (memory, start) = match visit {
            // Only the bytes stay of a visit: the process that knew the rest is gone.
            Some((memory, table)) => {
                let chunks = memory.chunks.clone();
                (Memory { chunks, ..Memory::fresh(&self.base) }, Some(table.clone()))
            }
            None => (Memory::fresh(&self.base), None),
        };
        self.started_from = start.as_ref().map(StateTable::current_root);
        let also = offer.also.iter().filter_map(|id| {
            let base = self.also.iter().find(|base| base.id() == *id)?;
            Some(Arc::clone(base) as Arc<dyn BaseView>)
        });
        let bases = Bases::new(self.base.clone(), also.collect()).unwrap();
        self.prepared += 1;
        let discarded = Arc::clone(&self.discarded);
        let vm = Incoming { vm: Vm::new(memory), loaded: false, discarded };
        Ok(Prepared { vm, bases, start })
    }
}
