//! Interrupted imports: what the next one makes of them, wherever they ended and whatever is in
//! their ledger.

use std::{
    env,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::*;
use crate::{
    index::Entry,
    scan::{SLAB_BYTES, Slab},
    store::ledger::{HEADER_BYTES, Ledger},
};

/// Slabs of the test disk. Every eighth is a checkpoint.
const SLABS: u64 = 20;

/// A disk of many slabs; slab 3 is zero.
fn long_disk() -> Vec<u8> {
    let mut image = Vec::new();
    for chunk in 0..SLABS * SLAB_BYTES / 4096 {
        let zero = chunk / 8 == 3 || chunk % 11 == 0;
        let chunk_of_hash = || {
            let mut bytes = [0; CHUNK_SIZE];
            blake3::Hasher::new()
                .update(&(chunk % 100).to_le_bytes())
                .finalize_xof()
                .fill(&mut bytes);
            bytes
        };
        image.extend(if zero { *ZERO_CHUNK } else { chunk_of_hash() });
    }
    image.truncate(image.len() - 3584);
    image
}

impl Fixture {
    /// The directory of the import that is under way or was interrupted.
    fn workshop(&self) -> Option<PathBuf> {
        let tmp = fs::read_dir(self.store.dir.join(TMP)).unwrap();
        let mut dirs = tmp.flatten().map(|entry| entry.path());
        dirs.find(|path| path.file_name().unwrap().to_string_lossy().starts_with("resume-"))
    }

    /// Imports, and returns a copy of the workshop as it was when `part` was done up to `slab`.
    /// The base is removed again.
    fn interrupted(&self, part: Part, slab: u64) -> PathBuf {
        let copy = self.dir.path().join("interrupted");
        let mut workshop = None;
        let id = self.store.import(&self.spec, &mut |progress| {
            let reached = progress.part == part && progress.done_bytes > slab * SLAB_BYTES;
            if reached && workshop.is_none() {
                let dir = self.workshop().unwrap();
                fs::create_dir(&copy).unwrap();
                for file in fs::read_dir(&dir).unwrap().flatten() {
                    fs::copy(file.path(), copy.join(file.file_name())).unwrap();
                }
                workshop = Some(dir);
            }
        });
        assert!(self.workshop().is_none(), "a finished import left its workshop");
        self.store.remove(&id.unwrap()).unwrap();
        let workshop = workshop.unwrap();
        fs::rename(&copy, &workshop).unwrap();
        workshop
    }
}

fn with_memory() -> Fixture {
    let image = long_disk();
    let fixture = Fixture::new(&image).with_memory(&[0, 2, 7, 0, 8, 0]);
    fs::write(fixture.dir.path().join("ram.img"), image.repeat(2).split_off(3584)).unwrap();
    // What reads holes in one place reads zeros in another.
    let ram = fixture.dir.path().join("ram.img");
    let bytes = fs::metadata(&ram).unwrap().len();
    OpenOptions::new().write(true).open(&ram).unwrap().set_len(bytes / 4096 * 4096).unwrap();
    fixture
}

#[test]
fn an_import_interrupted_anywhere_is_finished_by_the_next() {
    let fixture = with_memory();
    let id = fixture.import();
    let index = fs::read(fixture.store.base_dir(&id).join(INDEX_FILE)).unwrap();
    fixture.store.remove(&id).unwrap();
    let points = [0, 6, 7, 8, 15, 19].map(|slab| (Part::Disk, slab));
    let more = [(Part::Kernel, 0), (Part::Initramfs, 0), (Part::Memory, 0), (Part::Memory, 30)];
    for (part, slab) in points.into_iter().chain(more) {
        fixture.interrupted(part, slab);
        assert_eq!(fixture.import(), id, "after {part} slab {slab}");
        assert!(fixture.problems(&id).is_empty(), "after {part} slab {slab}");
        assert!(fs::read(fixture.store.base_dir(&id).join(INDEX_FILE)).unwrap() == index);
        assert_eq!(fs::read_dir(fixture.store.dir.join(TMP)).unwrap().count(), 0);
        fixture.store.remove(&id).unwrap();
    }
}

#[test]
fn what_was_recorded_is_not_read_again_and_the_rest_is_not_trusted() {
    let fixture = with_memory();
    let workshop = fixture.interrupted(Part::Disk, 12);
    let copy = OpenOptions::new().write(true).open(workshop.join("disk.raw")).unwrap();
    // A chunk of a slab that is recorded; one of a slab that is not, where the source is zero.
    copy.write_all_at(b"x", 4096).unwrap();
    copy.write_all_at(b"x", 11 * 11 * 4096).unwrap();
    let id = fixture.import();
    let problems = fixture.problems(&id);
    assert!(problems.len() == 1 && problems[0].contains("chunk 1"), "{problems:?}");
}

#[test]
fn a_changed_source_is_imported_from_the_beginning() {
    let fixture = with_memory();
    let workshop = fixture.interrupted(Part::Disk, 19);
    let mut image = long_disk();
    image[5] ^= 1;
    fs::write(&fixture.spec.disk, &image).unwrap();
    let id = fixture.import();
    assert!(fixture.problems(&id).is_empty());
    assert!(workshop.exists(), "it may still be wanted");
    // Two interrupted imports are not kept: the older goes.
    let mut spec = fixture.spec.clone();
    spec.memory = None;
    let fixture = Fixture { spec, ..fixture };
    let later = fixture.interrupted_beside(Part::Disk, 19, &workshop);
    drop(fixture.store.begin().unwrap());
    assert!(later.exists() && !workshop.exists());
}

impl Fixture {
    /// [`Fixture::interrupted`] with another interrupted import in the store.
    fn interrupted_beside(&self, part: Part, slab: u64, other: &Path) -> PathBuf {
        let aside = self.dir.path().join("aside");
        fs::rename(other, &aside).unwrap();
        let workshop = self.interrupted(part, slab);
        fs::rename(aside, other).unwrap();
        workshop
    }
}

#[test]
fn an_import_that_fails_leaves_nothing() {
    let fixture = with_memory();
    fixture.interrupted(Part::Disk, 19);
    let written = std::cell::Cell::new(false);
    let failed = fixture.store.import(&fixture.spec, &mut |progress| {
        if progress.part == Part::Memory && !written.replace(true) {
            let ram = &fixture.spec.memory.as_ref().unwrap().ram;
            OpenOptions::new().write(true).open(ram).unwrap().set_len(4096).unwrap();
        }
    });
    assert!(
        matches!(failed, Err(StoreError::Changed { .. } | StoreError::Io { .. })),
        "{failed:?}"
    );
    assert_eq!(fs::read_dir(fixture.store.dir.join(TMP)).unwrap().count(), 0);
}

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "run by `a_killed_import_goes_on`"]
fn victim() {
    let Some(dir) = env::var_os("HOWDAH_TEST_VICTIM").map(PathBuf::from) else { return };
    let store = Store::open(&dir.join("store")).unwrap();
    let spec = ImportSpec {
        name: "tiny".into(),
        disk: dir.join("disk.img"),
        kernel: dir.join("vmlinuz"),
        initramfs: Some(dir.join("initrd.img")),
        cmdline: "console=ttyS0".into(),
        memory: None,
    };
    let slowly = &mut |_| std::thread::sleep(Duration::from_millis(40));
    store.import(&spec, slowly).unwrap();
}

#[test]
fn a_killed_import_goes_on() {
    let fixture = Fixture::new(&long_disk());
    let mut victim = Command::new(env::current_exe().unwrap())
        .args(["store::tests::resume::victim", "--exact", "--ignored"])
        .env("HOWDAH_TEST_VICTIM", fixture.dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let recorded = || {
        let ledger = fixture.workshop().map(|dir| dir.join("ledger"));
        ledger.and_then(|path| fs::metadata(path).ok()).is_some_and(|meta| meta.len() > 2000)
    };
    while !recorded() {
        assert!(started.elapsed() < Duration::from_secs(30), "the victim does nothing");
        std::thread::sleep(Duration::from_millis(2));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    let half = fs::metadata(fixture.workshop().unwrap().join("disk.raw")).unwrap().ino();
    let base = fixture.base();
    assert_eq!(base.disk_file().metadata().unwrap().ino(), half, "it began anew");
    assert!(fixture.problems(&base.id()).is_empty());
    assert_eq!(fs::read_dir(fixture.store.dir.join(TMP)).unwrap().count(), 0);
}

#[test]
fn only_one_import_has_a_ledger() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("ledger");
    let parts = [(Part::Disk, 1 << 20)];
    let first = Ledger::open(&path, &[1; 32], &parts).unwrap().unwrap();
    assert!(Ledger::open(&path, &[1; 32], &parts).unwrap().is_none());
    drop(first);
    assert!(Ledger::open(&path, &[1; 32], &parts).unwrap().is_some());
    assert!(Ledger::open(&dir.path().join("gone/ledger"), &[1; 32], &parts).unwrap().is_none());
}

/// A ledger of three slabs of a disk of four, and what they are.
fn small_ledger(dir: &Path) -> (PathBuf, Vec<Vec<Entry>>) {
    let path = dir.join("ledger");
    let data = File::create(dir.join("data")).unwrap();
    let mut ledger =
        Ledger::open(&path, &[1; 32], &[(Part::Disk, 4 * SLAB_BYTES)]).unwrap().unwrap();
    let slabs: Vec<Vec<Entry>> = [0, 1, 3]
        .map(|slab: u64| {
            let place = |n| Place { part: Part::Disk, index: slab * 8 + n };
            (0..5)
                .map(|n| Entry::new(ChunkHash::of(&chunk_of((slab + n) as u8)), place(n)))
                .collect()
        })
        .into();
    for (number, entries) in [0, 1, 3].into_iter().zip(&slabs) {
        let slab = Slab { number, entries: entries.clone(), known: false };
        ledger.add(Part::Disk, slab, &data).unwrap();
    }
    ledger.write_pending().unwrap();
    (path, slabs)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever a crash or a bad disk makes of a ledger, what is believed of it was written to it.
    #[test]
    fn a_damaged_ledger_is_believed_up_to_the_damage(
        at in 0usize..900,
        noise in proptest::collection::vec(any::<u8>(), 1..60),
        cut in proptest::option::of(0usize..900),
        shorter in any::<bool>(),
    ) {
        let dir = TempDir::new().unwrap();
        let (path, slabs) = small_ledger(dir.path());
        let mut bytes = fs::read(&path).unwrap();
        let end = (at + noise.len()).min(bytes.len());
        let at = at.min(end);
        bytes[at..end].copy_from_slice(&noise[..end - at]);
        bytes.truncate(cut.unwrap_or(bytes.len()));
        fs::write(&path, &bytes).unwrap();
        // Of a disk with fewer slabs it is believed even less.
        let disk_bytes = if shorter { SLAB_BYTES + 512 } else { 4 * SLAB_BYTES };
        let ledger = Ledger::open(&path, &[1; 32], &[(Part::Disk, disk_bytes)]).unwrap().unwrap();
        let known = ledger.known(Part::Disk).unwrap();
        for (slab, entries) in [0, 1, 3].into_iter().zip(&slabs) {
            if let Some(found) = known.entries(slab) {
                prop_assert_eq!(&found, entries);
                prop_assert!(!shorter || slab == 0);
            }
        }
        prop_assert!(!known.has(2));
        let total: usize = ledger.with_runs(|runs| runs.iter().map(|run| run.len()).sum()).unwrap();
        prop_assert!(total <= 15);
    }

    /// Any bytes at all, as records with a good checksum too.
    #[test]
    fn a_foreign_ledger_is_no_harm(
        kind in 0u8..3,
        part in 0u8..6,
        count in 0u32..12,
        slab in prop_oneof![0u64..4, any::<u64>()],
        body in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let dir = TempDir::new().unwrap();
        let (path, _) = small_ledger(dir.path());
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(HEADER_BYTES);
        let mut fields = vec![kind, part, 0, 0];
        fields.extend(count.to_le_bytes());
        fields.extend(slab.to_le_bytes());
        let mut body = body;
        body.resize(body.len().max(count as usize * 40), 0);
        let checked = [&fields[..], &body[..count as usize * 40]].concat();
        bytes.extend(&fields);
        bytes.extend(blake3::hash(&checked).as_bytes());
        bytes.extend(&body);
        fs::write(&path, &bytes).unwrap();
        let parts = [(Part::Disk, 4 * SLAB_BYTES)];
        let ledger = Ledger::open(&path, &[1; 32], &parts).unwrap().unwrap();
        for part in ledger.parts().collect::<Vec<_>>() {
            prop_assert_eq!(part, Part::Disk);
            let known = ledger.known(part).unwrap();
            for slab in 0..4 {
                for entry in known.entries(slab).unwrap_or_default() {
                    prop_assert!(entry.index() / 8 == slab);
                }
            }
        }
    }
}
