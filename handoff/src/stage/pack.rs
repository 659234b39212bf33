//! Batches: what is compressed and sent as one.
//!
//! A body is a table of runs and the data that they refer to:
//!
//! ```text
//! generation u32 le | runs varint | run ... | data: 4096 bytes for each chunk of a data run
//! run = tag u8 | start delta | chunks - 1 varint | reference delta, for base and seen runs only
//! tag = bits 0-2 kind: 0 reset, 1 zero, 2 base, 3 seen, 4 data
//!       bit  3   space: 0 RAM, 1 disk
//!       bits 4-5 for a base run its part, for a seen run the space referred to, else 0
//!       bits 6-7 0
//! ```
//!
//! A run is `chunks` neighbours that travel the same way; the places or chunks that a base or seen
//! run refers to are neighbours too. A delta is a zigzag varint from where the last run in that
//! space (for references: of that part, or that space) ended, at first from 0. All integers are in
//! their shortest form, so that a batch has exactly one encoding of each run.

use guest_images::{CHUNK_SIZE, Chunk, Part, Place};

use super::{
    classify::Op,
    pack_codec::{Cursor, MAX_VARINT_BYTES, put_delta, put_varint},
    stats::Class,
};
use crate::chunks::{ChunkId, Space};

/// The most data that a batch carries. Codecs gain little from more, and this much is 0.8 s of a
/// 10 Mbps link uncompressed: the grain at which the sender can change its mind.
pub const MAX_BATCH_DATA_CHUNKS: usize = 256;

/// The most chunks that a batch speaks of: 32 MiB of the guest.
pub const MAX_BATCH_CHUNKS: usize = 8192;

/// Bytes that a run takes at most: tag, start, count below 2^14, reference.
const MAX_RUN_BYTES: usize = 1 + MAX_VARINT_BYTES + 2 + MAX_VARINT_BYTES;

/// The largest body: generation, number of runs, runs of one chunk each, data.
pub const MAX_BATCH_BYTES: usize =
    4 + 2 + MAX_BATCH_CHUNKS * MAX_RUN_BYTES + MAX_BATCH_DATA_CHUNKS * CHUNK_SIZE;

/// Why a body is not a batch. Positions are byte offsets in the body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Larger than any batch.
    #[error("a batch of {len} bytes is larger than the {MAX_BATCH_BYTES} allowed")]
    TooLarge {
        /// Its size.
        len: usize,
    },
    /// Ends inside its table.
    #[error("the batch ends at byte {at}, inside its table of runs")]
    Truncated {
        /// Where it ends.
        at: usize,
    },
    /// A number that is too large or not in its shortest form.
    #[error("the number at byte {at} of the batch is overlong")]
    Varint {
        /// Where it starts.
        at: usize,
    },
    /// A tag that means nothing.
    #[error("the run at byte {at} of the batch has unknown tag {tag:#04x}")]
    Tag {
        /// Where the run starts.
        at: usize,
        /// Its tag.
        tag: u8,
    },
    /// A run beyond the last number of a chunk.
    #[error("the run at byte {at} of the batch goes past the last chunk number")]
    Overflow {
        /// Where the run starts.
        at: usize,
    },
    /// More chunks than a batch may have.
    #[error(
        "a batch of {chunks} chunks, {data_chunks} of them with data, is over the limit of \
         {MAX_BATCH_CHUNKS} and {MAX_BATCH_DATA_CHUNKS}"
    )]
    TooManyChunks {
        /// Chunks of all kinds.
        chunks: u64,
        /// Chunks with data.
        data_chunks: u64,
    },
    /// The data is not what the table speaks of.
    #[error("the batch carries {actual} bytes of data where its table speaks of {expected}")]
    DataLength {
        /// Bytes that the table speaks of.
        expected: usize,
        /// Bytes after the table.
        actual: usize,
    },
}

/// What a run does to its chunks; a reference is that of its first chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunKind {
    Reset,
    Zero,
    Base(Place),
    Seen(ChunkId),
    Data,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    kind: RunKind,
    first: ChunkId,
    chunks: u64,
}

impl Run {
    fn of(id: ChunkId, op: Op) -> Option<Self> {
        let kind = match (op, id.space) {
            (Op::Unchanged, _) => return None,
            // In RAM, zeros are the base state: one way to say one thing.
            (Op::Reset, _) | (Op::Zero, Space::Ram) => RunKind::Reset,
            (Op::Zero, Space::Disk) => RunKind::Zero,
            (Op::FromBase(place), _) => RunKind::Base(place),
            (Op::FromSeen(source), _) => RunKind::Seen(source),
            (Op::Data, _) => RunKind::Data,
        };
        Some(Self { kind, first: id, chunks: 1 })
    }

    /// The run's effect on its chunk number `n`.
    fn kind_at(&self, n: u64) -> RunKind {
        match self.kind {
            RunKind::Base(p) => RunKind::Base(Place { part: p.part, index: p.index + n }),
            RunKind::Seen(s) => RunKind::Seen(ChunkId { space: s.space, index: s.index + n }),
            kind => kind,
        }
    }

    fn id_at(&self, n: u64) -> ChunkId {
        ChunkId { space: self.first.space, index: self.first.index + n }
    }

    /// Whether `next`, a run of one chunk, goes on where this one ends.
    fn continues_with(&self, next: &Run) -> bool {
        let ends = [Some(self.first.index), reference_of(self.kind)];
        ends.into_iter().flatten().all(|start| start.checked_add(self.chunks).is_some())
            && self.id_at(self.chunks) == next.first
            && self.kind_at(self.chunks) == next.kind
    }

    fn tag(&self) -> u8 {
        let (kind, reference) = match self.kind {
            RunKind::Reset => (0, 0),
            RunKind::Zero => (1, 0),
            RunKind::Base(place) => (2, place.part as u8),
            RunKind::Seen(source) => (3, source.space as u8),
            RunKind::Data => (4, 0),
        };
        kind | (self.first.space as u8) << 3 | reference << 4
    }

    /// A run of unknown extent from its tag, or `None` if the tag means nothing.
    fn from_tag(tag: u8) -> Option<Self> {
        let space = if tag & 8 == 0 { Space::Ram } else { Space::Disk };
        let kind = match (tag & 7, tag >> 4) {
            (0, 0) => RunKind::Reset,
            (1, 0) if space == Space::Disk => RunKind::Zero,
            (2, 0) => RunKind::Base(Place { part: Part::Disk, index: 0 }),
            (2, 1) => RunKind::Base(Place { part: Part::Kernel, index: 0 }),
            (2, 2) => RunKind::Base(Place { part: Part::Initramfs, index: 0 }),
            (2, 3) => RunKind::Base(Place { part: Part::Memory, index: 0 }),
            (3, 0) => RunKind::Seen(ChunkId { space: Space::Ram, index: 0 }),
            (3, 1) => RunKind::Seen(ChunkId { space: Space::Disk, index: 0 }),
            (4, 0) => RunKind::Data,
            _ => return None,
        };
        Some(Self { kind, first: ChunkId { space, index: 0 }, chunks: 1 })
    }
}

fn reference_of(kind: RunKind) -> Option<u64> {
    match kind {
        RunKind::Base(place) => Some(place.index),
        RunKind::Seen(source) => Some(source.index),
        _ => None,
    }
}

/// Where the last run in each space, and the last reference to each part and space, ended.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    ids: [u64; 2],
    parts: [u64; Part::ALL.len()],
    sources: [u64; 2],
}

impl Ends {
    fn id(&mut self, space: Space) -> &mut u64 {
        &mut self.ids[space as usize]
    }

    fn reference(&mut self, kind: RunKind) -> Option<&mut u64> {
        match kind {
            RunKind::Base(place) => Some(&mut self.parts[place.part as usize]),
            RunKind::Seen(source) => Some(&mut self.sources[source.space as usize]),
            _ => None,
        }
    }

    fn encode(&mut self, run: &Run, out: &mut Vec<u8>) {
        out.push(run.tag());
        let end = self.id(run.first.space);
        put_delta(out, *end, run.first.index);
        *end = run.first.index.wrapping_add(run.chunks);
        put_varint(out, run.chunks - 1);
        if let (Some(end), Some(start)) = (self.reference(run.kind), reference_of(run.kind)) {
            put_delta(out, *end, start);
            *end = start.wrapping_add(run.chunks);
        }
    }

    fn decode(&mut self, cursor: &mut Cursor<'_>) -> Result<Run, BatchError> {
        let at = cursor.at();
        let tag = cursor.byte()?;
        let mut run = Run::from_tag(tag).ok_or(BatchError::Tag { at, tag })?;
        let end = self.id(run.first.space);
        run.first.index = cursor.delta(*end)?;
        run.chunks = cursor.varint()?.checked_add(1).ok_or(BatchError::Overflow { at })?;
        let past = |start: u64| start.checked_add(run.chunks).ok_or(BatchError::Overflow { at });
        *end = past(run.first.index)?;
        if let Some(end) = self.reference(run.kind) {
            let start = cursor.delta(*end)?;
            *end = past(start)?;
            match &mut run.kind {
                RunKind::Base(place) => place.index = start,
                RunKind::Seen(source) => source.index = start,
                _ => {}
            }
        }
        Ok(run)
    }
}

/// When a batch counts as full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Chunks with data, at most [`MAX_BATCH_DATA_CHUNKS`].
    pub data_chunks: usize,
    /// Chunks of all kinds, at most [`MAX_BATCH_CHUNKS`].
    pub chunks: usize,
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self { data_chunks: MAX_BATCH_DATA_CHUNKS, chunks: MAX_BATCH_CHUNKS }
    }
}

/// A full batch was given one more chunk: finish it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the batch is full: finish it before the next chunk is pushed")]
pub struct BatchFull;

/// A finished batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawBatch {
    /// The body: what is compressed, and what [`Batch::parse`] takes.
    pub body: Vec<u8>,
    /// Chunks it speaks of.
    pub chunks: u64,
    /// Bytes of the body that each class takes, by the number of the class.
    pub class_bytes: [u64; Class::ALL.len()],
}

/// Collects ops into a batch.
#[derive(Debug)]
pub struct BatchBuilder {
    limits: BatchLimits,
    generation: u32,
    ends: Ends,
    open: Option<Run>,
    table: Vec<u8>,
    runs: u64,
    data: Vec<u8>,
    chunks: u64,
    class_bytes: [u64; Class::ALL.len()],
}

impl BatchBuilder {
    /// An empty batch of the given generation: that of every chunk it will speak of.
    pub fn new(generation: u32) -> Self {
        Self::with_limits(generation, BatchLimits::default())
    }

    /// An empty batch that is full earlier. Limits beyond the largest batch are cut to it, those
    /// of 0 raised to 1.
    pub fn with_limits(generation: u32, limits: BatchLimits) -> Self {
        let limits = BatchLimits {
            data_chunks: limits.data_chunks.clamp(1, MAX_BATCH_DATA_CHUNKS),
            chunks: limits.chunks.clamp(1, MAX_BATCH_CHUNKS),
        };
        Self {
            limits,
            generation,
            ends: Ends::default(),
            open: None,
            table: Vec::new(),
            runs: 0,
            data: Vec::with_capacity(limits.data_chunks * CHUNK_SIZE),
            chunks: 0,
            class_bytes: [0; Class::ALL.len()],
        }
    }

    /// Whether it must be finished before the next chunk.
    pub fn is_full(&self) -> bool {
        self.chunks >= self.limits.chunks as u64
            || self.data.len() >= self.limits.data_chunks * CHUNK_SIZE
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.chunks == 0
    }

    /// Chunks in it so far.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Adds what is to become of a chunk; its content is taken for [`Op::Data`] only, and
    /// [`Op::Unchanged`] adds nothing.
    pub fn push(&mut self, id: ChunkId, op: Op, chunk: &Chunk) -> Result<(), BatchFull> {
        let Some(next) = Run::of(id, op) else { return Ok(()) };
        if self.is_full() {
            return Err(BatchFull);
        }
        match &mut self.open {
            Some(run) if run.continues_with(&next) => run.chunks += 1,
            _ => {
                self.close_run();
                self.open = Some(next);
            }
        }
        if next.kind == RunKind::Data {
            self.data.extend_from_slice(chunk);
        }
        self.chunks += 1;
        Ok(())
    }

    fn close_run(&mut self) {
        let Some(run) = self.open.take() else { return };
        let before = self.table.len();
        self.ends.encode(&run, &mut self.table);
        self.runs += 1;
        let (class, data) = match run.kind {
            RunKind::Reset => (Class::Reset, 0),
            RunKind::Zero => (Class::Zero, 0),
            RunKind::Base(_) => (Class::Base, 0),
            RunKind::Seen(_) => (Class::Seen, 0),
            RunKind::Data => (Class::Data, run.chunks * CHUNK_SIZE as u64),
        };
        self.class_bytes[class as usize] += (self.table.len() - before) as u64 + data;
    }

    /// The batch.
    pub fn finish(mut self) -> RawBatch {
        self.close_run();
        let size = 4 + MAX_VARINT_BYTES + self.table.len() + self.data.len();
        let mut body = Vec::with_capacity(size);
        body.extend_from_slice(&self.generation.to_le_bytes());
        put_varint(&mut body, self.runs);
        body.append(&mut self.table);
        body.append(&mut self.data);
        RawBatch { body, chunks: self.chunks, class_bytes: self.class_bytes }
    }
}

/// What is to become of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What<'a> {
    /// Its base state again.
    Reset,
    /// Zeros, on disk.
    Zero,
    /// The content of a place in the base.
    FromBase(Place),
    /// The content that another chunk has now.
    FromSeen(ChunkId),
    /// This content.
    Data(&'a Chunk),
}

/// One step of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// The chunk.
    pub id: ChunkId,
    /// What it becomes.
    pub what: What<'a>,
}

/// A batch that was received: well-formed, but its ids and places are not checked against a guest.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    generation: u32,
    runs: Vec<Run>,
    chunks: u64,
    data: &'a [Chunk],
}

impl<'a> Batch<'a> {
    /// Reads a body. Takes memory in proportion to it, whatever it claims.
    pub fn parse(body: &'a [u8]) -> Result<Self, BatchError> {
        if body.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge { len: body.len() });
        }
        let mut cursor = Cursor::new(body);
        let generation = cursor.u32_le()?;
        let count = cursor.varint()?;
        let mut ends = Ends::default();
        let mut runs = Vec::new();
        let (mut chunks, mut data_chunks) = (0u64, 0u64);
        for _ in 0..count {
            let run = ends.decode(&mut cursor)?;
            chunks = chunks.saturating_add(run.chunks);
            if run.kind == RunKind::Data {
                data_chunks = data_chunks.saturating_add(run.chunks);
            }
            if chunks > MAX_BATCH_CHUNKS as u64 || data_chunks > MAX_BATCH_DATA_CHUNKS as u64 {
                return Err(BatchError::TooManyChunks { chunks, data_chunks });
            }
            runs.push(run);
        }
        let (data, rest) = cursor.rest().as_chunks::<CHUNK_SIZE>();
        if data.len() as u64 != data_chunks || !rest.is_empty() {
            return Err(BatchError::DataLength {
                expected: data_chunks as usize * CHUNK_SIZE,
                actual: cursor.rest().len(),
            });
        }
        Ok(Self { generation, runs, chunks, data })
    }

    /// The generation of every chunk in it.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// How many chunks it speaks of.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Its steps, in the order in which they must be taken.
    pub fn steps(&self) -> impl Iterator<Item = Step<'a>> + '_ {
        let mut data = self.data.iter();
        let ops = self
            .runs
            .iter()
            .flat_map(|run| (0..run.chunks).map(move |n| (run.id_at(n), run.kind_at(n))));
        ops.map_while(move |(id, kind)| {
            let what = match kind {
                RunKind::Reset => What::Reset,
                RunKind::Zero => What::Zero,
                RunKind::Base(place) => What::FromBase(place),
                RunKind::Seen(source) => What::FromSeen(source),
                // Never ends early: `parse` counted as many chunks of data as there are.
                RunKind::Data => What::Data(data.next()?),
            };
            Some(Step { id, what })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(disk: bool, index: u64) -> ChunkId {
        ChunkId { space: if disk { Space::Disk } else { Space::Ram }, index }
    }

    fn ops() -> impl Strategy<Value = (ChunkId, Op)> {
        let index = || prop_oneof![0u64..50, any::<u64>(), Just(u64::MAX), Just(u64::MAX - 1)];
        let part = prop::sample::select(Part::ALL.to_vec());
        (any::<bool>(), index(), 0u8..6, part, index(), any::<bool>()).prop_map(
            |(disk, index, kind, part, reference, source_disk)| {
                let op = match kind {
                    0 => Op::Unchanged,
                    1 => Op::Reset,
                    2 => Op::Zero,
                    3 => Op::FromBase(Place { part, index: reference }),
                    4 => Op::FromSeen(id(source_disk, reference)),
                    _ => Op::Data,
                };
                (id(disk, index), op)
            },
        )
    }

    fn content(n: usize) -> Chunk {
        [n as u8 | 1; CHUNK_SIZE]
    }

    fn expected(id: ChunkId, op: Op, chunk: &Chunk) -> Option<Step<'_>> {
        let what = match (op, id.space) {
            (Op::Unchanged, _) => return None,
            (Op::Zero, Space::Ram) | (Op::Reset, _) => What::Reset,
            (Op::Zero, Space::Disk) => What::Zero,
            (Op::FromBase(place), _) => What::FromBase(place),
            (Op::FromSeen(source), _) => What::FromSeen(source),
            (Op::Data, _) => What::Data(chunk),
        };
        Some(Step { id, what })
    }

    proptest! {
        #[test]
        fn round_trip(ops in prop::collection::vec(ops(), 0..60), generation: u32) {
            let chunks: Vec<Chunk> = (0..ops.len()).map(content).collect();
            let mut batch = BatchBuilder::new(generation);
            for ((id, op), chunk) in ops.iter().zip(&chunks) {
                batch.push(*id, *op, chunk).unwrap();
            }
            let raw = batch.finish();
            // An op on the very last chunk number has no end to encode: refused, not wrapped.
            let touches_end = ops.iter().any(|(id, op)| {
                let reference = match op {
                    Op::FromBase(place) => place.index,
                    Op::FromSeen(source) => source.index,
                    _ => 0,
                };
                *op != Op::Unchanged && (id.index == u64::MAX || reference == u64::MAX)
            });
            match Batch::parse(&raw.body) {
                Ok(parsed) => {
                    prop_assert!(!touches_end);
                    let steps: Vec<_> = parsed.steps().collect();
                    let wanted: Vec<_> = ops.iter().zip(&chunks)
                        .filter_map(|((id, op), chunk)| expected(*id, *op, chunk)).collect();
                    prop_assert_eq!(parsed.generation(), generation);
                    prop_assert_eq!(parsed.chunks(), raw.chunks);
                    prop_assert_eq!(steps, wanted);
                }
                Err(e) => prop_assert!(touches_end, "{}", e),
            }
            let table: u64 = raw.class_bytes.iter().sum();
            prop_assert!(raw.body.len() as u64 - table <= 4 + 2);
        }

        #[test]
        fn arbitrary_bytes(body in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(batch) = Batch::parse(&body) {
                prop_assert_eq!(batch.steps().count() as u64, batch.chunks());
            }
        }

        /// A well-formed batch has nothing after it and lacks nothing.
        #[test]
        fn no_more_no_less(ops in prop::collection::vec(ops(), 0..20), extra: u8) {
            let mut batch = BatchBuilder::new(1);
            for (id, op) in ops {
                batch.push(ChunkId { index: id.index / 2, ..id }, op, &content(1)).unwrap();
            }
            let mut body = batch.finish().body;
            if Batch::parse(&body).is_ok() {
                body.push(extra);
                prop_assert!(Batch::parse(&body).is_err());
                body.truncate(body.len() - 2);
                prop_assert!(Batch::parse(&body).is_err());
            }
        }
    }

    #[test]
    fn neighbours_share_a_run() {
        let mut batch = BatchBuilder::new(1);
        for n in 0..100 {
            let place = Place { part: Part::Disk, index: 5000 + n };
            batch.push(id(false, 1000 + n), Op::FromBase(place), &content(1)).unwrap();
        }
        assert_eq!(batch.chunks(), 100);
        let raw = batch.finish();
        assert!(raw.body.len() <= 12, "{} bytes", raw.body.len());
    }

    #[test]
    fn full_is_full() {
        let limits = BatchLimits { data_chunks: 2, chunks: 3 };
        let mut batch = BatchBuilder::with_limits(1, limits);
        batch.push(id(false, 1), Op::Reset, &content(1)).unwrap();
        batch.push(id(false, 2), Op::Reset, &content(1)).unwrap();
        assert!(!batch.is_full());
        batch.push(id(false, 4), Op::Data, &content(1)).unwrap();
        assert!(batch.is_full());
        assert_eq!(batch.push(id(false, 5), Op::Data, &content(1)), Err(BatchFull));
        batch.push(id(false, 5), Op::Unchanged, &content(1)).unwrap();

        let mut batch = BatchBuilder::with_limits(1, limits);
        batch.push(id(false, 4), Op::Data, &content(1)).unwrap();
        batch.push(id(true, 4), Op::Data, &content(1)).unwrap();
        assert!(batch.is_full());
    }

    /// The largest batch that can be built is one that can be parsed.
    #[test]
    fn the_largest_fits() {
        let mut batch = BatchBuilder::new(u32::MAX);
        for n in 0..MAX_BATCH_CHUNKS as u64 {
            let far = id(false, if n % 2 == 0 { n } else { u64::MAX / 2 + n });
            let data = n >= (MAX_BATCH_CHUNKS - MAX_BATCH_DATA_CHUNKS) as u64;
            let op = if data { Op::Data } else { Op::FromSeen(far) };
            batch.push(far, op, &content(1)).unwrap();
        }
        assert!(batch.is_full());
        let raw = batch.finish();
        assert!(raw.body.len() <= MAX_BATCH_BYTES);
        assert_eq!(Batch::parse(&raw.body).unwrap().chunks(), MAX_BATCH_CHUNKS as u64);
    }

    #[test]
    fn little_input_cannot_claim_much() {
        let claim = |count: u64| {
            let mut body = vec![0; 4];
            body.extend([1, 0, 0]);
            put_varint(&mut body, count - 1);
            Batch::parse(&body).map(|batch| batch.chunks())
        };
        assert_eq!(claim(MAX_BATCH_CHUNKS as u64), Ok(MAX_BATCH_CHUNKS as u64));
        let chunks = MAX_BATCH_CHUNKS as u64 + 1;
        assert_eq!(claim(chunks), Err(BatchError::TooManyChunks { chunks, data_chunks: 0 }));
        assert!(claim(u64::MAX).is_err());
        let runs = [&[0; 4][..], &[0xff; 9], &[1]].concat();
        assert_eq!(Batch::parse(&runs).unwrap_err(), BatchError::Truncated { at: 14 });
    }

    #[test]
    fn unknown_tags() {
        for tag in [1u8, 5, 6, 7, 0x10, 0x23, 0x42, 0x80, 0xff] {
            let body = [0, 0, 0, 0, 1, tag, 0, 0, 0];
            assert_eq!(Batch::parse(&body).unwrap_err(), BatchError::Tag { at: 5, tag });
        }
    }
}
