//! Reads a part once: hashes it on all cores and copies it on the way.
//!
//! The part is cut into *slabs*. Workers read, copy and hash whole slabs; the caller's thread gets
//! what they found in order, for the root, and may keep it, so that a slab need not be read again
//! after a crash.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::{
    base::{Part, Place},
    chunk::{self, CHUNK_SIZE, ChunkHash},
    files,
    in_order::in_order,
    index::Entry,
    manifest::{PartRoot, RootHasher},
};

const CHUNK_BYTES: u64 = CHUNK_SIZE as u64;
/// Chunks of a slab: 64 MiB. Few in tests, so that a small file has many slabs.
pub(crate) const SLAB_CHUNKS: u64 = if cfg!(test) { 8 } else { 16 << 10 };
/// Bytes of a slab.
pub(crate) const SLAB_BYTES: u64 = SLAB_CHUNKS * CHUNK_BYTES;
/// Bytes that are read, copied and hashed as one. Small enough for a core's own cache.
const PIECE_BYTES: u64 = 512 << 10;

/// What to scan.
pub(crate) struct Scan<'a> {
    /// Which part it is.
    pub(crate) part: Part,
    /// The file to read.
    pub(crate) source: &'a File,
    /// How many bytes of it.
    pub(crate) bytes: u64,
    /// Where to copy it, if at all: a file with holes where nothing was copied yet. Chunks of
    /// zeros stay holes.
    pub(crate) copy: Option<&'a File>,
    /// Gives the entries of a slab that was scanned, and copied, before.
    pub(crate) known: Option<&'a KnownSlabs<'a>>,
}

/// The entries of slabs scanned before, in order of place.
pub(crate) type KnownSlabs<'a> = dyn Fn(u64) -> Option<Vec<Entry>> + Sync + 'a;

/// What is in one slab of a part.
pub(crate) struct Slab {
    /// Its number in the part.
    pub(crate) number: u64,
    /// An entry for each chunk that is not zero, in order of place.
    pub(crate) entries: Vec<Entry>,
    /// Whether it was not scanned but known.
    pub(crate) known: bool,
}

/// Which half of a scan failed.
#[derive(Debug)]
pub(crate) enum ScanError {
    Read(io::Error),
    Write(io::Error),
}

/// The bytes of slab `number` in a part of `bytes` bytes.
pub(crate) fn slab_range(number: u64, bytes: u64) -> Range<u64> {
    let start = number.saturating_mul(SLAB_BYTES).min(bytes);
    start..start.saturating_add(SLAB_BYTES).min(bytes)
}

/// How many slabs a part of `bytes` bytes has.
pub(crate) fn slabs(bytes: u64) -> u64 {
    bytes.div_ceil(SLAB_BYTES)
}

impl Scan<'_> {
    /// Scans it and returns the root. `take` gets every slab, in order.
    pub(crate) fn run(
        &self,
        take: &mut dyn FnMut(Slab) -> io::Result<()>,
    ) -> Result<PartRoot, ScanError> {
        // A hint: slabs are read from beginning to end, even if several at once.
        let _ = posix_fadvise(self.source, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        let mut root = RootHasher::new(self.bytes.div_ceil(CHUNK_BYTES));
        in_order(
            slabs(self.bytes),
            |number| self.slab(number),
            |slab: Result<Slab, ScanError>| {
                let slab = slab?;
                self.add_to_root(&slab, &mut root);
                take(slab).map_err(ScanError::Write)
            },
        )?;
        // A chunk less than announced would have been an error of the reader.
        root.finish().ok_or_else(|| ScanError::Read(cut_short()))
    }

    fn slab(&self, number: u64) -> Result<Slab, ScanError> {
        if let Some(entries) = self.known.and_then(|known| known(number)) {
            return Ok(Slab { number, entries, known: true });
        }
        let range = slab_range(number, self.bytes);
        let mut entries = Vec::new();
        let mut piece = Vec::new();
        let mut at = range.start;
        while let Some((start, end)) = files::data_extent(self.source, at, range.end) {
            // Extents follow the file system's blocks, pieces our chunks. An extent that begins in
            // a chunk already read is taken up where that chunk ends.
            at = (start - start % CHUNK_BYTES).max(at);
            let end = end.next_multiple_of(CHUNK_BYTES);
            while at < end {
                let len = (end - at).min(PIECE_BYTES);
                self.read_piece(at, len, &mut piece)?;
                self.hash_piece(at, &piece, &mut entries);
                at += len;
            }
        }
        Ok(Slab { number, entries, known: false })
    }

    /// Reads one piece, padded with zeros to whole chunks, and copies it.
    fn read_piece(&self, at: u64, len: u64, piece: &mut Vec<u8>) -> Result<(), ScanError> {
        let inside = self.bytes.saturating_sub(at).min(len) as usize;
        piece.resize(len as usize, 0);
        let (read, padding) = piece.split_at_mut(inside);
        self.source.read_exact_at(read, at).map_err(|error| {
            let short = error.kind() == io::ErrorKind::UnexpectedEof;
            ScanError::Read(if short { cut_short() } else { error })
        })?;
        padding.fill(0);
        match self.copy {
            Some(copy) => files::write_sparse(copy, at, read).map_err(ScanError::Write),
            None => Ok(()),
        }
    }

    fn hash_piece(&self, at: u64, piece: &[u8], entries: &mut Vec<Entry>) {
        let (chunks, _) = piece.as_chunks::<CHUNK_SIZE>();
        for (index, chunk) in (at / CHUNK_BYTES..).zip(chunks) {
            if !chunk::is_zero(chunk) {
                let place = Place { part: self.part, index };
                entries.push(Entry::new(ChunkHash::of(chunk), place));
            }
        }
    }

    fn add_to_root(&self, slab: &Slab, root: &mut RootHasher) {
        let range = slab_range(slab.number, self.bytes);
        let mut next = range.start / CHUNK_BYTES;
        for entry in &slab.entries {
            let index = entry.index();
            root.push_zeros(index.saturating_sub(next));
            root.push(entry.hash());
            next = index + 1;
        }
        root.push_zeros(range.end.div_ceil(CHUNK_BYTES).saturating_sub(next));
    }
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read")
}
