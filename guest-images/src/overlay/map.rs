//! The overlay's map: one state a chunk, in memory as atomics, on disk in `disk.map`.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::base::BaseId;

/// The version of the map format.
pub const MAP_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"HOWDMAP\0";
/// The header takes one page; states follow, one byte a chunk, filled up to whole pages.
pub(super) const HEADER_BYTES: usize = 4096;
/// Bytes of states that are written as one: the unit of the dirty bits.
pub(super) const PAGE_BYTES: usize = 4096;
/// Header bytes under the checksum.
const CHECKED_BYTES: usize = 64;

/// Where a chunk of a VM's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChunkState {
    /// Not changed: the base disk holds it.
    Base = 0,
    /// Written: the overlay's data file holds it.
    Data = 1,
    /// Discarded or written with zeros.
    Zero = 2,
}

impl ChunkState {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        [Self::Base, Self::Data, Self::Zero].into_iter().find(|state| *state as u8 == byte)
    }
}

/// What the first page of `disk.map` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapHeader {
    pub(super) base: BaseId,
    pub(super) disk_bytes: u64,
}

/// What is wrong with a map's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No overlay map.
    #[error("not an overlay map")]
    Magic,
    /// Another version's.
    #[error("overlay map version {0}; this build reads version {MAP_VERSION}")]
    Version(u32),
    /// Some byte of it changed.
    #[error("its header is damaged (checksum mismatch)")]
    Damaged,
}

impl MapHeader {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut page = [0; HEADER_BYTES];
        page[..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&MAP_VERSION.to_le_bytes());
        // 12..16 stay zero.
        page[16..48].copy_from_slice(&self.base.0);
        page[48..56].copy_from_slice(&self.disk_bytes.to_le_bytes());
        // 56..64 stay zero.
        let checksum = blake3::hash(&page[..CHECKED_BYTES]);
        page[CHECKED_BYTES..CHECKED_BYTES + 32].copy_from_slice(checksum.as_bytes());
        page
    }

    pub(super) fn decode(page: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        if page[..8] != MAGIC[..] {
            return Err(HeaderError::Magic);
        }
        let mut version = [0; 4];
        version.copy_from_slice(&page[8..12]);
        let version = u32::from_le_bytes(version);
        if version != MAP_VERSION {
            return Err(HeaderError::Version(version));
        }
        let (mut base, mut disk_bytes) = ([0; 32], [0; 8]);
        base.copy_from_slice(&page[16..48]);
        disk_bytes.copy_from_slice(&page[48..56]);
        let header = Self { base: BaseId(base), disk_bytes: u64::from_le_bytes(disk_bytes) };
        // The fields above determine every byte of the page.
        if header.encode() == *page { Ok(header) } else { Err(HeaderError::Damaged) }
    }
}

/// One page of states, as it was when it was taken, and where it belongs in `disk.map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPage {
    /// Its offset in the map file.
    pub file_offset: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The states of all chunks and which pages of them are newer than the file.
#[derive(Debug)]
pub(super) struct StateMap {
    chunks: u64,
    states: Box<[AtomicU8]>,
    dirty: Box<[AtomicU64]>,
}

impl StateMap {
    /// A map whose states are `bytes`, already checked; its length is that of the file's states.
    pub(super) fn new(chunks: u64, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(bytes.len(), padded_len(chunks));
        let pages = bytes.len() / PAGE_BYTES;
        Self {
            chunks,
            states: bytes.into_iter().map(AtomicU8::new).collect(),
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    fn slot(&self, chunk: u64) -> Option<&AtomicU8> {
        (chunk < self.chunks).then(|| self.states.get(chunk as usize)).flatten()
    }

    /// The state of a chunk; one that does not exist counts as base, which reads as zeros there.
    pub(super) fn get(&self, chunk: u64) -> ChunkState {
        // Acquire: who sees `Data` also sees what the marker did before marking.
        let byte = self.slot(chunk).map_or(0, |slot| slot.load(Ordering::Acquire));
        ChunkState::from_byte(byte).unwrap_or(ChunkState::Base)
    }

    /// Sets a chunk's state; `false` if there is no such chunk.
    pub(super) fn set(&self, chunk: u64, state: ChunkState) -> bool {
        let Some(slot) = self.slot(chunk) else { return false };
        if slot.swap(state as u8, Ordering::AcqRel) != state as u8 {
            // After the state: a snapshot that clears this bit then reads the new state.
            self.set_dirty(chunk as usize / PAGE_BYTES);
        }
        true
    }

    fn set_dirty(&self, page: usize) {
        if let Some(word) = self.dirty.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// Copies every dirty page and takes its dirty bit.
    pub(super) fn take_dirty(&self) -> Vec<MapPage> {
        let mut taken = Vec::new();
        for (number, word) in self.dirty.iter().enumerate() {
            // The bit goes before the states are read: a state set after it was read dirties again.
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let page = number * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let start = page * PAGE_BYTES;
                let states = self.states.get(start..start + PAGE_BYTES).unwrap_or_default();
                taken.push(MapPage {
                    file_offset: (HEADER_BYTES + start) as u64,
                    bytes: states.iter().map(|state| state.load(Ordering::Acquire)).collect(),
                });
            }
        }
        taken
    }

    /// Makes pages that were taken dirty again: they were not written after all.
    pub(super) fn restore_dirty(&self, pages: &[MapPage]) {
        for page in pages {
            self.set_dirty((page.file_offset as usize - HEADER_BYTES) / PAGE_BYTES);
        }
    }

    /// The chunks that are not [`ChunkState::Base`], ascending.
    pub(super) fn changed(&self) -> impl Iterator<Item = u64> + '_ {
        let base = ChunkState::Base as u8;
        (0..self.chunks).zip(self.states.iter()).filter_map(move |(chunk, state)| {
            (state.load(Ordering::Acquire) != base).then_some(chunk)
        })
    }
}

/// Bytes that the states of `chunks` chunks take in the file.
pub(super) fn padded_len(chunks: u64) -> usize {
    (chunks as usize).next_multiple_of(PAGE_BYTES)
}
