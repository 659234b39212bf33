//! What an import has done so far, in a file that outlives it.
//!
//! The ledger is a list of records, each with a checksum: "this slab of that part is copied, and
//! these are its chunks' hashes". A record is written only when what it speaks of is durable, so
//! whoever finds a ledger, after a kill or a power loss, goes on where its records end. The same
//! records, sorted by hash as they are, are the runs that the index is merged from: an import
//! writes one in any case, and holds in memory what was not synced yet, no more.
//!
//! It is private to this build and to one import: another version's is dropped, not converted.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use memmap2::Mmap;
use nix::fcntl::FlockArg;

use crate::{
    base::Part,
    chunk::CHUNK_SIZE,
    files::Lock,
    index::{
        ENTRY_BYTES, Entry,
        build::{Run, sort_run},
    },
    scan::{SLAB_BYTES, SLAB_CHUNKS, Slab, slab_range, slabs},
};

const MAGIC: &[u8; 8] = b"HOWDLDG\0";
const VERSION: u32 = 1;
/// Magic, version, chunks of a slab, key.
pub(super) const HEADER_BYTES: usize = 48;
/// Kind, part, two zeros, count, slab, then a checksum over these and the entries that follow.
const RECORD_BYTES: usize = 48;
const SLAB_RECORD: u8 = 0;
const CLONE_RECORD: u8 = 1;

/// Bytes of a part, holes not counted, that may be copied before they are made durable and
/// recorded: what a crash costs at most, besides what the workers are at.
const CHECKPOINT_BYTES: u64 = 8 * SLAB_BYTES;

/// The ledger of one import, locked for it.
#[derive(Debug)]
pub(super) struct Ledger {
    file: Lock,
    /// Where the entries of each slab begin in the file, and how many there are.
    slabs: BTreeMap<(Part, u64), (u64, usize)>,
    /// The parts that were not copied but share their source's blocks, whole.
    cloned: Vec<Part>,
    /// Where the next record goes.
    end: u64,
    /// Records whose data is not durable yet.
    pending: Vec<u8>,
    pending_slabs: Vec<((Part, u64), (u64, usize))>,
    /// Bytes of the part that these stand for, holes not counted.
    pending_bytes: u64,
}

impl Ledger {
    /// Opens the ledger at `path` for an import with this key of parts with these lengths, or
    /// begins one. Nothing if another process has it, or took it away meanwhile.
    pub(super) fn open(
        path: &Path,
        key: &[u8; 32],
        parts: &[(Part, u64)],
    ) -> io::Result<Option<Self>> {
        let file =
            match OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
            {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
        let file = match Lock::take(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        // Between opening and locking, its import may have finished and moved it away.
        let named = fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        let locked = file.metadata()?;
        if named != Some((locked.dev(), locked.ino())) {
            return Ok(None);
        }
        let mut ledger = Self {
            file,
            slabs: BTreeMap::new(),
            cloned: Vec::new(),
            end: HEADER_BYTES as u64,
            pending: Vec::new(),
            pending_slabs: Vec::new(),
            pending_bytes: 0,
        };
        if locked.len() < HEADER_BYTES as u64 || !ledger.read(key, parts)? {
            ledger.restart(key)?;
        }
        Ok(Some(ledger))
    }

    /// Forgets all that was done.
    pub(super) fn restart(&mut self, key: &[u8; 32]) -> io::Result<()> {
        self.slabs.clear();
        self.cloned.clear();
        self.end = HEADER_BYTES as u64;
        self.file.set_len(0)?;
        self.file.write_all_at(&header(key), 0)
    }

    /// Reads the records up to the first that is not whole, and cuts the file there. `false` if it
    /// is another import's ledger.
    fn read(&mut self, key: &[u8; 32], parts: &[(Part, u64)]) -> io::Result<bool> {
        let map = self.map()?;
        if !map.starts_with(&header(key)) {
            return Ok(false);
        }
        let mut at = HEADER_BYTES;
        while let Some(record) = map.get(at..).and_then(|rest| Record::parse(rest, parts)) {
            match record.kind {
                CLONE_RECORD => self.cloned.push(record.part),
                _ => {
                    let entries_at = (at + RECORD_BYTES) as u64;
                    let entry = (entries_at, record.entries.len());
                    self.slabs.insert((record.part, record.slab), entry);
                }
            }
            at += RECORD_BYTES + record.entries.len() * ENTRY_BYTES;
        }
        self.end = at as u64;
        drop(map);
        self.file.set_len(self.end)?;
        Ok(true)
    }

    /// The parts of which anything is recorded.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.cloned.iter().copied().chain(self.slabs.keys().map(|(part, _)| *part))
    }

    /// Whether a slab is recorded.
    pub(super) fn has(&self, part: Part, slab: u64) -> bool {
        self.slabs.contains_key(&(part, slab))
    }

    /// How many chunks that are not zero a recorded slab has.
    pub(super) fn entries(&self, part: Part, slab: u64) -> usize {
        self.slabs.get(&(part, slab)).map_or(0, |(_, count)| *count)
    }

    /// Whether a part is a clone of its source.
    pub(super) fn is_cloned(&self, part: Part) -> bool {
        self.cloned.contains(&part)
    }

    /// Records that a part is a clone of its source, durable already.
    pub(super) fn add_clone(&mut self, part: Part) -> io::Result<()> {
        let record = encode(CLONE_RECORD, part, 0, &[]);
        self.file.write_all_at(&record, self.end)?;
        self.end += record.len() as u64;
        self.cloned.push(part);
        Ok(())
    }

    /// What is recorded of the slabs of one part.
    pub(super) fn known(&self, part: Part) -> io::Result<Known> {
        let slabs = self.slabs.range((part, 0)..=(part, u64::MAX));
        Ok(Known { map: self.map()?, slabs: slabs.map(|((_, n), at)| (*n, *at)).collect() })
    }

    /// Takes down a slab of `part`, whose copy goes to `data`. What was taken down becomes durable
    /// from time to time.
    pub(super) fn add(&mut self, part: Part, slab: Slab, data: &File) -> io::Result<()> {
        let Slab { number, mut entries, .. } = slab;
        sort_run(&mut entries);
        let record = encode(SLAB_RECORD, part, number, &entries);
        let at = self.end + (self.pending.len() + RECORD_BYTES) as u64;
        self.pending_slabs.push(((part, number), (at, entries.len())));
        self.pending.extend_from_slice(&record);
        self.pending_bytes += (entries.len() * CHUNK_SIZE) as u64;
        if self.pending_bytes >= CHECKPOINT_BYTES {
            data.sync_data()?;
            self.write_pending()?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Writes the records that are left. Their data is durable.
    pub(super) fn write_pending(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.pending, self.end)?;
        self.end += self.pending.len() as u64;
        self.slabs.extend(self.pending_slabs.drain(..));
        self.pending.clear();
        self.pending_bytes = 0;
        Ok(())
    }

    /// Gives all slabs' entries, as sorted runs.
    pub(super) fn with_runs<T>(&self, use_runs: impl FnOnce(&[Run<'_>]) -> T) -> io::Result<T> {
        let map = self.map()?;
        let runs: Vec<_> = self.slabs.values().filter_map(|place| run(&map, *place)).collect();
        Ok(use_runs(&runs))
    }

    fn map(&self) -> io::Result<Mmap> {
        // SAFETY: the map is only read. The file is this import's alone: its lock is held, and it
        // lies in a directory for work under way, where who shortens it against the lock makes
        // this process fault and no more. Records are appended behind what is read of a map.
        unsafe { Mmap::map(&*self.file) }
    }
}

/// What a ledger says of the slabs of one part.
pub(super) struct Known {
    map: Mmap,
    slabs: BTreeMap<u64, (u64, usize)>,
}

impl Known {
    /// Whether it says anything.
    pub(super) fn is_empty(&self) -> bool {
        self.slabs.is_empty()
    }

    /// Whether a slab is done.
    pub(super) fn has(&self, slab: u64) -> bool {
        self.slabs.contains_key(&slab)
    }

    /// The entries of a slab, in order of place.
    pub(super) fn entries(&self, slab: u64) -> Option<Vec<Entry>> {
        let run = run(&self.map, *self.slabs.get(&slab)?)?;
        let mut entries: Vec<_> = run.iter().map(Entry::from_bytes).collect();
        entries.sort_unstable_by_key(Entry::index);
        Some(entries)
    }
}

fn run(map: &[u8], (at, count): (u64, usize)) -> Option<Run<'_>> {
    let bytes = map.get(usize::try_from(at).ok()?..)?.get(..count.checked_mul(ENTRY_BYTES)?)?;
    Some(bytes.as_chunks().0)
}

/// A record as it is in the file.
struct Record<'a> {
    kind: u8,
    part: Part,
    slab: u64,
    entries: Run<'a>,
}

impl<'a> Record<'a> {
    /// The record that `bytes` begin with, if there is a whole one that can be of an import of
    /// parts with these lengths.
    fn parse(bytes: &'a [u8], parts: &[(Part, u64)]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<RECORD_BYTES>()?;
        let (fields, checksum) = head.split_first_chunk::<16>()?;
        let [kind, part, 0, 0, count @ ..] = *fields else { return None };
        let (count, slab) = count.split_first_chunk::<4>()?;
        let count = u32::from_le_bytes(*count) as usize;
        let slab = u64::from_le_bytes(*slab.first_chunk()?);
        if count as u64 > SLAB_CHUNKS {
            return None;
        }
        let entries = rest.get(..count * ENTRY_BYTES)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(fields).update(entries);
        if hasher.finalize().as_bytes() != checksum {
            return None;
        }
        let part = Part::try_from(part).ok()?;
        let (_, bytes) = parts.iter().find(|(known, _)| *known == part)?;
        let entries: Run<'a> = entries.as_chunks().0;
        let sound = match kind {
            SLAB_RECORD => slab < slabs(*bytes) && is_run_of(part, slab, *bytes, entries),
            CLONE_RECORD => slab == 0 && entries.is_empty(),
            _ => false,
        };
        sound.then_some(Self { kind, part, slab, entries })
    }
}

/// Whether these are entries of that slab and no other, sorted by hash.
fn is_run_of(part: Part, slab: u64, bytes: u64, run: Run<'_>) -> bool {
    let range = slab_range(slab, bytes);
    let chunk_bytes = CHUNK_SIZE as u64;
    let chunks = range.start / chunk_bytes..range.end.div_ceil(chunk_bytes);
    let inside = |entry: &Entry| {
        entry.place().is_some_and(|place| place.part == part && chunks.contains(&place.index))
    };
    run.iter().map(Entry::from_bytes).all(|entry| inside(&entry))
        && run.is_sorted_by_key(Entry::from_bytes)
}

fn encode(kind: u8, part: Part, slab: u64, entries: &[Entry]) -> Vec<u8> {
    let mut record = vec![0; RECORD_BYTES];
    record.extend(entries.iter().flat_map(|entry| entry.to_bytes()));
    record[0] = kind;
    record[1] = part as u8;
    record[4..8].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    record[8..16].copy_from_slice(&slab.to_le_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&record[..16]).update(&record[RECORD_BYTES..]);
    record[16..48].copy_from_slice(hasher.finalize().as_bytes());
    record
}

fn header(key: &[u8; 32]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(SLAB_CHUNKS as u32).to_le_bytes());
    bytes[16..].copy_from_slice(key);
    bytes
}
