//! The source's worker: compresses and seals, in order.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender};

use super::courier::{Notice, Sealed};
use crate::{
    root::StateRoot,
    stage::{Compressor, CpuWatch, Mode, Sealer, SegmentKind, Share, SharedShare},
};

/// What the engine gives to the worker.
pub(super) enum Job {
    /// A body to compress and seal, and how many chunks it speaks of.
    Body { round: u32, kind: SegmentKind, body: Vec<u8>, chunks: u64 },
    /// Goes through, behind everything before it.
    Prepare(StateRoot, Option<[u8; 32]>),
}

/// What the worker did.
#[derive(Debug, Default)]
pub(super) struct WorkerStats {
    pub(super) compress: SharedShare,
    pub(super) seal: SharedShare,
    /// Bytes of segments by the round they belong to.
    round_bytes: Mutex<BTreeMap<u32, u64>>,
}

impl WorkerStats {
    /// Bytes of a round's segments so far.
    pub(super) fn round_bytes(&self, round: u32) -> u64 {
        self.rounds().get(&round).copied().unwrap_or(0)
    }

    fn rounds(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        // A number more or less: a panic elsewhere leaves it usable.
        self.round_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works until the engine or the courier is gone.
pub(super) fn work(
    mut sealer: Sealer,
    jobs: &Receiver<Job>,
    sealed: &Sender<Sealed>,
    notices: &Sender<Notice>,
    stats: &WorkerStats,
) {
    let mut compressor = Compressor::new();
    for job in jobs {
        let out = match job {
            Job::Prepare(root, full_hash) => Sealed::Prepare(root, full_hash),
            Job::Body { round, kind, body, chunks } => {
                let mut watch = CpuWatch::start();
                let packed = match compressor.pack(Mode::DEFAULT, &body) {
                    Ok(packed) => packed,
                    // Whoever waits for the notice may be gone already; then nobody needs it.
                    Err(e) => return drop(notices.send(Notice::Compressor(e.to_string()))),
                };
                let (bytes_in, bytes_out) = (body.len() as u64, packed.payload.len() as u64);
                stats.compress.add(Share { chunks, bytes_in, bytes_out, cpu_ns: watch.lap_ns() });
                let segment = sealer.seal(round, kind, packed);
                let (bytes_in, bytes_out) = (bytes_out, segment.encoded_len() as u64);
                stats.seal.add(Share { chunks, bytes_in, bytes_out, cpu_ns: watch.lap_ns() });
                *stats.rounds().entry(round).or_default() += bytes_out;
                Sealed::Segment(segment)
            }
        };
        if sealed.send(out).is_err() {
            return;
        }
    }
}

/// Whole microseconds, as reports have them.
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
