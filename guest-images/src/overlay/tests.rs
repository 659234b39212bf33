//! Tests of the overlay: what each operation does, what is refused, and crashes against an oracle.

mod batched;
mod crash;
mod faults;

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use tempfile::TempDir;

use super::*;
use crate::{
    chunk::ZERO_CHUNK,
    store::tests::{Fixture, disk},
};

/// Chunks of the test disk; its last one is cut at 1024 bytes.
const CHUNKS: u64 = 9;

struct Vm {
    base: Arc<Base>,
    image: Vec<u8>,
    dir: TempDir,
}

impl Vm {
    /// A VM, and the store that holds its base.
    fn new() -> (Fixture, Self) {
        let mut image = disk(&[1, 2, 0, 3, 4, 5, 0, 6, 7]);
        image.truncate(8 * CHUNK_SIZE + 1024);
        let fixture = Fixture::new(&image);
        let base = fixture.base();
        (fixture, Self { base, image, dir: TempDir::new().unwrap() })
    }

    fn create(&self) -> Overlay {
        Overlay::create(self.dir.path(), Arc::clone(&self.base)).unwrap()
    }

    fn open(&self) -> Result<Overlay, OverlayError> {
        Overlay::open(self.dir.path(), Arc::clone(&self.base))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn whole(overlay: &Overlay) -> Vec<u8> {
    let mut bytes = vec![0xff; overlay.disk_bytes() as usize];
    overlay.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_new_overlay_is_the_base_and_takes_no_space() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    assert_eq!((overlay.chunks(), overlay.disk_bytes()), (CHUNKS, vm.image.len() as u64));
    assert_eq!(whole(&overlay), vm.image);
    assert_eq!(overlay.changed().count(), 0);
    assert!(overlay.allocated_bytes().unwrap() <= 16 << 10);
    let mut chunk = [1; CHUNK_SIZE];
    overlay.read_chunk(8, &mut chunk).unwrap();
    assert_eq!(chunk[..1024], vm.image[8 * CHUNK_SIZE..]);
    assert!(chunk[1024..].iter().all(|byte| *byte == 0), "padding is zero");
}

#[test]
fn what_was_flushed_is_there_again() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    let mut expected = vm.image.clone();
    overlay.write_at(4000, &[7; 200]).unwrap();
    expected[4000..4200].fill(7);
    overlay.write_at(8 * 4096 + 512, &[8; 512]).unwrap();
    expected[8 * 4096 + 512..].fill(8);
    overlay.zero_chunk(3).unwrap();
    expected[3 * 4096..4 * 4096].fill(0);
    overlay.write_chunk(4, &[9; CHUNK_SIZE]).unwrap();
    overlay.reset_chunk(4).unwrap();
    assert_eq!(whole(&overlay), expected);
    assert_eq!(overlay.changed().collect::<Vec<_>>(), [0, 1, 3, 8]);
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = vm.open().unwrap();
    assert_eq!(whole(&overlay), expected);
    assert_eq!(overlay.state(3), ChunkState::Zero);
    assert_eq!(overlay.state_run(0, 100), (ChunkState::Data, 2));
    assert_eq!(overlay.state_run(4, 100), (ChunkState::Base, 4));
    assert_eq!(overlay.state_run(9, 100), (ChunkState::Base, 0));
}

#[test]
fn an_exported_image_is_the_disk_with_its_holes() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    overlay.write_at(4000, &[7; 200]).unwrap();
    overlay.write_at(8 * 4096 + 512, &[8; 512]).unwrap();
    overlay.zero_chunk(3).unwrap();
    overlay.write_chunk(4, &[0; CHUNK_SIZE]).unwrap();
    let (image, taken) = (vm.file("image"), vm.file("taken"));
    overlay.export(&image).unwrap();
    assert!(fs::read(&image).unwrap() == whole(&overlay));
    let blocks = fs::metadata(&image).unwrap().blocks();
    assert!(blocks * 512 <= 5 * 4096, "{blocks} blocks: chunks 2, 3, 4 and 6 are zero");

    fs::write(&taken, "mine").unwrap();
    assert!(overlay.export(&taken).is_err());
    assert_eq!(fs::read(&taken).unwrap(), b"mine");
}

#[test]
fn ranges_are_zeroed_to_the_byte() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    let end = vm.image.len();
    for (from, to) in [(0, 0), (100, 200), (4000, 4200), (512, 3 * 4096), (4096, 8192), (5000, end)]
    {
        let mut expected = whole(&overlay);
        expected[from..to].fill(0);
        overlay.zero_at(from as u64, (to - from) as u64).unwrap();
        assert!(whole(&overlay) == expected, "{from}..{to}");
    }
    assert_eq!(overlay.state(8), ChunkState::Zero, "the cut chunk is whole at the disk's end");
}

#[test]
fn space_comes_back_after_discard_and_after_reset() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    let empty = overlay.allocated_bytes().unwrap();
    (0..8).for_each(|chunk| overlay.write_chunk(chunk, &[9; CHUNK_SIZE]).unwrap());
    overlay.flush().unwrap();
    let full = overlay.allocated_bytes().unwrap();
    assert!(full >= empty + 8 * 4096);
    overlay.zero_chunks(0, 4).unwrap();
    assert!(overlay.allocated_bytes().unwrap() <= full - 4 * 4096);
    (4..8).for_each(|chunk| overlay.reset_chunk(chunk).unwrap());
    overlay.flush().unwrap();
    drop(overlay);
    assert!(vm.open().unwrap().allocated_bytes().unwrap() <= empty);
}

#[test]
fn requests_outside_the_disk_are_refused() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    let end = overlay.disk_bytes();
    let refused = |result: Result<(), OverlayError>| {
        assert!(matches!(result, Err(OverlayError::OutOfRange { .. })), "{result:?}");
    };
    let mut chunk = *ZERO_CHUNK;
    for number in [CHUNKS, CHUNKS + 1, u64::MAX] {
        refused(overlay.read_chunk(number, &mut chunk));
        refused(overlay.write_chunk(number, &chunk));
        refused(overlay.zero_chunk(number));
        refused(overlay.reset_chunk(number));
        assert!(!overlay.mark(number, ChunkState::Data));
        assert_eq!(overlay.state(number), ChunkState::Base);
    }
    for (offset, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX, 0), (end + 1, 0)] {
        refused(overlay.read_at(offset, &mut vec![0; len]));
        refused(overlay.write_at(offset, &vec![0; len]));
        refused(overlay.zero_at(offset, len as u64));
    }
    refused(overlay.zero_at(0, u64::MAX));
    refused(overlay.zero_chunks(1, u64::MAX));
    overlay.read_at(end, &mut []).unwrap();
    let error = overlay.write_chunk(8, &[1; CHUNK_SIZE]).unwrap_err();
    assert!(matches!(error, OverlayError::Padding { chunk: 8, .. }), "{error}");
    assert_eq!(whole(&overlay), vm.image);
}

#[test]
fn two_never_hold_one_disk() {
    let (_fixture, vm) = Vm::new();
    let overlay = vm.create();
    let error = vm.open().unwrap_err().to_string();
    let me = format!("process {}", std::process::id());
    assert!(
        error.contains("in use by") && error.contains(vm.dir.path().to_str().unwrap()),
        "{error}"
    );
    // Some file systems' device numbers differ between stat and /proc/locks: then the name is lost.
    assert!(error.contains(&me) || error.contains("another process"), "{error}");
    let error = Overlay::create(vm.dir.path(), Arc::clone(&vm.base)).unwrap_err();
    assert!(matches!(error, OverlayError::Exists { .. }), "{error}");
    drop(overlay);
    let overlay = vm.open().unwrap();
    assert_eq!(whole(&overlay), vm.image);
    assert_eq!(fs::read_dir(vm.dir.path()).unwrap().count(), 2, "nothing is left lying about");
}

#[test]
fn damaged_and_foreign_maps_are_refused_precisely() {
    let (mut fixture, mut vm) = Vm::new();
    let overlay = vm.create();
    overlay.write_chunk(1, &[1; CHUNK_SIZE]).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let good = fs::read(vm.file(MAP_FILE)).unwrap();
    let refusal = |vm: &Vm, map: &[u8], words: &str| {
        fs::write(vm.file(MAP_FILE), map).unwrap();
        let error = vm.open().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("disk.map"), "{words}: {error}");
    };
    let with = |at: usize, byte: u8| {
        let mut map = good.clone();
        map[at] = byte;
        map
    };
    refusal(&vm, &[], "truncated");
    refusal(&vm, &good[..100], "truncated");
    refusal(&vm, &good[..4096], "truncated");
    refusal(&vm, &good[..good.len() - 1], "truncated");
    refusal(&vm, &[&good[..], &[0]].concat(), "truncated or foreign");
    refusal(&vm, &with(0, b'X'), "not an overlay map");
    refusal(&vm, &with(8, 9), "version 9");
    refusal(&vm, &with(50, 9), "damaged");
    refusal(&vm, &with(4000, 9), "damaged");
    refusal(&vm, &with(4096 + 3, 3), "byte 4099 says state 3 of chunk 3");
    refusal(&vm, &with(4096 + 9, 1), "chunk 9");
    refusal(&vm, &with(8191, 0xff), "chunk 4095");
    fs::write(vm.file(MAP_FILE), &good).unwrap();

    // The data file cut, or gone, while the map needs it.
    let data = fs::read(vm.file(DATA_FILE)).unwrap();
    fs::write(vm.file(DATA_FILE), &data[..5000]).unwrap();
    let error = vm.open().unwrap_err().to_string();
    assert!(error.contains("disk.data has 5000 bytes"), "{error}");
    fs::write(vm.file(DATA_FILE), []).unwrap();
    assert!(matches!(vm.open(), Err(OverlayError::Length { found: 0, .. })));
    fs::remove_file(vm.file(DATA_FILE)).unwrap();
    assert!(matches!(vm.open(), Err(OverlayError::Io { .. })));
    fs::write(vm.file(DATA_FILE), &data).unwrap();
    vm.open().unwrap();

    fixture.spec.cmdline.push('x');
    vm.base = fixture.base();
    assert!(matches!(vm.open(), Err(OverlayError::WrongBase { .. })));
}

#[test]
fn a_creation_cut_short_is_completed_by_opening() {
    let (fixture, vm) = Vm::new();
    drop(vm.create());
    for cut in [true, false] {
        if cut {
            fs::write(vm.file(DATA_FILE), []).unwrap();
        } else {
            fs::remove_file(vm.file(DATA_FILE)).unwrap();
        }
        let overlay = vm.open().unwrap();
        assert_eq!(whole(&overlay), vm.image);
        overlay.write_at(512, &[1; 512]).unwrap();
    }
    assert!(Overlay::open(fixture.dir.path(), Arc::clone(&vm.base)).is_err(), "no overlay here");
}

#[test]
fn a_flush_given_up_is_made_up_for_by_the_next() {
    let (_fixture, vm) = Vm::new();
    let overlay = Arc::new(vm.create());
    overlay.write_chunk(2, &[5; CHUNK_SIZE]).unwrap();
    let taken = overlay.take_dirty_map().unwrap();
    assert_eq!(taken.pages().len(), 1);
    assert_eq!((taken.pages()[0].file_offset, taken.pages()[0].bytes[2]), (4096, 1));
    assert!(matches!(overlay.take_dirty_map(), Err(OverlayError::FlushRunning)));
    assert!(matches!(overlay.flush(), Err(OverlayError::FlushRunning)));
    drop(taken);
    overlay.flush().unwrap();
    let taken = overlay.take_dirty_map().unwrap();
    assert!(taken.pages().is_empty(), "nothing is new");
    taken.done();
    drop(overlay);
    assert_eq!(vm.open().unwrap().state(2), ChunkState::Data);
}

#[test]
fn after_a_failed_sync_no_flush_succeeds() {
    let (_fixture, vm) = Vm::new();
    let overlay = Arc::new(vm.create());
    overlay.write_chunk(2, &[5; CHUNK_SIZE]).unwrap();
    overlay.take_dirty_map().unwrap().sync_failed();
    assert!(matches!(overlay.flush(), Err(OverlayError::SyncLost { .. })));
    assert!(matches!(overlay.take_dirty_map(), Err(OverlayError::SyncLost { .. })));
    drop(overlay);
    assert_eq!(vm.open().unwrap().state(2), ChunkState::Base, "the map was never written");
}

/// A reader beside the writer sees old or new content of each chunk, never something else.
#[test]
fn readers_race_with_the_writer_and_flushes() {
    let (_fixture, vm) = Vm::new();
    let overlay = Arc::new(vm.create());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut chunk = *ZERO_CHUNK;
            let mut reads = 0u64;
            while !stop.load(Ordering::Relaxed) || reads == 0 {
                overlay.read_chunk(0, &mut chunk).unwrap();
                let uniform = chunk.iter().all(|byte| *byte == 0 || *byte == 0xee);
                assert!(uniform || chunk == vm.image[..CHUNK_SIZE]);
                reads += 1;
            }
        });
        let flusher = scope.spawn(|| (0..20).for_each(|_| overlay.flush().unwrap()));
        for _ in 0..300 {
            overlay.write_chunk(0, &[0xee; CHUNK_SIZE]).unwrap();
            overlay.zero_chunk(0).unwrap();
            overlay.reset_chunk(0).unwrap();
        }
        flusher.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
    overlay.flush().unwrap();
    drop(overlay);
    assert_eq!(vm.open().unwrap().state(0), ChunkState::Base);
}
