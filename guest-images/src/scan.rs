//! Reads a part once, from beginning to end: hashes it on two threads and copies it on the way.
//!
//! ```text
//!            ┌─> hasher ─┐
//! reader ────┤           ├──> collector (the caller's thread): root, entries, progress
//!   └> copy  └─> hasher ─┘
//! ```
//!
//! The reader deals pieces to the hashers in turn and the collector takes results in the same turn,
//! so they arrive in order without a table of what is missing.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use crate::{
    base::{Part, Place},
    chunk::{self, CHUNK_SIZE, ChunkHash},
    files,
    index::Entry,
    manifest::{PartRoot, RootHasher},
};

const CHUNK_BYTES: u64 = CHUNK_SIZE as u64;
/// Bytes that are read, copied and hashed as one.
const PIECE_BYTES: u64 = 1 << 20;
const HASHERS: usize = 2;
/// Pieces that may wait before and behind each hasher: bounds memory to a few MiB.
const QUEUE: usize = 4;

/// What to scan.
pub(crate) struct Scan<'a> {
    /// Which part it is.
    pub(crate) part: Part,
    /// The file to read.
    pub(crate) source: &'a File,
    /// How many bytes of it.
    pub(crate) bytes: u64,
    /// Where to copy it, if at all. Chunks of zeros become holes.
    pub(crate) copy: Option<&'a File>,
}

/// Which half of a scan failed.
#[derive(Debug)]
pub(crate) enum ScanError {
    Read(io::Error),
    Write(io::Error),
}

/// A piece of a part. Pieces follow each other without gaps.
enum Piece<T> {
    /// So many chunks of zeros.
    Hole(u64),
    /// Chunks to hash; then, in their place, their hashes: nothing for a chunk of zeros.
    Chunks(T),
}

type Hashes = Vec<Option<ChunkHash>>;

impl Scan<'_> {
    /// Scans it: appends an entry for each chunk that is not zero, in order, and returns the root.
    /// `progress` is told how many bytes are done.
    pub(crate) fn run(
        &self,
        entries: &mut Vec<Entry>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<PartRoot, ScanError> {
        thread::scope(|scope| {
            let mut to_hashers = Vec::with_capacity(HASHERS);
            let mut from_hashers = Vec::with_capacity(HASHERS);
            for _ in 0..HASHERS {
                let (to_hasher, work) = sync_channel(QUEUE);
                let (done, from_hasher) = sync_channel(QUEUE);
                scope.spawn(move || hash_pieces(&work, &done));
                to_hashers.push(to_hasher);
                from_hashers.push(from_hasher);
            }
            let reader = scope.spawn(move || self.read_pieces(&to_hashers));
            let root = self.collect(&from_hashers, entries, progress);
            match reader.join() {
                // A piece less than announced would have been an error of the reader.
                Ok(read) => read.and(root.ok_or_else(|| ScanError::Read(cut_short()))),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Reads all pieces in order, copies them, deals them out.
    fn read_pieces(&self, hashers: &[SyncSender<Piece<Vec<u8>>>]) -> Result<(), ScanError> {
        let mut turn = hashers.iter().cycle();
        // A hasher is gone only if the collector is, and then nobody wants more.
        let mut deal = |piece| turn.next().is_some_and(|hasher| hasher.send(piece).is_ok());
        let mut at = 0;
        while at < self.bytes {
            let (start, end) =
                files::data_extent(self.source, at, self.bytes).unwrap_or((self.bytes, self.bytes));
            // Extents follow the file system's blocks, pieces our chunks. An extent that begins in
            // a chunk already read is taken up where that chunk ends.
            let start = if start == self.bytes {
                start.next_multiple_of(CHUNK_BYTES)
            } else {
                (start - start % CHUNK_BYTES).max(at)
            };
            if start > at && !deal(Piece::Hole((start - at) / CHUNK_BYTES)) {
                return Ok(());
            }
            at = start;
            while at < end.min(self.bytes) {
                let len = (end.next_multiple_of(CHUNK_BYTES) - at).min(PIECE_BYTES);
                let piece = self.read_piece(at, len)?;
                if !deal(Piece::Chunks(piece)) {
                    return Ok(());
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Reads one piece, padded with zeros to whole chunks, and copies it.
    fn read_piece(&self, at: u64, len: u64) -> Result<Vec<u8>, ScanError> {
        let mut piece = vec![0; len as usize];
        let inside = (self.bytes - at).min(len) as usize;
        self.source.read_exact_at(&mut piece[..inside], at).map_err(|error| {
            let short = error.kind() == io::ErrorKind::UnexpectedEof;
            ScanError::Read(if short { cut_short() } else { error })
        })?;
        if let Some(copy) = self.copy {
            files::write_sparse(copy, at, &piece[..inside]).map_err(ScanError::Write)?;
        }
        Ok(piece)
    }

    /// Takes the hashes in order.
    fn collect(
        &self,
        hashers: &[Receiver<Piece<Hashes>>],
        entries: &mut Vec<Entry>,
        progress: &mut dyn FnMut(u64),
    ) -> Option<PartRoot> {
        let mut root = RootHasher::new(self.bytes.div_ceil(CHUNK_BYTES));
        let mut index = 0;
        for hasher in hashers.iter().cycle() {
            let Ok(piece) = hasher.recv() else { break };
            match piece {
                Piece::Hole(chunks) => {
                    root.push_zeros(chunks);
                    index += chunks;
                }
                Piece::Chunks(hashes) => {
                    for hash in hashes {
                        match hash {
                            None => root.push_zeros(1),
                            Some(hash) => {
                                root.push(&hash);
                                entries.push(Entry::new(hash, Place { part: self.part, index }));
                            }
                        }
                        index += 1;
                    }
                }
            }
            progress((index * CHUNK_BYTES).min(self.bytes));
        }
        root.finish()
    }
}

fn hash_pieces(work: &Receiver<Piece<Vec<u8>>>, done: &SyncSender<Piece<Hashes>>) {
    for piece in work {
        let hashed = match piece {
            Piece::Hole(chunks) => Piece::Hole(chunks),
            Piece::Chunks(bytes) => {
                let (chunks, _) = bytes.as_chunks::<CHUNK_SIZE>();
                let hash = |chunk| (!chunk::is_zero(chunk)).then(|| ChunkHash::of(chunk));
                Piece::Chunks(chunks.iter().map(hash).collect())
            }
        };
        if done.send(hashed).is_err() {
            return;
        }
    }
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read")
}
