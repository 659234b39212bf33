//! What stays behind of a VM that was handed off, so that its way back is short.
//!
//! ```text
//! HOME/vms/NAME/
//!     visit                the state table at the handoff, then the RAM chunks it names, in its order
//!     disk.data disk.map   the disk overlay, as it was then
//!     known/EPOCH.table    state tables of VMs that arrived here: what their sources may have kept
//! ```
//!
//! A visit is a memory aid: whoever uses it hashes every chunk of it and compares it with its table,
//! and begins from the base if one is wrong. It is there only while the overlay beside it is the
//! one that it was written for: it is written last, and gone, durably, before the overlay changes.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Seek, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

use guest_images::{BaseId, CHUNK_SIZE, Chunk, ChunkHash, overlay::Overlay};
use handoff::{
    BaseView, ChunkId, Geometry, Offer, Space, StateTable, base_view::is_base_state, vm::MAX_KNOWN,
};

use crate::{
    failure::{Exit, Failure},
    home::{VmDir, sync_parent},
};

/// The visit's file in a VM's directory.
const VISIT: &str = "visit";
/// The directory of tables that came in.
const KNOWN: &str = "known";
/// Reads and writes are gathered into so many bytes.
const BUFFER_BYTES: usize = 1 << 20;
/// RAM is loaded so many chunks at a time: 8 MiB.
const LOAD_CHUNKS: usize = 2048;
/// The most threads that verify.
const MAX_CORES: usize = 8;
/// A thread for fewer chunks costs more than it saves.
const LEAST_PART: usize = 64;

/// Why a visit is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// A file of it cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The overlay is damaged.
    #[error(transparent)]
    Overlay(#[from] guest_images::overlay::OverlayError),
    /// A chunk is not what the table says.
    #[error("chunk {} of {:?} is not what it was", .0.index, .0.space)]
    Chunk(ChunkId),
    /// The machine did not take a chunk.
    #[error("{0}")]
    Vm(handoff::vm::VmError),
}

/// What a VM that moved leaves behind, as bytes on this disk; 0 if it left nothing.
pub(crate) fn kept_bytes(dir: &VmDir) -> u64 {
    let path = dir.path();
    let size = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(path.join(name)).map_or(0, |found| found.blocks().saturating_mul(512))
    };
    match path.join(VISIT).is_file() {
        true => {
            let disk = [guest_images::overlay::DATA_FILE, guest_images::overlay::MAP_FILE];
            size(VISIT) + disk.into_iter().map(size).sum::<u64>()
        }
        false => 0,
    }
}

/// Keeps RAM and disk of a paused VM that moved, unless that is more than `limit_bytes`. Returns
/// how many bytes are kept; 0 if none.
pub(crate) fn keep(
    dir: &VmDir,
    table: &StateTable,
    disk: &Overlay,
    limit_bytes: u64,
    read: &mut dyn FnMut(ChunkId, &mut Chunk) -> Result<(), handoff::vm::VmError>,
) -> Result<u64, Failure> {
    let failed = |e: io::Error| Failure::file("write", &dir.path().join(VISIT), &e);
    let other = |e: &dyn std::fmt::Display| {
        Failure::plain(Exit::Failed, format!("visit of VM {}", dir.name()), e)
    };
    let ram = ram_chunks(table);
    let bytes = (ram.len() as u64 * CHUNK_SIZE as u64)
        .saturating_add(table.len() * size_of::<ChunkHash>() as u64)
        .saturating_add(disk.allocated_bytes().map_err(|e| other(&e))?);
    if bytes > limit_bytes {
        return Ok(0);
    }
    disk.flush().map_err(|e| other(&e))?;
    write_whole(&dir.path().join(VISIT), |out| {
        table.write_to(&mut *out)?;
        let mut chunk = [0; CHUNK_SIZE];
        for &(id, _) in &ram {
            read(id, &mut chunk).map_err(io::Error::other)?;
            out.write_all(&chunk)?;
        }
        Ok(())
    })
    .map_err(failed)?;
    Ok(bytes)
}

fn ram_chunks(table: &StateTable) -> Vec<(ChunkId, ChunkHash)> {
    table.iter().filter(|(id, _)| id.space == Space::Ram).collect()
}

/// A visit that is one of those that a source remembers.
#[derive(Debug)]
pub(crate) struct Visit {
    table: StateTable,
    ram: BufReader<File>,
    path: PathBuf,
}

impl Visit {
    /// The visit of `dir`, if `offer` speaks of it.
    pub(crate) fn find(dir: &VmDir, offer: &Offer) -> Option<Self> {
        if offer.known.is_empty() {
            return None;
        }
        let path = dir.path().join(VISIT);
        let file = File::open(&path).ok()?;
        let mut ram = BufReader::with_capacity(BUFFER_BYTES, file);
        match StateTable::read_from(&mut ram, offer.base, offer.geometry) {
            Ok(table) => {
                let known = offer.known.contains(&table.current_root());
                known.then_some(Self { table, ram, path })
            }
            Err(e) => {
                tracing::warn!("{}: {e}", path.display());
                None
            }
        }
    }

    /// Checks the disk, chunk by chunk, against the table.
    pub(crate) fn check_disk(&self, disk: &Overlay) -> Result<(), Unusable> {
        let said = self.table.iter().filter(|(id, _)| id.space == Space::Disk);
        let ids: BTreeSet<u64> = said.map(|(id, _)| id.index).chain(disk.changed()).collect();
        let ids: Vec<_> = ids.into_iter().collect();
        on_all_cores(&mut vec![(); ids.len()], |first, slots| {
            let base: &dyn BaseView = &**disk.base();
            let mut chunk = [0; CHUNK_SIZE];
            for &index in ids.iter().skip(first).take(slots.len()) {
                let id = ChunkId { space: Space::Disk, index };
                disk.read_chunk(index, &mut chunk)?;
                let right = match self.table.get(id) {
                    Some(hash) => ChunkHash::of(&chunk) == hash,
                    None => is_base_state(base, id, &chunk)?,
                };
                if !right {
                    return Err(Unusable::Chunk(id));
                }
            }
            Ok(())
        })
    }

    /// Takes the visit out of the directory, durably: what happens to the overlay from here on
    /// makes it a thing of the past.
    pub(crate) fn consume(&self) -> io::Result<()> {
        fs::remove_file(&self.path)?;
        sync_parent(&self.path)
    }

    /// Gives every RAM chunk, once it is checked, to `write`; the table of all that is there then.
    pub(crate) fn load_ram(
        mut self,
        mut write: impl FnMut(ChunkId, &Chunk) -> Result<(), handoff::vm::VmError>,
    ) -> Result<StateTable, Unusable> {
        let mut at = self.ram.stream_position()?;
        let file = self.ram.into_inner();
        let mut chunks = Vec::new();
        for part in ram_chunks(&self.table).chunks(LOAD_CHUNKS) {
            chunks.resize(part.len(), [0; CHUNK_SIZE]);
            on_all_cores(&mut chunks, |first, into| {
                file.read_exact_at(into.as_flattened_mut(), at + (first * CHUNK_SIZE) as u64)?;
                let wrong = part
                    .iter()
                    .skip(first)
                    .zip(into)
                    .find(|((_, hash), chunk)| ChunkHash::of(chunk) != *hash);
                wrong.map_or(Ok(()), |((id, _), _)| Err(Unusable::Chunk(*id)))
            })?;
            for ((id, _), chunk) in part.iter().zip(&chunks) {
                write(*id, chunk).map_err(Unusable::Vm)?;
            }
            at += (part.len() * CHUNK_SIZE) as u64;
        }
        Ok(self.table)
    }
}

/// Does `work` on every part of `items`, as many at once as there are cores; it is told where its
/// part begins.
fn on_all_cores<T: Send>(
    items: &mut [T],
    work: impl Fn(usize, &mut [T]) -> Result<(), Unusable> + Sync,
) -> Result<(), Unusable> {
    let cores = thread::available_parallelism().map_or(1, usize::from).min(MAX_CORES);
    let each = items.len().div_ceil(cores).max(LEAST_PART);
    thread::scope(|scope| {
        let work = &work;
        let parts = items.chunks_mut(each).enumerate();
        let running: Vec<_> =
            parts.map(|(n, part)| scope.spawn(move || work(n * each, part))).collect();
        // The scope waits for those behind the first that found something wrong.
        running.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked),
        })
    })
}

/// Removes the visit of a VM, durably, if there is one, and what a crash left of one.
pub(crate) fn forget(dir: &VmDir) -> Result<(), Failure> {
    let path = dir.path().join(VISIT);
    let _ = fs::remove_file(unfinished(&path));
    let removed = match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_parent(&path),
    };
    removed.map_err(|e| Failure::file("remove", &path, &e))
}

/// Remembers the state in which a VM arrived: its source may have kept it. Older ones go.
pub(crate) fn remember(dir: &VmDir, epoch: u64, table: &StateTable) -> Result<(), Failure> {
    let known = dir.path().join(KNOWN);
    let path = known.join(format!("{epoch}.table"));
    let written = match fs::create_dir(&known) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => write_whole(&path, |out| table.write_to(out)),
    };
    written.map_err(|e| Failure::file("write", &path, &e))?;
    for (_, old) in tables(dir).into_iter().skip(MAX_KNOWN) {
        fs::remove_file(&old).map_err(|e| Failure::file("remove", &old, &e))?;
    }
    Ok(())
}

/// The states that peers may have kept, the newest first. One that cannot be read is passed over.
pub(crate) fn known(dir: &VmDir, base: BaseId, geometry: Geometry) -> Vec<StateTable> {
    let read = |path: &Path| {
        let file = File::open(path).map_err(|e| e.to_string())?;
        let from = BufReader::with_capacity(BUFFER_BYTES, file);
        StateTable::read_from(from, base, geometry).map_err(|e| e.to_string())
    };
    let tables = tables(dir).into_iter().take(MAX_KNOWN);
    tables
        .filter_map(|(_, path)| {
            read(&path).inspect_err(|e| tracing::warn!("{}: {e}", path.display())).ok()
        })
        .collect()
}

/// Tables with the epochs in which they came, the newest first.
fn tables(dir: &VmDir) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(dir.path().join(KNOWN)) else { return Vec::new() };
    let epoch = |path: &Path| path.file_name()?.to_str()?.strip_suffix(".table")?.parse().ok();
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<_> = paths.filter_map(|path| Some((epoch(&path)?, path))).collect();
    found.sort_by(|a: &(u64, _), b| b.cmp(a));
    found
}

/// The name of a file while it is written.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Writes a file that is there as a whole, durably, or not at all.
fn write_whole(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = unfinished(path);
    let written = (|| {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, &file);
        content(&mut out)?;
        out.flush()?;
        drop(out);
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_parent(path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use guest_images::{
        Base,
        store::{ImportSpec, Store},
    };

    use super::*;
    use crate::home::Home;

    const GEOMETRY: Geometry = Geometry { ram_chunks: 64, disk_chunks: 3 };

    struct Bench {
        _root: tempfile::TempDir,
        dir: VmDir,
        base: Arc<Base>,
        disk: Option<Overlay>,
        table: StateTable,
    }

    fn ram(index: u64) -> ChunkId {
        ChunkId { space: Space::Ram, index }
    }

    /// What the guest has in a RAM chunk.
    fn content(id: ChunkId) -> Chunk {
        [id.index as u8 + 1; CHUNK_SIZE]
    }

    /// A VM with three chunks of RAM and two of disk that are not its base's: one written, one zero.
    fn bench() -> Bench {
        let root = tempfile::tempdir().unwrap();
        let (disk, kernel) = (root.path().join("disk.raw"), root.path().join("kernel"));
        fs::write(&disk, [1; 3 * CHUNK_SIZE]).unwrap();
        let mut image = vec![0; 16384];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x1f1] = 4;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        fs::write(&kernel, image).unwrap();
        let store = Store::open(&root.path().join("store")).unwrap();
        let spec = ImportSpec {
            name: "tiny".into(),
            disk,
            kernel,
            initramfs: None,
            cmdline: String::new(),
            memory: None,
        };
        let id = store.import(&spec, &mut |_| {}).unwrap();
        let base = Arc::new(store.get_id(&id).unwrap());
        let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        let disk = Overlay::create(dir.path(), Arc::clone(&base)).unwrap();
        let mut table = StateTable::new(id, GEOMETRY);
        for id in [3, 4, 60].map(ram) {
            table.set(id, ChunkHash::of(&content(id)));
        }
        disk.write_chunk(0, &[9; CHUNK_SIZE]).unwrap();
        disk.zero_chunk(2).unwrap();
        for (index, content) in [(0, [9; CHUNK_SIZE]), (2, [0; CHUNK_SIZE])] {
            table.set(ChunkId { space: Space::Disk, index }, ChunkHash::of(&content));
        }
        Bench { _root: root, dir, base, disk: Some(disk), table }
    }

    impl Bench {
        fn keep(&mut self, limit: u64) -> u64 {
            let read = &mut |id, into: &mut Chunk| {
                *into = content(id);
                Ok(())
            };
            let disk = self.disk.as_ref().unwrap();
            let kept = keep(&self.dir, &self.table, disk, limit, read).unwrap();
            self.disk = None;
            kept
        }

        fn offer(&self) -> Offer {
            Offer {
                vm_name: "a".into(),
                base: self.base.id(),
                geometry: GEOMETRY,
                changed_disk_chunks: 0,
                machine: Vec::new(),
                also: Vec::new(),
                known: vec![handoff::StateRoot([1; 32]), self.table.current_root()],
            }
        }

        fn find(&self) -> Option<Visit> {
            Visit::find(&self.dir, &self.offer())
        }

        fn disk(&self) -> Overlay {
            Overlay::open(self.dir.path(), Arc::clone(&self.base)).unwrap()
        }
    }

    #[test]
    fn what_is_kept_comes_back() {
        let mut bench = bench();
        let kept = bench.keep(1 << 20);
        assert!(kept >= 4 * CHUNK_SIZE as u64, "{kept}");
        assert!(kept_bytes(&bench.dir) >= 3 * CHUNK_SIZE as u64);
        let stranger = Offer { known: vec![handoff::StateRoot([1; 32])], ..bench.offer() };
        assert!(Visit::find(&bench.dir, &stranger).is_none());
        let visit = bench.find().unwrap();
        visit.check_disk(&bench.disk()).unwrap();
        visit.consume().unwrap();
        assert!(bench.find().is_none());
        let mut loaded = Vec::new();
        let table = visit
            .load_ram(|id, chunk| {
                assert_eq!(*chunk, content(id));
                loaded.push(id.index);
                Ok(())
            })
            .unwrap();
        assert_eq!(loaded, [3, 4, 60]);
        assert_eq!(table.current_root(), bench.table.current_root());
        assert_eq!(kept_bytes(&bench.dir), 0);
    }

    #[test]
    fn what_is_too_much_is_not_kept() {
        let mut bench = bench();
        assert_eq!(bench.keep(3 * CHUNK_SIZE as u64), 0);
        assert!(bench.find().is_none());
        assert_eq!(kept_bytes(&bench.dir), 0);
    }

    #[test]
    fn torn_and_altered_visits_are_never_used() {
        let mut bench = bench();
        bench.keep(1 << 20);
        let path = bench.dir.path().join(VISIT);
        let whole = fs::read(&path).unwrap();
        let useful = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            bench.find().is_some_and(|visit| visit.load_ram(|_, _| Ok(())).is_ok())
        };
        assert!(useful(&whole));
        for cut in [0, 1, 12, 50, 100, whole.len() / 2, whole.len() - 1] {
            assert!(!useful(&whole[..cut]), "cut at {cut}");
        }
        for at in [0, 9, 30, 60, 100, whole.len() - 2 * CHUNK_SIZE, whole.len() - 1] {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            assert!(!useful(&altered), "altered at {at}");
        }
    }

    #[test]
    fn a_disk_that_moved_on_is_noticed() {
        for change in [0, 1, 2] {
            let mut bench = bench();
            bench.keep(1 << 20);
            let disk = bench.disk();
            disk.write_chunk(change, &[5; CHUNK_SIZE]).unwrap();
            let found = bench.find().unwrap().check_disk(&disk).unwrap_err();
            assert!(matches!(found, Unusable::Chunk(id) if id.index == change), "{found}");
            disk.reset_chunk(change).unwrap();
            assert_eq!(bench.find().unwrap().check_disk(&disk).is_ok(), change == 1);
        }
    }

    #[test]
    fn a_disk_that_is_gone_takes_its_visit_along() {
        let mut bench = bench();
        bench.keep(1 << 20);
        bench.dir.remove_disk().unwrap();
        assert!(bench.find().is_none() && kept_bytes(&bench.dir) == 0);
        // A crash left half of one, and nothing that could be taken for a whole one.
        fs::write(bench.dir.path().join("visit.new"), b"howdah/t").unwrap();
        assert!(bench.find().is_none() && kept_bytes(&bench.dir) == 0);
        bench.dir.remove_disk().unwrap();
        assert!(!bench.dir.path().join("visit.new").exists());
    }

    #[test]
    fn the_newest_states_are_remembered() {
        let bench = bench();
        for epoch in 1..=7u64 {
            let mut table = bench.table.clone();
            table.set(ram(0), ChunkHash([epoch as u8; 32]));
            remember(&bench.dir, epoch, &table).unwrap();
        }
        fs::write(bench.dir.path().join(KNOWN).join("9.table"), b"howdah/t").unwrap();
        let found = known(&bench.dir, bench.base.id(), GEOMETRY);
        let newest: Vec<_> = found.iter().map(|t| t.get(ram(0)).unwrap().0[0]).collect();
        assert_eq!(newest, [7, 6, 5]);
        let other = Geometry { ram_chunks: 65, ..GEOMETRY };
        assert!(known(&bench.dir, bench.base.id(), other).is_empty());
    }
}
