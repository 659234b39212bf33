//! Tests of the disk: a driver's random requests against an array of bytes.

use std::{collections::BTreeSet, fs, path::Path, sync::OnceLock};

use guest_images::{
    CHUNK_SIZE,
    overlay::ChunkState,
    store::{ImportSpec, Store},
};
use proptest::prelude::*;
use tempfile::TempDir;
use virtio_bindings::virtio_blk::*;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use super::*;
use crate::devices::virtio::testing::{DATA, Driver, EVENT_IDX};

/// Not a whole number of chunks: the last has three sectors.
const SECTORS: u64 = 8 * 40 + 3;
const DISK_BYTES: usize = (SECTORS * SECTOR_BYTES) as usize;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// Room that each request of a batch has in guest RAM.
const SLOT_BYTES: u64 = 0x4_0000;

struct Disk {
    dir: TempDir,
    overlay: Arc<Overlay>,
    dirty: Arc<DiskDirty>,
    driver: Driver,
    /// What the disk must hold.
    oracle: Vec<u8>,
    base: Vec<u8>,
}

fn base_content() -> Vec<u8> {
    // Chunks 8 to 15 are zero, as parts of real disks are.
    let byte = |n: usize| if (8..16).contains(&(n / CHUNK_SIZE)) { 0 } else { (n / 7 + n) as u8 };
    (0..DISK_BYTES).map(byte).collect()
}

/// The base that all disks here are over, imported once.
fn base() -> Arc<guest_images::Base> {
    static STORE: OnceLock<TempDir> = OnceLock::new();
    let dir = STORE.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        import(dir.path());
        dir
    });
    Arc::new(Store::open(&dir.path().join("store")).unwrap().get("test").unwrap())
}

fn import(dir: &Path) {
    let file = |name: &str, content: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    // The head of an ELF file for x86-64 is all that an import looks at.
    let mut kernel = [0; 5000];
    kernel[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    kernel[16..20].copy_from_slice(&[2, 0, 62, 0]);
    let store = Store::open(&dir.join("store")).unwrap();
    let spec = ImportSpec {
        name: "test".into(),
        disk: file("disk", &base_content()),
        kernel: file("kernel", &kernel),
        initramfs: None,
        cmdline: String::new(),
        memory: None,
    };
    store.import(&spec, &mut |_| {}).unwrap();
}

fn open(overlay: Overlay) -> (Arc<Overlay>, Block) {
    let overlay = Arc::new(overlay);
    let block = Block::new(overlay.clone(), "a-disk").unwrap();
    (overlay, block)
}

/// An unwritten disk, gone with the directory.
pub(crate) fn fresh() -> (TempDir, Arc<Overlay>) {
    let dir = TempDir::new().unwrap();
    let overlay = Arc::new(Overlay::create(dir.path(), base()).unwrap());
    (dir, overlay)
}

fn disk(features: u64) -> Disk {
    let dir = TempDir::new().unwrap();
    let (overlay, block) = open(Overlay::create(dir.path(), base()).unwrap());
    let dirty = block.dirty();
    let mut driver = Driver::new(Box::new(block));
    driver.start(features | EVENT_IDX);
    let base = base_content();
    Disk { dir, overlay, dirty, driver, oracle: base.clone(), base }
}

/// A request as the tests make them; sectors are taken modulo what fits.
#[derive(Clone, Debug)]
enum Ask {
    Read { sector: u64, sectors: u64 },
    Write { sector: u64, sectors: u64, seed: u8 },
    Zero { ranges: Vec<(u64, u64)>, unmap: bool },
    Discard { ranges: Vec<(u64, u64)> },
    Flush,
}

fn clamp(sector: u64, sectors: u64) -> (u64, u64) {
    let sector = sector % SECTORS;
    (sector, sectors.clamp(1, SECTORS - sector))
}

fn bytes(sector: u64, sectors: u64) -> std::ops::Range<usize> {
    let start = (sector * SECTOR_BYTES) as usize;
    start..start + (sectors * SECTOR_BYTES) as usize
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 512 * 31 + n) as u8 ^ seed).collect()
}

/// Splits a run of guest memory into descriptors of odd lengths.
fn pieces(address: u64, len: u64) -> Vec<(u64, u32)> {
    let lengths = [700u64, 4096, 1, 9000].into_iter().cycle();
    let mut out = Vec::new();
    let mut at = 0;
    for length in lengths {
        if at == len {
            return out;
        }
        let take = if out.len() > 8 { len - at } else { length.min(len - at) };
        out.push((address + at, take as u32));
        at += take;
    }
    out
}

impl Disk {
    fn slot(n: usize) -> u64 {
        DATA + n as u64 * SLOT_BYTES
    }

    /// Offers a request in slot `n`; the header is at its end, the status behind that.
    fn offer(&mut self, n: usize, kind: u32, sector: u64, out: &[(u64, u32)], into: &[(u64, u32)]) {
        let header = Self::slot(n) + SLOT_BYTES - 32;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.put(header, &bytes);
        self.driver.put(header + 16, &[0xff]);
        let readable: Vec<_> = [&[(header, 16)], out].concat();
        let writable: Vec<_> = [into, &[(header + 16, 1)]].concat();
        self.driver.offer(0, &readable, &writable);
    }

    fn status(&self, n: usize) -> u8 {
        self.driver.get(Self::slot(n) + SLOT_BYTES - 16, 1)[0]
    }

    /// Kicks and waits for `count` answers.
    fn run(&mut self, count: usize) {
        self.driver.kick(0);
        (0..count).for_each(|_| {
            self.driver.wait_used(0);
        });
    }

    fn ranges(&mut self, n: usize, kind: u32, ranges: &[(u64, u64)], flags: u32) {
        let mut list = Vec::new();
        for (sector, sectors) in ranges {
            list.extend(sector.to_le_bytes());
            list.extend((*sectors as u32).to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        self.driver.put(Self::slot(n), &list);
        self.offer(n, kind, 0, &[(Self::slot(n), list.len() as u32)], &[]);
    }

    /// Offers `ask` in slot `n` and applies it to the oracle. Returns what a read must give.
    fn ask(&mut self, n: usize, ask: &Ask) -> Option<Vec<u8>> {
        let data = Self::slot(n) + 3;
        match ask {
            Ask::Read { sector, sectors } => {
                let (sector, sectors) = clamp(*sector, *sectors);
                let range = bytes(sector, sectors);
                self.driver.put(data, &vec![0xa5; range.len()]);
                let into = pieces(data, range.len() as u64);
                self.offer(n, VIRTIO_BLK_T_IN, sector, &[], &into);
                return Some(self.oracle[range].to_vec());
            }
            Ask::Write { sector, sectors, seed } => {
                let (sector, sectors) = clamp(*sector, *sectors);
                let range = bytes(sector, sectors);
                let content = pattern(*seed, range.len());
                self.driver.put(data, &content);
                let out = pieces(data, range.len() as u64);
                self.offer(n, VIRTIO_BLK_T_OUT, sector, &out, &[]);
                self.oracle[range].copy_from_slice(&content);
            }
            Ask::Zero { ranges, unmap } => {
                let ranges: Vec<_> = ranges.iter().map(|(s, c)| clamp(*s, *c)).collect();
                self.ranges(n, VIRTIO_BLK_T_WRITE_ZEROES, &ranges, (*unmap).into());
                ranges.iter().for_each(|(s, c)| self.oracle[bytes(*s, *c)].fill(0));
            }
            Ask::Discard { ranges } => {
                let ranges: Vec<_> = ranges.iter().map(|(s, c)| clamp(*s, *c)).collect();
                self.ranges(n, VIRTIO_BLK_T_DISCARD, &ranges, 0);
                for (sector, sectors) in ranges {
                    let range = bytes(sector, sectors);
                    let first = range.start.next_multiple_of(CHUNK_SIZE);
                    let whole = range.end / CHUNK_SIZE * CHUNK_SIZE;
                    let end = if range.end == DISK_BYTES { DISK_BYTES } else { whole };
                    if first < end {
                        self.oracle[first..end].fill(0);
                    }
                }
            }
            Ask::Flush => self.offer(n, VIRTIO_BLK_T_FLUSH, 0, &[], &[]),
        }
        None
    }

    fn content(overlay: &Overlay) -> Vec<u8> {
        let mut content = vec![0; DISK_BYTES];
        overlay.read_at(0, &mut content).unwrap();
        content
    }

    fn check_content(&self, what: &str) {
        let content = Self::content(&self.overlay);
        for (chunk, (found, expected)) in
            content.chunks(CHUNK_SIZE).zip(self.oracle.chunks(CHUNK_SIZE)).enumerate()
        {
            assert!(found == expected, "{what}: chunk {chunk} differs");
        }
        // What differs from base must be known to differ, or a handoff would leave it behind.
        for (chunk, (mine, base)) in
            self.oracle.chunks(CHUNK_SIZE).zip(self.base.chunks(CHUNK_SIZE)).enumerate()
        {
            let is_base = self.overlay.state(chunk as u64) == ChunkState::Base;
            assert!(mine == base || !is_base, "{what}: chunk {chunk} is changed base");
        }
    }

    fn harvest(&self) -> BTreeSet<u64> {
        let words = self.dirty.harvest();
        (0..self.dirty.chunks()).filter(|c| words[*c as usize / 64] >> (c % 64) & 1 == 1).collect()
    }

    /// Drops everything and opens the disk again.
    fn reopen(self) -> Vec<u8> {
        let Self { dir, overlay, driver, .. } = self;
        let base = overlay.base().clone();
        drop((driver, overlay));
        let overlay = Overlay::open(dir.path(), base).unwrap();
        Self::content(&overlay)
    }
}

fn asks() -> impl Strategy<Value = Ask> {
    let range = || (0..SECTORS, prop_oneof![1..4u64, 1..30u64, 60..100u64]);
    let ranges = || prop::collection::vec(range(), 1..4);
    prop_oneof![
        4 => range().prop_map(|(sector, sectors)| Ask::Read { sector, sectors }),
        5 => (range(), any::<u8>())
            .prop_map(|((sector, sectors), seed)| Ask::Write { sector, sectors, seed }),
        2 => (ranges(), any::<bool>()).prop_map(|(ranges, unmap)| Ask::Zero { ranges, unmap }),
        2 => ranges().prop_map(|ranges| Ask::Discard { ranges }),
        1 => Just(Ask::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Batches of requests, many overlapping, in flight at once: what the driver reads, what the disk
    /// holds and what is marked are as if they had been carried out one after the other.
    #[test]
    fn requests_behave_as_if_serial(
        batches in prop::collection::vec(prop::collection::vec(asks(), 1..16), 1..6),
        flush in any::<bool>(),
    ) {
        let mut disk = disk(if flush { FLUSH } else { 0 });
        for batch in &batches {
            let before = disk.oracle.clone();
            let reads: Vec<_> = batch.iter().enumerate().map(|(n, a)| disk.ask(n, a)).collect();
            disk.run(batch.len());
            for (n, expected) in reads.iter().enumerate() {
                prop_assert_eq!(disk.status(n), 0, "request {} of {:?}", n, batch);
                let Some(expected) = expected else { continue };
                let found = disk.driver.get(Disk::slot(n) + 3, expected.len());
                prop_assert!(found == *expected, "read {} of {:?}", n, batch);
            }
            disk.check_content("after a batch");
            let dirty = disk.harvest();
            let chunks = disk.oracle.chunks(CHUNK_SIZE).zip(before.chunks(CHUNK_SIZE));
            for (chunk, (now, then)) in chunks.enumerate() {
                prop_assert!(now == then || dirty.contains(&(chunk as u64)), "chunk {}", chunk);
            }
            // Only what was asked for is marked.
            let asked = batch.iter().flat_map(touched).collect::<BTreeSet<u64>>();
            prop_assert!(dirty.is_subset(&asked), "{:?} of {:?}", dirty, asked);
        }
        if flush {
            disk.ask(0, &Ask::Flush);
            disk.run(1);
        }
        let oracle = disk.oracle.clone();
        prop_assert!(disk.reopen() == oracle, "after opening it again");
    }

    /// Pausing in the middle of anything leaves nothing in flight, and the disk goes on elsewhere.
    #[test]
    fn drains_and_moves(batch in prop::collection::vec(asks(), 1..24)) {
        let mut disk = disk(FLUSH);
        let reads: Vec<_> = batch.iter().enumerate().map(|(n, a)| disk.ask(n, a)).collect();
        disk.driver.kick(0);
        disk.driver.device.pause().unwrap();
        // Some were answered; none changes anything from here on.
        let mut answered = 0;
        while disk.driver.poll_used(0).is_some() {
            answered += 1;
        }
        let ram = disk.driver.get(DATA, 24 * SLOT_BYTES as usize);
        let content = Disk::content(&disk.overlay);
        std::thread::sleep(Duration::from_millis(2));
        prop_assert!(ram == disk.driver.get(DATA, ram.len()));
        prop_assert!(content == Disk::content(&disk.overlay));
        let block = Block::new(disk.overlay.clone(), "a-disk").unwrap();
        let (mut driver, _) = disk.driver.hand_off(Box::new(block));
        (answered..batch.len()).for_each(|_| { driver.wait_used(0); });
        disk.driver = driver;
        disk.check_content("after the move");
        for (n, expected) in reads.iter().enumerate() {
            prop_assert_eq!(disk.status(n), 0);
            let Some(expected) = expected else { continue };
            prop_assert!(disk.driver.get(Disk::slot(n) + 3, expected.len()) == *expected);
        }
    }

    /// Every page of guest RAM that differs afterwards is marked: data, status bytes, rings.
    #[test]
    fn every_change_of_ram_is_marked(batch in prop::collection::vec(asks(), 1..16)) {
        let mut disk = disk(FLUSH);
        let ram = disk.driver.ram.clone();
        // A device that has just been set going looks at its queues once unasked: what it did
        // between the copy and the reset of the marks would be changed and not marked.
        disk.driver.device.pause().unwrap();
        batch.iter().enumerate().for_each(|(n, ask)| { disk.ask(n, ask); });
        let before = disk.driver.get(0, (DATA + 16 * SLOT_BYTES) as usize);
        ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
        disk.driver.device.resume().unwrap();
        disk.driver.kick(0);
        disk.driver.device.pause().unwrap();
        let after = disk.driver.get(0, before.len());
        let region = ram.iter().next().unwrap();
        for (page, (now, then)) in after.chunks(4096).zip(before.chunks(4096)).enumerate() {
            prop_assert!(now == then || region.bitmap().dirty_at(page * 4096), "page {}", page);
        }
    }

    /// Headers and lengths that make no sense are answered or break the device; nothing panics, and
    /// the disk is as it was unless the request was right.
    #[test]
    fn nonsense_is_survived(
        kind in prop_oneof![0..20u32, any::<u32>()],
        sector in prop_oneof![0..2 * SECTORS, any::<u64>()],
        out in prop::collection::vec((0u64..SLOT_BYTES, 0u32..5000), 0..4),
        into in prop::collection::vec((0u64..SLOT_BYTES, 0u32..5000), 0..4),
        content in prop::collection::vec(any::<u8>(), 64),
    ) {
        let mut disk = disk(FLUSH);
        let place = |(offset, len): &(u64, u32)| (Disk::slot(1) + offset, *len);
        disk.driver.put(Disk::slot(1), &content);
        let out: Vec<_> = out.iter().map(place).collect();
        let into: Vec<_> = into.iter().map(place).collect();
        disk.offer(0, kind, sector, &out, &into);
        disk.run(1);
        prop_assert!(disk.status(0) <= 2, "status {}", disk.status(0));
        prop_assert_eq!(disk.driver.status(), 15);
        let asks = [Ask::Flush, Ask::Write { sector: 9, sectors: 3, seed: 1 }];
        for (n, ask) in asks.iter().enumerate() {
            disk.ask(n, ask);
        }
        disk.run(2);
        prop_assert_eq!((disk.status(0), disk.status(1)), (0, 0));
    }
}

/// Chunks that a request may change.
fn touched(ask: &Ask) -> Vec<u64> {
    let one = |sector: u64, sectors: u64| {
        let (sector, sectors) = clamp(sector, sectors);
        sector / 8..(sector + sectors).div_ceil(8)
    };
    match ask {
        Ask::Read { .. } | Ask::Flush => Vec::new(),
        Ask::Write { sector, sectors, .. } => one(*sector, *sectors).collect(),
        Ask::Zero { ranges, .. } | Ask::Discard { ranges } => {
            ranges.iter().flat_map(|(s, c)| one(*s, *c)).collect()
        }
    }
}

#[test]
fn tells_its_shape_and_name() {
    let mut disk = disk(FLUSH);
    let mut capacity = [0; 8];
    crate::devices::bus::BusDevice::read(disk.driver.device.as_ref(), 0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    disk.offer(0, VIRTIO_BLK_T_GET_ID, 0, &[], &[(Disk::slot(0), 20)]);
    disk.run(1);
    assert_eq!(disk.driver.get(Disk::slot(0), 20), *b"a-disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(disk.status(0), 0);
}

/// What fstrim in a guest goes by (virtio 1.2, section 5.2.4): discards are on offer, in units of a
/// chunk, and as large as a request may be.
#[test]
fn offers_discards_by_the_chunk() {
    let disk = disk(FLUSH);
    for feature in [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
        assert_ne!(disk.driver.offered() & 1 << feature, 0);
    }
    let config = |offset: u32| disk.driver.read32(0x100 + offset);
    let [max_sectors, max_ranges, alignment] = [36, 40, 44].map(config);
    assert_eq!((max_sectors, max_ranges), (MAX_RANGE_SECTORS, MAX_RANGES));
    assert_eq!(u64::from(alignment) * SECTOR_BYTES, CHUNK_SIZE as u64);
    assert_eq!([48, 52].map(config), [MAX_RANGE_SECTORS, MAX_RANGES]);
    assert_eq!((config(20), config(24) & 0xff), (SECTOR_BYTES as u32, 3), "512e");
}

/// Chunks 8 to 15 are a hole of the base: trimming them leaves no trace, or none any more.
#[test]
fn what_is_trimmed_over_a_hole_of_the_base_is_base_again() {
    let mut disk = disk(FLUSH);
    let trim = |disk: &mut Disk, chunks: std::ops::Range<u64>| {
        let (sector, sectors) = (chunks.start * 8, (chunks.end - chunks.start) * 8);
        disk.ask(0, &Ask::Discard { ranges: vec![(sector, sectors)] });
        disk.run(1);
        assert_eq!(disk.status(0), 0);
        disk.check_content("after a discard");
        disk.harvest().into_iter().collect::<Vec<u64>>()
    };
    assert_eq!(trim(&mut disk, 8..16), [0; 0], "nothing was there");
    for sector in [8 * 7, 8 * 12] {
        disk.ask(0, &Ask::Write { sector, sectors: 16, seed: 3 });
        disk.run(1);
    }
    disk.harvest();
    assert_eq!(trim(&mut disk, 6..14), [6, 7, 8, 12, 13]);
    assert_eq!(disk.overlay.changed().collect::<Vec<_>>(), [6, 7]);
    assert_eq!(disk.overlay.state(7), ChunkState::Zero);
    assert_eq!(trim(&mut disk, 6..14), [0; 0], "a second time");
    disk.ask(0, &Ask::Flush);
    disk.run(1);
    let oracle = disk.oracle.clone();
    assert!(disk.reopen() == oracle, "after opening it again");
}

#[test]
fn refuses_what_it_cannot_do() {
    let mut disk = disk(FLUSH);
    let slot = Disk::slot(0);
    type Pieces<'a> = &'a [(u64, u32)];
    let cases: [(&str, u32, u64, Pieces, Pieces, u32); 8] = [
        ("read past the end", VIRTIO_BLK_T_IN, SECTORS - 1, &[], &[(slot, 1024)], 1),
        ("write past the end", VIRTIO_BLK_T_OUT, SECTORS, &[(slot, 512)], &[], 1),
        ("sector that overflows", VIRTIO_BLK_T_OUT, u64::MAX, &[(slot, 512)], &[], 1),
        ("part of a sector", VIRTIO_BLK_T_IN, 0, &[], &[(slot, 511)], 1),
        ("nothing", VIRTIO_BLK_T_OUT, 0, &[], &[], 1),
        ("no ranges", VIRTIO_BLK_T_DISCARD, 0, &[], &[], 1),
        ("part of a range", VIRTIO_BLK_T_DISCARD, 0, &[(slot, 15)], &[], 1),
        ("a kind that there is not", 77, 0, &[], &[], 2),
    ];
    for (what, kind, sector, out, into, status) in cases {
        disk.offer(0, kind, sector, out, into);
        disk.run(1);
        assert_eq!(u32::from(disk.status(0)), status, "{what}");
    }
    for (what, kind, range, flags, status) in [
        ("unmap in a discard", VIRTIO_BLK_T_DISCARD, (0, 8), 1, 2),
        ("unknown flag", VIRTIO_BLK_T_WRITE_ZEROES, (0, 8), 2, 2),
        ("too long", VIRTIO_BLK_T_WRITE_ZEROES, (0, u64::from(MAX_RANGE_SECTORS) + 1), 0, 1),
        ("past the end", VIRTIO_BLK_T_DISCARD, (SECTORS, 1), 0, 1),
    ] {
        disk.ranges(0, kind, &[range], flags);
        disk.run(1);
        assert_eq!(disk.status(0), status, "{what}");
    }
    disk.check_content("after refusals");
    assert!(disk.harvest().is_empty());
}

#[test]
fn a_chain_without_a_status_byte_breaks_the_device() {
    let mut disk = disk(FLUSH);
    disk.driver.offer(0, &[(DATA, 16)], &[]);
    disk.driver.kick(0);
    disk.driver.wait_for("the failure", |d| d.status() & 64 != 0);
}

#[test]
fn reads_mark_guest_memory() {
    let mut disk = disk(FLUSH);
    let region = |ram: &GuestRam, page: u64| {
        let region = ram.find_region(GuestAddress(DATA)).unwrap();
        region.bitmap().dirty_at((DATA + page * 4096) as usize)
    };
    let ram = disk.driver.ram.clone();
    // From base, then, once written, from data.
    for sector in [0, 8] {
        disk.ask(1, &Ask::Write { sector: 8, sectors: 8, seed: 5 });
        disk.run(1);
        ram.iter().for_each(|r| r.get_mmap().bitmap().reset());
        disk.offer(0, VIRTIO_BLK_T_IN, sector, &[], &[(DATA + 4096, 4096)]);
        ram.iter().for_each(|r| r.get_mmap().bitmap().reset());
        disk.run(1);
        assert_eq!([0, 1, 2].map(|p| region(&ram, p)), [false, true, false]);
    }
}

#[test]
fn a_driver_that_cannot_flush_gets_write_through() {
    let mut disk = disk(0);
    disk.ask(0, &Ask::Write { sector: 3, sectors: 7, seed: 9 });
    disk.run(1);
    // Nothing is left to flush: the map's pages went out before the answer.
    assert!(disk.overlay.take_dirty_map().unwrap().pages().is_empty());
}

#[test]
fn a_flush_makes_the_map_durable() {
    let mut disk = disk(FLUSH);
    disk.ask(0, &Ask::Write { sector: 3, sectors: 7, seed: 9 });
    disk.run(1);
    assert_eq!(disk.overlay.take_dirty_map().unwrap().pages().len(), 1);
    (0..20).for_each(|n| {
        disk.ask(n, &Ask::Flush);
    });
    disk.run(20);
    assert!((0..20).all(|n| disk.status(n) == 0));
    assert!(disk.overlay.take_dirty_map().unwrap().pages().is_empty());
}

#[test]
fn a_reset_in_the_middle_loses_no_mark() {
    let mut disk = disk(FLUSH);
    let mut changed_without_answer = 0;
    for round in 0..30u8 {
        let before = Disk::content(&disk.overlay);
        let writes = (0..20).map(|n| Ask::Write { sector: n * 13, sectors: 13, seed: round });
        let batch: Vec<Ask> = writes.collect();
        batch.iter().enumerate().for_each(|(n, ask)| {
            disk.ask(n, ask);
        });
        disk.driver.kick(0);
        std::thread::sleep(Duration::from_micros(30 * u64::from(round)));
        disk.driver.reset();
        let dirty = disk.harvest();
        let content = Disk::content(&disk.overlay);
        let chunks = content.chunks(CHUNK_SIZE).zip(before.chunks(CHUNK_SIZE));
        for (chunk, (now, then)) in chunks.enumerate() {
            assert!(now == then || dirty.contains(&(chunk as u64)), "chunk {chunk}");
            changed_without_answer += usize::from(now != then);
        }
        // And the disk serves its next driver.
        disk.driver.start(FLUSH | EVENT_IDX);
        disk.oracle = content;
        disk.ask(0, &Ask::Write { sector: 1, sectors: 50, seed: !round });
        disk.run(1);
        disk.check_content("after a reset");
    }
    assert!(changed_without_answer > 0, "no reset came in time to cut anything off");
}

/// A flush whose operations the test carries out.
fn flushing() -> (Disk, Ring, Flusher) {
    let mut disk = disk(FLUSH);
    disk.ask(0, &Ask::Write { sector: 0, sectors: 8, seed: 1 });
    disk.run(1);
    let (mut ring, mut flusher) = (ring::new().unwrap(), Flusher::default());
    flusher.join(7);
    assert!(flusher.start(&disk.overlay, &mut ring).is_none());
    flusher.join(8);
    assert!(flusher.start(&disk.overlay, &mut ring).is_none(), "one at a time");
    (disk, ring, flusher)
}

fn next(ring: &mut Ring) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while ring.reap().is_none() {
        assert!(ring.wait(deadline).unwrap());
    }
}

#[test]
fn a_failed_map_write_is_told_and_made_up_for() {
    let (disk, mut ring, mut flusher) = flushing();
    next(&mut ring);
    assert!(flusher.advance(&disk.overlay, &mut ring, Ok(())).is_none());
    next(&mut ring);
    let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
    let ended = flusher.advance(&disk.overlay, &mut ring, Err(full)).unwrap();
    assert_eq!((ended.members, ended.durable), (vec![7], false));
    // The next flush takes who waited, and has the page again.
    assert!(flusher.start(&disk.overlay, &mut ring).is_none());
    for _ in 0..2 {
        next(&mut ring);
        assert!(flusher.advance(&disk.overlay, &mut ring, Ok(())).is_none());
    }
    next(&mut ring);
    let ended = flusher.advance(&disk.overlay, &mut ring, Ok(())).unwrap();
    assert_eq!((ended.members, ended.durable), (vec![8], true));
    assert!(disk.overlay.take_dirty_map().unwrap().pages().is_empty());
}

#[test]
fn a_failed_sync_is_told_and_final() {
    let (disk, mut ring, mut flusher) = flushing();
    next(&mut ring);
    let lost = std::io::Error::from_raw_os_error(libc::EIO);
    let ended = flusher.advance(&disk.overlay, &mut ring, Err(lost)).unwrap();
    assert_eq!((ended.members, ended.durable), (vec![7], false));
    let ended = flusher.start(&disk.overlay, &mut ring).unwrap();
    assert_eq!((ended.members, ended.durable), (vec![8], false));
    assert!(disk.overlay.flush().is_err());
}

/// Puts another file behind the overlay's data file; what was there.
fn exchange(overlay: &Overlay, file: &fs::File) -> fs::File {
    use std::os::fd::AsRawFd;
    let before = fs::File::from(overlay.data_fd().try_clone_to_owned().unwrap());
    let (from, to) = (file.as_raw_fd(), overlay.data_fd().as_raw_fd());
    // SAFETY: both descriptors are open, and the second goes on belonging to the overlay, which only
    // finds another file behind it.
    assert_eq!(unsafe { libc::dup2(from, to) }, to);
    before
}

/// The host's disk is full: the guest hears of it, loses nothing that it had, and goes on when there is
/// room again.
#[test]
fn a_full_disk_is_told_to_the_guest() {
    let mut disk = disk(FLUSH);
    disk.ask(0, &Ask::Write { sector: 8, sectors: 8, seed: 1 });
    disk.run(1);
    disk.harvest();
    let full = fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let healthy = exchange(&disk.overlay, &full);
    let before = disk.oracle.clone();
    // A whole chunk, part of one that is the base's, and part of one that is not.
    let writes = [(16, 8), (33, 2), (9, 3)];
    for (n, (sector, sectors)) in writes.into_iter().enumerate() {
        disk.ask(n, &Ask::Write { sector, sectors, seed: 7 });
        disk.run(1);
        assert_eq!(disk.status(n), VIRTIO_BLK_S_IOERR as u8, "sector {sector}");
    }
    disk.oracle = before;
    exchange(&disk.overlay, &healthy);
    disk.check_content("while it was full");
    for (n, (sector, sectors)) in writes.into_iter().enumerate() {
        disk.ask(n, &Ask::Write { sector, sectors, seed: 7 });
        disk.run(1);
        assert_eq!(disk.status(n), VIRTIO_BLK_S_OK as u8);
    }
    disk.ask(3, &Ask::Flush);
    disk.run(1);
    assert_eq!(disk.status(3), VIRTIO_BLK_S_OK as u8);
    disk.check_content("when there was room again");
    let written: BTreeSet<u64> = [1, 2, 4].into();
    assert!(disk.harvest().is_superset(&written));
    let oracle = disk.oracle.clone();
    assert!(disk.reopen() == oracle);
}

#[test]
fn a_disk_is_held_to_a_rate_and_a_pause_does_not_wait_for_it() {
    let dir = TempDir::new().unwrap();
    let (overlay, block) = open(Overlay::create(dir.path(), base()).unwrap());
    let dirty = block.dirty();
    // 64 KiB at once, then 320 KiB a second.
    let rate = Rate { bytes_per_s: Some(320 << 10), operations_per_s: None };
    let mut driver = Driver::new(Box::new(block.limited(rate).unwrap()));
    driver.start(FLUSH | EVENT_IDX);
    let base = base_content();
    let mut disk = Disk { dir, overlay, dirty, driver, oracle: base.clone(), base };
    let begun = Instant::now();
    let asks: Vec<_> =
        (0..10).map(|n| Ask::Write { sector: n * 32, sectors: 32, seed: 3 }).collect();
    for (n, ask) in asks.iter().enumerate() {
        disk.ask(n, ask);
    }
    disk.run(asks.len());
    let took = begun.elapsed();
    // 160 KiB, of which 80 KiB (a debt of a request included) at once.
    assert!((200..5000).contains(&took.as_millis()), "{took:?}");
    for n in 0..asks.len() {
        assert_eq!(disk.status(n), VIRTIO_BLK_S_OK as u8);
    }
    for (n, ask) in asks.iter().enumerate() {
        disk.ask(n, ask);
    }
    disk.driver.kick(0);
    disk.driver.wait_used(0);
    let begun = Instant::now();
    disk.driver.device.pause().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(200), "{:?}", begun.elapsed());
    disk.driver.device.resume().unwrap();
    (1..asks.len()).for_each(|_| _ = disk.driver.wait_used(0));
    for (n, ask) in asks.iter().enumerate() {
        if let Ask::Write { sector, sectors, .. } = ask {
            disk.ask(n, &Ask::Read { sector: *sector, sectors: *sectors });
        }
    }
    disk.run(asks.len());
    for n in 0..asks.len() {
        let data = Disk::slot(n) + 3;
        let range = bytes(n as u64 * 32, 32);
        assert_eq!(disk.driver.get(data, range.len()), disk.oracle[range], "request {n}");
    }
}
