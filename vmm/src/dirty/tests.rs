//! The dirty set against an oracle that knows every write.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    rc::Rc,
};

use proptest::prelude::*;

use super::*;
use crate::layout::MIN_MEMORY_BYTES;

const RAM_CHUNKS: u64 = MIN_MEMORY_BYTES / CHUNK_SIZE as u64;
const DISK_CHUNKS: u64 = 100;

/// KVM, as far as this module sees it.
#[derive(Default)]
struct FakeLog {
    enabled: Cell<bool>,
    bits: RefCell<Vec<u64>>,
    fail: Cell<bool>,
}

impl FakeLog {
    fn write(&self, chunk: u64) {
        if self.enabled.get() {
            let mut bits = self.bits.borrow_mut();
            bits.resize(RAM_CHUNKS.div_ceil(64) as usize, 0);
            bits[(chunk / 64) as usize] |= 1 << (chunk % 64);
        }
    }
}

impl DirtyLog for Rc<FakeLog> {
    fn set_enabled(&self, enabled: bool) -> Result<(), DirtyError> {
        self.enabled.set(enabled);
        self.bits.borrow_mut().clear();
        Ok(())
    }

    fn take(&self, _: usize) -> Result<Vec<u64>, DirtyError> {
        if self.fail.take() {
            let source = kvm_ioctls::Error::new(libc::ENOMEM);
            return Err(DirtyError::Kvm { what: "reading", slot: 0, source });
        }
        Ok(std::mem::take(&mut self.bits.borrow_mut()))
    }
}

#[derive(Default)]
struct FakeDisk {
    changed: RefCell<BTreeSet<u64>>,
    dirty: RefCell<Vec<u64>>,
}

impl DiskLog for Rc<FakeDisk> {
    fn chunks(&self) -> u64 {
        DISK_CHUNKS
    }

    fn add_changed(&self, set: &mut ChunkSet) {
        for &index in &*self.changed.borrow() {
            set.insert(ChunkId { space: Space::Disk, index });
        }
    }

    fn take(&self) -> Vec<u64> {
        std::mem::replace(&mut *self.dirty.borrow_mut(), vec![0; 2])
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A vCPU writes a page.
    Vcpu(u64),
    /// A device writes a page.
    Device(u64),
    /// The guest writes to its disk.
    Disk(u64),
    Start,
    Harvest,
    FailedHarvest,
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    // Few distinct chunks, so that they meet; the ends of words and regions among them.
    let ram = prop_oneof![0..130u64, RAM_CHUNKS - 66..RAM_CHUNKS];
    prop_oneof![
        4 => ram.clone().prop_map(Step::Vcpu),
        4 => ram.prop_map(Step::Device),
        4 => (0..DISK_CHUNKS).prop_map(Step::Disk),
        1 => Just(Step::Start),
        3 => Just(Step::Harvest),
        1 => Just(Step::FailedHarvest),
        1 => Just(Step::Stop),
    ]
}

/// Every chunk ever changed, and those changed since the set was last handed out.
#[derive(Default)]
struct Oracle {
    ever: BTreeSet<ChunkId>,
    since: BTreeSet<ChunkId>,
}

impl Oracle {
    fn write(&mut self, space: Space, index: u64) {
        self.ever.insert(ChunkId { space, index });
        self.since.insert(ChunkId { space, index });
    }
}

struct World {
    ram: GuestRam,
    log: Rc<FakeLog>,
    disk: Rc<FakeDisk>,
    tracker: Tracker<Rc<FakeLog>, Rc<FakeDisk>>,
    tracking: bool,
    oracle: Oracle,
}

impl World {
    fn new() -> Self {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        let (log, disk) = (Rc::new(FakeLog::default()), Rc::new(FakeDisk::default()));
        *disk.dirty.borrow_mut() = vec![0; 2];
        let tracker = Tracker::new(log.clone(), ram.clone(), Some(disk.clone()));
        Self { ram, log, disk, tracker, tracking: false, oracle: Oracle::default() }
    }

    /// Writes as a vCPU does: the bitmap of `vm-memory` does not see it.
    fn vcpu_write(&self, chunk: u64) {
        let address = memory::chunk_address(&self.ram, chunk).unwrap();
        let slice = self.ram.get_slice(address, CHUNK_SIZE).unwrap();
        // SAFETY: inside the slice, and nothing else accesses this RAM.
        unsafe { slice.ptr_guard_mut().as_ptr().write_volatile(1) };
        self.log.write(chunk);
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Vcpu(chunk) => {
                self.vcpu_write(chunk);
                self.oracle.write(Space::Ram, chunk);
            }
            Step::Device(chunk) => {
                memory::write_chunk(&self.ram, chunk, &[7; CHUNK_SIZE]).unwrap();
                self.oracle.write(Space::Ram, chunk);
            }
            Step::Disk(chunk) => {
                self.disk.changed.borrow_mut().insert(chunk);
                self.disk.dirty.borrow_mut()[(chunk / 64) as usize] |= 1 << (chunk % 64);
                self.oracle.write(Space::Disk, chunk);
            }
            Step::Start => {
                let set: BTreeSet<_> = self.tracker.start().unwrap().iter().collect();
                assert!(set.is_superset(&self.oracle.ever), "start misses a change");
                // Only the host's large pages may add to it.
                let unexplained = set.difference(&self.oracle.ever).filter(|id| {
                    let huge = |id: &ChunkId| (id.space, id.index / 512);
                    !self.oracle.ever.iter().any(|known| huge(known) == huge(id))
                });
                assert_eq!(unexplained.count(), 0);
                self.oracle.since.clear();
                self.tracking = true;
            }
            Step::Harvest if self.tracking => {
                let set: BTreeSet<_> = self.tracker.harvest().unwrap().iter().collect();
                assert_eq!(set, std::mem::take(&mut self.oracle.since));
            }
            Step::FailedHarvest if self.tracking => {
                self.log.fail.set(true);
                self.tracker.harvest().unwrap_err();
            }
            Step::Stop => {
                self.tracker.stop().unwrap();
                self.tracking = false;
            }
            Step::Harvest | Step::FailedHarvest => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_set_is_exactly_what_was_written(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
        }
    }
}

/// Marks made while a harvest runs are in this one or the next.
#[test]
fn concurrent_marks_are_not_lost() {
    const WRITES: u64 = 20_000;
    let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
    let log = Rc::new(FakeLog::default());
    let mut tracker = Tracker::new(log, ram.clone(), None::<Rc<FakeDisk>>);
    tracker.start().unwrap();
    let writer = {
        let ram = ram.clone();
        std::thread::spawn(move || {
            for n in 0..WRITES {
                let chunk = n * 7919 % RAM_CHUNKS;
                let mut content = [0; CHUNK_SIZE];
                content[..8].copy_from_slice(&n.to_le_bytes());
                memory::write_chunk(&ram, chunk, &content).unwrap();
            }
        })
    };
    let mut copy = vec![[0; CHUNK_SIZE]; RAM_CHUNKS as usize];
    loop {
        let last = writer.is_finished();
        for id in tracker.harvest().unwrap().iter() {
            memory::read_chunk(&ram, id.index, &mut copy[id.index as usize]).unwrap();
        }
        if last {
            break;
        }
    }
    writer.join().unwrap();
    let mut now = [0; CHUNK_SIZE];
    for (index, copied) in copy.iter().enumerate() {
        memory::read_chunk(&ram, index as u64, &mut now).unwrap();
        assert_eq!(&now, copied, "chunk {index}");
    }
}
