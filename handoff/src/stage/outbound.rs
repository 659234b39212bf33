//! The stages of the source that work on chunks, as one: chunks in, batches out.
//!
//! ```text
//! slot (a group of copies) -> classify -> delta -> pack -> poll
//! ```

use std::{collections::VecDeque, sync::Arc};

use guest_images::{CHUNK_SIZE, Chunk, chunk::ZERO_CHUNK};

use super::{
    buffers::Buffers,
    classify::{Classifier, ClassifyError, Decision, Op},
    delta::DeltaStage,
    delta_cache::SentCache,
    forecast::Forecast,
    options::StageOptions,
    pack::{BatchBuilder, BatchLimits, RawBatch, What},
    repeats::Repeats,
    stats::{Class, ClassTimes, CpuWatch, Share, Stage, Stats},
};
use crate::{
    base_view::Bases,
    chunks::{ChunkId, Geometry},
    root::{StateRoot, StateTable},
};

/// Chunks that are worked on at once: their copies stay in the cache of one core.
pub const GROUP_CHUNKS: usize = 64;

/// In one of so many groups, the CPU time of every chunk is taken by itself: asking for it takes as
/// long as comparing a chunk.
pub const SAMPLE_GROUPS: u64 = 32;

/// How much data the first batch of a generation has that begins small, in chunks: each further one may
/// have twice as much. A link with nothing to do is not kept waiting for a whole batch.
const FIRST_DATA_CHUNKS: usize = 8;
/// And how many chunks of all kinds, for each of data.
const CHUNKS_PER_DATA_CHUNK: usize = GROUP_CHUNKS / FIRST_DATA_CHUNKS;

/// Takes copies of chunks, gives batches. Does no I/O but to read the base.
///
/// Every batch must reach the target, in order: see [`Classifier`].
pub struct Outbound {
    classifier: Classifier,
    delta: DeltaStage,
    ids: Vec<ChunkId>,
    chunks: Vec<Chunk>,
    decisions: Vec<Decision>,
    sampled_ns: Vec<u64>,
    groups: u64,
    limits: BatchLimits,
    /// Chunks of data that the next batch may have while batches still grow.
    growing: usize,
    batch: BatchBuilder,
    ready: VecDeque<RawBatch>,
    buffers: Buffers,
    stats: Stats,
    times: ClassTimes,
    repeats: Repeats,
}

impl Outbound {
    /// For a target on which every chunk has its base state.
    pub fn new(bases: Bases, geometry: Geometry, options: StageOptions) -> Self {
        let limits = BatchLimits::default();
        Self {
            classifier: Classifier::new(bases, geometry).with_options(options),
            delta: DeltaStage::new(&options),
            ids: Vec::with_capacity(GROUP_CHUNKS),
            chunks: vec![*ZERO_CHUNK; GROUP_CHUNKS],
            decisions: Vec::with_capacity(GROUP_CHUNKS),
            sampled_ns: Vec::with_capacity(GROUP_CHUNKS),
            groups: 0,
            limits,
            growing: usize::MAX,
            batch: BatchBuilder::with_limits(0, limits),
            ready: VecDeque::new(),
            buffers: Buffers::default(),
            stats: Stats::default(),
            times: ClassTimes::default(),
            repeats: Repeats::default(),
        }
    }

    /// The same for a target that holds what `table` says: see [`Classifier::with_start`].
    pub fn with_start(self, table: StateTable) -> Self {
        Self { classifier: self.classifier.with_start(table), ..self }
    }

    /// The same with deltas against what this side received of that.
    pub fn with_received(self, received: Arc<SentCache>) -> Self {
        Self { delta: self.delta.with_received(received), ..self }
    }

    /// The same with batches that are full earlier.
    pub fn with_limits(self, limits: BatchLimits) -> Self {
        Self { limits, batch: BatchBuilder::with_limits(0, limits), ..self }
    }

    /// The same with bodies in buffers of `buffers`: give them back there.
    pub fn with_buffers(self, buffers: Buffers) -> Self {
        Self { buffers, ..self }
    }

    /// From the next generation on, batches are full at other limits.
    pub fn set_limits(&mut self, limits: BatchLimits) {
        self.limits = limits;
    }

    /// Chunks given from now on are of this generation. Call it before the first chunk, and after
    /// [`Outbound::end`] for each further generation.
    pub fn begin(&mut self, generation: u32) {
        debug_assert!(self.ids.is_empty() && self.batch.is_empty());
        self.growing = usize::MAX;
        self.batch.begin(generation, self.limits);
    }

    /// The same for a generation of which nothing is on its way yet: its first batches are small, and
    /// soon ready.
    pub fn begin_small(&mut self, generation: u32) {
        self.begin(generation);
        self.growing = FIRST_DATA_CHUNKS;
        self.batch.begin(generation, self.limits_now());
    }

    fn limits_now(&self) -> BatchLimits {
        let chunks = self.growing.saturating_mul(CHUNKS_PER_DATA_CHUNK);
        BatchLimits {
            data_chunks: self.limits.data_chunks.min(self.growing),
            chunks: self.limits.chunks.min(chunks),
        }
    }

    /// Room for a copy of chunk `id`, to be filled before the next call.
    pub fn slot(&mut self, id: ChunkId) -> Result<&mut Chunk, ClassifyError> {
        if self.ids.len() == GROUP_CHUNKS {
            self.work()?;
        }
        self.ids.push(id);
        Ok(&mut self.chunks[self.ids.len() - 1])
    }

    /// Room for copies of the next chunks of `ids`, as many as the group under way can take: their
    /// numbers, and a place for each, to be filled before the next call. None once `ids` has ended.
    pub fn slots(
        &mut self,
        ids: &mut impl Iterator<Item = ChunkId>,
    ) -> Result<(&[ChunkId], &mut [Chunk]), ClassifyError> {
        if self.ids.len() == GROUP_CHUNKS {
            self.work()?;
        }
        let first = self.ids.len();
        self.ids.extend(ids.take(GROUP_CHUNKS - first));
        let (taken, end) = (self.ids.get(first..).unwrap_or_default(), self.ids.len());
        Ok((taken, self.chunks.get_mut(first..end).unwrap_or_default()))
    }

    /// Works off what was given and closes the last batch of the generation.
    pub fn end(&mut self) -> Result<(), ClassifyError> {
        self.work()?;
        if !self.batch.is_empty() {
            let mut watch = CpuWatch::start();
            let last = self.batch.finish_into(&self.buffers);
            count_batch(&mut self.stats, &last);
            self.ready.push_back(last);
            self.stats[Stage::Pack].cpu_ns += watch.lap_ns();
        }
        Ok(())
    }

    /// The next batch that is complete. At most a few are: poll after every chunk, and after the
    /// end until there is none.
    pub fn poll(&mut self) -> Option<RawBatch> {
        self.ready.pop_front()
    }

    /// What the chunks would cost that were put into the last [`Outbound::slots`]: nothing is sent of them,
    /// and nothing noted. Between generations only.
    pub fn foresee(&mut self, forecast: &mut Forecast) -> Result<(), ClassifyError> {
        debug_assert!(self.batch.is_empty());
        self.decisions.clear();
        let chunks = self.chunks.get(..self.ids.len()).unwrap_or_default();
        self.classifier.foresee_group(&self.ids, chunks, &mut self.decisions)?;
        self.decisions.iter().for_each(|decision| forecast.count(decision));
        self.ids.clear();
        Ok(())
    }

    /// Takes the group through the stages.
    fn work(&mut self) -> Result<(), ClassifyError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        self.decisions.clear();
        self.sampled_ns.clear();
        let chunks = self.chunks.get(..self.ids.len()).unwrap_or_default();
        let sample = self.groups.is_multiple_of(SAMPLE_GROUPS).then_some(&mut self.sampled_ns);
        let mut watch = CpuWatch::start();
        self.classifier.classify_group(&self.ids, chunks, &mut self.decisions, sample)?;
        let classify_ns = watch.lap_ns();
        self.delta.encode_group(self.classifier.bases(), &self.ids, chunks, &self.decisions);
        let delta_ns = watch.lap_ns();
        self.pack();
        let pack_ns = watch.lap_ns();
        self.groups += 1;
        self.account([classify_ns, delta_ns, pack_ns]);
        self.ids.clear();
        Ok(())
    }

    fn pack(&mut self) {
        for (i, ((id, decision), chunk)) in
            self.ids.iter().zip(&self.decisions).zip(&self.chunks).enumerate()
        {
            let delta = self.delta.what(i);
            let class = if delta.is_some() { Class::Delta } else { decision.op.class() };
            self.stats.count(class);
            // In the first generation what the target has is from elsewhere.
            if decision.op == Op::Data && decision.before.is_some() && self.batch.generation() > 1 {
                match &delta {
                    Some(What::Delta(_, bytes)) => self.repeats.delta(bytes.len()),
                    _ => self.repeats.full(),
                }
            }
            if let Some(ns) = self.sampled_ns.get(i) {
                self.times.sample(class, *ns);
            }
            let Some(what) = delta.or_else(|| decision.op.what(chunk)) else { continue };
            // Closed as soon as it is full, so that it has room for any one chunk.
            let pushed = self.batch.push(*id, what);
            debug_assert!(pushed.is_ok());
            if self.batch.is_full() {
                let full = self.batch.finish_into(&self.buffers);
                count_batch(&mut self.stats, &full);
                self.ready.push_back(full);
                if self.growing != usize::MAX {
                    self.growing = self.growing.saturating_mul(2);
                    self.batch.begin(self.batch.generation(), self.limits_now());
                }
            }
        }
    }

    /// Enters the group that was worked on.
    fn account(&mut self, cpu_ns: [u64; 3]) {
        let bytes_of = |chunks: usize| (chunks * CHUNK_SIZE) as u64;
        let data = self.decisions.iter().filter(|d| d.op == Op::Data).count();
        let (delta_bytes, deltas) = self.delta.made();
        let after_delta = bytes_of(data - deltas) + delta_bytes as u64;
        let shares = [
            (Stage::Classify, self.ids.len(), bytes_of(self.ids.len()), bytes_of(data)),
            (Stage::Delta, data, bytes_of(data), after_delta),
            (Stage::Pack, 0, after_delta, 0),
        ];
        for ((stage, chunks, bytes_in, bytes_out), cpu_ns) in shares.into_iter().zip(cpu_ns) {
            self.stats[stage].add(Share { chunks: chunks as u64, bytes_in, bytes_out, cpu_ns });
        }
    }

    /// The root of what the target holds once it applied every batch so far.
    pub fn root(&mut self) -> StateRoot {
        self.classifier.root()
    }

    /// The table behind [`Outbound::root`].
    pub fn table(&self) -> &StateTable {
        self.classifier.table()
    }

    /// The same, for good.
    pub fn into_table(self) -> StateTable {
        self.classifier.into_table()
    }

    /// What chunks cost that were sent again.
    pub fn repeats(&self) -> Repeats {
        self.repeats
    }

    /// What was done so far, by the stages up to [`Stage::Pack`].
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        self.times.share_out(&mut stats);
        stats
    }
}

fn count_batch(stats: &mut Stats, batch: &RawBatch) {
    stats.add_bytes_out(&batch.class_bytes);
    let bytes_out = batch.body.len() as u64;
    stats[Stage::Pack].add(Share { chunks: batch.chunks, bytes_out, ..Share::default() });
}
