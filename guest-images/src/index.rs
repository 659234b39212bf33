//! The chunk index: a sorted, mapped file that finds a chunk of a base by its hash.
//!
//! It is derived from the parts, not part of the base's identity: a damaged one costs dedup hits
//! and is told by [`Store::verify`](crate::store::Store::verify), it never makes a wrong disk.

use std::{
    cmp,
    fs::File,
    io,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

pub(crate) mod build;

use memmap2::{Advice, Mmap};

use crate::{
    base::{Part, Place},
    chunk::ChunkHash,
    manifest::{Manifest, PartRoot},
};

/// The version of the index of a base without memory: its header has three roots.
pub const INDEX_VERSION: u32 = 1;
/// The version of the index of a base with memory: its header has four roots.
pub const INDEX_VERSION_MEMORY: u32 = 2;

const MAGIC: &[u8; 8] = b"HOWDIDX\0";
/// Bytes of the header before the roots, and after them: the entries' checksum, eight zeros, the
/// header's checksum.
const BEFORE_ROOTS: usize = 24;
const AFTER_ROOTS: usize = 32 + 8 + 32;
/// A hash and a place.
pub(crate) const ENTRY_BYTES: usize = 40;
/// What is read from the file at once.
const PAGE_BYTES: usize = 4096;
/// Searches that go in lock step: enough to hide a read from memory or disk behind others.
const IN_STEP: usize = 64;
/// A place is a part in the top byte and a chunk number in the rest.
const PART_SHIFT: u32 = 56;
const INDEX_MASK: u64 = (1 << PART_SHIFT) - 1;

/// The roots that an index belongs to: of disk, kernel, initramfs and, if the base has one,
/// memory. An absent initramfs has a root of zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartRoots(Vec<[u8; 32]>);

impl PartRoots {
    /// The roots in a manifest.
    pub fn of(manifest: &Manifest) -> Self {
        let absent = PartRoot([0; 32]);
        let root = |part| manifest.part(part).map_or(absent, |info| info.root).0;
        let mut roots = vec![root(Part::Disk), root(Part::Kernel), root(Part::Initramfs)];
        roots.extend(manifest.part(Part::Memory).map(|info| info.root.0));
        Self(roots)
    }

    /// The version of an index with these roots.
    fn version(&self) -> u32 {
        if self.0.len() > 3 { INDEX_VERSION_MEMORY } else { INDEX_VERSION }
    }

    /// The length of the header of an index with these roots.
    fn header_bytes(&self) -> usize {
        BEFORE_ROOTS + 32 * self.0.len() + AFTER_ROOTS
    }
}

/// Why an index is refused.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// It cannot be read.
    #[error("reading the index: {0}")]
    Io(#[from] io::Error),
    /// It is not an index.
    #[error("not a chunk index")]
    Magic,
    /// Another version's.
    #[error("chunk index version {found}; this base needs version {expected}")]
    Version {
        /// The version in the file.
        found: u32,
        /// The version of an index of such a base.
        expected: u32,
    },
    /// The header is damaged.
    #[error("the index header is damaged")]
    Header,
    /// It was built from other parts.
    #[error("the index was built for other parts than the manifest names")]
    Foreign,
    /// The file's length does not fit its count.
    #[error("the index has {found} bytes; its {entries} entries need {expected}")]
    Length {
        /// Bytes the file has.
        found: u64,
        /// Entries that the header announces.
        entries: u64,
        /// Bytes it should have.
        expected: u64,
    },
}

/// One chunk: its hash and the first place that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    hash: ChunkHash,
    packed_place: u64,
}

impl Entry {
    /// An entry; `place` must be inside a part, which is far below 2^56 chunks.
    pub(crate) fn new(hash: ChunkHash, place: Place) -> Self {
        let packed_place = u64::from(place.part as u8) << PART_SHIFT | place.index;
        Self { hash, packed_place }
    }

    /// The place, unless the bytes name no part.
    pub(crate) fn place(&self) -> Option<Place> {
        unpack_place(self.packed_place)
    }

    /// The chunk's hash.
    pub(crate) fn hash(&self) -> &ChunkHash {
        &self.hash
    }

    /// The chunk's number in its part.
    pub(crate) fn index(&self) -> u64 {
        self.packed_place & INDEX_MASK
    }

    /// The entry in an index file.
    pub(crate) fn from_bytes(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let (mut hash, mut place) = ([0; 32], [0; 8]);
        hash.copy_from_slice(&bytes[..32]);
        place.copy_from_slice(&bytes[32..]);
        Self { hash: ChunkHash(hash), packed_place: u64::from_le_bytes(place) }
    }

    /// What an index file says of it.
    pub(crate) fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..32].copy_from_slice(&self.hash.0);
        bytes[32..].copy_from_slice(&self.packed_place.to_le_bytes());
        bytes
    }
}

fn unpack_place(packed: u64) -> Option<Place> {
    let part = Part::try_from((packed >> PART_SHIFT) as u8).ok()?;
    Some(Place { part, index: packed & INDEX_MASK })
}

/// Sorts entries and drops all but the first place of each hash: disk before kernel before
/// initramfs before memory, low chunk numbers before high ones.
pub(crate) fn sort(entries: &mut Vec<Entry>) {
    entries.sort_unstable();
    entries.dedup_by_key(|entry| entry.hash);
}

fn header(roots: &PartRoots, entries: u64, entries_checksum: &[u8; 32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(roots.header_bytes());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&roots.version().to_le_bytes());
    bytes.extend_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
    bytes.extend_from_slice(&entries.to_le_bytes());
    roots.0.iter().for_each(|root| bytes.extend_from_slice(root));
    bytes.extend_from_slice(entries_checksum);
    bytes.extend_from_slice(&[0; 8]);
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// An open index: mapped, so that it costs no memory of ours however large the base is.
#[derive(Debug)]
pub struct Index {
    map: Mmap,
    /// Where the entries begin.
    header_bytes: usize,
    entries: u64,
    /// A bit for each page of the file: whether it was asked for.
    asked_pages: Box<[AtomicU64]>,
}

impl Index {
    /// Opens an index and checks that it is whole and belongs to parts with these roots. The
    /// entries themselves are looked at when they are searched.
    pub fn open(path: &Path, roots: &PartRoots) -> Result<Self, IndexError> {
        let file = File::open(path)?;
        // SAFETY: the map is private to this value and only read. Files of a store are written
        // once, under another name, and never changed or truncated after that: a store removes
        // them by unlinking, which leaves a map intact. (Someone with the store's permissions who
        // truncates one all the same makes the reader fault: that is outside what we defend.)
        let map = unsafe { Mmap::map(&file)? };
        let header_bytes = roots.header_bytes();
        let entries = check_header(&map, roots)?;
        let words = map.len().div_ceil(PAGE_BYTES).div_ceil(64);
        let asked_pages = (0..words).map(|_| AtomicU64::new(0)).collect();
        let index = Self { map, header_bytes, entries, asked_pages };
        // Lookups jump about: reading ahead would only fill the page cache.
        let _ = index.map.advise(Advice::Random);
        Ok(index)
    }

    /// How many distinct chunks it holds.
    pub fn len(&self) -> u64 {
        self.entries
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The place recorded for `hash`. The caller checks that it is inside its part.
    pub(crate) fn find(&self, hash: &ChunkHash) -> Option<Place> {
        let mut search = Search::new(hash, self.entries);
        while let Some(at) = search.guess() {
            let (found, packed_place) = self.entry(at)?;
            if search.narrow(at, found, hash) {
                return unpack_place(packed_place);
            }
        }
        None
    }

    /// [`Index::find`] for many hashes at once: `places[i]` becomes what is recorded for
    /// `hashes[i]`; what is beyond the shorter of the two is left alone.
    ///
    /// The searches go in lock step, so that the cache lines and pages which one round of them
    /// needs are on their way together instead of one after the other.
    pub(crate) fn find_batch(&self, hashes: &[ChunkHash], places: &mut [Option<Place>]) {
        for (hashes, places) in hashes.chunks(IN_STEP).zip(places.chunks_mut(IN_STEP)) {
            self.find_in_step(hashes, places);
        }
    }

    fn find_in_step(&self, hashes: &[ChunkHash], places: &mut [Option<Place>]) {
        let mut searches: Vec<_> = hashes
            .iter()
            .zip(places)
            .map(|(hash, place)| {
                *place = None;
                (hash, place, Search::new(hash, self.entries), 0)
            })
            .collect();
        while !searches.is_empty() {
            searches.retain_mut(|(.., search, at)| {
                let Some(guess) = search.guess() else { return false };
                *at = guess;
                self.prefetch(guess);
                true
            });
            searches.retain_mut(|(hash, place, search, at)| {
                let Some((found, packed_place)) = self.entry(*at) else { return false };
                let hit = search.narrow(*at, found, hash);
                if hit {
                    **place = unpack_place(packed_place);
                }
                !hit
            });
        }
    }

    /// Has an entry brought into the cache, and its page into memory if this index never asked for
    /// that page before.
    fn prefetch(&self, number: u64) {
        let at = self.header_bytes + number as usize * ENTRY_BYTES;
        let Some(entry) = self.map.get(at..at + ENTRY_BYTES) else { return };
        let (page, bit) = (at / PAGE_BYTES, 1 << (at / PAGE_BYTES % 64));
        let asked = self.asked_pages.get(page / 64);
        if asked.is_some_and(|word| word.load(Ordering::Relaxed) & bit == 0) {
            asked.map(|word| word.fetch_or(bit, Ordering::Relaxed));
            // It starts to read and does not wait. If it fails, the search faults instead.
            let _ = self.map.advise_range(Advice::WillNeed, at, ENTRY_BYTES);
            return;
        }
        prefetch_line(entry);
    }

    /// Entry number `number`: its hash and packed place.
    fn entry(&self, number: u64) -> Option<(&[u8; 32], u64)> {
        let before = usize::try_from(number).ok()?.checked_mul(ENTRY_BYTES)?;
        let at = self.header_bytes.checked_add(before)?;
        let bytes: &[u8; ENTRY_BYTES] = self.map.get(at..)?.first_chunk()?;
        let (hash, place) = bytes.split_first_chunk::<32>()?;
        Some((hash, u64::from_le_bytes(*place.first_chunk()?)))
    }

    /// All entries, in the order of their hashes.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.entries).map_while(|number| {
            let (hash, packed_place) = self.entry(number)?;
            Some(Entry { hash: ChunkHash(*hash), packed_place })
        })
    }

    /// Whether the entries are the bytes that were written; reads the whole file.
    pub(crate) fn entries_intact(&self) -> bool {
        let (header, entries) = self.map.split_at(self.header_bytes.min(self.map.len()));
        let recorded = header.len().checked_sub(AFTER_ROOTS).and_then(|at| header.get(at..at + 32));
        recorded == Some(blake3::hash(entries).as_bytes().as_slice())
    }

    /// The number of the first entry that differs from `expected`, if any does.
    pub(crate) fn first_difference(&self, expected: &[Entry]) -> Option<u64> {
        let longest = self.entries.max(expected.len() as u64);
        (0..longest).find(|&number| {
            let wanted = expected.get(number as usize).map(|e| (e.hash.0, e.packed_place));
            self.entry(number).map(|(hash, place)| (*hash, place)) != wanted
        })
    }
}

/// One search: the entries that may still be the one, and the hashes around them.
///
/// Hashes are evenly spread, so their first bytes tell where they are: two or three guesses find an
/// entry among millions.
struct Search {
    key: u64,
    low: u64,
    low_key: u64,
    high: u64,
    high_key: u64,
    guesses: u32,
}

impl Search {
    /// After so many guesses the hashes are not evenly spread, or damaged: halve from there.
    const GUESSES: u32 = 6;

    fn new(hash: &ChunkHash, entries: u64) -> Self {
        let key = prefix(&hash.0);
        Self { key, low: 0, low_key: 0, high: entries, high_key: u64::MAX, guesses: 0 }
    }

    /// The entry to look at next; nothing if the hash is not there.
    fn guess(&mut self) -> Option<u64> {
        if self.low >= self.high {
            return None;
        }
        self.guesses += 1;
        let left = self.high - self.low;
        if self.guesses > Self::GUESSES {
            return Some(self.low + left / 2);
        }
        // low_key <= key <= high_key by the comparisons, whatever the order of the entries.
        let share = u128::from(self.key - self.low_key) * u128::from(left)
            / (u128::from(self.high_key - self.low_key) + 1);
        Some(self.low + share as u64)
    }

    /// Takes in that entry `at` has the hash `found`; whether it is the one.
    fn narrow(&mut self, at: u64, found: &[u8; 32], wanted: &ChunkHash) -> bool {
        match found.cmp(&wanted.0) {
            cmp::Ordering::Equal => return true,
            cmp::Ordering::Less => (self.low, self.low_key) = (at + 1, prefix(found)),
            cmp::Ordering::Greater => (self.high, self.high_key) = (at, prefix(found)),
        }
        false
    }
}

/// Asks the CPU for the cache line in which `bytes` begins.
fn prefetch_line(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: it reads nothing that the program sees and faults on no
    // address; this one is of a live slice besides. SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// The first bytes of a hash as a number that sorts like the hash.
fn prefix(hash: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Checks a header against the file's length and the roots; returns the number of entries.
fn check_header(map: &[u8], roots: &PartRoots) -> Result<u64, IndexError> {
    if !map.starts_with(MAGIC) {
        return Err(IndexError::Magic);
    }
    let version = map.get(8..).and_then(|rest| rest.first_chunk()).map(|b| u32::from_le_bytes(*b));
    if version != Some(roots.version()) {
        let (found, expected) = (version.unwrap_or_default(), roots.version());
        return Err(IndexError::Version { found, expected });
    }
    let header_bytes = map.get(..roots.header_bytes()).ok_or(IndexError::Header)?;
    let (checked, checksum) = header_bytes.split_at(header_bytes.len() - 32);
    if blake3::hash(checked).as_bytes() != checksum {
        return Err(IndexError::Header);
    }
    let entries =
        checked.get(16..).and_then(|rest| rest.first_chunk()).map(|b| u64::from_le_bytes(*b));
    let entries_checksum = checked.get(checked.len() - 40..).and_then(|rest| rest.first_chunk());
    let (Some(entries), Some(entries_checksum)) = (entries, entries_checksum) else {
        return Err(IndexError::Header);
    };
    // Every other byte of a header is determined by these.
    if header_bytes != header(roots, entries, entries_checksum) {
        return Err(IndexError::Foreign);
    }
    let found = map.len() as u64;
    let expected =
        entries.saturating_mul(ENTRY_BYTES as u64).saturating_add(header_bytes.len() as u64);
    if found != expected {
        return Err(IndexError::Length { found, entries, expected });
    }
    Ok(entries)
}
