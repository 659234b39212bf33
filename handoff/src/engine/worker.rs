//! The source's worker: compresses and seals, in order.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender};

use super::courier::{Notice, Sealed};
use crate::{
    Clock,
    ownership::HandoffId,
    root::StateRoot,
    stage::{Compressor, Sealer, SegmentKind},
};

/// What the engine gives to the worker.
pub(super) enum Job {
    /// A body to compress and seal.
    Body { round: u32, kind: SegmentKind, body: Vec<u8> },
    /// Goes through, behind everything before it.
    Prepare(StateRoot, Option<[u8; 32]>),
}

/// What the worker did.
#[derive(Debug, Default)]
pub(super) struct WorkerStats {
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) busy_us: AtomicU64,
}

/// Works until the engine or the courier is gone.
pub(super) fn work(
    handoff: HandoffId,
    jobs: &Receiver<Job>,
    sealed: &Sender<Sealed>,
    notices: &Sender<Notice>,
    stats: &WorkerStats,
    clock: &dyn Clock,
) {
    let mut sealer = Sealer::new(&handoff.0);
    let mut compressor = match Compressor::new() {
        Ok(compressor) => compressor,
        // Whoever waits for the notice may be gone already; then nobody needs it.
        Err(e) => return drop(notices.send(Notice::Compressor(e.to_string()))),
    };
    for job in jobs {
        let out = match job {
            Job::Prepare(root, full_hash) => Sealed::Prepare(root, full_hash),
            Job::Body { round, kind, body } => {
                let start = clock.now();
                let packed = match compressor.compress(&body) {
                    Ok(packed) => packed,
                    Err(e) => return drop(notices.send(Notice::Compressor(e.to_string()))),
                };
                let segment = sealer.seal(round, kind, packed);
                stats.bytes_in.fetch_add(body.len() as u64, Relaxed);
                stats.bytes_out.fetch_add(segment.encoded_len() as u64, Relaxed);
                stats.busy_us.fetch_add(micros(clock.now().saturating_sub(start)), Relaxed);
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
