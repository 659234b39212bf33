//! Creating and opening an overlay.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use nix::fcntl::{FallocateFlags, FlockArg, fallocate};

use super::{
    CHUNK_BYTES, ChunkState, Overlay, OverlayError,
    map::{HEADER_BYTES, MapHeader, StateMap, padded_len},
};
use crate::{
    base::Base,
    files::{self, Lock},
};

/// The data file's name in a VM's directory.
pub const DATA_FILE: &str = "disk.data";
/// The map's name in a VM's directory.
pub const MAP_FILE: &str = "disk.map";

impl Overlay {
    /// Makes an overlay in `dir`, equal to the base disk, and opens it.
    pub fn create(dir: &Path, base: Arc<Base>) -> Result<Self, OverlayError> {
        let chunks = base.disk_chunks();
        let states = padded_len(chunks);
        let header = MapHeader { base: base.id(), disk_bytes: base.disk_bytes() };
        let map_file = place_map(dir, &header, states)?;
        // The map is there and locked, so this process alone makes the data file. A crash between
        // the two leaves a map without `Data`, which `open` completes.
        let data = make_data(dir, chunks)?;
        files::sync_dir(dir).map_err(io_error("syncing", dir))?;
        Ok(Self::assemble(dir, base, data, map_file, StateMap::new(chunks, vec![0; states])))
    }

    /// Opens the overlay in `dir`, made by [`Overlay::create`] over the same base, with all that it
    /// holds: for a VM that starts again, and as the disk with which a VM's way back begins.
    pub fn open(dir: &Path, base: Arc<Base>) -> Result<Self, OverlayError> {
        let map_path = dir.join(MAP_FILE);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&map_path)
            .map_err(io_error("opening", &map_path))?;
        let map_file = lock(dir, &map_path, file)?;
        let states = read_map(&map_path, &map_file, &base)?;
        let chunks = base.disk_chunks();
        let data = open_data(dir, base.disk_bytes(), chunks, &states)?;
        let overlay = Self::assemble(dir, base, data, map_file, StateMap::new(chunks, states));
        overlay.reclaim()?;
        Ok(overlay)
    }

    fn assemble(dir: &Path, base: Arc<Base>, data: File, map_file: Lock, map: StateMap) -> Self {
        Self {
            disk_bytes: base.disk_bytes(),
            base,
            dir: dir.to_owned(),
            data,
            map_file,
            map,
            flush_turn: Mutex::new(()),
            flush_running: AtomicBool::new(false),
            sync_lost: AtomicBool::new(false),
        }
    }

    /// Punches what the data file holds of chunks that are not `Data`: left by resets and by
    /// writes that were never flushed. The map is made durable first: a state that a power loss
    /// could still take back must not name a hole.
    fn reclaim(&self) -> Result<(), OverlayError> {
        self.map_file.sync_data().map_err(self.io("syncing", MAP_FILE))?;
        let len = self.chunks() * CHUNK_BYTES;
        let mut at = 0;
        while let Some((start, end)) = files::data_extent(&self.data, at, len) {
            let (mut chunk, last) = (start / CHUNK_BYTES, end.div_ceil(CHUNK_BYTES));
            while chunk < last {
                let (state, run) = self.state_run(chunk, last - chunk);
                if state != ChunkState::Data {
                    self.punch(chunk, run);
                }
                chunk += run;
            }
            at = end;
        }
        Ok(())
    }
}

/// Puts a complete, locked map in place, unless there is one already.
fn place_map(dir: &Path, header: &MapHeader, states: usize) -> Result<Lock, OverlayError> {
    /// Tells apart the attempts of one process.
    static ATTEMPT: AtomicU64 = AtomicU64::new(0);
    let attempt = ATTEMPT.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(MAP_FILE);
    let new = dir.join(format!(".{MAP_FILE}.{}-{attempt}", std::process::id()));
    // Of a process with our number that crashed here: it is gone, and so is its lock.
    let _ = fs::remove_file(&new);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&new)
        .map_err(io_error("creating", &new))?;
    let placed = (|| {
        file.write_all_at(&header.encode(), 0).map_err(io_error("writing", &new))?;
        let bytes = (HEADER_BYTES + states) as u64;
        file.set_len(bytes).map_err(io_error("growing", &new))?;
        // Reserved, where the file system can, so that a flush does not find the host's disk full.
        let _ = fallocate(&file, FallocateFlags::empty(), 0, bytes as i64);
        file.sync_all().map_err(io_error("syncing", &new))?;
        let locked = lock(dir, &new, file)?;
        match fs::hard_link(&new, &path) {
            Ok(()) => Ok(locked),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(OverlayError::Exists { dir: dir.to_owned() })
            }
            Err(error) => Err(io_error("creating", &path)(error)),
        }
    })();
    let _ = fs::remove_file(&new);
    placed
}

/// Makes an empty data file; what an unfinished creation left there is dropped.
fn make_data(dir: &Path, chunks: u64) -> Result<File, OverlayError> {
    let path = dir.join(DATA_FILE);
    let data = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .map_err(io_error("creating", &path))?;
    data.set_len(chunks * CHUNK_BYTES).map_err(io_error("growing", &path))?;
    data.sync_all().map_err(io_error("syncing", &path))?;
    Ok(data)
}

/// Opens the data file and checks its length.
fn open_data(
    dir: &Path,
    disk_bytes: u64,
    chunks: u64,
    states: &[u8],
) -> Result<File, OverlayError> {
    let path = dir.join(DATA_FILE);
    let expected = chunks * CHUNK_BYTES;
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    let found = match &opened {
        Ok(data) => data.metadata().map_err(io_error("reading the length of", &path))?.len(),
        Err(_) => 0,
    };
    if found == expected {
        return opened.map_err(io_error("opening", &path));
    }
    if found == 0 && !states.contains(&(ChunkState::Data as u8)) {
        // A crash in `create`, right after the map was placed.
        return make_data(dir, chunks);
    }
    opened.map_err(io_error("opening", &path))?;
    Err(OverlayError::Length { path, found, expected, disk_bytes })
}

/// Reads and checks the whole map; returns the states.
fn read_map(path: &Path, file: &File, base: &Base) -> Result<Vec<u8>, OverlayError> {
    let header_error = |source| OverlayError::Header { path: path.to_owned(), source };
    let disk_bytes = base.disk_bytes();
    let chunks = base.disk_chunks();
    let mut states = vec![0; padded_len(chunks)];
    let expected = (HEADER_BYTES + states.len()) as u64;
    let found = file.metadata().map_err(io_error("reading the length of", path))?.len();
    let wrong_length =
        || OverlayError::Length { path: path.to_owned(), found, expected, disk_bytes };
    if found < HEADER_BYTES as u64 {
        return Err(wrong_length());
    }
    let mut page = [0; HEADER_BYTES];
    file.read_exact_at(&mut page, 0).map_err(io_error("reading", path))?;
    let header = MapHeader::decode(&page).map_err(header_error)?;
    if header.base != base.id() {
        let (found, expected) = (header.base, base.id());
        return Err(OverlayError::WrongBase { path: path.to_owned(), found, expected });
    }
    if found != expected || header.disk_bytes != disk_bytes {
        return Err(wrong_length());
    }
    file.read_exact_at(&mut states, HEADER_BYTES as u64).map_err(io_error("reading", path))?;
    // What fills up the last page is zero, as a chunk in state base is.
    let bad = states.iter().enumerate().find(|(chunk, byte)| {
        let known = ChunkState::from_byte(**byte).is_some();
        !known || (**byte != 0 && *chunk as u64 >= chunks)
    });
    if let Some((chunk, &found)) = bad {
        let (chunk, offset) = (chunk as u64, (HEADER_BYTES + chunk) as u64);
        return Err(OverlayError::State { path: path.to_owned(), offset, chunk, found });
    }
    Ok(states)
}

/// Locks the map for this process, or says who has it.
fn lock(dir: &Path, path: &Path, file: File) -> Result<Lock, OverlayError> {
    Lock::take(file, FlockArg::LockExclusiveNonblock).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => {
            OverlayError::Locked { dir: dir.to_owned(), holder: source.to_string() }
        }
        _ => io_error("locking", path)(source),
    })
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OverlayError {
    move |source| OverlayError::Io { what, path: path.to_owned(), source }
}
