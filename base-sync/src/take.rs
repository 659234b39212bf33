//! The taker: finds out what a base is made of, takes what it has from its own bases, and asks for the
//! rest.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io::{Read, Write},
    os::unix::fs::FileExt,
};

use guest_images::{
    Base, BaseId, CHUNK_SIZE, Chunk, ChunkHash, Manifest, Part, Place, Store,
    store::{Hashed, Reception, ReceptionError},
};

use crate::{
    link::Link,
    session::Host,
    wire::{MAX_BASES, MAX_CHUNKS, Message, No, Run, SyncError, Why},
};

/// Questions for hashes that wait for their answer: half a megabyte each at most.
const HASHES_AHEAD: usize = 4;
/// Questions for chunks that wait for their answer: a megabyte each at most, before compression.
const CHUNKS_AHEAD: usize = 8;
/// Chunks that are remembered, so that what the base holds twice travels once.
const MAX_REMEMBERED: usize = 1 << 20;
const CHUNK_BYTES: u64 = CHUNK_SIZE as u64;

/// How far a base is.
///
/// A giver tells what it sent, and as the total what it may have to at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the base that are here.
    pub done_bytes: u64,
    /// Bytes that it has, chunks of zeros not counted; zero until that is known.
    pub total_bytes: u64,
    /// Bytes that came over the link.
    pub received_bytes: u64,
}

/// How a base was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Its chunks that are not zero.
    pub chunks: u64,
    /// Of those, what an earlier try had left here.
    pub resumed_chunks: u64,
    /// What was found in bases here, or twice in this one.
    pub local_chunks: u64,
    /// What came over the link.
    pub received_chunks: u64,
    /// Whether the base was here before.
    pub already: bool,
}

/// What a base is taken with.
pub struct Taking<'a> {
    /// Where to.
    pub store: &'a Store,
    /// What may be.
    pub host: &'a dyn Host,
    /// Hears how far it is.
    pub progress: &'a mut dyn FnMut(Progress),
    /// Whether a base of this id that is here is damaged, and to be replaced; what is whole in it is used.
    pub heal: bool,
}

/// Takes the base of `manifest` from the other side of the link, which answers. The caller says Done.
pub(crate) fn take<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    manifest: &Manifest,
    taking: &mut Taking<'_>,
) -> Result<Taken, SyncError> {
    let (store, id) = (taking.store, manifest.id());
    if !taking.heal && store.contains(&id) && store.get_id(&id).is_ok() {
        return Ok(Taken { already: true, ..Taken::default() });
    }
    let reception = store.receive(manifest.clone())?;
    let mut locals = Locals::of(store, &id, taking.heal)?;
    let mut taker = Taker {
        id,
        reception,
        taken: Taken::default(),
        progress: Progress::default(),
        remembered: HashMap::new(),
        in_flight: VecDeque::new(),
    };
    taker.survey(link, &mut locals, taking)?;
    for (part, slabs) in taker.reception.parts() {
        for slab in 0..slabs {
            taker.fetch(link, &locals, taking, part, slab)?;
        }
    }
    while !taker.in_flight.is_empty() {
        taker.land(link, taking)?;
    }
    let machine = manifest.memory.as_ref().map(|memory| memory.machine.bytes);
    let machine = machine.map(|bytes| fetch_machine(link, bytes)).transpose()?;
    if let Some(machine) = &machine {
        taking.host.machine(machine).map_err(SyncError::Unwilling)?;
    }
    taker.reception.finish(machine.as_deref(), taking.heal)?;
    Ok(taker.taken)
}

fn fetch_machine<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    bytes: u64,
) -> Result<Vec<u8>, SyncError> {
    let mut machine = Vec::new();
    while (machine.len() as u64) < bytes {
        link.send(&Message::Machine(machine.len() as u64))?;
        let Message::MachineIs(piece) = link.receive()? else {
            return Err(SyncError::Protocol("it does not answer with the machine state"));
        };
        if piece.is_empty() {
            return Err(SyncError::Damaged(ReceptionError::Machine));
        }
        machine.extend_from_slice(&piece);
    }
    Ok(machine)
}

/// What is here already.
struct Locals {
    bases: Vec<Base>,
    /// Of `bases`, those that the giver has too, as it numbers them.
    shared: Vec<usize>,
    /// The parts of the damaged base that is to be healed.
    damaged: Vec<(Part, File)>,
}

impl Locals {
    fn of(store: &Store, id: &BaseId, heal: bool) -> Result<Self, SyncError> {
        let listed = store.list()?.into_iter().filter_map(|listed| listed.base.ok());
        // Of a damaged base nothing may be said that depends on what it holds where.
        let bases = listed.filter(|base| base.id() != *id).take(MAX_BASES).collect();
        let parts = Part::ALL.into_iter().filter(|_| heal);
        let open = |part: Part| Some((part, File::open(store.part_path(id, part)).ok()?));
        Ok(Self { bases, shared: Vec::new(), damaged: parts.filter_map(open).collect() })
    }

    /// Tells the giver what is here, and takes note of what it has too.
    fn agree<R: Read, W: Write>(&mut self, link: &mut Link<'_, R, W>) -> Result<(), SyncError> {
        link.send(&Message::Have(self.bases.iter().map(|base| base.id().0).collect()))?;
        let Message::Both(numbers) = link.receive()? else {
            return Err(SyncError::Protocol("it does not answer which bases it has"));
        };
        self.shared = numbers.iter().map(|number| usize::from(*number)).collect();
        if self.shared.iter().any(|number| *number >= self.bases.len()) {
            return Err(SyncError::Protocol("it has bases that were not named"));
        }
        Ok(())
    }

    /// The hash of a chunk that the giver refers to. Of one that cannot be read, a hash that nothing has.
    fn referred(&self, base: u8, place: Place) -> Result<ChunkHash, SyncError> {
        let outside = SyncError::Protocol("it refers to a chunk that is not there");
        let number = self.shared.get(usize::from(base));
        let base = number.and_then(|number| self.bases.get(*number));
        let base = base.filter(|base| place.index < base.part_chunks(place.part));
        let mut chunk = [0; CHUNK_SIZE];
        match base.ok_or(outside)?.read_file(place, &mut chunk) {
            Ok(()) => Ok(ChunkHash::of(&chunk)),
            Err(_) => Ok(ChunkHash([0; 32])),
        }
    }

    /// Chunks with these hashes, each from anywhere here where it is whole.
    fn find(
        &self,
        part: Part,
        wanted: &[Hashed],
        found: &mut dyn FnMut(&Hashed, &Chunk) -> Result<(), SyncError>,
    ) -> Result<Vec<Hashed>, SyncError> {
        let hashes: Vec<_> = wanted.iter().map(|hashed| hashed.hash).collect();
        let mut places: Vec<Vec<Option<Place>>> = Vec::new();
        for base in &self.bases {
            let mut of_base = vec![None; hashes.len()];
            base.lookup_batch(&hashes, &mut of_base);
            places.push(of_base);
        }
        let mut missing = Vec::new();
        let mut chunk = [0; CHUNK_SIZE];
        for (at, hashed) in wanted.iter().enumerate() {
            let here = |chunk: &mut Chunk| {
                if self.read_damaged(part, hashed.index, chunk) && is(chunk, hashed) {
                    return true;
                }
                self.bases.iter().zip(&places).any(|(base, places)| {
                    let place = places.get(at).copied().flatten();
                    place.is_some_and(|p| base.read_file(p, chunk).is_ok() && is(chunk, hashed))
                })
            };
            match here(&mut chunk) {
                true => found(hashed, &chunk)?,
                false => missing.push(*hashed),
            }
        }
        Ok(missing)
    }

    fn read_damaged(&self, part: Part, index: u64, into: &mut Chunk) -> bool {
        let Some((_, file)) = self.damaged.iter().find(|(of, _)| *of == part) else {
            return false;
        };
        into.fill(0);
        let (mut at, mut filled) = (index.saturating_mul(CHUNK_BYTES), 0);
        while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, at) {
                Ok(0) => break,
                Ok(read) => (at, filled) = (at + read as u64, filled + read),
                Err(_) => return false,
            }
        }
        filled > 0
    }
}

fn is(chunk: &Chunk, hashed: &Hashed) -> bool {
    ChunkHash::of(chunk) == hashed.hash
}

/// What an answer will be, or what is to be done once all before it came.
enum InFlight {
    Chunks { part: Part, wanted: Vec<Hashed> },
    EndOfSlab { part: Part, slab: u64, copies: Vec<(Hashed, Place)>, durable: bool },
}

struct Taker<'a> {
    id: BaseId,
    reception: Reception<'a>,
    taken: Taken,
    progress: Progress,
    /// Where chunks are in this base that came or were asked for.
    remembered: HashMap<ChunkHash, Place>,
    in_flight: VecDeque<InFlight>,
}

impl Taker<'_> {
    /// Finds out what all parts are made of, and that this is the base of the manifest.
    fn survey<R: Read, W: Write>(
        &mut self,
        link: &mut Link<'_, R, W>,
        locals: &mut Locals,
        taking: &mut Taking<'_>,
    ) -> Result<(), SyncError> {
        locals.agree(link)?;
        match self.survey_with(link, locals, taking, true) {
            // A base here to which the giver refers is damaged, or what an earlier try left is: once more,
            // with nothing but hashes.
            Err(SyncError::Damaged(error)) => {
                tracing::warn!(id = %self.id, %error, "asking for all hashes");
                self.reception.forget()?;
                self.survey_with(link, locals, taking, false)
            }
            done => done,
        }
    }

    fn survey_with<R: Read, W: Write>(
        &mut self,
        link: &mut Link<'_, R, W>,
        locals: &Locals,
        taking: &mut Taking<'_>,
        refer: bool,
    ) -> Result<(), SyncError> {
        (self.taken, self.progress) = (Taken::default(), Progress::default());
        for (part, slabs) in self.reception.parts() {
            let unknown = (0..slabs).filter(|slab| !self.reception.has_slab(part, *slab));
            let unknown: Vec<u64> = unknown.collect();
            let mut asked = unknown.iter();
            for (number, slab) in unknown.iter().enumerate() {
                let ahead = if number == 0 { HASHES_AHEAD } else { 1 };
                for slab in asked.by_ref().take(ahead) {
                    let range = self.reception.chunks_of(part, *slab);
                    let count = (range.end - range.start) as u32;
                    let (part, first) = (part as u8, range.start);
                    link.send(&Message::Hashes { part, first, count, refer })?;
                }
                let Message::HashesAre(runs) = link.receive()? else {
                    return Err(SyncError::Protocol("it does not answer with hashes"));
                };
                let hashes = unfold(&runs, self.reception.chunks_of(part, *slab), locals)?;
                self.reception.note(part, *slab, &hashes)?;
                self.count(hashes.len() as u64, taking)?;
            }
            for slab in (0..slabs).filter(|slab| self.reception.has_slab(part, *slab)) {
                let chunks = self.reception.slab_bytes(part, slab) / CHUNK_BYTES;
                self.taken.chunks += chunks;
            }
            self.reception.check(part)?;
        }
        self.progress.total_bytes = self.taken.chunks * CHUNK_BYTES;
        (taking.progress)(self.progress);
        Ok(())
    }

    /// Counts chunks that must have room, before more of them are heard of.
    fn count(&mut self, chunks: u64, taking: &mut Taking<'_>) -> Result<(), SyncError> {
        self.taken.chunks += chunks;
        let bytes = self.taken.chunks * CHUNK_BYTES;
        let more = bytes.saturating_sub(self.reception.allocated_bytes());
        taking.host.room(more).map_err(SyncError::Unwilling)
    }

    /// Takes of a slab what is here, and asks for the rest.
    fn fetch<R: Read, W: Write>(
        &mut self,
        link: &mut Link<'_, R, W>,
        locals: &Locals,
        taking: &mut Taking<'_>,
        part: Part,
        slab: u64,
    ) -> Result<(), SyncError> {
        link.check()?;
        if self.reception.has_slab(part, slab) {
            let chunks = self.reception.slab_bytes(part, slab) / CHUNK_BYTES;
            self.taken.resumed_chunks += chunks;
            self.done(chunks, link, taking);
            return Ok(());
        }
        let all = self.reception.noted(part, slab)?.len() as u64;
        let missing = self.reception.open_slab(part, slab)?;
        self.taken.resumed_chunks += all - missing.len() as u64;
        let mut local = 0;
        let reception = &mut self.reception;
        let missing = locals.find(part, &missing, &mut |hashed, chunk| {
            local += 1;
            Ok(reception.put(Place { part, index: hashed.index }, chunk)?)
        })?;
        self.taken.local_chunks += local;
        self.done(all - missing.len() as u64, link, taking);
        let (copies, wanted) = self.once(part, missing);
        let durable = !wanted.is_empty();
        for wanted in wanted.chunks(MAX_CHUNKS) {
            while self.in_flight.len() >= CHUNKS_AHEAD {
                self.land(link, taking)?;
            }
            link.send(&Message::Chunks { part: part as u8, runs: neighbours(wanted) })?;
            self.in_flight.push_back(InFlight::Chunks { part, wanted: wanted.to_vec() });
        }
        self.in_flight.push_back(InFlight::EndOfSlab { part, slab, copies, durable });
        while matches!(self.in_flight.front(), Some(InFlight::EndOfSlab { .. })) {
            self.land(link, taking)?;
        }
        Ok(())
    }

    /// Parts chunks into those that are or will be elsewhere in this base, and those to ask for.
    fn once(&mut self, part: Part, missing: Vec<Hashed>) -> (Vec<(Hashed, Place)>, Vec<Hashed>) {
        let (mut copies, mut wanted) = (Vec::new(), Vec::new());
        for hashed in missing {
            if let Some(place) = self.remembered.get(&hashed.hash) {
                copies.push((hashed, *place));
                continue;
            }
            if self.remembered.len() < MAX_REMEMBERED {
                self.remembered.insert(hashed.hash, Place { part, index: hashed.index });
            }
            wanted.push(hashed);
        }
        (copies, wanted)
    }

    /// Does what comes next: takes an answer, or ends a slab.
    fn land<R: Read, W: Write>(
        &mut self,
        link: &mut Link<'_, R, W>,
        taking: &mut Taking<'_>,
    ) -> Result<(), SyncError> {
        match self.in_flight.pop_front() {
            Some(InFlight::Chunks { part, wanted }) => {
                let Message::ChunksAre(packed) = link.receive()? else {
                    return Err(SyncError::Protocol("it does not answer with chunks"));
                };
                let bytes = wanted.len() * CHUNK_SIZE;
                let contents = zstd::bulk::decompress(&packed, bytes);
                let contents = contents.ok().filter(|contents| contents.len() == bytes);
                let contents =
                    contents.ok_or(SyncError::Protocol("what it sends cannot be unpacked"))?;
                let (chunks, _) = contents.as_chunks::<CHUNK_SIZE>();
                for (hashed, chunk) in wanted.iter().zip(chunks) {
                    self.reception.put(Place { part, index: hashed.index }, chunk)?;
                }
                self.taken.received_chunks += wanted.len() as u64;
                self.done(wanted.len() as u64, link, taking);
            }
            Some(InFlight::EndOfSlab { part, slab, copies, durable }) => {
                let mut chunk = [0; CHUNK_SIZE];
                for (hashed, from) in &copies {
                    self.reception.read(*from, &mut chunk)?;
                    self.reception.put(Place { part, index: hashed.index }, &chunk)?;
                }
                self.taken.local_chunks += copies.len() as u64;
                self.done(copies.len() as u64, link, taking);
                self.reception.close_slab(part, slab, durable)?;
            }
            None => {}
        }
        Ok(())
    }

    fn done<R, W>(&mut self, chunks: u64, link: &Link<'_, R, W>, taking: &mut Taking<'_>) {
        self.progress.done_bytes += chunks * CHUNK_BYTES;
        self.progress.received_bytes = link.received_bytes;
        (taking.progress)(self.progress);
    }
}

/// The hashes that runs stand for, which must be of these chunks, in order.
fn unfold(
    runs: &[Run],
    chunks: std::ops::Range<u64>,
    locals: &Locals,
) -> Result<Vec<Hashed>, SyncError> {
    let outside = SyncError::Protocol("it gives hashes of other chunks than were asked for");
    let mut hashes: Vec<Hashed> = Vec::new();
    for run in runs {
        let (at, count) = match run {
            Run::Base { at, count, .. } => (*at, u64::from(*count)),
            Run::Hashes { at, hashes } => (*at, hashes.len() as u64 / 32),
        };
        let end = at.checked_add(count).filter(|end| *end <= chunks.end);
        let next = hashes.last().map_or(chunks.start, |hashed| hashed.index + 1);
        // Beyond this, every number is of a chunk that was asked for: the rest cannot grow.
        let (true, Some(end)) = (at >= next, end) else { return Err(outside) };
        match run {
            Run::Base { base, part, first, .. } => {
                let part = Part::try_from(*part);
                let part = part.map_err(|_| SyncError::Protocol("it refers to no part"))?;
                for index in at..end {
                    let from = Place { part, index: first.saturating_add(index - at) };
                    hashes.push(Hashed { index, hash: locals.referred(*base, from)? });
                }
            }
            Run::Hashes { hashes: bytes, .. } => {
                let (rows, []) = bytes.as_chunks::<32>() else { return Err(outside) };
                let row = |(index, row): (u64, &[u8; 32])| Hashed { index, hash: ChunkHash(*row) };
                hashes.extend((at..end).zip(rows).map(row));
            }
        }
    }
    Ok(hashes)
}

/// Neighbours as runs.
fn neighbours(wanted: &[Hashed]) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for hashed in wanted {
        match runs.last_mut() {
            Some((first, count)) if *first + u64::from(*count) == hashed.index => *count += 1,
            _ => runs.push((hashed.index, 1)),
        }
    }
    runs
}

/// What a taker that has no room says.
impl No {
    /// There is less room than a base needs.
    pub fn no_space(needed_bytes: u64, available_bytes: u64) -> Self {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let text = format!(
            "the base needs {} MiB more in the store, {} MiB may be used",
            mib(needed_bytes),
            mib(available_bytes)
        );
        Self::new(Why::NoSpace, text)
    }
}
