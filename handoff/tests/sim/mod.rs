//! Two in-memory VMs with faults, for the engine's tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod pair;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use guest_images::{CHUNK_SIZE, Chunk};
use handoff::{
    BaseView, ChunkId, ChunkSet, Geometry, Offer, Refusal, SourceVm, Space, TargetHost, TargetVm,
    base_view::{own_place, testing::MemBase},
    vm::{Prepared, VmError},
};

pub const GEOMETRY: Geometry = Geometry { ram_chunks: 600, disk_chunks: 200 };

/// Counts how many guests run at once, over both sides.
#[derive(Clone, Default)]
pub struct Runners(Arc<AtomicI64>, Arc<AtomicBool>);

impl Runners {
    fn start(&self) {
        if self.0.fetch_add(1, SeqCst) + 1 > 1 {
            self.1.store(true, SeqCst);
        }
    }

    fn stop(&self) {
        self.0.fetch_sub(1, SeqCst);
    }

    pub fn now(&self) -> i64 {
        self.0.load(SeqCst)
    }

    pub fn ever_two(&self) -> bool {
        self.1.load(SeqCst)
    }
}

pub fn chunk(seed: u64) -> Chunk {
    let mut bytes = [0; CHUNK_SIZE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    // Half of it compresses.
    bytes[CHUNK_SIZE / 2..].fill(seed as u8);
    bytes
}

pub fn base() -> Arc<MemBase> {
    let disk = (0..GEOMETRY.disk_chunks - 20).map(|i| chunk(1000 + i)).collect();
    Arc::new(MemBase::new(disk, vec![chunk(5000); 3], vec![chunk(6000); 2]))
}

#[derive(Clone)]
pub struct Memory {
    pub ram: Vec<Chunk>,
    pub disk: Vec<Chunk>,
    dirty: ChunkSet,
}

impl Memory {
    pub fn fresh(base: &dyn BaseView) -> Self {
        let mut disk = vec![[0; CHUNK_SIZE]; GEOMETRY.disk_chunks as usize];
        for (index, chunk) in disk.iter_mut().enumerate() {
            let id = ChunkId { space: Space::Disk, index: index as u64 };
            if let Some(place) = own_place(base, id) {
                base.read(place, chunk).unwrap();
            }
        }
        let ram = vec![[0; CHUNK_SIZE]; GEOMETRY.ram_chunks as usize];
        Self { ram, disk, dirty: ChunkSet::new(GEOMETRY) }
    }

    pub fn at(&mut self, id: ChunkId) -> &mut Chunk {
        match id.space {
            Space::Ram => &mut self.ram[id.index as usize],
            Space::Disk => &mut self.disk[id.index as usize],
        }
    }

    pub fn write(&mut self, id: ChunkId, content: Chunk) {
        *self.at(id) = content;
        self.dirty.insert(id);
    }

    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.ram.iter().chain(&self.disk).for_each(|c| _ = hasher.update(c));
        *hasher.finalize().as_bytes()
    }
}

/// A guest: a thread that writes at random while it runs.
pub struct Guest {
    pub memory: Arc<Mutex<Memory>>,
    running: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    runners: Runners,
}

impl Guest {
    fn new(memory: Arc<Mutex<Memory>>, runners: Runners, writes_per_s: u64) -> Self {
        let running = Arc::new(AtomicBool::new(false));
        let over = Arc::new(AtomicBool::new(false));
        let (m, r, o) = (Arc::clone(&memory), Arc::clone(&running), Arc::clone(&over));
        let thread = (writes_per_s > 0).then(|| {
            thread::spawn(move || {
                let mut n = 77u64;
                while !o.load(SeqCst) {
                    thread::sleep(Duration::from_micros(1_000_000 / writes_per_s));
                    let mut memory = m.lock().unwrap();
                    if r.load(SeqCst) {
                        n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let space = if n >> 60 == 0 { Space::Disk } else { Space::Ram };
                        let index = (n >> 33) % if space == Space::Ram { 40 } else { 200 };
                        let content = match n >> 58 & 3 {
                            0 => [0; CHUNK_SIZE],
                            1 => chunk(1000 + n % 50),
                            _ => chunk(n),
                        };
                        memory.write(ChunkId { space, index }, content);
                    }
                }
            })
        });
        Self { memory, running, over, thread, runners }
    }

    pub fn run(&self) {
        let _held = self.memory.lock().unwrap();
        if !self.running.swap(true, SeqCst) {
            self.runners.start();
        }
    }

    pub fn pause(&self) {
        let _held = self.memory.lock().unwrap();
        if self.running.swap(false, SeqCst) {
            self.runners.stop();
        }
    }

    pub fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.pause();
        self.over.store(true, SeqCst);
        self.thread.take().map(JoinHandle::join);
    }
}

pub struct Source {
    pub guest: Guest,
    base: Arc<MemBase>,
    tracking: bool,
    pub fail_save: bool,
    pub fail_track: bool,
}

impl Source {
    /// A running guest with some state of its own.
    pub fn new(base: &Arc<MemBase>, runners: &Runners, writes_per_s: u64) -> Self {
        let mut memory = Memory::fresh(&**base);
        for i in 0..300 {
            memory.write(ChunkId { space: Space::Ram, index: i * 2 }, chunk(i));
        }
        for i in 0..60 {
            memory.write(ChunkId { space: Space::Disk, index: i * 3 }, chunk(9000 + i % 7));
        }
        // Page cache: what the base disk holds, in RAM.
        for i in 0..100 {
            memory.write(ChunkId { space: Space::Ram, index: i * 2 + 1 }, chunk(1000 + i));
        }
        let guest = Guest::new(Arc::new(Mutex::new(memory)), runners.clone(), writes_per_s);
        guest.run();
        Self { guest, base: Arc::clone(base), tracking: false, fail_save: false, fail_track: false }
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.guest.memory.lock().unwrap()
    }
}

impl SourceVm for Source {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        let fresh = Memory::fresh(&*self.base);
        let memory = self.memory();
        Ok(memory.disk.iter().zip(&fresh.disk).filter(|(now, then)| now != then).count() as u64)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        assert!(!std::mem::replace(&mut self.tracking, true), "tracking twice");
        if self.fail_track {
            return Err("no log today".into());
        }
        let fresh = Memory::fresh(&*self.base);
        let mut memory = self.memory();
        memory.dirty = ChunkSet::new(GEOMETRY);
        let mut set = ChunkSet::new(GEOMETRY);
        for (space, now, then) in
            [(Space::Ram, &memory.ram, &fresh.ram), (Space::Disk, &memory.disk, &fresh.disk)]
        {
            for index in (0..now.len()).filter(|&i| now[i] != then[i]) {
                set.insert(ChunkId { space, index: index as u64 });
            }
        }
        Ok(set)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        assert!(self.tracking);
        Ok(std::mem::replace(&mut self.memory().dirty, ChunkSet::new(GEOMETRY)))
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        assert!(std::mem::replace(&mut self.tracking, false));
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.memory().at(id);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.guest.pause();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        assert!(!self.guest.is_running());
        if self.fail_save {
            return Err("no state today".into());
        }
        // Saving writes to guest memory, as real devices do.
        self.memory().write(ChunkId { space: Space::Ram, index: 599 }, chunk(424242));
        Ok(b"registers".repeat(1000))
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.memory().hash())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.guest.run();
        Ok(())
    }
}

pub struct Target {
    pub guest: Guest,
    fresh: Memory,
    loaded: bool,
    fail_load: bool,
    fail_resume: bool,
    pub discarded: bool,
}

impl TargetVm for Target {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        *self.guest.memory.lock().unwrap().at(id) = *chunk;
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        *self.guest.memory.lock().unwrap().at(id) = *self.fresh.at(id);
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.guest.memory.lock().unwrap().at(id);
        Ok(())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        if self.fail_load {
            return Err("this CPU lacks a feature".into());
        }
        assert_eq!(state, b"registers".repeat(1000));
        assert!(!std::mem::replace(&mut self.loaded, true), "loaded twice");
        Ok(())
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.guest.memory.lock().unwrap().hash())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert!(self.loaded && !self.discarded && !self.guest.is_running());
        if self.fail_resume {
            return Err("vCPU 0 does not start".into());
        }
        self.guest.run();
        Ok(())
    }

    fn discard(&mut self) {
        assert!(!self.guest.is_running());
        self.discarded = true;
    }
}

#[derive(Clone, Default)]
pub struct HostFaults {
    pub refuse: Option<Refusal>,
    pub fail_load: bool,
    pub fail_resume: bool,
    /// How long it takes to get ready.
    pub slow: Duration,
}

pub struct Host {
    pub base: Arc<MemBase>,
    pub runners: Runners,
    pub faults: HostFaults,
}

impl TargetHost for Host {
    type Vm = Target;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Target>, Refusal> {
        assert_eq!(offer.geometry, GEOMETRY);
        if let Some(refusal) = self.faults.refuse.clone() {
            return Err(refusal);
        }
        if offer.base != self.base.id() {
            return Err(Refusal::UnknownBase(offer.base));
        }
        thread::sleep(self.faults.slow);
        let fresh = Memory::fresh(&*self.base);
        let memory = Arc::new(Mutex::new(fresh.clone()));
        let vm = Target {
            guest: Guest::new(memory, self.runners.clone(), 0),
            fresh,
            loaded: false,
            fail_load: self.faults.fail_load,
            fail_resume: self.faults.fail_resume,
            discarded: false,
        };
        let own: Arc<dyn BaseView> = self.base.clone();
        Ok(Prepared { vm, bases: own.into(), start: None })
    }
}
