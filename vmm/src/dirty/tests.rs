//! The dirty set against an oracle that knows every write.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fs::File,
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
    manual: bool,
    enabled: Cell<bool>,
    bits: RefCell<Vec<u64>>,
    fail: Cell<bool>,
}

impl FakeLog {
    fn new(manual: bool) -> Rc<Self> {
        Rc::new(Self { manual, ..Self::default() })
    }

    fn write(&self, chunk: u64) {
        if self.enabled.get() {
            self.bits.borrow_mut()[(chunk / 64) as usize] |= 1 << (chunk % 64);
        }
    }

    fn may_fail(&self) -> Result<(), DirtyError> {
        if self.fail.take() {
            let source = kvm_ioctls::Error::new(libc::ENOMEM);
            return Err(DirtyError::Kvm { what: "reading", slot: 0, source });
        }
        Ok(())
    }
}

impl DirtyLog for Rc<FakeLog> {
    fn set_enabled(&self, enabled: bool) -> Result<(), DirtyError> {
        // As KVM does: nothing happens to a log that is on already.
        if enabled && !self.enabled.get() {
            // Initially set: nothing is watched yet.
            let word = if self.manual { u64::MAX } else { 0 };
            *self.bits.borrow_mut() = vec![word; RAM_CHUNKS.div_ceil(64) as usize];
        }
        self.enabled.set(enabled);
        Ok(())
    }

    fn is_manual(&self) -> bool {
        self.manual
    }

    fn read(&self, _: usize) -> Result<Vec<u64>, DirtyError> {
        self.may_fail()?;
        let mut bits = self.bits.borrow_mut();
        let taken = bits.clone();
        if !self.manual {
            bits.fill(0);
        }
        Ok(taken)
    }

    fn clear(&self, _: usize, first_word: u64, cleared: &[u64]) -> Result<(), DirtyError> {
        assert!(self.manual && self.enabled.get());
        self.may_fail()?;
        let mut bits = self.bits.borrow_mut();
        for (bits, cleared) in bits[first_word as usize..].iter_mut().zip(cleared) {
            *bits &= !cleared;
        }
        Ok(())
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
    /// The VMM drops a page that the guest has no use for.
    Drop(u64),
    /// The guest writes to its disk.
    Disk(u64),
    Start,
    Harvest,
    FailedHarvest,
    /// The engine reads chunks that it has been given: so many from the n-th on.
    Read(prop::sample::Index, usize),
    /// The same, and a vCPU writes to each right before it is copied.
    RacingRead(prop::sample::Index, usize),
    /// The engine looks at what is dirty, and leaves it out of what it has been given.
    Peek,
    /// The guest is asked for its free pages.
    Ask,
    /// The guest calls pages free, rightly or not.
    Name(u64, u64),
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    // Few distinct chunks, so that they meet; the ends of words and regions among them.
    let ram = prop_oneof![0..130u64, RAM_CHUNKS - 66..RAM_CHUNKS];
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => ram.clone().prop_map(Step::Vcpu),
        4 => ram.clone().prop_map(Step::Device),
        2 => ram.prop_map(Step::Drop),
        4 => (0..DISK_CHUNKS).prop_map(Step::Disk),
        1 => Just(Step::Start),
        3 => Just(Step::Harvest),
        1 => Just(Step::FailedHarvest),
        4 => (index(), 1..40usize).prop_map(|(at, count)| Step::Read(at, count)),
        2 => (index(), 1..4usize).prop_map(|(at, count)| Step::RacingRead(at, count)),
        3 => Just(Step::Peek),
        1 => Just(Step::Ask),
        3 => (0..130u64, 1..70u64).prop_map(|(at, count)| Step::Name(at, count)),
        1 => Just(Step::Stop),
    ]
}

/// What a chunk holds: 0 is what it began as, every write makes another.
type Version = u64;

struct World {
    ram: GuestRam,
    log: Rc<FakeLog>,
    disk: Rc<FakeDisk>,
    tracker: Tracker<Rc<FakeLog>, Rc<FakeDisk>>,
    tracking: bool,
    /// Of every chunk that was ever written.
    now: BTreeMap<ChunkId, Version>,
    writes: Version,
    /// Written since they were last handed out.
    since: BTreeSet<ChunkId>,
    /// What the engine has: copies, and what it has been given and not read.
    copied: BTreeMap<ChunkId, Version>,
    todo: BTreeSet<ChunkId>,
    /// What was written since the guest was asked, and what it called free and the engine left out.
    since_asked: BTreeSet<ChunkId>,
    left_out: BTreeSet<ChunkId>,
    /// What was written and not handed out when the guest was asked.
    before_asked: BTreeSet<ChunkId>,
    /// Left out because a look named it.
    deferred: BTreeSet<ChunkId>,
}

impl World {
    fn new(manual: bool, base: Option<&File>) -> Self {
        let ram = memory::map(base, MIN_MEMORY_BYTES).unwrap();
        let (log, disk) = (FakeLog::new(manual), Rc::new(FakeDisk::default()));
        *disk.dirty.borrow_mut() = vec![0; 2];
        let tracker = Tracker::new(log.clone(), ram.clone(), Some(disk.clone()));
        Self {
            ram,
            log,
            disk,
            tracker,
            tracking: false,
            now: BTreeMap::new(),
            writes: 0,
            since: BTreeSet::new(),
            copied: BTreeMap::new(),
            todo: BTreeSet::new(),
            since_asked: BTreeSet::new(),
            left_out: BTreeSet::new(),
            before_asked: BTreeSet::new(),
            deferred: BTreeSet::new(),
        }
    }

    fn written(&mut self, space: Space, index: u64) {
        let id = ChunkId { space, index };
        self.writes += 1;
        self.now.insert(id, self.writes);
        self.since.insert(id);
        self.since_asked.insert(id);
    }

    /// Writes as a vCPU does: the bitmap of `vm-memory` does not see it.
    fn vcpu_write(&mut self, chunk: u64) {
        let address = memory::chunk_address(&self.ram, chunk).unwrap();
        let slice = self.ram.get_slice(address, CHUNK_SIZE).unwrap();
        // SAFETY: inside the slice, and nothing else accesses this RAM.
        unsafe { slice.ptr_guard_mut().as_ptr().write_volatile(1) };
        self.log.write(chunk);
        self.written(Space::Ram, chunk);
    }

    fn start(&mut self) {
        let set: BTreeSet<_> = self.tracker.start().unwrap().iter().collect();
        // Only the host's large pages may add to what was written.
        let huge = |id: &ChunkId| (id.space, id.index / 512);
        let known: BTreeSet<_> = self.now.keys().map(huge).collect();
        assert!(set.iter().all(|id| known.contains(&huge(id))), "start gives what never changed");
        self.copied.clear();
        self.left_out.clear();
        self.deferred.clear();
        (self.todo, self.tracking) = (set, true);
        self.since.clear();
        self.check("start");
    }

    fn harvest(&mut self) {
        let set: BTreeSet<_> = self.tracker.harvest().unwrap().iter().collect();
        assert!(set.is_subset(&self.since), "given twice for one write");
        self.since = self.since.difference(&set).copied().collect();
        self.left_out = self.left_out.difference(&set).copied().collect();
        self.deferred = self.deferred.difference(&set).copied().collect();
        assert!(self.deferred.is_empty(), "named by a look, and not given");
        self.todo.extend(set);
        self.check("harvest");
    }

    /// What is dirty is told, and the engine leaves it out of what it has been given.
    fn peek(&mut self) {
        let set: BTreeSet<_> = self.tracker.peek().unwrap().iter().collect();
        assert_eq!(set, self.since, "not what the next harvest gives");
        self.todo = self.todo.difference(&set).copied().collect();
        self.deferred.extend(set);
    }

    /// Nothing is lost: what the engine has not been told to read, it has.
    fn check(&self, after: &str) {
        for (id, version) in &self.now {
            let copied = self.copied.get(id).copied().unwrap_or(0);
            let due = self.todo.contains(id) || self.left_out.contains(id);
            assert!(copied == *version || due, "{after} lost a write to {id:?}");
        }
    }

    fn name_free(&mut self, named: Range<u64>) {
        let asked = self.tracker.is_asking();
        let returned: BTreeSet<_> =
            self.tracker.add_free(std::slice::from_ref(&named)).unwrap().iter().collect();
        let named = named.map(|index| ChunkId { space: Space::Ram, index });
        let unused = |id: &ChunkId| asked && !self.since_asked.contains(id);
        let expected: BTreeSet<_> =
            named.filter(|id| unused(id) && !self.left_out.contains(id)).collect();
        assert!(returned.is_subset(&expected), "free, and written");
        // What was written before and had not been handed out by then may count as written too.
        assert!(expected.difference(&returned).all(|id| self.before_asked.contains(id)));
        self.todo = self.todo.difference(&returned).copied().collect();
        self.left_out.extend(returned);
    }

    /// The guest stands still, and the engine takes the rest.
    fn pause(&mut self) {
        self.tracker.discard_free().unwrap();
        for id in self.left_out.difference(&self.since_asked) {
            self.now.insert(*id, 0);
            self.since.insert(*id);
        }
        self.harvest();
        assert!(self.left_out.is_empty(), "discarded, and not told");
        self.read(|_| 0, usize::MAX, false);
        self.harvest();
        assert!(self.todo.is_empty());
        let mut chunk = [0; CHUNK_SIZE];
        for (id, version) in self.now.iter().filter(|(id, _)| id.space == Space::Ram) {
            memory::read_chunk(&self.ram, id.index, &mut chunk).unwrap();
            assert_eq!(chunk[0] != 0, *version != 0, "{id:?}");
        }
    }

    fn read(&mut self, pick: impl Fn(usize) -> usize, count: usize, racing: bool) {
        for _ in 0..count.min(self.todo.len()) {
            let Some(&id) = self.todo.iter().nth(pick(self.todo.len())) else { return };
            if racing && id.space == Space::Ram {
                self.vcpu_write(id.index);
            }
            self.todo.remove(&id);
            self.copied.insert(id, self.now.get(&id).copied().unwrap_or(0));
        }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Vcpu(chunk) => self.vcpu_write(chunk),
            Step::Device(chunk) => {
                memory::write_chunk(&self.ram, chunk, &[7; CHUNK_SIZE]).unwrap();
                self.written(Space::Ram, chunk);
            }
            Step::Drop(chunk) => {
                memory::drop_chunk(&self.ram, chunk).unwrap();
                self.written(Space::Ram, chunk);
                self.now.insert(ChunkId { space: Space::Ram, index: chunk }, 0);
            }
            Step::Disk(chunk) => {
                self.disk.changed.borrow_mut().insert(chunk);
                self.disk.dirty.borrow_mut()[(chunk / 64) as usize] |= 1 << (chunk % 64);
                self.written(Space::Disk, chunk);
            }
            Step::Start => self.start(),
            Step::Stop => {
                self.tracker.stop().unwrap();
                self.todo.clear();
                self.left_out.clear();
                self.tracking = false;
            }
            _ if !self.tracking => {}
            Step::Harvest => self.harvest(),
            Step::FailedHarvest => {
                self.log.fail.set(true);
                self.tracker.harvest().unwrap_err();
            }
            Step::Read(ref at, count) => self.read(|len| at.index(len), count, false),
            Step::RacingRead(ref at, count) => self.read(|len| at.index(len), count, true),
            Step::Ask if self.tracker.is_asking() => {}
            Step::Ask => {
                assert!(self.tracker.begin_free());
                self.since_asked.clear();
                self.before_asked = self.since.clone();
            }
            Step::Name(at, count) => self.name_free(at..at + count),
            Step::Peek => self.peek(),
        }
    }
}

fn base() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIN_MEMORY_BYTES).unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_write_is_lost(
        manual: bool,
        with_base: bool,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let base = with_base.then(base);
        let mut world = World::new(manual, base.as_ref());
        for step in &steps {
            world.apply(step);
        }
        if world.tracking {
            world.pause();
        }
    }
}

/// A look tells what is dirty as often as it is asked, and takes nothing.
#[test]
fn a_look_takes_nothing() {
    for manual in [true, false] {
        let mut world = World::new(manual, Some(&base()));
        world.vcpu_write(5);
        world.start();
        assert!(world.tracker.peek().unwrap().is_empty());
        world.vcpu_write(5);
        for _ in 0..2 {
            let seen: Vec<_> = world.tracker.peek().unwrap().iter().map(|id| id.index).collect();
            assert_eq!(seen, [5], "manual: {manual}");
        }
        world.vcpu_write(6);
        let next: Vec<_> = world.tracker.harvest().unwrap().iter().map(|id| id.index).collect();
        assert_eq!(next, [5, 6], "manual: {manual}");
        assert!(world.tracker.peek().unwrap().is_empty());
        world.tracker.stop().unwrap();
        world.vcpu_write(7);
        assert!(world.tracker.peek().unwrap().is_empty(), "nothing is tracked");
    }
}

/// A bit that is set after the log was read and before it was cleared survives, because only what was
/// read is cleared.
#[test]
fn a_bit_set_between_reading_and_clearing_survives() {
    let mut world = World::new(true, Some(&base()));
    world.start();
    world.vcpu_write(5);
    world.harvest();
    world.vcpu_write(7);
    world.read(|_| 0, 1, false);
    let next: Vec<_> = world.tracker.harvest().unwrap().iter().map(|id| id.index).collect();
    assert_eq!(next, [7]);
}

/// What the VMM wrote before tracking began is told by the page tables: its marks add nothing.
#[test]
fn old_marks_of_dropped_pages_are_forgotten() {
    for manual in [false, true] {
        let mut world = World::new(manual, Some(&base()));
        memory::write_chunk(&world.ram, 9, &[1; CHUNK_SIZE]).unwrap();
        memory::write_chunk(&world.ram, 10, &[1; CHUNK_SIZE]).unwrap();
        memory::drop_chunk(&world.ram, 10).unwrap();
        let set: Vec<_> = world.tracker.start().unwrap().iter().map(|id| id.index).collect();
        assert_eq!(set, [9]);
    }
}

/// Marks made while a harvest runs are in this one or the next.
#[test]
fn concurrent_marks_are_not_lost() {
    const WRITES: u64 = 20_000;
    for manual in [false, true] {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        let mut tracker = Tracker::new(FakeLog::new(manual), ram.clone(), None::<Rc<FakeDisk>>);
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
}
