//! A part of an open base: its file, and the file mapped.

use std::{fs::File, path::Path};

use memmap2::{Mmap, MmapOptions};

use crate::{
    base::BaseError,
    chunk::{CHUNK_SIZE, Chunk},
};

/// A part's file, open and mapped for reading.
///
/// Reading a chunk through the map costs no system call and no copy. What it costs instead: a
/// file that someone truncates *while it is mapped*, against its mode and its store's rules, or a
/// disk that fails to read, makes the reader fault (SIGBUS) where `pread` would have returned an
/// error. The length is checked when the part is opened, so a file cut short before that is an
/// error with its name. ADR 0008 argues why a fault is the right price.
#[derive(Debug)]
pub(crate) struct MappedPart {
    file: File,
    map: Mmap,
}

impl MappedPart {
    /// Opens the file at `path`, which must have `expected` bytes, and at least one.
    pub(crate) fn open(path: &Path, expected: u64) -> Result<Self, BaseError> {
        let file = open_exact(path, expected)?;
        // Whole chunks, so that the padded last one is a chunk like the others.
        let padded = expected.next_multiple_of(CHUNK_SIZE as u64);
        let len = usize::try_from(padded).unwrap_or(usize::MAX);
        // SAFETY: the map is only read, and nothing writes the file while it lives: a store writes
        // a part once, under another name, then takes the write permission away and renames it
        // into place; it removes it by unlinking, which leaves a map intact, and not while the
        // base's manifest is locked shared, as it is by whoever owns this value. Bytes between the
        // file's end and that of its last page are inside the mapping and read as zeros; `len`
        // reaches no further, as pages are chunks here. (Who has the store's permissions and
        // truncates the file all the same makes the reader fault, which ends the process but gives
        // no wrong byte.)
        let map = unsafe { MmapOptions::new().len(len).map(&file) }
            .map_err(BaseError::io("mapping", path))?;
        Ok(Self { file, map })
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Chunk number `index`, padded with zeros if it is the last; nothing outside the part.
    pub(crate) fn chunk(&self, index: u64) -> Option<&Chunk> {
        let start = usize::try_from(index).ok()?.checked_mul(CHUNK_SIZE)?;
        self.map.get(start..)?.first_chunk()
    }
}

/// Opens a file and checks its length.
pub(crate) fn open_exact(path: &Path, expected: u64) -> Result<File, BaseError> {
    let file = File::open(path).map_err(BaseError::io("opening", path))?;
    let found = file.metadata().map_err(BaseError::io("reading the length of", path))?.len();
    if found != expected {
        return Err(BaseError::PartLength { path: path.to_owned(), found, expected });
    }
    Ok(file)
}
