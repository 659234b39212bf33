//! A paused VM to a file.

use std::{
    io::{self, Write},
    thread,
};

use super::{
    super::{
        MAX_MACHINE_STATE_BYTES, PipelineOptions,
        ahead::Ahead,
        courier::{Notice, Sealed},
        pipeline::{Feed, Outlet, Pipeline},
        worker::{Job, Shared, WorkerStats},
    },
    format::{Head, Writer},
};
use crate::{
    Bases, ChunkSet, Clock, Offer, SourceVm, Space, StateTable,
    adapt::{AdaptOptions, Adapter, ModeChoice},
    order::RoundOrder,
    report::{StageShare, class_shares, millis, stage_shares},
    stage::{
        Buffers, ClassifyError, Mode, Outbound, SegmentKind, Stage, StageOptions,
        pack::MAX_BATCH_BYTES,
    },
    vm::VmError,
};

/// Why a VM could not be saved. It is as it was, paused; what was written is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The file could not be written.
    #[error("cannot write the saved VM: {0}")]
    Io(#[from] io::Error),
    /// The VM could not be read.
    #[error("{doing}: {source}")]
    Vm {
        /// What was being done.
        doing: &'static str,
        /// What the VM said.
        source: VmError,
    },
    /// A chunk could not be compared with the base.
    #[error(transparent)]
    Classify(#[from] ClassifyError),
    /// The compressor failed.
    #[error("compressing: {0}")]
    Compress(String),
}

/// What was saved.
#[derive(Debug)]
pub struct Saved {
    /// What it took, and what it came to.
    pub report: SaveReport,
    /// The state that the file holds.
    pub table: StateTable,
}

/// What it took to save a VM, and what it came to.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SaveReport {
    /// The VM's name.
    pub vm: String,
    /// The base's id, in hex.
    pub base: String,
    /// The state root, in hex.
    pub root: String,
    /// From the request until all was written.
    pub total_ms: f64,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of the machine's state, before compression.
    pub state_bytes: u64,
    /// What became of the chunks, by class.
    pub classes: Vec<StageShare>,
    /// What each stage did.
    pub stages: Vec<StageShare>,
}

/// Writes what makes the VM, which must be paused, differ from its base. It stays paused.
///
/// All of `bases` must be there when it is restored: give those only that will be. The caller makes
/// the file durable, and removes it after an error.
#[allow(clippy::too_many_arguments)]
pub fn save(
    vm: &mut dyn SourceVm,
    bases: Bases,
    vm_name: &str,
    machine: &[u8],
    stages: StageOptions,
    pipeline: PipelineOptions,
    out: impl Write + Send,
    clock: &dyn Clock,
) -> Result<Saved, SaveError> {
    let started = clock.now();
    let changed = vm.start_tracking().map_err(failed("finding what changed"))?;
    let saved = save_changed(vm, bases, vm_name, machine, stages, pipeline, out, &changed, clock);
    // What was read is on its way already; a VM that stays here needs no tracking.
    let stopped = vm.stop_tracking().map_err(failed("ending to track changes"));
    let mut saved = saved?;
    stopped?;
    saved.report.total_ms = millis(clock.now().saturating_sub(started));
    Ok(saved)
}

fn failed(doing: &'static str) -> impl FnOnce(VmError) -> SaveError {
    move |source| SaveError::Vm { doing, source }
}

#[allow(clippy::too_many_arguments)]
fn save_changed(
    vm: &mut dyn SourceVm,
    bases: Bases,
    vm_name: &str,
    machine: &[u8],
    stages: StageOptions,
    pipeline: PipelineOptions,
    out: impl Write + Send,
    changed: &ChunkSet,
    clock: &dyn Clock,
) -> Result<Saved, SaveError> {
    let offer = Offer {
        vm_name: vm_name.to_owned(),
        base: bases.own().id(),
        geometry: vm.geometry(),
        changed_disk_chunks: changed.iter().filter(|id| id.space == Space::Disk).count() as u64,
        machine: machine.to_vec(),
        also: bases.iter().skip(1).map(|(_, base)| base.id()).collect(),
        known: Vec::new(),
    };
    let head = Head::new(&offer)?;
    let writer = Writer::new(out, &head)?;
    let stats = WorkerStats::default();
    // The guest waits for it, and no link does: there is nothing to adapt to.
    let choice = match pipeline.choice {
        ModeChoice::Auto => ModeChoice::Fixed(Mode::DEFAULT),
        fixed @ ModeChoice::Fixed(_) => fixed,
    };
    let options = PipelineOptions { choice, ..pipeline };
    let buffers = options.buffers();
    let (mut feed, pipeline, outlet) = Pipeline::new(&options, head.sealer(), buffers.clone());
    let (notices, notices_rx) = crossbeam_channel::unbounded();
    let outbound = Outbound::new(bases, vm.geometry(), stages).with_limits(options.batch_limits());
    let mut outbound = outbound.with_buffers(buffers.clone());
    // A file takes all there is.
    let (adapter, ahead) =
        (Adapter::new(AdaptOptions::new(options.choice, clock.now())), Ahead::default());
    ahead.open();
    let with = Shared { adapter: &adapter, ahead: &ahead, stats: &stats, clock };
    let (packed, written) = thread::scope(|scope| {
        pipeline.start(scope, &notices, with);
        let written = scope.spawn(move || write(writer, &outlet, &buffers));
        let packed = pack(vm, &mut outbound, changed, &mut feed);
        // The workers and then the writer end with what they take from.
        drop(feed);
        (packed, written.join())
    });
    // Whoever stopped first knows why: those before it only see that nobody takes their work.
    if let Ok(Notice::Compressor(why)) = notices_rx.try_recv() {
        return Err(SaveError::Compress(why));
    }
    let bytes = written.map_err(|_| SaveError::Compress("the writer panicked".into()))??;
    let state_bytes = packed?.ok_or_else(|| SaveError::Compress("the worker ended".into()))?;
    let mut done = outbound.stats();
    done[Stage::Compress] = stats.compress.get();
    done[Stage::Seal] = stats.seal.get();
    let report = SaveReport {
        vm: offer.vm_name,
        base: offer.base.to_string(),
        root: outbound.root().to_string(),
        total_ms: 0.0,
        bytes,
        state_bytes,
        classes: class_shares(&done),
        stages: stage_shares(&done),
    };
    Ok(Saved { report, table: outbound.into_table() })
}

/// Gives everything to the worker, and last the root. Returns the bytes of the machine's state, or
/// `None` if nobody takes the work any more.
fn pack(
    vm: &mut dyn SourceVm,
    outbound: &mut Outbound,
    changed: &ChunkSet,
    feed: &mut Feed,
) -> Result<Option<u64>, SaveError> {
    if !pack_round(vm, outbound, 1, changed.clone(), feed)? {
        return Ok(None);
    }
    let state = vm.save_state().map_err(failed("saving the machine's state"))?;
    if state.len() > MAX_MACHINE_STATE_BYTES {
        let why = format!("{} bytes, at most {MAX_MACHINE_STATE_BYTES}", state.len());
        return Err(SaveError::Vm { doing: "saving the machine's state", source: why.into() });
    }
    // Saving may have written to guest memory.
    let touched = vm.harvest().map_err(failed("asking for changed memory"))?;
    if !pack_round(vm, outbound, 2, touched, feed)? {
        return Ok(None);
    }
    // At least one piece: a file without any segment is none.
    let pieces = state.chunks(MAX_BATCH_BYTES).map(<[u8]>::to_vec);
    let pieces = pieces.chain(state.is_empty().then(Vec::new));
    for body in pieces {
        let kind = SegmentKind::MachineState;
        if feed.push(Job::Body { round: 2, kind, body, chunks: 0 }).is_err() {
            return Ok(None);
        }
    }
    let told = feed.push(Job::Prepare(outbound.root(), None)).is_ok();
    Ok(told.then_some(state.len() as u64))
}

/// `false` if nobody takes the work any more.
fn pack_round(
    vm: &mut dyn SourceVm,
    outbound: &mut Outbound,
    round: u32,
    set: ChunkSet,
    feed: &mut Feed,
) -> Result<bool, SaveError> {
    let mut give = |outbound: &mut Outbound| {
        while let Some(batch) = outbound.poll() {
            let kind = SegmentKind::Chunks;
            let job = Job::Body { round, kind, body: batch.body, chunks: batch.chunks };
            if feed.push(job).is_err() {
                return false;
            }
        }
        true
    };
    outbound.begin(round);
    // In order: a disk reads it faster, and neighbours compress better together.
    let mut order = RoundOrder::ascending(set);
    loop {
        let (ids, slots) = outbound.slots(&mut order)?;
        if ids.is_empty() {
            break;
        }
        vm.read_chunks(ids, slots).map_err(failed("reading the guest"))?;
        if !give(outbound) {
            return Ok(false);
        }
    }
    outbound.end()?;
    Ok(give(outbound))
}

/// Writes what comes, to the end; returns the file's length.
fn write(mut writer: Writer<impl Write>, outlet: &Outlet, buffers: &Buffers) -> io::Result<u64> {
    for sealed in &outlet.sealed {
        outlet.taken();
        match sealed {
            Sealed::Segment(segment) => {
                writer.segment(&segment)?;
                buffers.give(segment.payload);
            }
            Sealed::Prepare(root, _) => return writer.end(root),
        }
    }
    Err(io::Error::other("nothing more came"))
}
