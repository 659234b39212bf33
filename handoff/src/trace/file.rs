//! A trace as a file. `docs/formats.md` has the bytes.
//!
//! A file comes from outside: counts are bounded before anything is made of them, memory grows with
//! what was read, and nothing is a [`Trace`] before all of it was looked at and its hash compared.

use std::{
    io::{self, BufRead, Read, Write},
    sync::Arc,
    time::Duration,
};

use guest_images::{CHUNK_SIZE, Part, Place};

use super::{Change, ContentId, Contents, Trace, TraceBase};
use crate::{ChunkId, Geometry, Space};

const MAGIC: &[u8; 8] = b"HOWDTRC\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 104;
const HASH_BYTES: usize = 32;
/// How hard contents are compressed.
const LEVEL: i32 = 3;
/// Contents are compared over so many bytes, and no more memory is needed to read them.
const WINDOW_LOG: u32 = 23;
const PARTS: usize = Part::ALL.len();

/// The most chunks that RAM and disk have: 256 GiB.
pub const MAX_CHUNKS: u64 = 1 << 26;
/// The most different contents: 2 GiB.
pub const MAX_CONTENTS: u64 = 1 << 19;
/// The most changes.
pub const MAX_CHANGES: u64 = 1 << 23;
/// The longest trace: an hour and a bit.
pub const MAX_DURATION: Duration = Duration::from_secs(1 << 12);

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceFileError {
    /// It could not be read or written; also where it is cut off or its compression is damaged.
    #[error("it is cut off, damaged or cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Something else.
    #[error("it is not a trace")]
    NotATrace,
    /// A newer program wrote it.
    #[error("it has format {found}, this program reads {VERSION}")]
    Version {
        /// The format it has.
        found: u32,
    },
    /// More than a trace may have.
    #[error("it has {found} {what}, at most {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// The bound.
        most: u64,
    },
    /// What cannot be.
    #[error("entry {number} of its {table} {what}")]
    Entry {
        /// Where.
        table: &'static str,
        /// The number of the entry, from 0.
        number: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A hash that does not match.
    #[error("its {0} is damaged: the hash does not match")]
    Damaged(&'static str),
    /// Bytes behind the end.
    #[error("there is more behind its end")]
    Longer,
}

/// How much there is of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    geometry: Geometry,
    parts: [u64; PARTS],
    duration_us: u64,
    contents: u64,
    places: u64,
    initial: u64,
    changes: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let Self { geometry, parts, duration_us, contents, places, initial, changes } = *self;
        let numbers = [geometry.ram_chunks, geometry.disk_chunks].into_iter().chain(parts).chain([
            duration_us,
            contents,
            places,
            initial,
            changes,
        ]);
        for (slot, number) in bytes[16..].as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *slot = number.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, TraceFileError> {
        if !bytes.starts_with(MAGIC) {
            return Err(TraceFileError::NotATrace);
        }
        let found = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if found != VERSION {
            return Err(TraceFileError::Version { found });
        }
        let mut numbers = bytes[16..].as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n));
        let mut next = || numbers.next().unwrap_or_default();
        let geometry = Geometry { ram_chunks: next(), disk_chunks: next() };
        let parts = [next(), next(), next(), next()];
        let (duration_us, contents, places) = (next(), next(), next());
        let header = Self {
            geometry,
            parts,
            duration_us,
            contents,
            places,
            initial: next(),
            changes: next(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), TraceFileError> {
        let Geometry { ram_chunks, disk_chunks } = self.geometry;
        let most_us = u64::try_from(MAX_DURATION.as_micros()).unwrap_or(u64::MAX);
        let bounded = |what, found, most| match found {
            0.. if found <= most => Ok(()),
            _ => Err(TraceFileError::TooMany { what, found, most }),
        };
        bounded("chunks", ram_chunks.saturating_add(disk_chunks), MAX_CHUNKS)?;
        for chunks in self.parts {
            bounded("chunks in a part of its base", chunks, MAX_CHUNKS)?;
        }
        bounded("microseconds", self.duration_us, most_us)?;
        bounded("contents", self.contents, MAX_CONTENTS)?;
        bounded("places", self.places, MAX_CHANGES)?;
        bounded("chunks at its begin", self.initial, MAX_CHANGES)?;
        bounded("changes", self.changes, MAX_CHANGES)
    }
}

/// Writes a trace; says how many bytes that were.
pub fn write(trace: &Trace, to: impl Write) -> Result<u64, TraceFileError> {
    let held = trace.base.held();
    let header = Header {
        geometry: trace.geometry,
        parts: trace.base.parts(),
        duration_us: micros(trace.duration),
        contents: trace.contents().len() as u64,
        places: held.len() as u64,
        initial: trace.initial.len() as u64,
        changes: trace.changes.len() as u64,
    };
    header.check()?;
    let mut to = Counted { to, bytes: 0 };
    let bytes = header.encode();
    to.write_all(&bytes)?;
    to.write_all(blake3::hash(&bytes).as_bytes())?;
    let mut zstd = zstd::stream::write::Encoder::new(&mut to, LEVEL)?;
    zstd.window_log(WINDOW_LOG)?;
    let mut out = Hashed { inner: zstd, hasher: blake3::Hasher::new() };
    for (_, chunk) in trace.contents().iter().skip(1) {
        out.put(chunk)?;
    }
    for (Place { part, index }, content) in held {
        out.put(&entry(part as u8, index, content))?;
    }
    for (id, content) in &trace.initial {
        out.put(&entry(id.space as u8, id.index, *content))?;
    }
    for Change { at, id, content } in &trace.changes {
        out.put(&micros(*at).to_le_bytes())?;
        out.put(&entry(id.space as u8, id.index, *content))?;
    }
    let hash = out.hasher.finalize();
    let mut zstd = out.inner;
    zstd.write_all(hash.as_bytes())?;
    zstd.finish()?;
    to.flush()?;
    Ok(to.bytes)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn entry(kind: u8, index: u64, content: ContentId) -> [u8; 13] {
    let mut bytes = [0; 13];
    bytes[0] = kind;
    bytes[1..9].copy_from_slice(&index.to_le_bytes());
    bytes[9..].copy_from_slice(&content.number().to_le_bytes());
    bytes
}

struct Counted<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.to.write(bytes)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<W: Write> Hashed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.inner.write_all(bytes)
    }
}

impl<R: Read> Hashed<R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.hasher.update(&bytes);
        Ok(bytes)
    }

    fn time(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn number(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }
}

/// Reads a trace, which must be all there is.
pub fn read(mut from: impl BufRead) -> Result<Trace, TraceFileError> {
    let mut bytes = [0; HEADER_BYTES];
    // What is shorter than a magic is no damaged trace but something else.
    from.read_exact(&mut bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof if !bytes.starts_with(MAGIC) => TraceFileError::NotATrace,
        _ => e.into(),
    })?;
    let header = Header::decode(&bytes)?;
    let mut hash = [0; HASH_BYTES];
    from.read_exact(&mut hash)?;
    if blake3::hash(&bytes).as_bytes() != &hash {
        return Err(TraceFileError::Damaged("header"));
    }
    let mut zstd = zstd::stream::read::Decoder::with_buffer(from)?.single_frame();
    zstd.window_log_max(WINDOW_LOG)?;
    let mut body = Hashed { inner: zstd, hasher: blake3::Hasher::new() };
    let trace = tables(&header, &mut body)?;
    let expected = body.hasher.finalize();
    let mut zstd = body.inner;
    zstd.read_exact(&mut hash)?;
    if expected.as_bytes() != &hash {
        return Err(TraceFileError::Damaged("body"));
    }
    // The frame's end, and nothing behind it.
    if zstd.read(&mut [0])? != 0 || !zstd.finish().fill_buf()?.is_empty() {
        return Err(TraceFileError::Longer);
    }
    Ok(trace)
}

fn tables(header: &Header, body: &mut Hashed<impl Read>) -> Result<Trace, TraceFileError> {
    let mut contents = Contents::new();
    for number in 1..header.contents {
        let chunk = body.take::<CHUNK_SIZE>()?;
        let room = contents.push(&chunk);
        room.ok_or(TraceFileError::Entry { table: "contents", number, what: "is one too many" })?;
    }
    let there = contents.len() as u64;
    let mut held = Vec::new();
    for number in 0..header.places {
        let wrong = |what| TraceFileError::Entry { table: "places", number, what };
        let [kind] = body.take()?;
        let part = Part::ALL.iter().copied().find(|part| *part as u8 == kind);
        let part = part.ok_or_else(|| wrong("is of no part"))?;
        let place = Place { part, index: body.time()? };
        let content = content(body.number()?, there).ok_or_else(|| wrong("has no content"))?;
        if place.index >= header.parts[part as usize] {
            return Err(wrong("lies outside its part"));
        }
        if held.last().is_some_and(|(last, _)| *last >= place) {
            return Err(wrong("is not behind the one before"));
        }
        held.push((place, content));
    }
    let mut initial: Vec<(ChunkId, ContentId)> = Vec::new();
    for number in 0..header.initial {
        let wrong = |what| TraceFileError::Entry { table: "first chunks", number, what };
        let (id, content) = chunk(header, body, there)?.map_err(wrong)?;
        if initial.last().is_some_and(|(last, _)| *last >= id) {
            return Err(wrong("is not behind the one before"));
        }
        initial.push((id, content));
    }
    let mut changes: Vec<Change> = Vec::new();
    let mut last = 0;
    for number in 0..header.changes {
        let wrong = |what| TraceFileError::Entry { table: "changes", number, what };
        let at = body.time()?;
        if at < last || at > header.duration_us {
            return Err(wrong("is before the last one or after the end"));
        }
        last = at;
        let (id, content) = chunk(header, body, there)?.map_err(wrong)?;
        changes.push(Change { at: Duration::from_micros(at), id, content });
    }
    Ok(Trace {
        geometry: header.geometry,
        duration: Duration::from_micros(header.duration_us),
        base: Arc::new(TraceBase::new(header.parts, held, Arc::new(contents))),
        initial,
        changes,
    })
}

fn content(number: u32, there: u64) -> Option<ContentId> {
    (u64::from(number) < there.max(1)).then_some(ContentId(number))
}

type Named = Result<(ChunkId, ContentId), &'static str>;

fn chunk(header: &Header, body: &mut Hashed<impl Read>, there: u64) -> io::Result<Named> {
    let [kind] = body.take()?;
    let (index, number) = (body.time()?, body.number()?);
    let space = match kind {
        0 => Space::Ram,
        1 => Space::Disk,
        _ => return Ok(Err("is of no space")),
    };
    let id = ChunkId { space, index };
    if !header.geometry.contains(id) {
        return Ok(Err("lies outside the guest"));
    }
    Ok(content(number, there).map(|content| (id, content)).ok_or("has no content"))
}

#[cfg(test)]
mod tests {
    use guest_images::Chunk;
    use proptest::prelude::*;

    use super::*;
    use crate::trace::TraceBuilder;

    fn encode(trace: &Trace) -> Vec<u8> {
        let mut bytes = Vec::new();
        assert_eq!(write(trace, &mut bytes).unwrap(), bytes.len() as u64);
        bytes
    }

    fn same(one: &Trace, two: &Trace) -> bool {
        one.geometry == two.geometry
            && one.duration == two.duration
            && one.initial == two.initial
            && one.changes == two.changes
            && one.base.held() == two.base.held()
            && one.base.parts() == two.base.parts()
            && one.contents().iter().eq(two.contents().iter())
    }

    fn filled(byte: u8) -> Chunk {
        let mut chunk = [byte; CHUNK_SIZE];
        chunk[7] = 1;
        chunk
    }

    fn any_trace() -> impl Strategy<Value = Trace> {
        let places = prop::collection::vec((0usize..PARTS, 0u64..50, any::<u8>()), 0..8);
        let first = prop::collection::vec((any::<bool>(), 0u64..40, any::<u8>()), 0..20);
        let changes =
            prop::collection::vec((0u64..5_000, any::<bool>(), 0u64..40, any::<u8>()), 0..30);
        (places, first, changes).prop_map(|(places, first, changes)| {
            let id = |disk: bool, index| {
                let space = if disk { Space::Disk } else { Space::Ram };
                ChunkId { space, index }
            };
            let geometry = Geometry { ram_chunks: 40, disk_chunks: 40 };
            let mut trace = TraceBuilder::new(geometry, [50; PARTS], 1000);
            for (part, index, byte) in places {
                trace.base(Place { part: Part::ALL[part], index }, &filled(byte)).unwrap();
            }
            for (disk, index, byte) in first {
                trace.initial(id(disk, index), &filled(byte)).unwrap();
            }
            let mut at = Duration::ZERO;
            for (after, disk, index, byte) in changes {
                at += Duration::from_micros(after);
                trace.change(at, id(disk, index), &filled(byte)).unwrap();
            }
            trace.finish(Duration::from_millis(20))
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(trace in any_trace()) {
            let bytes = encode(&trace);
            let read = read(&bytes[..]).unwrap();
            prop_assert!(same(&trace, &read));
            prop_assert_eq!(encode(&read), bytes);
        }

        /// Not one bit may differ, nothing may be missing, nothing may follow.
        #[test]
        fn no_damage_goes_unseen(trace in any_trace(), at: prop::sample::Index, bit in 0u32..8) {
            let whole = encode(&trace);
            let mut bytes = whole.clone();
            bytes[at.index(whole.len())] ^= 1 << bit;
            // zstd ignores some bits of its own; what was read is the same trace then.
            if let Ok(read) = read(&bytes[..]) {
                prop_assert!(same(&trace, &read));
            }
            prop_assert!(read(&whole[..at.index(whole.len())]).is_err());
            bytes = whole;
            bytes.push(0);
            prop_assert!(matches!(read(&bytes[..]), Err(TraceFileError::Longer)));
        }

        /// Whatever numbers a header has, reading ends with an error and needs little.
        #[test]
        fn a_header_alone_costs_nothing(numbers in prop::collection::vec(any::<u64>(), 11), shift in 0u32..64) {
            let mut bytes = [0; HEADER_BYTES];
            bytes[..8].copy_from_slice(MAGIC);
            bytes[8] = 1;
            for (slot, number) in bytes[16..].as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
                *slot = (number >> shift).to_le_bytes();
            }
            let mut file = bytes.to_vec();
            file.extend_from_slice(blake3::hash(&bytes).as_bytes());
            prop_assert!(read(&file[..]).is_err());
        }

        #[test]
        fn junk_is_no_trace(junk in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(read(&junk[..]).is_err());
        }
    }

    #[test]
    fn other_versions_are_named() {
        let geometry = Geometry { ram_chunks: 1, disk_chunks: 0 };
        let trace = TraceBuilder::new(geometry, [0; PARTS], 10).finish(Duration::ZERO);
        let mut bytes = encode(&trace);
        bytes[8] = 9;
        let error = read(&bytes[..]).unwrap_err();
        assert_eq!(error.to_string(), "it has format 9, this program reads 1");
        assert!(matches!(read(&b"short"[..]), Err(TraceFileError::NotATrace)));
    }
}
