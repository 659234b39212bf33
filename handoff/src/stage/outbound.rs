//! The stages of the source that work on chunks, as one: chunks in, batches out.
//!
//! ```text
//! slot (a group of copies) -> classify -> delta -> pack -> poll
//! ```

use std::collections::VecDeque;

use guest_images::{CHUNK_SIZE, Chunk, chunk::ZERO_CHUNK};

use super::{
    classify::{Classifier, ClassifyError, Decision, Op},
    options::StageOptions,
    pack::{BatchBuilder, BatchLimits, RawBatch},
    stats::{CpuWatch, Share, Stage, Stats},
};
use crate::{
    base_view::Bases,
    chunks::{ChunkId, Geometry},
    root::{StateRoot, StateTable},
};

/// Chunks that are worked on at once: their copies stay in the cache of one core.
pub const GROUP_CHUNKS: usize = 64;

/// In one of so many groups, the CPU time of every chunk is taken by itself.
const SAMPLE_GROUPS: u64 = 8;

/// Takes copies of chunks, gives batches. Does no I/O but to read the base.
///
/// Every batch must reach the target, in order: see [`Classifier`].
pub struct Outbound {
    classifier: Classifier,
    ids: Vec<ChunkId>,
    chunks: Vec<Chunk>,
    decisions: Vec<Decision>,
    sampled_ns: Vec<u64>,
    groups: u64,
    limits: BatchLimits,
    batch: BatchBuilder,
    ready: VecDeque<RawBatch>,
    stats: Stats,
}

impl Outbound {
    /// For a target on which every chunk has its base state.
    pub fn new(bases: Bases, geometry: Geometry, options: StageOptions) -> Self {
        let limits = BatchLimits::default();
        Self {
            classifier: Classifier::new(bases, geometry).with_options(options),
            ids: Vec::with_capacity(GROUP_CHUNKS),
            chunks: vec![*ZERO_CHUNK; GROUP_CHUNKS],
            decisions: Vec::with_capacity(GROUP_CHUNKS),
            sampled_ns: Vec::with_capacity(GROUP_CHUNKS),
            groups: 0,
            limits,
            batch: BatchBuilder::with_limits(0, limits),
            ready: VecDeque::new(),
            stats: Stats::default(),
        }
    }

    /// The same for a target that holds what `table` says: see [`Classifier::with_start`].
    pub fn with_start(self, table: StateTable) -> Self {
        Self { classifier: self.classifier.with_start(table), ..self }
    }

    /// The same with batches that are full earlier.
    pub fn with_limits(self, limits: BatchLimits) -> Self {
        Self { limits, batch: BatchBuilder::with_limits(0, limits), ..self }
    }

    /// Chunks given from now on are of this generation. Call it before the first chunk, and after
    /// [`Outbound::end`] for each further generation.
    pub fn begin(&mut self, generation: u32) {
        debug_assert!(self.ids.is_empty() && self.batch.is_empty());
        self.batch = BatchBuilder::with_limits(generation, self.limits);
    }

    /// Room for a copy of chunk `id`, to be filled before the next call.
    pub fn slot(&mut self, id: ChunkId) -> Result<&mut Chunk, ClassifyError> {
        if self.ids.len() == GROUP_CHUNKS {
            self.work()?;
        }
        self.ids.push(id);
        Ok(&mut self.chunks[self.ids.len() - 1])
    }

    /// Works off what was given and closes the last batch of the generation.
    pub fn end(&mut self) -> Result<(), ClassifyError> {
        self.work()?;
        if !self.batch.is_empty() {
            self.close_batch();
        }
        Ok(())
    }

    /// The next batch that is complete. At most a few are: poll after every chunk, and after the
    /// end until there is none.
    pub fn poll(&mut self) -> Option<RawBatch> {
        self.ready.pop_front()
    }

    /// Takes the group through the stages.
    fn work(&mut self) -> Result<(), ClassifyError> {
        let chunks = self.chunks.get(..self.ids.len()).unwrap_or_default();
        self.decisions.clear();
        self.sampled_ns.clear();
        let sample = self.groups.is_multiple_of(SAMPLE_GROUPS).then_some(&mut self.sampled_ns);
        let mut watch = CpuWatch::start();
        self.classifier.classify_group(&self.ids, chunks, &mut self.decisions, sample)?;
        let classified_ns = watch.lap_ns();
        self.groups += 1;
        self.pack();
        let packed_ns = watch.lap_ns();
        let bytes = (self.ids.len() * CHUNK_SIZE) as u64;
        let data = self.decisions.iter().filter(|d| d.op == Op::Data).count();
        add(
            &mut self.stats[Stage::Classify],
            Share {
                chunks: self.ids.len() as u64,
                bytes_in: bytes,
                bytes_out: (data * CHUNK_SIZE) as u64,
                cpu_ns: classified_ns,
            },
        );
        add(&mut self.stats[Stage::Pack], Share { cpu_ns: packed_ns, ..Share::default() });
        self.ids.clear();
        Ok(())
    }

    fn pack(&mut self) {
        for i in 0..self.ids.len() {
            let (id, op) = (self.ids[i], self.decisions[i].op);
            self.stats.count(op.class());
            if op.what(ZERO_CHUNK).is_some() && self.batch.is_full() {
                self.close_batch();
            }
            if let Some(what) = op.what(&self.chunks[i]) {
                // A batch that is not full has room for any one chunk.
                let pushed = self.batch.push(id, what);
                debug_assert!(pushed.is_ok());
            }
        }
        if self.batch.is_full() {
            self.close_batch();
        }
    }

    fn close_batch(&mut self) {
        let next = BatchBuilder::with_limits(self.batch.generation(), self.limits);
        let batch = std::mem::replace(&mut self.batch, next).finish();
        self.stats.add_bytes_out(&batch.class_bytes);
        add(
            &mut self.stats[Stage::Pack],
            Share {
                chunks: batch.chunks,
                bytes_in: 0,
                bytes_out: batch.body.len() as u64,
                cpu_ns: 0,
            },
        );
        self.ready.push_back(batch);
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

    /// What was done so far, by the stages up to [`Stage::Pack`].
    pub fn stats(&self) -> Stats {
        self.stats
    }
}

fn add(share: &mut Share, more: Share) {
    share.chunks += more.chunks;
    share.bytes_in += more.bytes_in;
    share.bytes_out += more.bytes_out;
    share.cpu_ns += more.cpu_ns;
}
