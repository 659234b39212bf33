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

use super::{
    courier::{Notice, Sealed},
    press::{ENCODER_BYTES, Encoders},
    sequence::Sequencer,
    worker::{Job, Shared, Worker},
};
use crate::{
    adapt::ModeChoice,
    stage::{BatchLimits, Buffers, Sealer},
};

/// The most workers that there can be.
pub const MAX_WORKERS: usize = 16;
/// Workers that there are by default, if there are as many cores.
const DEFAULT_MOST_WORKERS: usize = 4;

/// What a body has besides its chunks, at most, while it is no last round's.
const BATCH_TABLE_BYTES: usize = 128 << 10;
/// Jobs that no worker has in its hands: of bodies, and of segments that wait for the link.
const QUEUED_JOBS: usize = 3;
/// How the source's stages work together.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineOptions {
    /// Threads that compress: 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Bytes of chunks in a batch, up to 1 MiB.
    pub batch_bytes: usize,
    /// The share of a core that each worker may use while the guest runs: the rest is the guest's.
    pub cpu_share: f64,
    /// Who says in which mode bodies are compressed.
    pub choice: ModeChoice,
    /// One stage after the other for each batch, to measure what working at once brings.
    pub serial: bool,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        Self {
            workers: cores.min(DEFAULT_MOST_WORKERS),
            batch_bytes: BatchLimits::USUAL_BYTES,
            cpu_share: 1.0,
            choice: ModeChoice::default(),
            serial: false,
        }
    }
}

impl PipelineOptions {
    /// Threads that compress: as many as are asked for and have memory for a forced mode.
    pub fn workers(&self) -> usize {
        let most = match self.choice {
            _ if self.serial => 1,
            ModeChoice::Auto => MAX_WORKERS,
            ModeChoice::Fixed(mode) => {
                ENCODER_BYTES.checked_div(mode.encoder_bytes()).unwrap_or(MAX_WORKERS)
            }
        };
        self.workers.min(most).clamp(1, MAX_WORKERS)
    }

    /// Jobs that can be in the pipeline: one in each worker's hands, and a few before and behind
    /// them. Few, because what waits is old when it is sent.
    pub(super) fn tickets(&self) -> usize {
        if self.serial { 1 } else { self.workers() + QUEUED_JOBS }
    }

    /// Spare buffers: one for each of those who fill them.
    pub(super) fn buffers(&self) -> Buffers {
        Buffers::new((self.workers() + 1) * (self.batch_bytes + BATCH_TABLE_BYTES))
    }

    pub(super) fn batch_limits(&self) -> BatchLimits {
        BatchLimits::of_bytes(self.batch_bytes)
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
    encoders: Encoders,
}

impl Outlet {
    /// The window holds so many bytes; how many it may.
    pub(super) fn window(&self, used: u64) -> u64 {
        self.encoders.window(used)
    }

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
    samples: bool,
    buffers: Buffers,
    encoders: Encoders,
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
        let encoders = Encoders::default();
        let pipeline = Pipeline {
            encoders: encoders.clone(),
            jobs: jobs_rx,
            sequencer: Arc::new(Sequencer::new(sealer, sealed)),
            workers: options.workers(),
            cpu_share: options.cpu_share,
            samples: options.choice == ModeChoice::Auto,
            buffers,
        };
        let feed = Feed { jobs, tickets: tickets_rx, next: 0 };
        (feed, pipeline, Outlet { sealed: sealed_rx, tickets, encoders })
    }

    /// Sets the workers to work. They end when the feed is gone and all jobs are done, or when
    /// nobody takes what they make.
    pub(super) fn start<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        notices: &Sender<Notice>,
        with: Shared<'scope>,
    ) {
        for _ in 0..self.workers {
            let worker = Worker {
                jobs: self.jobs.clone(),
                sequencer: Arc::clone(&self.sequencer),
                notices: notices.clone(),
                with,
                buffers: self.buffers.clone(),
                encoders: self.encoders.clone(),
                cpu_share: self.cpu_share,
                workers: self.workers,
                samples: self.samples,
            };
            scope.spawn(move || worker.run());
        }
    }
}
