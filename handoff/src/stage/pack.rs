//! Batches: what is compressed and sent as one.
//!
//! A body is a table of runs and the data that they refer to:
//!
//! ```text
//! generation u32 le | runs varint | run ... | chunk of a data run [4096] ... | delta ...
//! run = tag u8 | start delta | chunks - 1 varint
//!       for base and seen runs: reference delta
//!       for delta runs: bytes of each chunk's delta - 1 varint ...
//! tag = bits 0-2 kind: 0 reset, 1 zero, 2 base, 3 seen, 4 data, 5 delta
//!       bit  3   space: 0 RAM, 1 disk
//!       bits 4-5 for a base run its part, for a seen run the space referred to, for a delta run
//!                its codec, else 0
//!       bits 6-7 for a base run the number of its base, else 0
//! ```
//!
//! A run is `chunks` neighbours that travel the same way; the places or chunks that a base or seen
//! run refers to are neighbours too. A delta is a zigzag varint from where the last run in that
//! space (for references: of that part of that base, or that space) ended, at first from 0. All
//! integers are in their shortest form, so that a batch has exactly one encoding of each run.
//! Chunks and deltas follow the table apart from each other, each in the order of the table: alike
//! data compresses better side by side.

use std::borrow::Cow;

use guest_images::{CHUNK_SIZE, Chunk};

use super::{
    buffers::Buffers,
    delta::{DeltaCodec, MAX_DELTA_BYTES},
    pack_codec::{Cursor, MAX_VARINT_BYTES, put_varint},
    pack_run::{Ends, Run, RunKind},
    stats::Class,
};
use crate::{base_view::BasePlace, chunks::ChunkId};

/// The most data that a batch carries, in chunks; deltas count by their bytes. Codecs gain little from more, and this much is 0.8 s of a
/// 10 Mbps link uncompressed: the grain at which the sender can change its mind.
pub const MAX_BATCH_DATA_CHUNKS: usize = 256;

/// The most chunks that a batch speaks of: 32 MiB of the guest.
pub const MAX_BATCH_CHUNKS: usize = 8192;

/// Bytes that a run takes at most: tag, start, count below 2^14, reference.
const MAX_RUN_BYTES: usize = 1 + MAX_VARINT_BYTES + 2 + MAX_VARINT_BYTES;

/// The most data that a batch carries, in bytes: the last of it may be the longest delta.
const MAX_BATCH_DATA_BYTES: usize = (MAX_BATCH_DATA_CHUNKS - 1) * CHUNK_SIZE + MAX_DELTA_BYTES;

/// The largest body: generation, number of runs, runs of one chunk each, data.
pub const MAX_BATCH_BYTES: usize = 4 + 2 + MAX_BATCH_CHUNKS * MAX_RUN_BYTES + MAX_BATCH_DATA_BYTES;

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
        "a batch of {chunks} chunks with {data_bytes} bytes of data is over the limit of \
         {MAX_BATCH_CHUNKS} chunks and {MAX_BATCH_DATA_BYTES} bytes"
    )]
    TooManyChunks {
        /// Chunks of all kinds.
        chunks: u64,
        /// Bytes of chunks and deltas.
        data_bytes: u64,
    },
    /// A delta that is longer than the chunk it stands for.
    #[error("the delta announced at byte {at} of the batch has {len} bytes")]
    DeltaLength {
        /// Where its length is.
        at: usize,
        /// Its length.
        len: u64,
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

/// When a batch counts as full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Chunks' worth of data, at most [`MAX_BATCH_DATA_CHUNKS`].
    pub data_chunks: usize,
    /// Chunks of all kinds, at most [`MAX_BATCH_CHUNKS`].
    pub chunks: usize,
}

impl BatchLimits {
    /// The least that [`BatchLimits::of_bytes`] takes.
    pub const MIN_BYTES: usize = 256 << 10;
    /// What is usual: the largest compress 0.4 % better, and their buffers take the source's memory
    /// beyond its bound where much of a large guest has changed.
    pub const USUAL_BYTES: usize = 768 << 10;
    /// The most that [`BatchLimits::of_bytes`] takes.
    pub const MAX_BYTES: usize = MAX_BATCH_DATA_CHUNKS * CHUNK_SIZE;

    /// Batches of so much data, from [`BatchLimits::MIN_BYTES`] to [`BatchLimits::MAX_BYTES`].
    pub fn of_bytes(bytes: usize) -> Self {
        let bytes = bytes.clamp(Self::MIN_BYTES, Self::MAX_BYTES);
        Self { data_chunks: bytes / CHUNK_SIZE, chunks: MAX_BATCH_CHUNKS }
    }
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self { data_chunks: MAX_BATCH_DATA_CHUNKS, chunks: MAX_BATCH_CHUNKS }
    }
}

impl BatchLimits {
    /// No larger than the largest batch, no smaller than one chunk.
    fn cut(self) -> Self {
        Self {
            data_chunks: self.data_chunks.clamp(1, MAX_BATCH_DATA_CHUNKS),
            chunks: self.chunks.clamp(1, MAX_BATCH_CHUNKS),
        }
    }
}

/// A batch that has no room for one more chunk: finish it first.
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
    /// Lengths of the open run's deltas.
    open_deltas: Vec<u16>,
    table: Vec<u8>,
    runs: u64,
    data: Vec<u8>,
    deltas: Vec<u8>,
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
        Self {
            limits: limits.cut(),
            generation,
            ends: Ends::default(),
            open: None,
            open_deltas: Vec::new(),
            table: Vec::new(),
            runs: 0,
            data: Vec::new(),
            deltas: Vec::new(),
            chunks: 0,
            class_bytes: [0; Class::ALL.len()],
        }
    }

    /// Begins the next batch, if this one was finished, with the buffers that it has.
    pub fn begin(&mut self, generation: u32, limits: BatchLimits) {
        debug_assert!(self.is_empty() && self.open.is_none());
        (self.generation, self.limits) = (generation, limits.cut());
    }

    /// Whether it must be finished before the next chunk: it has no room for any that might come.
    pub fn is_full(&self) -> bool {
        self.chunks >= self.limits.chunks as u64
            || self.data_bytes() > (self.limits.data_chunks - 1) * CHUNK_SIZE
    }

    /// Bytes of chunks and deltas in it so far.
    pub fn data_bytes(&self) -> usize {
        self.data.len() + self.deltas.len()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.chunks == 0
    }

    /// The generation that it was made with.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Chunks in it so far.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Adds what is to become of a chunk. A delta must have 1 to [`MAX_DELTA_BYTES`] bytes.
    pub fn push(&mut self, id: ChunkId, what: What<'_>) -> Result<(), BatchFull> {
        if self.is_full() {
            return Err(BatchFull);
        }
        let next = Run::of(id, &what);
        match &mut self.open {
            Some(run) if run.continues_with(&next) => run.chunks += 1,
            _ => {
                self.close_run();
                self.open = Some(next);
            }
        }
        match what {
            What::Data(chunk) => self.data.extend_from_slice(chunk),
            What::Delta(_, delta) => {
                debug_assert!((1..=MAX_DELTA_BYTES).contains(&delta.len()));
                self.open_deltas.push(delta.len() as u16);
                self.deltas.extend_from_slice(delta);
            }
            _ => {}
        }
        self.chunks += 1;
        Ok(())
    }

    fn close_run(&mut self) {
        let Some(run) = self.open.take() else { return };
        let before = self.table.len();
        self.ends.encode(&run, &self.open_deltas, &mut self.table);
        self.runs += 1;
        let data = match run.kind {
            RunKind::Data => run.chunks * CHUNK_SIZE as u64,
            _ => self.open_deltas.drain(..).map(u64::from).sum(),
        };
        let class = match run.kind {
            RunKind::Reset => Class::Reset,
            RunKind::Zero => Class::Zero,
            RunKind::Base(at) => Class::of_place(at),
            RunKind::Seen(_) => Class::Seen,
            RunKind::Data => Class::Data,
            RunKind::Delta(_) => Class::Delta,
        };
        self.class_bytes[class as usize] += (self.table.len() - before) as u64 + data;
    }

    /// The batch, in a buffer of `buffers`. What is left is an empty batch of the same generation
    /// and limits.
    pub fn finish_into(&mut self, buffers: &Buffers) -> RawBatch {
        self.close_run();
        let size = 4 + MAX_VARINT_BYTES + self.table.len() + self.data_bytes();
        let mut body = buffers.take(size);
        body.extend_from_slice(&self.generation.to_le_bytes());
        put_varint(&mut body, self.runs);
        body.append(&mut self.table);
        body.append(&mut self.data);
        body.append(&mut self.deltas);
        self.ends = Ends::default();
        self.runs = 0;
        let chunks = std::mem::take(&mut self.chunks);
        RawBatch { body, chunks, class_bytes: std::mem::take(&mut self.class_bytes) }
    }

    /// The batch, for good.
    pub fn finish(mut self) -> RawBatch {
        self.finish_into(&Buffers::default())
    }
}

/// What is to become of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What<'a> {
    /// Its base state again.
    Reset,
    /// Zeros, where its base state is something else.
    Zero,
    /// The content of a place in a base.
    FromBase(BasePlace),
    /// The content that another chunk has now.
    FromSeen(ChunkId),
    /// This content.
    Data(&'a Chunk),
    /// What it holds now, changed by this delta.
    Delta(DeltaCodec, &'a [u8]),
}

/// One step of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// The chunk.
    pub id: ChunkId,
    /// What it becomes.
    pub what: What<'a>,
}

/// What a body's table says: a batch but for its data.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    generation: u32,
    runs: Vec<Run>,
    chunks: u64,
    delta_lens: Vec<u16>,
    /// Where the data begins, and where the deltas do.
    data_at: usize,
    deltas_at: usize,
}

impl Layout {
    /// Reads a body's table in place of what it was. Takes memory in proportion to the body,
    /// whatever that claims.
    pub(super) fn read(&mut self, body: &[u8]) -> Result<(), BatchError> {
        let Self { runs, delta_lens, .. } = self;
        runs.clear();
        delta_lens.clear();
        if body.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge { len: body.len() });
        }
        let mut cursor = Cursor::new(body);
        let generation = cursor.u32_le()?;
        let count = cursor.varint()?;
        let mut ends = Ends::default();
        let (mut chunks, mut data_chunks, mut delta_bytes) = (0u64, 0u64, 0u64);
        for _ in 0..count {
            let run = ends.decode(&mut cursor)?;
            chunks = chunks.saturating_add(run.chunks);
            if run.kind == RunKind::Data {
                data_chunks = data_chunks.saturating_add(run.chunks);
            }
            let check = |delta_bytes: u64| {
                let data_bytes =
                    data_chunks.saturating_mul(CHUNK_SIZE as u64).saturating_add(delta_bytes);
                let fits =
                    chunks <= MAX_BATCH_CHUNKS as u64 && data_bytes <= MAX_BATCH_DATA_BYTES as u64;
                fits.then_some(()).ok_or(BatchError::TooManyChunks { chunks, data_bytes })
            };
            check(delta_bytes)?;
            if let RunKind::Delta(_) = run.kind {
                for _ in 0..run.chunks {
                    let len = delta_len(&mut cursor)?;
                    delta_bytes += u64::from(len);
                    delta_lens.push(len);
                }
                check(delta_bytes)?;
            }
            runs.push(run);
        }
        // Both fit: checked above.
        let (data_len, delta_len) = (data_chunks as usize * CHUNK_SIZE, delta_bytes as usize);
        let rest = cursor.rest();
        if rest.len() != data_len + delta_len {
            return Err(BatchError::DataLength {
                expected: data_len + delta_len,
                actual: rest.len(),
            });
        }
        let data_at = body.len() - rest.len();
        (self.generation, self.chunks) = (generation, chunks);
        (self.data_at, self.deltas_at) = (data_at, data_at + data_len);
        Ok(())
    }

    /// The batch, of the body that was read.
    pub(super) fn batch<'a>(&'a self, body: &'a [u8]) -> Batch<'a> {
        Batch::of(Cow::Borrowed(self), body)
    }

    /// [`Batch::steps`] of it.
    pub(super) fn steps_of<'a>(&'a self, body: &'a [u8]) -> impl Iterator<Item = Step<'a>> {
        let Batch { data, deltas, .. } = self.batch(body);
        self.steps(data, deltas)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }
}

/// A batch that was received: well-formed, but its ids and places are not checked against a guest.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    layout: Cow<'a, Layout>,
    data: &'a [Chunk],
    deltas: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Reads a body. Takes memory in proportion to it, whatever it claims.
    pub fn parse(body: &'a [u8]) -> Result<Self, BatchError> {
        let mut layout = Layout::default();
        layout.read(body)?;
        Ok(Self::of(Cow::Owned(layout), body))
    }

    fn of(layout: Cow<'a, Layout>, body: &'a [u8]) -> Self {
        let Layout { data_at, deltas_at, .. } = *layout;
        let data = body.get(data_at..deltas_at).unwrap_or_default();
        let (data, _) = data.as_chunks::<CHUNK_SIZE>();
        let deltas = body.get(deltas_at..).unwrap_or_default();
        Self { layout, data, deltas }
    }

    /// The generation of every chunk in it.
    pub fn generation(&self) -> u32 {
        self.layout.generation
    }

    /// How many chunks it speaks of.
    pub fn chunks(&self) -> u64 {
        self.layout.chunks
    }

    /// Its steps, in the order in which they must be taken.
    pub fn steps(&self) -> impl Iterator<Item = Step<'a>> + '_ {
        self.layout.steps(self.data, self.deltas)
    }
}

impl Layout {
    fn steps<'a, 'b>(
        &'b self,
        data: &'a [Chunk],
        mut deltas: &'a [u8],
    ) -> impl Iterator<Item = Step<'a>> + use<'a, 'b> {
        let mut data = data.iter();
        let mut delta_lens = self.delta_lens.iter();
        let ops = self
            .runs
            .iter()
            .flat_map(|run| (0..run.chunks).map(move |n| (run.id_at(n), run.kind_at(n))));
        ops.map_while(move |(id, kind)| {
            // Never ends early: `parse` counted as much data as there is.
            let what = match kind {
                RunKind::Reset => What::Reset,
                RunKind::Zero => What::Zero,
                RunKind::Base(at) => What::FromBase(at),
                RunKind::Seen(source) => What::FromSeen(source),
                RunKind::Data => What::Data(data.next()?),
                RunKind::Delta(codec) => {
                    let (delta, rest) = deltas.split_at_checked((*delta_lens.next()?).into())?;
                    deltas = rest;
                    What::Delta(codec, delta)
                }
            };
            Some(Step { id, what })
        })
    }
}

/// The length of one delta.
fn delta_len(cursor: &mut Cursor<'_>) -> Result<u16, BatchError> {
    let at = cursor.at();
    let len = cursor.varint()?.saturating_add(1);
    let fits = u16::try_from(len).ok().filter(|len| usize::from(*len) <= MAX_DELTA_BYTES);
    fits.ok_or(BatchError::DeltaLength { at, len })
}

#[cfg(test)]
mod tests {
    use guest_images::{Part, Place};
    use proptest::prelude::*;

    use super::*;
    use crate::chunks::Space;

    fn id(disk: bool, index: u64) -> ChunkId {
        ChunkId { space: if disk { Space::Disk } else { Space::Ram }, index }
    }

    /// What becomes of a chunk, with data made from a number.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Kind {
        Reset,
        Zero,
        Base(BasePlace),
        Seen(ChunkId),
        Data(u8),
        Delta(DeltaCodec, usize),
    }

    static BYTES: [u8; 2 * MAX_DELTA_BYTES] = [7; 2 * MAX_DELTA_BYTES];

    impl Kind {
        fn what(&self) -> What<'static> {
            match *self {
                Kind::Reset => What::Reset,
                Kind::Zero => What::Zero,
                Kind::Base(at) => What::FromBase(at),
                Kind::Seen(source) => What::FromSeen(source),
                Kind::Data(n) => What::Data(BYTES[usize::from(n)..].first_chunk().unwrap()),
                Kind::Delta(codec, len) => What::Delta(codec, &BYTES[..len]),
            }
        }
    }

    fn ops() -> impl Strategy<Value = (ChunkId, Kind)> {
        let index = || prop_oneof![0u64..50, any::<u64>(), Just(u64::MAX), Just(u64::MAX - 1)];
        let part = prop::sample::select(Part::ALL.to_vec());
        let source = (any::<bool>(), index());
        let kind = prop_oneof![
            Just(Kind::Reset),
            Just(Kind::Zero),
            (0u8..4, part, index()).prop_map(|(base, part, index)| Kind::Base(BasePlace {
                base,
                place: Place { part, index }
            })),
            source.prop_map(|(disk, index)| Kind::Seen(id(disk, index))),
            any::<u8>().prop_map(Kind::Data),
            (any::<bool>(), prop_oneof![1usize..300, Just(MAX_DELTA_BYTES)]).prop_map(
                |(xor, len)| Kind::Delta(if xor { DeltaCodec::Xor } else { DeltaCodec::Runs }, len)
            ),
        ];
        (any::<bool>(), index(), kind).prop_map(|(disk, index, kind)| (id(disk, index), kind))
    }

    proptest! {
        #[test]
        fn round_trip(ops in prop::collection::vec(ops(), 0..60), generation: u32) {
            let mut batch = BatchBuilder::new(generation);
            for (id, kind) in &ops {
                batch.push(*id, kind.what()).unwrap();
            }
            let raw = batch.finish();
            // An op on the very last chunk number has no end to encode: refused, not wrapped.
            let touches_end = ops.iter().any(|(id, kind)| {
                let reference = match kind {
                    Kind::Base(at) => at.place.index,
                    Kind::Seen(source) => source.index,
                    _ => 0,
                };
                id.index == u64::MAX || reference == u64::MAX
            });
            match Batch::parse(&raw.body) {
                Ok(parsed) => {
                    prop_assert!(!touches_end);
                    let steps: Vec<_> = parsed.steps().collect();
                    let wanted: Vec<_> =
                        ops.iter().map(|(id, kind)| Step { id: *id, what: kind.what() }).collect();
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
            for (id, kind) in ops {
                batch.push(ChunkId { index: id.index / 2, ..id }, kind.what()).unwrap();
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
            let at = BasePlace { base: 3, place };
            batch.push(id(false, 1000 + n), What::FromBase(at)).unwrap();
        }
        assert_eq!(batch.chunks(), 100);
        let raw = batch.finish();
        assert!(raw.body.len() <= 12, "{} bytes", raw.body.len());
    }

    #[test]
    fn full_is_full() {
        let of = |kib: usize| BatchLimits::of_bytes(kib << 10).data_chunks;
        assert_eq!([0, 256, 600, 1024, 9999].map(of), [64, 64, 150, 256, 256]);
        let limits = BatchLimits { data_chunks: 2, chunks: 3 };
        let mut batch = BatchBuilder::with_limits(1, limits);
        batch.push(id(false, 1), What::Reset).unwrap();
        batch.push(id(false, 2), What::Reset).unwrap();
        assert!(!batch.is_full());
        batch.push(id(false, 4), Kind::Data(1).what()).unwrap();
        assert!(batch.is_full());
        assert_eq!(batch.push(id(false, 5), What::Reset), Err(BatchFull));

        let mut batch = BatchBuilder::with_limits(1, limits);
        batch.push(id(false, 4), Kind::Data(1).what()).unwrap();
        batch.push(id(true, 4), Kind::Data(1).what()).unwrap();
        assert!(batch.is_full());

        // With a delta in it there is no room for a whole chunk.
        let mut batch = BatchBuilder::with_limits(1, limits);
        batch.push(id(false, 4), Kind::Data(1).what()).unwrap();
        batch.push(id(false, 5), Kind::Delta(DeltaCodec::Runs, 1).what()).unwrap();
        assert!(batch.is_full());
    }

    /// The largest batch that can be built is one that can be parsed.
    #[test]
    fn the_largest_fits() {
        let mut batch = BatchBuilder::new(u32::MAX);
        for n in 0..MAX_BATCH_CHUNKS as u64 {
            let far = id(false, if n % 2 == 0 { n } else { u64::MAX / 2 + n });
            let data = n >= (MAX_BATCH_CHUNKS - MAX_BATCH_DATA_CHUNKS) as u64;
            let kind = if data { Kind::Data(1) } else { Kind::Seen(far) };
            batch.push(far, kind.what()).unwrap();
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
        assert_eq!(claim(chunks), Err(BatchError::TooManyChunks { chunks, data_bytes: 0 }));
        assert!(claim(u64::MAX).is_err());
        let runs = [&[0; 4][..], &[0xff; 9], &[1]].concat();
        assert_eq!(Batch::parse(&runs).unwrap_err(), BatchError::Truncated { at: 14 });
    }

    #[test]
    fn unknown_tags() {
        for tag in [6u8, 7, 0x10, 0x23, 0x34, 0x35, 0x41, 0x43, 0x45, 0x80, 0xff] {
            let body = [0, 0, 0, 0, 1, tag, 0, 0, 0];
            assert_eq!(Batch::parse(&body).unwrap_err(), BatchError::Tag { at: 5, tag });
        }
    }
}
