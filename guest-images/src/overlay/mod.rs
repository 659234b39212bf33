//! A VM's disk: what differs from the base disk, sparse and crash-consistent.
//!
//! Two files in the VM's directory. `disk.data` is sparse and holds chunk *i* at *i* × 4096;
//! `disk.map` says of every chunk whether it is [`ChunkState::Base`], [`ChunkState::Data`] or
//! [`ChunkState::Zero`]. The map in memory is an array of atomics and is what readers go by.
//!
//! # Order of a write
//!
//! 1. The data is written to `disk.data`: whole chunks, unless the chunk is `Data` already.
//! 2. At completion the chunk is [marked](Overlay::mark) in memory.
//! 3. The write is reported complete to the guest. Nothing is durable yet, nor need it be.
//!
//! # Order of a flush
//!
//! 1. [Take the dirty pages](Overlay::take_dirty_map) of the map. They name only data whose writes
//!    have completed.
//! 2. `fdatasync` of `disk.data`: all that those pages refer to is durable.
//! 3. Write the pages to `disk.map`.
//! 4. `fdatasync` of `disk.map`. Only now the flush is reported complete.
//!
//! Taking the pages *after* step 2 would be wrong: a write that completes between the two would be
//! named by a durable map while its data is not.
//!
//! # Why every crash window is safe
//!
//! The promise is a disk's: what was written before a completed flush is there; each sector written
//! since then holds the old or a newer content. The process may die (page cache survives) or the
//! host lose power (any subset of unsynced sectors is there) at any point:
//!
//! - *Before 3*: the map on disk is that of the last flush. A chunk that it calls `Base` or `Zero`
//!   is unchanged whatever `disk.data` holds there. One that it calls `Data` was overwritten in
//!   place, sector by sector.
//! - *Within 3 or before 4*: any subset of the new states is on disk. States are single bytes, so
//!   none is torn, and both the old and the new one of each chunk are true: the new one because 2
//!   came first, the old one as above.
//! - *A discard* punches `disk.data` at once. If the map still calls the chunk `Data`, it reads as
//!   zeros, which is the newer content. So a discard may call a chunk `Base` where that is zero.
//! - *A reset to base* must not punch: a `Data` state on disk would then name zeros, which the
//!   chunk never held. The space is given back when the overlay is opened next, once the map is
//!   durable.
//! - *A partial write to a chunk that is not `Data`* writes the whole chunk, so that step 3 never
//!   uncovers what `disk.data` held there before.
//! - *Creating*: the map appears under its name only when complete (link of a finished file);
//!   without any `Data` state the data file's content does not matter.
//!
//! A failed `fdatasync` is final: the kernel reports lost writes once and forgets them, so a later
//! success would prove nothing. From then on every flush fails until the overlay is opened anew.
//!
//! # Threads
//!
//! One writer at a time (the block device, or the engine that receives), any number of readers. A
//! reader that races with the writer may see a chunk half old, half new; dirty tracking makes the
//! engine read it again. Across processes a lock on `disk.map` keeps a second writer out.

mod batched;
mod export;
mod flush;
mod map;
mod open;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::fcntl::{FallocateFlags, fallocate};

pub use self::{
    batched::{ChunkIo, Means},
    flush::DirtyMap,
    map::{ChunkState, HeaderError, MAP_VERSION, MapPage},
    open::{DATA_FILE, MAP_FILE},
};
use crate::{
    base::{Base, BaseId},
    chunk::{CHUNK_SIZE, Chunk},
    files::Lock,
};

const CHUNK_BYTES: u64 = CHUNK_SIZE as u64;

/// What can go wrong with an overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The operating system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// Another process writes to this disk.
    #[error("the disk in {dir} is {holder}: stop that VM first")]
    Locked {
        /// The VM's directory.
        dir: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// There is an overlay already.
    #[error("{dir} has a disk already; nothing was changed")]
    Exists {
        /// The VM's directory.
        dir: PathBuf,
    },
    /// The map's header is none.
    #[error("{path}: {source}")]
    Header {
        /// The map.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// The overlay belongs to another base.
    #[error(
        "{path} is the map of a disk over base {found}, not {expected}: open it with the base it was made for"
    )]
    WrongBase {
        /// The map.
        path: PathBuf,
        /// The base in the map.
        found: BaseId,
        /// The base it was opened with.
        expected: BaseId,
    },
    /// A file is cut off or has grown.
    #[error(
        "{path} has {found} bytes, a disk of {disk_bytes} bytes needs {expected}: the file is truncated or foreign"
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        expected: u64,
        /// The disk's size.
        disk_bytes: u64,
    },
    /// A state that does not exist.
    #[error(
        "{path}: byte {offset} says state {found} of chunk {chunk}, which does not exist: the map is damaged"
    )]
    State {
        /// The map.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// The chunk.
        chunk: u64,
        /// The byte there.
        found: u8,
    },
    /// The request reaches past the disk's end.
    #[error("bytes {offset}..+{len} lie outside a disk of {disk_bytes} bytes")]
    OutOfRange {
        /// Where it begins.
        offset: u64,
        /// Its length.
        len: u64,
        /// The disk's size.
        disk_bytes: u64,
    },
    /// The padding behind the disk's last sector is not zero.
    #[error("chunk {chunk} has data behind the disk's end at byte {disk_bytes}")]
    Padding {
        /// The last chunk.
        chunk: u64,
        /// The disk's size.
        disk_bytes: u64,
    },
    /// The caller began a flush while another was under way.
    #[error("another flush of this disk is under way")]
    FlushRunning,
    /// An earlier `fdatasync` failed.
    #[error(
        "an earlier sync of {path} failed: writes since the last good flush may be lost; stop the VM and open its disk anew"
    )]
    SyncLost {
        /// The data file.
        path: PathBuf,
    },
}

impl From<OverlayError> for io::Error {
    fn from(error: OverlayError) -> Self {
        let kind = match &error {
            OverlayError::Io { source, .. } => source.kind(),
            OverlayError::OutOfRange { .. } | OverlayError::Padding { .. } => {
                io::ErrorKind::InvalidInput
            }
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// A copy-on-write disk over a base disk. See the [module](self) for its contract.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<Base>,
    dir: PathBuf,
    disk_bytes: u64,
    data: File,
    map_file: Lock,
    map: map::StateMap,
    /// Held by a synchronous flush, so that two of them queue up.
    flush_turn: Mutex<()>,
    /// Pages are taken and not yet written or given back.
    flush_running: AtomicBool,
    /// An `fdatasync` failed.
    sync_lost: AtomicBool,
}

impl Overlay {
    /// The base under this disk.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// The disk's length in bytes: a multiple of 512.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// How many chunks the disk has; the last may reach past its end.
    pub fn chunks(&self) -> u64 {
        self.map.chunks()
    }

    /// Where a chunk's present content is. A chunk outside the disk counts as base.
    pub fn state(&self, chunk: u64) -> ChunkState {
        self.map.get(chunk)
    }

    /// The state of `chunk` and how many chunks from there, at most `limit`, share it: what one
    /// I/O can cover. Zero chunks outside the disk.
    pub fn state_run(&self, chunk: u64, limit: u64) -> (ChunkState, u64) {
        let state = self.state(chunk);
        let end = chunk.saturating_add(limit).min(self.chunks());
        let length = (chunk..end).take_while(|&next| self.state(next) == state).count();
        (state, length as u64)
    }

    /// Sets a chunk's state, after an asynchronous write of it has completed. `false`, and nothing
    /// done, for a chunk outside the disk.
    pub fn mark(&self, chunk: u64, state: ChunkState) -> bool {
        self.map.set(chunk, state)
    }

    /// Copies one chunk's present content. Padding behind the disk's end is zero.
    pub fn read_chunk(&self, chunk: u64, into: &mut Chunk) -> Result<(), OverlayError> {
        let offset = self.chunk_offset(chunk)?;
        self.read_state(self.state(chunk), offset, into)
    }

    /// Writes one whole chunk. Bytes behind the disk's end must be zero.
    pub fn write_chunk(&self, chunk: u64, content: &Chunk) -> Result<(), OverlayError> {
        let offset = self.check_content(chunk, content)?;
        self.write_data(offset, content)?;
        self.mark(chunk, ChunkState::Data);
        Ok(())
    }

    /// Whether a chunk may hold this; gives its place in the data file.
    fn check_content(&self, chunk: u64, content: &Chunk) -> Result<u64, OverlayError> {
        let offset = self.chunk_offset(chunk)?;
        let inside = (self.disk_bytes - offset).min(CHUNK_BYTES) as usize;
        if content[inside..].iter().any(|byte| *byte != 0) {
            return Err(OverlayError::Padding { chunk, disk_bytes: self.disk_bytes });
        }
        Ok(offset)
    }

    /// Makes one chunk zero and gives its space back.
    pub fn zero_chunk(&self, chunk: u64) -> Result<(), OverlayError> {
        self.zero_chunks(chunk, 1)
    }

    /// Makes `count` chunks zero and gives their space back: a discard.
    pub fn zero_chunks(&self, first: u64, count: u64) -> Result<(), OverlayError> {
        let end = first.checked_add(count).filter(|end| *end <= self.chunks());
        let Some(end) = end else {
            let (offset, len) =
                (first.saturating_mul(CHUNK_BYTES), count.saturating_mul(CHUNK_BYTES));
            return Err(OverlayError::OutOfRange { offset, len, disk_bytes: self.disk_bytes });
        };
        (first..end).for_each(|chunk| {
            self.mark(chunk, ChunkState::Zero);
        });
        self.punch(first, count);
        Ok(())
    }

    /// Makes one chunk equal to the base again. Its space is given back at the next open.
    pub fn reset_chunk(&self, chunk: u64) -> Result<(), OverlayError> {
        self.chunk_offset(chunk)?;
        self.mark(chunk, ChunkState::Base);
        Ok(())
    }

    /// Reads a byte range of the disk.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), OverlayError> {
        self.check_range(offset, into.len())?;
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            let chunk = at / CHUNK_BYTES;
            let within = at % CHUNK_BYTES;
            let spanned = (within + rest.len() as u64).div_ceil(CHUNK_BYTES);
            let (state, run) = self.state_run(chunk, spanned);
            // A run has at least the chunk it starts with, which is inside the disk.
            let bytes = (run * CHUNK_BYTES - within).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(bytes as usize);
            self.read_state(state, at, now)?;
            (at, rest) = (at + bytes, later);
        }
        Ok(())
    }

    /// Writes a byte range of the disk, filling up chunks that are not data yet.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), OverlayError> {
        self.check_range(offset, from.len())?;
        let (mut at, mut rest) = (offset, from);
        while !rest.is_empty() {
            let within = (at % CHUNK_BYTES) as usize;
            let (now, later) = rest.split_at((CHUNK_SIZE - within).min(rest.len()));
            self.write_in_chunk(at / CHUNK_BYTES, within, now)?;
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    /// Makes a byte range zero: whole chunks as [`Overlay::zero_chunks`] does, the ends by writing.
    pub fn zero_at(&self, offset: u64, len: u64) -> Result<(), OverlayError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.disk_bytes);
        let Some(end) = end else {
            return Err(OverlayError::OutOfRange { offset, len, disk_bytes: self.disk_bytes });
        };
        // The chunk that the disk ends in is whole when it is zeroed up to the disk's end.
        let whole_end = if end == self.disk_bytes { self.chunks() } else { end / CHUNK_BYTES };
        let whole_start = offset.div_ceil(CHUNK_BYTES);
        if whole_start >= whole_end {
            return self.write_at(offset, &vec![0; len as usize]);
        }
        let head = (whole_start * CHUNK_BYTES).min(end) - offset;
        self.write_at(offset, &vec![0; head as usize])?;
        self.zero_chunks(whole_start, whole_end - whole_start)?;
        let tail_start = (whole_end * CHUNK_BYTES).min(end);
        self.write_at(tail_start, &vec![0; (end - tail_start) as usize])
    }

    /// The chunks that are not [`ChunkState::Base`], ascending, as of when each is reached.
    pub fn changed(&self) -> impl Iterator<Item = u64> + '_ {
        self.map.changed()
    }

    /// Bytes that the overlay's files take up.
    pub fn allocated_bytes(&self) -> Result<u64, OverlayError> {
        let blocks = |file: &File, path| {
            let meta = file.metadata().map_err(self.io("reading the size of", path))?;
            Ok(meta.blocks() * 512)
        };
        Ok(blocks(&self.data, DATA_FILE)? + blocks(&self.map_file, MAP_FILE)?)
    }

    /// `disk.data`, for asynchronous I/O: chunk *i* is at *i* × 4096. Reading it is right for chunks
    /// in state [`ChunkState::Data`] only; whoever writes it [marks](Overlay::mark) afterwards.
    pub fn data_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// The base disk, read-only; it may end before this disk does, with zeros behind it.
    pub fn base_fd(&self) -> BorrowedFd<'_> {
        self.base.disk_file().as_fd()
    }

    /// `disk.map`, for the pages of a [`DirtyMap`].
    pub fn map_fd(&self) -> BorrowedFd<'_> {
        self.map_file.as_fd()
    }

    /// Writes part of one chunk.
    fn write_in_chunk(&self, chunk: u64, within: usize, part: &[u8]) -> Result<(), OverlayError> {
        let offset = chunk * CHUNK_BYTES;
        let state = self.state(chunk);
        if state == ChunkState::Data {
            return self.write_data(offset + within as u64, part);
        }
        let mut content = [0; CHUNK_SIZE];
        if part.len() < CHUNK_SIZE {
            self.read_state(state, offset, &mut content)?;
        }
        content[within..within + part.len()].copy_from_slice(part);
        self.write_data(offset, &content)?;
        self.mark(chunk, ChunkState::Data);
        Ok(())
    }

    /// Reads a range whose chunks are all in `state`.
    fn read_state(
        &self,
        state: ChunkState,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), OverlayError> {
        let read = match state {
            ChunkState::Zero => {
                into.fill(0);
                Ok(())
            }
            ChunkState::Data => self.data.read_exact_at(into, offset),
            ChunkState::Base => self.base.read_disk_at(offset, into),
        };
        read.map_err(|source| self.read_failed(state, source))
    }

    /// A read of chunks in `state` failed.
    fn read_failed(&self, state: ChunkState, source: io::Error) -> OverlayError {
        let path = match state {
            ChunkState::Base => self.base.dir().join("disk.raw"),
            ChunkState::Data | ChunkState::Zero => self.dir.join(DATA_FILE),
        };
        OverlayError::Io { what: "reading", path, source }
    }

    fn write_data(&self, offset: u64, bytes: &[u8]) -> Result<(), OverlayError> {
        self.data.write_all_at(bytes, offset).map_err(self.io("writing", DATA_FILE))
    }

    /// Gives the space of chunks back, as far as the file system can: the map counts, not the hole.
    fn punch(&self, first: u64, count: u64) {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = ((first * CHUNK_BYTES) as i64, (count * CHUNK_BYTES) as i64);
        if len > 0
            && let Err(error) = fallocate(&self.data, mode, offset, len)
        {
            tracing::debug!(%error, first, count, "space of zeroed chunks is not given back");
        }
    }

    fn chunk_offset(&self, chunk: u64) -> Result<u64, OverlayError> {
        if chunk < self.chunks() {
            return Ok(chunk * CHUNK_BYTES);
        }
        let offset = chunk.saturating_mul(CHUNK_BYTES);
        Err(OverlayError::OutOfRange { offset, len: CHUNK_BYTES, disk_bytes: self.disk_bytes })
    }

    fn check_range(&self, offset: u64, len: usize) -> Result<(), OverlayError> {
        let len = len as u64;
        match offset.checked_add(len) {
            Some(end) if end <= self.disk_bytes => Ok(()),
            _ => Err(OverlayError::OutOfRange { offset, len, disk_bytes: self.disk_bytes }),
        }
    }

    /// Wraps an I/O error with what was done to which of the overlay's files.
    fn io(
        &self,
        what: &'static str,
        file: &'static str,
    ) -> impl FnOnce(io::Error) -> OverlayError + '_ {
        move |source| OverlayError::Io { what, path: self.dir.join(file), source }
    }

    fn check_sync(&self) -> Result<(), OverlayError> {
        if self.sync_lost.load(Ordering::Acquire) {
            return Err(OverlayError::SyncLost { path: self.dir.join(DATA_FILE) });
        }
        Ok(())
    }
}
