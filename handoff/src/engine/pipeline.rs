//! The source's pipeline: who gives to whom, and how much there can be between them.
//!
//! ```text
//!            tickets ◄──────────────────────────────────────────────┐
//! engine ── numbered jobs ──► worker 1..N ──► Sequencer ── sealed ──► courier or file
//!    ▲                            │          (order, seal)                │
//!    └───────── Buffers ◄─────────┴──────── payloads, once applied ◄──────┘
//! ```
//!
//! Each job needs a ticket, and its segment gives it back when the courier takes it. So what is in the
//! pipeline is bounded as a whole, every queue has room for all of it, and nobody but the engine ever
//! waits for room.

use std::{
    sync::Arc,
    thread::{Scope, available_parallelism},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use guest_images::CHUNK_SIZE;

use super::{
    courier::{Notice, Sealed},
    sequence::Sequencer,
    worker::{Job, Worker, WorkerStats},
};
use crate::stage::{BatchLimits, Buffers, Sealer, pack::MAX_BATCH_BYTES};

/// The most workers that there can be.
pub const MAX_WORKERS: usize = 16;
/// Workers that there are by default, if there are as many cores.
const DEFAULT_MOST_WORKERS: usize = 4;

/// How the source's stages work together.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineOptions {
    /// Threads that compress: 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Bytes of chunks in a batch, up to 1 MiB.
    pub batch_bytes: usize,
    /// The share of a core that each worker may use while the guest runs: the rest is the guest's.
    pub cpu_share: f64,
    /// Whether the chunks of a round go in random order.
    pub shuffle: bool,
    /// One stage after the other for each batch, to measure what working at once brings.
    pub serial: bool,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        Self {
            workers: cores.min(DEFAULT_MOST_WORKERS),
            batch_bytes: BatchLimits::default().data_chunks * CHUNK_SIZE,
            cpu_share: 1.0,
            shuffle: true,
            serial: false,
        }
    }
}

impl PipelineOptions {
    /// Threads that compress.
    pub fn workers(&self) -> usize {
        if self.serial { 1 } else { self.workers.clamp(1, MAX_WORKERS) }
    }

    /// Jobs that can be in the pipeline: one in each worker's hands and one for it to go on with,
    /// one that the engine is about to give, and one that waits for the link.
    pub(super) fn tickets(&self) -> usize {
        if self.serial { 1 } else { 2 * self.workers() + 2 }
    }

    /// Spare buffers: as many as there can be in the pipeline at once.
    pub(super) fn buffers(&self) -> Buffers {
        Buffers::new(self.tickets() * MAX_BATCH_BYTES)
    }

    pub(super) fn batch_limits(&self) -> BatchLimits {
        BatchLimits { data_chunks: self.batch_bytes / CHUNK_SIZE, ..BatchLimits::default() }
    }
}

/// The engine's end.
pub(super) struct Feed {
    jobs: Sender<(u64, Job)>,
    tickets: Receiver<()>,
    next: u64,
}

/// Nobody takes jobs any more.
#[derive(Debug)]
pub(super) struct PipelineEnded;

impl Feed {
    /// A ticket for the next job, or `false` if there is none within `timeout`.
    pub(super) fn ticket(&self, timeout: Duration) -> Result<bool, PipelineEnded> {
        match self.tickets.recv_timeout(timeout) {
            Ok(()) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(PipelineEnded),
        }
    }

    /// Gives a job for which there is a ticket.
    pub(super) fn give(&mut self, job: Job) -> Result<(), PipelineEnded> {
        let number = self.next;
        self.next += 1;
        self.jobs.send((number, job)).map_err(|_| PipelineEnded)
    }

    /// Gives a job, waiting while the pipeline is full.
    pub(super) fn push(&mut self, job: Job) -> Result<(), PipelineEnded> {
        self.tickets.recv().map_err(|_| PipelineEnded)?;
        self.give(job)
    }
}

/// The other end: segments in order.
pub(super) struct Outlet {
    /// What was sealed. Give a ticket back for each with [`Outlet::taken`].
    pub(super) sealed: Receiver<Sealed>,
    tickets: Sender<()>,
}

impl Outlet {
    /// One was taken: there is room for one more.
    pub(super) fn taken(&self) {
        // There is room for as many as were given out; an engine that is gone needs none.
        let _ = self.tickets.try_send(());
    }
}

/// What is between the two ends, before threads take it.
pub(super) struct Pipeline {
    jobs: Receiver<(u64, Job)>,
    sequencer: Arc<Sequencer>,
    workers: usize,
    cpu_share: f64,
    buffers: Buffers,
}

impl Pipeline {
    /// A pipeline and its ends. Bodies are taken from `buffers` by who makes them.
    pub(super) fn new(
        options: &PipelineOptions,
        sealer: Sealer,
        buffers: Buffers,
    ) -> (Feed, Pipeline, Outlet) {
        let most = options.tickets();
        let (jobs, jobs_rx) = bounded(most);
        let (sealed, sealed_rx) = bounded(most);
        let (tickets, tickets_rx) = bounded(most);
        (0..most).for_each(|_| _ = tickets.try_send(()));
        let pipeline = Pipeline {
            jobs: jobs_rx,
            sequencer: Arc::new(Sequencer::new(sealer, sealed)),
            workers: options.workers(),
            cpu_share: options.cpu_share,
            buffers,
        };
        let feed = Feed { jobs, tickets: tickets_rx, next: 0 };
        (feed, pipeline, Outlet { sealed: sealed_rx, tickets })
    }

    /// Sets the workers to work. They end when the feed is gone and all jobs are done, or when
    /// nobody takes what they make.
    pub(super) fn start<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        notices: &Sender<Notice>,
        stats: &'scope WorkerStats,
    ) {
        for _ in 0..self.workers {
            let worker = Worker {
                jobs: self.jobs.clone(),
                sequencer: Arc::clone(&self.sequencer),
                notices: notices.clone(),
                stats,
                buffers: self.buffers.clone(),
                cpu_share: self.cpu_share,
            };
            scope.spawn(move || worker.run());
        }
    }
}
