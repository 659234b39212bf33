//! A base that comes in chunk by chunk, from wherever chunks come: what is not verified never becomes
//! a base.
//!
//! ```text
//! Store::receive(manifest) ─► note the hashes of each slab ─► is_part(root)? ─┐
//!        ┌────────────────────────────────────────────────────────────────────┘
//!        └─► open_slab: what is missing ─► put every chunk ─► close_slab ─► finish: a base
//! ```
//!
//! The hashes of a part are believed once they give the root in the manifest; a chunk once it has its
//! hash. A reception that ends early leaves its directory, and the next one of the same base goes on:
//! with the slabs that are in the ledger, and with every chunk of the others that is there already.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{
    Store, StoreError,
    ledger::Known,
    workshop::{Scratch, Workshop, seal, write_file},
};
use crate::{
    base::{Base, BaseId, INDEX_FILE, MACHINE_FILE, MANIFEST_FILE, Part, Place},
    chunk::{self, CHUNK_SIZE, Chunk, ChunkHash},
    files::Lock,
    index::{self, Entry, PartRoots},
    manifest::{MachineInfo, Manifest, PartRoot, RootHasher},
    scan::{SLAB_CHUNKS, Slab, slab_range, slabs},
};

/// Chunks that are noted, opened and closed as one.
pub const RECEIVED_SLAB_CHUNKS: u64 = SLAB_CHUNKS;

const CHUNK_BYTES: u64 = CHUNK_SIZE as u64;
const HASHED_BYTES: usize = 40;
/// Where the hashes are kept that were noted.
const NOTES: &str = "notes";

/// A chunk of a part that is not zero, by its number and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// Its number in the part.
    pub index: u64,
    /// Its hash.
    pub hash: ChunkHash,
}

/// Why what came in is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReceptionError {
    /// The store cannot do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A chunk has another content than was announced.
    #[error("{part} chunk {index} came with another content than its hash says")]
    Content {
        /// Which part.
        part: Part,
        /// Which chunk.
        index: u64,
    },
    /// Hashes or chunks that cannot be: of another slab, out of order, unannounced.
    #[error("{part}, slab {slab}: {what}")]
    Order {
        /// Which part.
        part: Part,
        /// Which slab.
        slab: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The hashes of a part are not those of the manifest.
    #[error("the {part} has the root {found}, the manifest says {expected}")]
    Root {
        /// Which part.
        part: Part,
        /// What the manifest names.
        expected: PartRoot,
        /// What came.
        found: PartRoot,
    },
    /// The machine state is not that of the manifest.
    #[error("the machine state is not the one that the manifest names")]
    Machine,
}

/// A slab whose chunks are coming in.
#[derive(Debug)]
struct Open {
    hashes: Vec<Hashed>,
    have: Vec<bool>,
}

/// A base in the making.
#[derive(Debug)]
pub struct Reception<'a> {
    store: &'a Store,
    manifest: Manifest,
    // None only once it is finished.
    workshop: Option<Workshop>,
    files: BTreeMap<Part, File>,
    notes: File,
    notes_end: u64,
    noted: BTreeMap<(Part, u64), (u64, usize)>,
    open: BTreeMap<(Part, u64), Open>,
    _under_way: Lock,
}

impl Store {
    /// Begins to receive the base that `manifest` describes, or goes on with it.
    pub fn receive(&self, manifest: Manifest) -> Result<Reception<'_>, ReceptionError> {
        let id = manifest.id();
        let json = manifest
            .to_json()
            .map_err(|source| StoreError::Content { path: self.base_dir(&id), source })?;
        let under_way = self.begin()?;
        let lengths: Vec<_> = parts(&manifest).map(|(part, bytes, _)| (part, bytes)).collect();
        let workshop = Workshop::enter(self, &reception_key(&id), &lengths)?;
        // It says too that this directory is worth keeping.
        write_file(&workshop.dir().join(MANIFEST_FILE), |file| file.write_all_at(&json, 0))?;
        let mut files = BTreeMap::new();
        for (part, bytes) in lengths {
            let file = workshop.part_file(part)?;
            let path = workshop.dir().join(part.file_name());
            file.set_len(bytes).map_err(StoreError::io("writing", &path))?;
            files.insert(part, file);
        }
        let path = workshop.dir().join(NOTES);
        let notes =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let notes = notes.map_err(StoreError::io("creating", &path))?;
        Ok(Reception {
            store: self,
            manifest,
            workshop: Some(workshop),
            files,
            notes,
            notes_end: 0,
            noted: BTreeMap::new(),
            open: BTreeMap::new(),
            _under_way: under_way,
        })
    }
}

/// Which parts there are, with their lengths and roots.
fn parts(manifest: &Manifest) -> impl Iterator<Item = (Part, u64, PartRoot)> + '_ {
    Part::ALL
        .into_iter()
        .filter_map(|part| manifest.part(part).map(|info| (part, info.bytes, info.root)))
}

impl Reception<'_> {
    /// The parts that come in, with the number of slabs of each.
    pub fn parts(&self) -> Vec<(Part, u64)> {
        parts(&self.manifest).map(|(part, bytes, _)| (part, slabs(bytes))).collect()
    }

    /// The numbers of the chunks of a slab.
    pub fn chunks_of(&self, part: Part, slab: u64) -> std::ops::Range<u64> {
        let range = slab_range(slab, self.bytes_of(part));
        range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES)
    }

    /// Whether a slab is here, durable and whole.
    pub fn has_slab(&self, part: Part, slab: u64) -> bool {
        self.workshop.as_ref().is_some_and(|workshop| workshop.ledger.has(part, slab))
    }

    /// Bytes on disk that a slab's chunks have which is here.
    pub fn slab_bytes(&self, part: Part, slab: u64) -> u64 {
        let ledger = self.workshop.as_ref().map(|workshop| &workshop.ledger);
        ledger.map_or(0, |ledger| ledger.entries(part, slab) as u64 * CHUNK_BYTES)
    }

    /// Takes down what the chunks of a slab should be: those that are not zero, in order.
    pub fn note(&mut self, part: Part, slab: u64, hashes: &[Hashed]) -> Result<(), ReceptionError> {
        let wrong = |what| ReceptionError::Order { part, slab, what };
        let chunks = self.chunks_of(part, slab);
        if !hashes.iter().all(|hashed| chunks.contains(&hashed.index)) {
            return Err(wrong("a chunk is not of this slab"));
        }
        if !hashes.is_sorted_by(|a, b| a.index < b.index) {
            return Err(wrong("the chunks are not in order"));
        }
        let mut bytes = Vec::with_capacity(hashes.len() * HASHED_BYTES);
        for hashed in hashes {
            bytes.extend_from_slice(&hashed.index.to_le_bytes());
            bytes.extend_from_slice(&hashed.hash.0);
        }
        self.notes.write_all_at(&bytes, self.notes_end).map_err(self.writing(NOTES))?;
        self.noted.insert((part, slab), (self.notes_end, hashes.len()));
        self.notes_end += bytes.len() as u64;
        Ok(())
    }

    /// What was noted of a slab.
    pub fn noted(&self, part: Part, slab: u64) -> Result<Vec<Hashed>, ReceptionError> {
        let what = "its hashes were not noted";
        let missing = ReceptionError::Order { part, slab, what };
        let (at, count) = *self.noted.get(&(part, slab)).ok_or(missing)?;
        let mut bytes = vec![0; count * HASHED_BYTES];
        self.notes.read_exact_at(&mut bytes, at).map_err(self.writing(NOTES))?;
        let (rows, _) = bytes.as_chunks::<HASHED_BYTES>();
        let hashed = rows.iter().map(|row| {
            let (mut index, mut hash) = ([0; 8], [0; 32]);
            index.copy_from_slice(&row[..8]);
            hash.copy_from_slice(&row[8..]);
            Hashed { index: u64::from_le_bytes(index), hash: ChunkHash(hash) }
        });
        Ok(hashed.collect())
    }

    /// Whether all that was noted of a part, with the slabs that are here, is the part that the
    /// manifest names.
    pub fn check(&self, part: Part) -> Result<(), ReceptionError> {
        let Some(info) = self.manifest.part(part) else { return Ok(()) };
        let known = self.known(part)?;
        let mut root = RootHasher::new(info.chunks());
        for slab in 0..slabs(info.bytes) {
            let chunks = self.chunks_of(part, slab);
            let mut next = chunks.start;
            let hashes = match known.as_ref().and_then(|known| known.entries(slab)) {
                Some(entries) => entries.iter().map(hashed).collect(),
                None => self.noted(part, slab)?,
            };
            for Hashed { index, hash } in hashes {
                root.push_zeros(index.saturating_sub(next));
                root.push(&hash);
                next = index + 1;
            }
            root.push_zeros(chunks.end.saturating_sub(next));
        }
        let found = root.finish().unwrap_or(PartRoot([0; 32]));
        if found == info.root {
            return Ok(());
        }
        Err(ReceptionError::Root { part, expected: info.root, found })
    }

    /// Forgets the slabs that are here: for when what they give is not the part.
    pub fn forget(&mut self) -> Result<(), ReceptionError> {
        self.noted.clear();
        self.open.clear();
        self.notes_end = 0;
        let id = self.manifest.id();
        if let Some(workshop) = &mut self.workshop {
            let path = workshop.dir().to_owned();
            workshop
                .ledger
                .restart(&reception_key(&id))
                .map_err(StoreError::io("writing", &path))?;
        }
        Ok(())
    }

    /// Opens a slab that was noted, for its chunks to be put; those that are not there yet.
    pub fn open_slab(&mut self, part: Part, slab: u64) -> Result<Vec<Hashed>, ReceptionError> {
        let hashes = self.noted(part, slab)?;
        let file = self.file(part)?;
        self.clear_gaps(part, slab, &hashes)?;
        let mut have = Vec::with_capacity(hashes.len());
        let range = slab_range(slab, self.bytes_of(part));
        // Nothing was put into a slab without data.
        let empty = crate::files::data_extent(file, range.start, range.end).is_none();
        let mut chunk = *chunk::ZERO_CHUNK;
        for hashed in &hashes {
            let there = !empty && self.read_back(part, hashed.index, &mut chunk)?;
            have.push(there && ChunkHash::of(&chunk) == hashed.hash);
        }
        let missing = hashes.iter().zip(&have).filter(|(_, have)| !**have).map(|(h, _)| *h);
        let missing = missing.collect();
        self.open.insert((part, slab), Open { hashes, have });
        Ok(missing)
    }

    /// Puts a chunk of an open slab in its place, if it is the one that was noted. What is beyond the end
    /// of a part's last chunk must be zero.
    pub fn put(&mut self, place: Place, chunk: &Chunk) -> Result<(), ReceptionError> {
        let Place { part, index } = place;
        let slab = index / SLAB_CHUNKS;
        let wrong = |what| ReceptionError::Order { part, slab, what };
        let inside = self.bytes_of(part).saturating_sub(index.saturating_mul(CHUNK_BYTES));
        let open = self.open.get_mut(&(part, slab)).ok_or(wrong("it is not open"))?;
        let at = open.hashes.binary_search_by_key(&index, |hashed| hashed.index);
        let at = at.map_err(|_| wrong("a chunk came that was not announced"))?;
        let (bytes, padding) = chunk.split_at(inside.min(CHUNK_BYTES) as usize);
        let expected = open.hashes.get(at).map(|hashed| hashed.hash);
        if Some(ChunkHash::of(chunk)) != expected || padding.iter().any(|byte| *byte != 0) {
            return Err(ReceptionError::Content { part, index });
        }
        let written = self.file(part)?.write_all_at(bytes, index * CHUNK_BYTES);
        written.map_err(self.writing(part.file_name()))?;
        if let Some(have) = self.open.get_mut(&(part, slab)).and_then(|open| open.have.get_mut(at))
        {
            *have = true;
        }
        Ok(())
    }

    /// Reads a chunk back that was put.
    pub fn read(&self, place: Place, into: &mut Chunk) -> Result<(), ReceptionError> {
        self.read_back(place.part, place.index, into).map(drop)
    }

    /// Closes a slab all of whose chunks are there, in order of part and number. With `durable` it survives whatever comes; else it
    /// does so with one of the next.
    pub fn close_slab(
        &mut self,
        part: Part,
        slab: u64,
        durable: bool,
    ) -> Result<(), ReceptionError> {
        let wrong = |what| ReceptionError::Order { part, slab, what };
        let open = self.open.remove(&(part, slab)).ok_or(wrong("it is not open"))?;
        if !open.have.iter().all(|have| *have) {
            return Err(wrong("not all of its chunks came"));
        }
        let entry = |hashed: &Hashed| Entry::new(hashed.hash, Place { part, index: hashed.index });
        let entries = open.hashes.iter().map(entry).collect();
        let writing = self.writing(part.file_name());
        let file = self.files.get(&part).ok_or(wrong("the base has no such part"))?;
        let Some(workshop) = &mut self.workshop else { return Ok(()) };
        let ledger = &mut workshop.ledger;
        let added = ledger.add(part, Slab { number: slab, entries, known: false }, file);
        // The last of a part always: what is pending is of one part only, whose file is synced.
        let last = slab + 1 == slabs(self.manifest.part(part).map_or(0, |info| info.bytes));
        let added = added.and_then(|()| match durable || last {
            true => file.sync_data().and_then(|()| ledger.write_pending()),
            false => Ok(()),
        });
        added.map_err(writing)?;
        Ok(())
    }

    /// Makes it a base: all slabs are there, and `machine` is what the manifest names. One of this id
    /// that is there stays, unless it is damaged or `replace` says that it is.
    pub fn finish(
        mut self,
        machine: Option<&[u8]>,
        replace: bool,
    ) -> Result<BaseId, ReceptionError> {
        let expected = self.manifest.memory.as_ref().map(|memory| memory.machine);
        if expected != machine.map(MachineInfo::of) {
            return Err(ReceptionError::Machine);
        }
        for (part, _) in self.parts() {
            // From the ledger alone: nothing that is only noted counts.
            self.noted.retain(|(noted, _), _| *noted != part);
            self.check(part)?;
        }
        for (part, file) in &self.files {
            seal(file).map_err(self.writing(part.file_name()))?;
        }
        let Some(workshop) = self.workshop.take() else { return Ok(self.manifest.id()) };
        let done = self.complete(workshop, machine)?;
        let id = self.manifest.id();
        self.store.place_base(&done.0, &id, replace)?;
        Ok(id)
    }

    /// Writes what a base has besides its parts.
    fn complete(
        &self,
        workshop: Workshop,
        machine: Option<&[u8]>,
    ) -> Result<Scratch, ReceptionError> {
        let dir = workshop.dir();
        if let Some(machine) = machine {
            write_file(&dir.join(MACHINE_FILE), |file| file.write_all_at(machine, 0))?;
        }
        write_file(&dir.join(INDEX_FILE), |file| {
            let roots = PartRoots::of(&self.manifest);
            workshop.ledger.with_runs(|runs| index::build::write(file, &roots, runs))?
        })?;
        let notes = dir.join(NOTES);
        std::fs::remove_file(&notes).map_err(StoreError::io("removing", &notes))?;
        Ok(workshop.finish(self.store)?)
    }

    /// Makes holes of what a slab has where it should be zero.
    fn clear_gaps(&self, part: Part, slab: u64, hashes: &[Hashed]) -> Result<(), ReceptionError> {
        let file = self.file(part)?;
        let chunks = self.chunks_of(part, slab);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let mut next = chunks.start;
        for index in hashes.iter().map(|hashed| hashed.index).chain([chunks.end]) {
            let (from, to) = (next * CHUNK_BYTES, index * CHUNK_BYTES);
            next = index + 1;
            if crate::files::data_extent(file, from, to.min(self.bytes_of(part))).is_some() {
                let punched = fallocate(file, mode, from as i64, (to - from) as i64);
                punched.map_err(io::Error::from).map_err(self.writing(part.file_name()))?;
            }
        }
        Ok(())
    }

    fn read_back(&self, part: Part, index: u64, into: &mut Chunk) -> Result<bool, ReceptionError> {
        let at = index.saturating_mul(CHUNK_BYTES);
        let inside = self.bytes_of(part).saturating_sub(at).min(CHUNK_BYTES) as usize;
        let (bytes, padding) = into.split_at_mut(inside);
        padding.fill(0);
        let read = self.file(part)?.read_exact_at(bytes, at);
        read.map_err(self.writing(part.file_name()))?;
        Ok(inside > 0)
    }

    fn bytes_of(&self, part: Part) -> u64 {
        self.manifest.part(part).map_or(0, |info| info.bytes)
    }

    fn file(&self, part: Part) -> Result<&File, ReceptionError> {
        let what = "the base has no such part";
        self.files.get(&part).ok_or(ReceptionError::Order { part, slab: 0, what })
    }

    fn known(&self, part: Part) -> Result<Option<Known>, ReceptionError> {
        let known = self.workshop.as_ref().map(|workshop| workshop.ledger.known(part));
        Ok(known.transpose().map_err(self.writing(part.file_name()))?)
    }

    fn writing(&self, name: &str) -> impl Fn(io::Error) -> StoreError + use<> {
        let dir = self.workshop.as_ref().map(Workshop::dir);
        let path = dir.unwrap_or(Path::new("")).join(name);
        move |source| StoreError::Io { what: "writing", path: path.clone(), source }
    }

    /// Bytes that what is here takes on disk.
    pub fn allocated_bytes(&self) -> u64 {
        let blocks = |file: &File| file.metadata().map_or(0, |meta| meta.blocks() * 512);
        self.files.values().map(blocks).sum()
    }
}

impl Drop for Reception<'_> {
    /// What came so far stays for the next try.
    fn drop(&mut self) {
        if let Some(mut workshop) = self.workshop.take() {
            let synced = self.files.values().all(|file| file.sync_data().is_ok());
            if synced {
                let _ = workshop.ledger.write_pending();
            }
            workshop.leave();
        }
    }
}

fn hashed(entry: &Entry) -> Hashed {
    Hashed { index: entry.index(), hash: *entry.hash() }
}

/// What a base's reception is found by.
fn reception_key(id: &BaseId) -> [u8; 32] {
    let mut key = blake3::Hasher::new_derive_key("howdah 2026 reception v1");
    key.update(&id.0);
    *key.finalize().as_bytes()
}

impl Base {
    /// The hashes of the chunks of a part that are not zero, of those with numbers in `range`. Reads the
    /// file, not the map: who cannot read it gets an error.
    pub fn hash_chunks(&self, part: Part, range: std::ops::Range<u64>) -> io::Result<Vec<Hashed>> {
        let Some(file) = self.part_file(part) else { return Ok(Vec::new()) };
        let bytes = self.manifest().part(part).map_or(0, |info| info.bytes);
        let end = range.end.saturating_mul(CHUNK_BYTES).min(bytes);
        let mut at = range.start.saturating_mul(CHUNK_BYTES);
        let (mut hashes, mut piece) = (Vec::new(), vec![0; 512 << 10]);
        while let Some((start, stop)) = crate::files::data_extent(file, at, end) {
            at = (start - start % CHUNK_BYTES).max(at);
            while at < stop {
                let want = (end - at).min(piece.len() as u64) as usize;
                let (read, _) = piece.split_at_mut(want);
                file.read_exact_at(read, at)?;
                let whole = want.next_multiple_of(CHUNK_SIZE);
                piece.get_mut(want..whole).unwrap_or_default().fill(0);
                let (chunks, _) = piece.get(..whole).unwrap_or_default().as_chunks::<CHUNK_SIZE>();
                for (index, chunk) in (at / CHUNK_BYTES..).zip(chunks) {
                    if !chunk::is_zero(chunk) {
                        hashes.push(Hashed { index, hash: ChunkHash::of(chunk) });
                    }
                }
                at += whole as u64;
            }
        }
        Ok(hashes)
    }

    /// [`Base::read`] that reads the file, not the map.
    pub fn read_file(&self, place: Place, into: &mut Chunk) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::InvalidInput, "no such chunk");
        let file = self.part_file(place.part).ok_or_else(missing)?;
        let bytes = self.manifest().part(place.part).map_or(0, |info| info.bytes);
        let at = place.index.saturating_mul(CHUNK_BYTES);
        let inside = bytes.saturating_sub(at).min(CHUNK_BYTES) as usize;
        if inside == 0 {
            return Err(missing());
        }
        let (read, padding) = into.split_at_mut(inside);
        padding.fill(0);
        file.read_exact_at(read, at)
    }
}
