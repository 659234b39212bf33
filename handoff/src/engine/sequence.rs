//! Puts back in order what several workers made at once, and seals it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crossbeam_channel::Sender;

use super::{courier::Sealed, worker::WorkerStats};
use crate::{
    root::StateRoot,
    stage::{CpuWatch, Packed, Sealer, SegmentKind, Share},
};

/// What became of a job.
pub(super) enum Made {
    /// A compressed body.
    Packed { round: u32, kind: SegmentKind, packed: Packed, chunks: u64 },
    /// Went through.
    Prepare(StateRoot, Option<[u8; 32]>),
}

/// Numbers and chains segments in the order of their jobs, whichever is made first.
///
/// There is no thread of its own: who brings the next one seals it, and all that waited for it.
/// How many can wait is bounded by the tickets of the pipeline.
pub(super) struct Sequencer(Mutex<State>);

struct State {
    sealer: Sealer,
    next: u64,
    waiting: BTreeMap<u64, Made>,
    /// None once the pipeline ended: then whoever takes from it sees that.
    out: Option<Sender<Sealed>>,
}

impl Sequencer {
    /// The first job has number 0. `out` must have room for all that is in the pipeline.
    pub(super) fn new(sealer: Sealer, out: Sender<Sealed>) -> Self {
        Self(Mutex::new(State { sealer, next: 0, waiting: BTreeMap::new(), out: Some(out) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Sealing does not panic; and after a worker's panic nothing is sealed any more.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what became of job `number`. `false` if nobody takes anything any more.
    pub(super) fn put(&self, number: u64, made: Made, stats: &WorkerStats) -> bool {
        let mut state = self.state();
        let state = &mut *state;
        state.waiting.insert(number, made);
        while let Some(made) = state.waiting.remove(&state.next) {
            state.next += 1;
            let sealed = seal(&mut state.sealer, made, stats);
            let taken = state.out.as_ref().is_some_and(|out| out.send(sealed).is_ok());
            if !taken {
                state.out = None;
                return false;
            }
        }
        state.out.is_some()
    }

    /// A job is missing for good: nothing comes any more.
    pub(super) fn fail(&self) {
        let mut state = self.state();
        state.out = None;
        state.waiting.clear();
    }
}

fn seal(sealer: &mut Sealer, made: Made, stats: &WorkerStats) -> Sealed {
    match made {
        Made::Prepare(root, full_hash) => Sealed::Prepare(root, full_hash),
        Made::Packed { round, kind, packed, chunks } => {
            let mut watch = CpuWatch::start();
            let bytes_in = packed.payload.len() as u64;
            let segment = sealer.seal(round, kind, packed);
            let bytes_out = segment.encoded_len() as u64;
            stats.seal.add(Share { chunks, bytes_in, bytes_out, cpu_ns: watch.lap_ns() });
            stats.sealed(round, bytes_out);
            Sealed::Segment(segment)
        }
    }
}
