//! Tests of the store, and the bases that other tests stand on.

mod hostile;
mod resume;

use std::{
    collections::HashMap,
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    base::{INDEX_FILE, Place},
    chunk::{CHUNK_SIZE, Chunk, ChunkHash, ZERO_CHUNK},
    manifest::RootHasher,
};

/// A store in a directory of its own, and image files to import.
pub(crate) struct Fixture {
    pub(crate) dir: TempDir,
    pub(crate) store: Store,
    pub(crate) spec: ImportSpec,
}

/// A bzImage as far as anyone looks, of odd length.
fn kernel() -> Vec<u8> {
    let mut kernel = vec![0x90; 3 * CHUNK_SIZE + 77];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel
}

fn chunk_of(seed: u8) -> Chunk {
    std::array::from_fn(|i| seed.wrapping_mul(31).wrapping_add((i / 7) as u8) | 1)
}

/// A disk with one chunk for each seed; seed 0 is a chunk of zeros.
pub(crate) fn disk(seeds: &[u8]) -> Vec<u8> {
    let content = |seed: &u8| if *seed == 0 { *ZERO_CHUNK } else { chunk_of(*seed) };
    seeds.iter().flat_map(content).collect()
}

impl Fixture {
    pub(crate) fn new(disk: &[u8]) -> Self {
        let dir = TempDir::new().unwrap();
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let spec = ImportSpec {
            name: "tiny".into(),
            disk: put("disk.img", disk),
            kernel: put("vmlinuz", &kernel()),
            initramfs: Some(put("initrd.img", &[0x30; 5000])),
            cmdline: "console=ttyS0".into(),
            memory: None,
        };
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { store, spec, dir }
    }

    pub(crate) fn import(&self) -> BaseId {
        self.store.import(&self.spec, &mut |_| {}).unwrap()
    }

    pub(crate) fn base(&self) -> Arc<Base> {
        Arc::new(self.store.get_id(&self.import()).unwrap())
    }

    /// Gives the base a memory of one chunk for each seed.
    pub(crate) fn with_memory(mut self, seeds: &[u8]) -> Self {
        let ram = self.dir.path().join("ram.img");
        fs::write(&ram, disk(seeds)).unwrap();
        self.spec.memory = Some(MemorySpec { ram, machine: b"a machine".to_vec() });
        self
    }

    fn refusal(&self) -> String {
        let error = self.store.import(&self.spec, &mut |_| {}).unwrap_err().to_string();
        assert!(self.store.list().unwrap().is_empty(), "a refused import left a base");
        assert_eq!(fs::read_dir(self.store.dir.join(TMP)).unwrap().count(), 0);
        error
    }

    /// Writes into a file of the stored base, as a bad disk would.
    fn damage(&self, id: &BaseId, file: &str, at: u64, bytes: &[u8]) {
        let path = self.store.base_dir(id).join(file);
        let mut mode = fs::metadata(&path).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o644);
        fs::set_permissions(&path, mode).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn problems(&self, id: &BaseId) -> Vec<String> {
        let problems = self.store.verify(id, &mut |_| {}).unwrap();
        problems.iter().map(Problem::to_string).collect()
    }
}

#[test]
fn an_imported_base_reads_and_finds_every_chunk() {
    let fixture = Fixture::new(&disk(&[1, 0, 2, 1, 3]));
    let mut seen = Vec::new();
    let id = fixture.store.import(&fixture.spec, &mut |progress| seen.push(progress)).unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.part, last.done_bytes, last.total_bytes), (Part::Initramfs, 5000, 5000));
    let base = fixture.store.get("tiny").unwrap();
    assert_eq!(base.id(), id);
    assert_eq!(base.manifest().cmdline, "console=ttyS0");
    assert_eq!((base.disk_chunks(), base.part_chunks(Part::Kernel)), (5, 4));
    assert_eq!(base.kernel_path(), base.dir().join("kernel"));
    assert_eq!(base.initramfs_path(), Some(base.dir().join("initramfs")));

    let mut chunk = *ZERO_CHUNK;
    for (part, chunks) in [(Part::Disk, 5), (Part::Kernel, 4), (Part::Initramfs, 2)] {
        for index in 0..chunks {
            base.read(Place { part, index }, &mut chunk).unwrap();
            let place = base.lookup(&ChunkHash::of(&chunk));
            if chunk == *ZERO_CHUNK {
                assert_eq!(place, None);
                continue;
            }
            let mut again = *ZERO_CHUNK;
            base.read(place.unwrap(), &mut again).unwrap();
            assert_eq!(chunk, again, "{part} chunk {index}");
        }
        let outside = base.read(Place { part, index: chunks }, &mut chunk).unwrap_err();
        assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
        assert!(base.read(Place { part, index: u64::MAX }, &mut chunk).is_err());
    }
    // The padding of a part's last chunk, and the first of two equal chunks.
    base.read(Place { part: Part::Initramfs, index: 1 }, &mut chunk).unwrap();
    assert_eq!((chunk[903], chunk[904]), (0x30, 0));
    let one = ChunkHash::of(&chunk_of(1));
    assert_eq!(base.lookup(&one), Some(Place { part: Part::Disk, index: 0 }));
    assert_eq!(base.lookup(&ChunkHash([7; 32])), None);
    assert!(fixture.problems(&id).is_empty());
}

#[test]
fn the_same_files_give_the_same_base_and_the_name_follows() {
    let mut fixture = Fixture::new(&disk(&[1, 2]));
    let first = fixture.import();
    assert_eq!(fixture.import(), first);
    fixture.spec.cmdline = "console=ttyS0 quiet".into();
    let second = fixture.import();
    assert_ne!(first, second);
    assert_eq!(fixture.store.resolve("tiny").unwrap(), second);
    assert_eq!(fixture.store.resolve(&first.to_string()[..8]).unwrap(), first);
    assert_eq!(fixture.store.resolve(&second.to_string().to_uppercase()).unwrap(), second);
    fixture.store.name("old", &first).unwrap();
    let listed = fixture.store.list().unwrap();
    let of = |id| &listed.iter().find(|listed| listed.id == id).unwrap().names;
    assert_eq!((of(first), of(second)), (&vec!["old".to_owned()], &vec!["tiny".to_owned()]));
    assert!(listed.iter().all(|listed| listed.base.is_ok()));
}

#[test]
fn a_base_with_memory_has_its_chunks_and_its_machine() {
    let plain = Fixture::new(&disk(&[1, 0, 2])).import();
    let fixture = Fixture::new(&disk(&[1, 0, 2])).with_memory(&[0, 2, 7, 0, 8, 0]);
    let id = fixture.import();
    assert_ne!(id, plain);
    let base = fixture.store.get_id(&id).unwrap();
    assert_eq!(base.manifest().version, 2);
    assert_eq!(base.machine().unwrap().as_deref(), Some(b"a machine".as_slice()));
    assert_eq!(base.memory_file().unwrap().metadata().unwrap().len(), 6 * 4096);
    assert_eq!(base.part_chunks(Part::Memory), 6);
    let memory = |index| Place { part: Part::Memory, index };
    assert_eq!(base.chunk(memory(0)), Some(ZERO_CHUNK));
    assert_eq!(base.chunk(memory(4)), Some(&chunk_of(8)));
    assert_eq!(base.chunk(memory(6)), None);
    assert_eq!(base.chunk(memory(u64::MAX)), None);
    // What the disk has too is found there.
    assert_eq!(base.lookup(&ChunkHash::of(&chunk_of(7))), Some(memory(2)));
    let on_disk = Place { part: Part::Disk, index: 2 };
    assert_eq!(base.lookup(&ChunkHash::of(&chunk_of(2))), Some(on_disk));
    assert!(fixture.problems(&id).is_empty());
    drop(base);

    fixture.damage(&id, "machine", 2, b"x");
    let base = fixture.store.get_id(&id).unwrap();
    assert_eq!(base.machine().unwrap_err().kind(), io::ErrorKind::InvalidData);
    drop(base);
    let problems = fixture.problems(&id);
    assert!(problems.len() == 1 && problems[0].contains("machine"), "{problems:?}");
    fixture.damage(&id, "memory.raw", 2 * 4096, b"x");
    assert!(fixture.problems(&id)[0].contains("memory.raw: "));
    fixture.damage(&id, "machine", 9, b"x");
    let error = fixture.store.get_id(&id).unwrap_err().to_string();
    assert!(error.contains("machine has 10 bytes"), "{error}");
}

#[test]
fn roots_are_those_that_the_format_describes() {
    let fixture = Fixture::new(&disk(&[1, 0, 0, 2]));
    let base = fixture.base();
    let mut root = RootHasher::new(4);
    root.push(&ChunkHash::of(&chunk_of(1)));
    root.push_zeros(2);
    root.push(&ChunkHash::of(&chunk_of(2)));
    assert_eq!(base.manifest().disk.root, root.finish().unwrap());
}

#[test]
fn holes_are_kept_and_made() {
    // 40 MiB: data, hole, a stretch of written zeros, data that ends in the middle of a chunk.
    let fixture = Fixture::new(&disk(&[1]));
    let bytes = (40 << 20) + 512;
    let image = OpenOptions::new().write(true).open(&fixture.spec.disk).unwrap();
    image.set_len(bytes).unwrap();
    image.write_all_at(&vec![0; 4 << 20], 20 << 20).unwrap();
    image.write_all_at(&chunk_of(9), 30 << 20).unwrap();
    image.write_all_at(&[5; 512], 40 << 20).unwrap();
    let base = fixture.base();
    let stored = base.disk_file().metadata().unwrap();
    assert_eq!(stored.len(), bytes);
    assert!(stored.blocks() * 512 < 1 << 20, "{} blocks", stored.blocks());
    assert_eq!(
        fs::read(&fixture.spec.disk).unwrap(),
        fs::read(base.dir().join("disk.raw")).unwrap()
    );
    assert_eq!(base.index().len(), 3 + 3 + 2, "the kernel repeats a chunk");
    assert!(fixture.problems(&base.id()).is_empty());
}

#[test]
fn what_cannot_be_a_base_is_refused_by_name_and_leaves_nothing() {
    let refusal = |change: fn(&mut Fixture), words: &[&str]| {
        let mut fixture = Fixture::new(&disk(&[1, 2]));
        change(&mut fixture);
        let error = fixture.refusal();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refusal(|f| fs::write(&f.spec.disk, b"QFI\xfb\0\0\0\x03").unwrap(), &["qcow2", "disk.img"]);
    refusal(|f| fs::write(&f.spec.disk, b"").unwrap(), &["disk.img", "empty"]);
    refusal(|f| fs::write(&f.spec.disk, [1; 1000]).unwrap(), &["disk.img", "1000", "sectors"]);
    refusal(|f| fs::write(&f.spec.kernel, [1; 5000]).unwrap(), &["vmlinuz", "bzImage"]);
    refusal(|f| fs::write(&f.spec.kernel, b"").unwrap(), &["vmlinuz"]);
    refusal(|f| f.spec.disk = f.dir.path().into(), &["directory", "disk"]);
    refusal(|f| f.spec.disk = "/dev/null".into(), &["special file"]);
    refusal(|f| f.spec.kernel = f.dir.path().join("gone"), &["gone", "No such file"]);
    refusal(|f| fs::write(f.dir.path().join("initrd.img"), b"").unwrap(), &["initrd", "empty"]);
    let memory = |f: &mut Fixture, ram: &[u8], machine: Vec<u8>| {
        let path = f.dir.path().join("ram.img");
        fs::write(&path, ram).unwrap();
        f.spec.memory = Some(MemorySpec { ram: path, machine });
    };
    let refusal_of = |ram: &[u8], machine: Vec<u8>, words: &[&str]| {
        let mut fixture = Fixture::new(&disk(&[1, 2]));
        memory(&mut fixture, ram, machine);
        let error = fixture.refusal();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refusal_of(&[1; 4096], Vec::new(), &["ram.img", "machine state of 0 bytes"]);
    refusal_of(&[1; 4096], vec![0; (16 << 20) + 1], &["ram.img", "at most"]);
    refusal_of(&[1; 4097], vec![1], &["ram.img", "whole chunks"]);
    refusal_of(&[], vec![1], &["ram.img", "empty"]);
    refusal(|f| f.spec.cmdline = "a\nb".into(), &["command line"]);
    refusal(|f| f.spec.name = "../up".into(), &["../up"]);
    refusal(|f| f.spec.name = String::new(), &["name"]);
    refusal(|f| f.spec.name = "a".repeat(64), &["name"]);
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    let fixture = Fixture::new(&disk(&[1]));
    let error = fixture.store.get("debian").unwrap_err().to_string();
    assert!(error.contains("debian") && error.contains("howdah base import"), "{error}");
    fixture.import();
    let error = fixture.store.get("debian").unwrap_err().to_string();
    assert!(error.contains("tiny"), "{error}");
    for odd in ["", "..", "../names/tiny", "zz", "00", "/etc/passwd", "a\0b"] {
        assert!(fixture.store.get(odd).is_err(), "{odd:?}");
    }
    fs::write(fixture.store.dir.join(NAMES).join("bad"), "nonsense").unwrap();
    let error = fixture.store.get("bad").unwrap_err().to_string();
    assert!(error.contains("names/bad"), "{error}");
    assert_eq!(fixture.store.list().unwrap().len(), 1);
}

#[test]
fn damage_is_told_with_its_place() {
    let fixture = Fixture::new(&disk(&[1, 0, 2, 1, 3]));
    let id = fixture.import();
    fixture.damage(&id, "disk.raw", 2 * 4096 + 5, b"\xee");
    fixture.damage(&id, "disk.raw", 4 * 4096, &[0; 4096]);
    let problems = fixture.problems(&id);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("disk.raw") && problems[0].contains("chunks 2, 4"),
        "{problems:?}"
    );
    // Importing again does not see it; removing first does.
    fixture.store.remove(&id).unwrap();
    assert_eq!(fixture.import(), id);
    assert!(fixture.problems(&id).is_empty());

    fixture.damage(&id, "kernel", 0, b"\xee");
    assert!(fixture.problems(&id)[0].contains("kernel: "));
}

#[test]
fn a_base_that_cannot_be_opened_is_listed_and_replaced_by_importing_it_again() {
    let fixture = Fixture::new(&disk(&[1, 2]));
    let id = fixture.import();
    let damage: [(&str, &[u8], &str); 4] = [
        ("manifest.json", b"x", "manifest"),
        (INDEX_FILE, b"x", "not a chunk index"),
        (INDEX_FILE, &[0; 0], "truncated below"),
        ("disk.raw", &[0; 0], "truncated below"),
    ];
    for (file, bytes, words) in damage {
        if bytes.is_empty() {
            fixture.damage(&id, file, 0, &[]);
            let path = fixture.store.base_dir(&id).join(file);
            OpenOptions::new().write(true).open(path).unwrap().set_len(4095).unwrap_or_default();
            let error = fixture.store.get("tiny").unwrap_err().to_string();
            assert!(error.contains("bytes") && error.contains(file), "{error}");
        } else {
            fixture.damage(&id, file, 0, bytes);
            let error = fixture.store.get("tiny").unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(file), "{error}");
        }
        assert!(fixture.store.list().unwrap()[0].base.is_err());
        assert_eq!(fixture.problems(&id).len(), 1);
        assert_eq!(fixture.import(), id);
        assert!(fixture.problems(&id).is_empty());
    }
}

#[test]
fn a_manifest_moved_elsewhere_is_refused() {
    let mut fixture = Fixture::new(&disk(&[1, 2]));
    let first = fixture.import();
    fixture.spec.cmdline.push('x');
    let second = fixture.import();
    let manifest = |id| fixture.store.base_dir(id).join(MANIFEST_FILE);
    let text = fs::read(manifest(&second)).unwrap();
    fs::remove_file(manifest(&first)).unwrap();
    fs::write(manifest(&first), text).unwrap();
    let error = fixture.store.get_id(&first).unwrap_err();
    assert!(matches!(error, StoreError::Base(BaseError::WrongId { found, .. }) if found == second));
}

#[test]
fn a_base_in_use_stays() {
    let fixture = Fixture::new(&disk(&[1]));
    let base = fixture.base();
    let error = fixture.store.remove(&base.id()).unwrap_err().to_string();
    assert!(error.contains("in use by"), "{error}");
    assert!(fixture.store.get("tiny").is_ok());
    let id = base.id();
    drop(base);
    fixture.store.remove(&id).unwrap();
    assert!(fixture.store.list().unwrap().is_empty());
    assert!(matches!(fixture.store.get("tiny"), Err(StoreError::NotFound { .. })));
    assert!(matches!(fixture.store.remove(&id), Err(StoreError::NotFound { .. })));
}

#[test]
fn what_a_crash_left_is_cleaned_up_but_not_what_is_under_way() {
    let fixture = Fixture::new(&disk(&[1]));
    let left = fixture.store.dir.join(TMP).join("import-1-0-0");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("disk.raw"), b"half").unwrap();
    let other = fixture.store.begin().unwrap();
    assert!(!left.exists());
    // Now `other` is an import under way.
    fs::create_dir(&left).unwrap();
    fixture.import();
    assert!(left.exists());
    drop(other);
    fixture.store.name("again", &fixture.import()).unwrap();
    assert!(!left.exists());
}

#[test]
fn many_importers_at_once_agree() {
    let fixture = Fixture::new(&disk(&[1, 2, 3]));
    let ids: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| fixture.import())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(fixture.store.list().unwrap().len(), 1);
    assert_eq!(fs::read_dir(fixture.store.dir.join(TMP)).unwrap().count(), 0);
}

/// A damaged index may miss; it never names a place outside the base, and never panics.
#[test]
fn lookups_on_a_damaged_index_stay_inside_the_base() {
    let seeds: Vec<u8> = (0..=255).collect();
    let fixture = Fixture::new(&disk(&seeds));
    let id = fixture.import();
    let entries = fixture.store.get_id(&id).unwrap().index().len() as usize;
    for round in 0..20u64 {
        // Noise over all entries, or over their places only.
        for entry in 0..entries {
            let noise = blake3::hash(&[round.to_le_bytes(), (entry as u64).to_le_bytes()].concat());
            let at = 192 + 40 * entry as u64;
            if round % 2 == 0 {
                fixture.damage(&id, INDEX_FILE, at, &noise.as_bytes()[..31]);
            } else {
                fixture.damage(&id, INDEX_FILE, at + 32, &noise.as_bytes()[..8]);
            }
        }
        let base = fixture.store.get_id(&id).unwrap();
        for seed in 0..=255 {
            if let Some(place) = base.lookup(&ChunkHash::of(&chunk_of(seed))) {
                assert!(place.index < base.part_chunks(place.part));
            }
        }
        for entry in base.index().entries() {
            if let Some(place) = base.lookup(entry.hash()) {
                assert!(place.index < base.part_chunks(place.part));
            }
        }
        let hashes: Vec<_> = (0..=255).map(|seed| ChunkHash::of(&chunk_of(seed))).collect();
        let mut places = vec![None; hashes.len()];
        base.lookup_batch(&hashes, &mut places);
        let singly: Vec<_> = hashes.iter().map(|hash| base.lookup(hash)).collect();
        assert_eq!(places, singly);
        let problems = fixture.problems(&id);
        assert!(problems[0].contains("entry 0"), "{problems:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Any disk: the store's bytes are the image's, and a lookup finds exactly what is there, at
    /// its first place.
    #[test]
    fn lookup_agrees_with_a_hash_map(
        seeds in proptest::collection::vec(0u8..24, 1..600),
        tail_sectors in 0usize..8,
    ) {
        let mut image = disk(&seeds);
        image.extend(std::iter::repeat_n(0xab, tail_sectors * 512));
        let fixture = Fixture::new(&image);
        let base = fixture.base();
        prop_assert_eq!(base.disk_bytes(), image.len() as u64);
        let mut first = HashMap::new();
        for (index, bytes) in image.chunks(CHUNK_SIZE).enumerate() {
            let mut chunk = *ZERO_CHUNK;
            chunk[..bytes.len()].copy_from_slice(bytes);
            let place = Place { part: Part::Disk, index: index as u64 };
            let mut read = [1; CHUNK_SIZE];
            base.read(place, &mut read).unwrap();
            prop_assert!(read == chunk);
            first.entry(ChunkHash::of(&chunk)).or_insert(place);
        }
        for seed in 0u8..=255 {
            let hash = ChunkHash::of(&chunk_of(seed));
            prop_assert_eq!(base.lookup(&hash), first.get(&hash).copied());
        }
        prop_assert_eq!(base.lookup(&ChunkHash::of(ZERO_CHUNK)), None);
        let hashes: Vec<_> = (0u8..=255).map(|seed| ChunkHash::of(&chunk_of(seed))).collect();
        let mut places = vec![Some(Place { part: Part::Kernel, index: 9 }); 300];
        base.lookup_batch(&hashes, &mut places);
        let expected = hashes.iter().map(|hash| first.get(hash).copied());
        prop_assert!(places.iter().copied().take(256).eq(expected));
        prop_assert!(places[256..].iter().all(|place| place.is_some()), "more than was asked");
    }
}
