//! The giver: answers what the taker asks, and remembers nothing.

use std::io::{Read, Write};

use guest_images::{Base, BaseId, CHUNK_SIZE, Part, Place, Store, store::Hashed};

use crate::{
    link::Link,
    take::Progress,
    wire::{MAX_BASES, MAX_CHUNKS, MAX_HASHES, MAX_PIECE_BYTES, Message, Run, SyncError},
};

/// Bases that the giver opens to refer to.
const MAX_SHARED: usize = 8;
/// How hard what is sent is compressed: links between cloudlets are thinner than a core is slow.
const LEVEL: i32 = 3;

/// How a base was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Chunks whose contents were sent.
    pub sent_chunks: u64,
    /// Whether the taker had the base already.
    pub already: bool,
}

/// Gives `base` to the other side of the link, which asks. `progress` hears what was sent, and how much that
/// is at most: the taker may have chunks in bases of which the giver knows nothing.
pub(crate) fn give<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    store: &Store,
    base: &Base,
    progress: &mut dyn FnMut(Progress),
) -> Result<Given, SyncError> {
    let mut giver = Giver { store, base, shared: Vec::new(), refers: true, told_chunks: 0 };
    let mut given = Given::default();
    loop {
        let answer = match link.receive()? {
            Message::Have(ids) => giver.both(&ids)?,
            Message::Hashes { part, first, count, refer } => {
                giver.hashes(part, first, count, refer)?
            }
            Message::Chunks { part, runs } => {
                let (answer, count) = giver.chunks(part, &runs)?;
                given.sent_chunks += count;
                let done_bytes = given.sent_chunks * CHUNK_SIZE as u64;
                let total_bytes = done_bytes.max(giver.told_chunks * CHUNK_SIZE as u64);
                progress(Progress { done_bytes, total_bytes, ..Progress::default() });
                answer
            }
            Message::Machine(at) => giver.machine(at)?,
            Message::Done { already } => return Ok(Given { already, ..given }),
            _ => return Err(SyncError::Protocol("a taker does not say that")),
        };
        link.send(&answer)?;
    }
}

struct Giver<'a> {
    store: &'a Store,
    base: &'a Base,
    /// What the taker holds too, in the order it was told.
    shared: Vec<Base>,
    /// Whether the taker lets answers refer to those; once it does not, it asks for everything again.
    refers: bool,
    /// Chunks that were told by their hashes.
    told_chunks: u64,
}

impl Giver<'_> {
    fn reading(&self, source: std::io::Error) -> SyncError {
        SyncError::Read { id: self.base.id(), source }
    }

    fn both(&mut self, ids: &[[u8; 32]]) -> Result<Message, SyncError> {
        if ids.len() > MAX_BASES {
            return Err(SyncError::Protocol("it names too many bases"));
        }
        self.shared.clear();
        let mut numbers = Vec::new();
        for (number, id) in (0..).zip(ids) {
            // A base that does not open is of no use here.
            if self.shared.len() < MAX_SHARED
                && self.store.contains(&BaseId(*id))
                && let Ok(base) = self.store.get_id(&BaseId(*id))
            {
                self.shared.push(base);
                numbers.push(number);
            }
        }
        Ok(Message::Both(numbers))
    }

    fn part(&self, part: u8) -> Result<Part, SyncError> {
        let part = Part::try_from(part).ok().filter(|part| self.base.part_chunks(*part) > 0);
        part.ok_or(SyncError::Protocol("it asks for a part that the base does not have"))
    }

    fn hashes(
        &mut self,
        part: u8,
        first: u64,
        count: u32,
        refer: bool,
    ) -> Result<Message, SyncError> {
        let part = self.part(part)?;
        let end = first.saturating_add(u64::from(count));
        if u64::from(count) > MAX_HASHES || end > self.base.part_chunks(part) {
            return Err(SyncError::Protocol("it asks for hashes of chunks that are not there"));
        }
        let hashes = self.base.hash_chunks(part, first..end);
        let hashes = hashes.map_err(|error| self.reading(error))?;
        let places = self.places(&hashes, refer);
        if self.refers && !refer {
            (self.refers, self.told_chunks) = (false, 0);
        }
        self.told_chunks += places.iter().filter(|place| place.is_none()).count() as u64;
        Ok(Message::HashesAre(runs(&hashes, &places)))
    }

    /// Where shared bases hold these chunks.
    fn places(&self, hashes: &[Hashed], refer: bool) -> Vec<Option<(u8, Place)>> {
        let wanted: Vec<_> = hashes.iter().map(|hashed| hashed.hash).collect();
        let mut places = vec![None; hashes.len()];
        for (number, base) in (0u8..).zip(&self.shared).filter(|_| refer) {
            let mut found = vec![None; hashes.len()];
            base.lookup_batch(&wanted, &mut found);
            for (place, found) in places.iter_mut().zip(found) {
                *place = place.or(found.map(|found| (number, found)));
            }
        }
        places
    }

    fn chunks(&self, part: u8, runs: &[(u64, u32)]) -> Result<(Message, u64), SyncError> {
        let part = self.part(part)?;
        let total: u64 = runs.iter().map(|(_, count)| u64::from(*count)).sum();
        let ends = runs.iter().map(|(first, count)| first.saturating_add(u64::from(*count)));
        if total > MAX_CHUNKS as u64 || ends.max() > Some(self.base.part_chunks(part)) {
            return Err(SyncError::Protocol("it asks for chunks that are not there, or too many"));
        }
        let mut contents = Vec::with_capacity(total as usize * CHUNK_SIZE);
        let mut chunk = [0; CHUNK_SIZE];
        for (first, count) in runs {
            for index in *first..first + u64::from(*count) {
                let read = self.base.read_file(Place { part, index }, &mut chunk);
                read.map_err(|error| self.reading(error))?;
                contents.extend_from_slice(&chunk);
            }
        }
        let packed = zstd::bulk::compress(&contents, LEVEL)?;
        Ok((Message::ChunksAre(packed), total))
    }

    fn machine(&self, at: u64) -> Result<Message, SyncError> {
        let machine = self.base.machine().map_err(|error| self.reading(error))?;
        let machine = machine.unwrap_or_default();
        let rest = usize::try_from(at).ok().and_then(|at| machine.get(at..)).unwrap_or_default();
        Ok(Message::MachineIs(rest.get(..MAX_PIECE_BYTES).unwrap_or(rest).to_vec()))
    }
}

/// Puts neighbours together: those that a base holds as neighbours too, and those told by hash.
fn runs(hashes: &[Hashed], places: &[Option<(u8, Place)>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (hashed, place) in hashes.iter().zip(places) {
        let joined = match (runs.last_mut(), place) {
            (Some(Run::Base { at, count, base, part, first }), Some((number, place))) => {
                let behind = u64::from(*count);
                let joins = *at + behind == hashed.index
                    && (*base, *part) == (*number, place.part as u8)
                    && *first + behind == place.index;
                *count += u32::from(joins);
                joins
            }
            (Some(Run::Hashes { at, hashes }), None) => {
                let joins = *at + hashes.len() as u64 / 32 == hashed.index;
                if joins {
                    hashes.extend_from_slice(&hashed.hash.0);
                }
                joins
            }
            _ => false,
        };
        if !joined {
            runs.push(match place {
                Some((base, place)) => Run::Base {
                    at: hashed.index,
                    count: 1,
                    base: *base,
                    part: place.part as u8,
                    first: place.index,
                },
                None => Run::Hashes { at: hashed.index, hashes: hashed.hash.0.to_vec() },
            });
        }
    }
    runs
}
