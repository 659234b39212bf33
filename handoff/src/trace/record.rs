//! Records a guest while it runs.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash, Part, chunk::is_zero};

use super::{BuildError, Trace, TraceBuilder, file};
use crate::{BaseView, ChunkId, ChunkSet, Clock, SourceVm, base_view::own_place, vm::VmError};

/// Reading what differs from base takes time, in which the guest goes on: so often it is read again
/// what it changed meanwhile, ...
const CATCH_UP: u32 = 8;
/// ... until that is no more than this.
const CAUGHT_UP_CHUNKS: u64 = 256;
/// Between two looks whether to stop.
const NAP: Duration = Duration::from_millis(20);

/// How a guest is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordOptions {
    /// For how long.
    pub duration: Duration,
    /// How often it is looked at what changed. Of a chunk that changes more often, the last content is
    /// kept.
    pub every: Duration,
    /// How many different contents are held at most, 4 KiB each. Recording ends when there are more.
    pub most_contents: usize,
}

impl Default for RecordOptions {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(30),
            every: Duration::from_millis(100),
            most_contents: 1 << 17,
        }
    }
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// After the time asked for.
    InTime,
    /// Early, because it was told to.
    Cancelled,
    /// Early, because the bound on contents was reached.
    Full,
}

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The trace.
    pub trace: Trace,
    /// Why it ended.
    pub ended: Ended,
}

/// Why nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The VM could not be tracked or read.
    #[error("{doing}: {source}")]
    Vm {
        /// What was being done.
        doing: &'static str,
        /// What the VM said.
        source: VmError,
    },
    /// What differs from base alone is more than may be held.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A guest that no trace can be of.
    #[error("a guest of {0} chunks is too large for a trace, which has at most {most}", most = file::MAX_CHUNKS)]
    TooLarge(u64),
}

fn failed(doing: &'static str) -> impl FnOnce(VmError) -> RecordError {
    move |source| RecordError::Vm { doing, source }
}

/// Records a running guest that is of `base` and is not tracked by anybody else. It is not paused; to
/// be tracked and read costs it a little. Afterwards it is not tracked any more, whatever happened.
pub fn record(
    vm: &mut dyn SourceVm,
    base: &dyn BaseView,
    options: RecordOptions,
    clock: &dyn Clock,
    cancel: &AtomicBool,
) -> Result<Recorded, RecordError> {
    let geometry = vm.geometry();
    let chunks = geometry.ram_chunks.saturating_add(geometry.disk_chunks);
    if chunks > file::MAX_CHUNKS {
        return Err(RecordError::TooLarge(chunks));
    }
    let most = options.most_contents.min(file::MAX_CONTENTS as usize);
    let builder = TraceBuilder::new(geometry, Part::ALL.map(|part| base.part_chunks(part)), most);
    let changed = vm.start_tracking().map_err(failed("finding what differs from base"))?;
    let mut recorder = Recorder { vm, base, builder, chunk: [0; CHUNK_SIZE] };
    let recorded = recorder.run(changed, options, clock, cancel);
    let Recorder { vm, builder, .. } = recorder;
    let stopped = vm.stop_tracking().map_err(failed("ending dirty tracking"));
    let (ended, duration) = recorded?;
    stopped?;
    Ok(Recorded { trace: builder.finish(duration), ended })
}

struct Recorder<'a> {
    vm: &'a mut dyn SourceVm,
    base: &'a dyn BaseView,
    builder: TraceBuilder,
    chunk: Chunk,
}

impl Recorder<'_> {
    fn run(
        &mut self,
        changed: ChunkSet,
        options: RecordOptions,
        clock: &dyn Clock,
        cancel: &AtomicBool,
    ) -> Result<(Ended, Duration), RecordError> {
        let mut set = changed;
        for _ in 0..CATCH_UP {
            for id in set.iter() {
                if cancel.load(Relaxed) {
                    return Ok((Ended::Cancelled, Duration::ZERO));
                }
                self.take(id)?;
                self.builder.initial(id, &self.chunk)?;
            }
            if set.len() <= CAUGHT_UP_CHUNKS {
                break;
            }
            set = self.vm.harvest().map_err(failed("asking what changed"))?;
        }
        let began = clock.now();
        let mut due = options.every;
        loop {
            while clock.now().saturating_sub(began) < due.min(options.duration) {
                if cancel.load(Relaxed) {
                    return Ok((Ended::Cancelled, clock.now().saturating_sub(began)));
                }
                let left = (began + due.min(options.duration)).saturating_sub(clock.now());
                std::thread::sleep(left.min(NAP));
            }
            let at = clock.now().saturating_sub(began).min(file::MAX_DURATION);
            let set = self.vm.harvest().map_err(failed("asking what changed"))?;
            match self.changes(at, &set) {
                Ok(true) => {}
                Ok(false) => return Ok((Ended::Full, at)),
                Err(e) => return Err(e),
            }
            if at >= options.duration || at >= file::MAX_DURATION {
                return Ok((Ended::InTime, at));
            }
            // Where it cannot be kept up, a look is left out.
            due = due.saturating_add(options.every).max(at);
        }
    }

    /// Takes note of what changed; `false` if there is no room for more.
    fn changes(&mut self, at: Duration, set: &ChunkSet) -> Result<bool, RecordError> {
        for id in set.iter() {
            if self.builder.changes() as u64 >= file::MAX_CHANGES {
                return Ok(false);
            }
            match self.take(id).and_then(|()| Ok(self.builder.change(at, id, &self.chunk)?)) {
                Err(RecordError::Build(BuildError::Full { .. })) => return Ok(false),
                other => other?,
            }
        }
        Ok(true)
    }

    /// Reads a chunk, and takes from the base what it began as and where its content is found there.
    fn take(&mut self, id: ChunkId) -> Result<(), RecordError> {
        self.vm.read_chunk(id, &mut self.chunk).map_err(failed("reading what changed"))?;
        if let Some(place) = own_place(self.base, id)
            && !self.builder.has_base(place)
            && let Some(content) = self.base.chunk(place)
        {
            self.builder.base(place, content)?;
        }
        if !is_zero(&self.chunk)
            && let Some(place) = self.base.lookup(&ChunkHash::of(&self.chunk))
            && !self.builder.has_base(place)
            && let Some(content) = self.base.chunk(place)
        {
            self.builder.base(place, content)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        tcp::MonotonicClock,
        trace::{
            Play, TraceVm,
            synth::{Mix, Synth},
        },
    };

    /// A played guest is recorded, and its trace leads to the same state.
    #[test]
    fn a_trace_of_a_played_trace_is_the_same_guest() {
        let spec = Synth {
            ram_chunks: 2048,
            disk_chunks: 512,
            cache_chunks: 100,
            changed: 300,
            mix: Mix::PAGE_CACHE,
            base_memory: true,
            writes_per_s: 300.0,
            hot: 50,
            duration: Duration::from_millis(400),
            ..Synth::default()
        };
        let trace = Arc::new(spec.build().unwrap());
        let clock = MonotonicClock::default();
        let play = Play { again: false, ..Play::default() };
        let mut vm = TraceVm::new(Arc::clone(&trace), play, clock);
        let options = RecordOptions {
            duration: Duration::from_millis(600),
            every: Duration::from_millis(20),
            ..RecordOptions::default()
        };
        let cancel = AtomicBool::new(false);
        let base = Arc::clone(trace.base());
        let recorded = record(&mut vm, &*base, options, &clock, &cancel).unwrap();
        assert_eq!(recorded.ended, Ended::InTime);
        let again = recorded.trace;
        assert_eq!(again.duration().as_millis() / 100, 6);
        let changes = again.changes();
        assert!(changes.len() > 60 && changes.len() <= trace.changes().len(), "{}", changes.len());
        let times: std::collections::BTreeSet<_> = changes.iter().map(|change| change.at).collect();
        assert!(times.len() >= 8, "seen at {} times", times.len());
        let mut replayed = TraceVm::new(
            Arc::new(again),
            Play { from: Duration::from_secs(1), again: false, ..Play::default() },
            clock,
        );
        assert_eq!(replayed.full_hash().unwrap(), vm.full_hash().unwrap());
        assert!(vm.harvest().is_err(), "it is tracked no more");
    }

    #[test]
    fn it_is_bounded_and_can_be_ended() {
        let spec = Synth {
            ram_chunks: 2048,
            changed: 100,
            changed_disk: 0,
            writes_per_s: 2000.0,
            duration: Duration::from_secs(5),
            ..Synth::default()
        };
        let trace = Arc::new(spec.build().unwrap());
        let clock = MonotonicClock::default();
        let base = Arc::clone(trace.base());
        let run = |most_contents, cancelled| {
            let mut vm = TraceVm::new(Arc::clone(&trace), Play::default(), clock);
            let options = RecordOptions { most_contents, ..RecordOptions::default() };
            record(&mut vm, &*base, options, &clock, &AtomicBool::new(cancelled))
        };
        let full = run(300, false).unwrap();
        assert_eq!(full.ended, Ended::Full);
        assert!(full.trace.contents().len() <= 300);
        assert_eq!(run(1000, true).unwrap().ended, Ended::Cancelled);
        let error = run(50, false).unwrap_err();
        assert!(matches!(error, RecordError::Build(BuildError::Full { most: 50 })), "{error}");
    }
}
