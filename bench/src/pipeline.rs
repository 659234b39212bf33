//! What the source's stages make of it together.

use std::{hint::black_box, sync::Arc, thread, time::Duration};

use anyhow::{Context, ensure};
use guest_images::{CHUNK_SIZE, Chunk};
use handoff::{
    Bases, ChunkId, Geometry, Space,
    adapt::ModeChoice,
    engine::PipelineOptions,
    report::Report,
    stage::{Compressor, Mode, Outbound, Sealer, SegmentKind, StageOptions, thread_cpu_ns},
};
use serde_json::json;

use crate::{
    Tell, contents,
    guest::Still,
    hand_off::{Far, Plan, Ran, Road, hand_off, no_bases},
    harness::{Outcome, Side, best_of_ns},
    link::{Shape, Way},
};

/// What one handoff may take.
const RUN_S: f64 = 0.6;
/// Least and most bytes of a guest.
const BYTES: (f64, f64) = (4e6, 192e6);
/// Turns of each measurement: the best counts.
const TURNS: usize = 3;

/// Two workers on two cores must compress so much more than one.
const TWO_WORKERS: f64 = 1.7;
/// Next to stages that wait for each other.
const PIPELINED: f64 = 0.64;

/// CPUs that this process may use.
pub(crate) fn cpus() -> f64 {
    thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// How the engine is asked to work.
pub(crate) fn options(choice: ModeChoice, workers: usize) -> PipelineOptions {
    PipelineOptions { choice, workers, ..PipelineOptions::default() }
}

/// The seconds that each stage takes for a byte of the guest, by itself on one core.
struct Alone {
    /// Read, compared, classified, packed.
    pack: f64,
    compress: f64,
    seal: f64,
}

impl Alone {
    fn of(mode: Mode, chunks: &[Chunk]) -> anyhow::Result<Self> {
        let bytes = (chunks.len() * CHUNK_SIZE) as f64;
        let mut bodies = Vec::new();
        let pack = best_of_ns(TURNS, || {
            bodies = bodies_of(chunks)?;
            Ok(())
        })?;
        let mut compressor = Compressor::new();
        let mut packed = Vec::new();
        let compress = best_of_ns(TURNS, || {
            packed.clear();
            for body in &bodies {
                packed.push(compressor.pack(mode, body)?);
            }
            Ok(())
        })?;
        let mut sealed = Vec::new();
        for _ in 0..TURNS {
            // Takes what it seals.
            let (again, mut sealer) = (packed.clone(), Sealer::new(&[7; 16]));
            let start = thread_cpu_ns();
            again.into_iter().for_each(|packed| {
                black_box(sealer.seal(1, SegmentKind::Chunks, packed));
            });
            sealed.push(thread_cpu_ns() - start);
        }
        let seal = sealed.into_iter().min().context("no turn")?;
        let per_byte = |ns: u64| ns as f64 / 1e9 / bytes;
        Ok(Self { pack: per_byte(pack), compress: per_byte(compress), seal: per_byte(seal) })
    }

    /// Bytes a second of the slowest stage, with so many workers.
    fn slowest(&self, workers: usize) -> f64 {
        1.0 / self.pack.max(self.compress / workers as f64).max(self.seal)
    }
}

/// The bodies that a guest's chunks become.
fn bodies_of(chunks: &[Chunk]) -> anyhow::Result<Vec<Vec<u8>>> {
    let geometry = Geometry { ram_chunks: chunks.len() as u64, disk_chunks: 0 };
    let mut outbound = Outbound::new(no_bases(), geometry, StageOptions::default());
    let mut bodies = Vec::new();
    outbound.begin(1);
    for (index, chunk) in (0..).zip(chunks) {
        *outbound.slot(ChunkId { space: Space::Ram, index })? = *chunk;
        bodies.extend(std::iter::from_fn(|| outbound.poll()).map(|batch| batch.body));
    }
    outbound.end()?;
    bodies.extend(std::iter::from_fn(|| outbound.poll()).map(|batch| batch.body));
    Ok(bodies)
}

/// Bytes of a guest that a mode gets done in the time of a run.
fn chunks_for(mode: Mode) -> anyhow::Result<Vec<Chunk>> {
    let probe = contents::chunks(contents::MEMORY, 256);
    let rate = Alone::of(mode, &probe)?.slowest(1);
    let bytes = (rate * RUN_S).clamp(BYTES.0, BYTES.1);
    Ok(contents::chunks(contents::MEMORY, bytes as usize / CHUNK_SIZE))
}

/// The CPU time of all threads of this process.
fn process_cpu_s() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    usage.map_or(0.0, |usage| {
        let s = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        s(usage.user_time()) + s(usage.system_time())
    })
}

/// The time from the first round's begin to the end of the last byte, in seconds.
pub(crate) fn moving_s(report: &Report) -> f64 {
    (report.total_ms - report.setup_ms.max(report.tracking_ms)) / 1e3
}

/// The best of several handoffs over loopback: seconds, and CPU seconds of all threads.
fn best(
    guest: &Still,
    bases: &Bases,
    plan: &Plan<'_>,
    turns: usize,
) -> anyhow::Result<(f64, f64, Report)> {
    let mut best: Option<(f64, f64, Report)> = None;
    for _ in 0..turns {
        let before = process_cpu_s();
        let Ran { report, moved, .. } = hand_off(&mut guest.clone(), bases, plan)?;
        ensure!(moved, "given up");
        let (took, cpu) = (moving_s(&report), process_cpu_s() - before);
        if best.as_ref().is_none_or(|(least, ..)| took < *least) {
            best = Some((took, cpu, report));
        }
    }
    best.context("no turn")
}

/// In every mode: the source into a sink and into a target, against the slowest of its stages alone, or against
/// what the CPUs can do where all threads together need more than there are.
pub(crate) fn whole(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    for mode in Mode::STATIC {
        let chunks = Arc::new(chunks_for(*mode)?);
        let alone = Alone::of(*mode, &chunks)?;
        let guest = Still::of(Arc::clone(&chunks));
        let bytes = guest.bytes() as f64;
        for (far, what) in [(Far::Sink, "source"), (Far::Target, "both_ends")] {
            let mut plan = Plan::new(Road::Loopback, far);
            plan.send.pipeline = options(ModeChoice::Fixed(*mode), 1);
            let (took, cpu, report) = best(&guest, &no_bases(), &plan, TURNS)?;
            let (rate, slowest) = (bytes / took, alone.slowest(1));
            let by_cpus = cpus() * bytes / cpu;
            let reference = slowest.min(by_cpus);
            let name = format!("pipeline_{what}_{mode}");
            let outcome = Outcome::of(
                "pipeline",
                name,
                ("bytes/s", rate),
                ("slowest_stage", reference),
                (Side::AtLeast, 0.8),
            );
            tell(outcome.with(json!({
                "slowest_stage_bytes_per_s": slowest,
                "of_slowest_stage": rate / slowest,
                "cpus": cpus(),
                "all_cpus_bytes_per_s": by_cpus,
                "cpu_s": cpu,
                "wall_s": took,
                "pack_bytes_per_s": 1.0 / alone.pack,
                "compress_bytes_per_s": 1.0 / alone.compress,
                "seal_bytes_per_s": 1.0 / alone.seal,
                "stages": report.stages,
            })))?;
        }
    }
    Ok(())
}

/// Modes in which compression is nearly all of the work.
const HEAVY: [&str; 3] = ["zstd:12", "xz:1", "bzip2:9"];

/// Two workers against one, where there is enough to compress.
pub(crate) fn workers(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    for mode in HEAVY {
        let mode: Mode = mode.parse()?;
        let chunks = contents::chunks(contents::MEMORY, 4096);
        let guest = Still::of(Arc::new(chunks));
        let mut times = [f64::MAX; 2];
        for _ in 0..TURNS {
            for (time, workers) in times.iter_mut().zip([1, 2]) {
                let mut plan = Plan::new(Road::Loopback, Far::Sink);
                plan.send.pipeline = options(ModeChoice::Fixed(mode), workers);
                *time = time.min(best(&guest, &no_bases(), &plan, 1)?.0);
            }
        }
        let [one, two] = times.map(|time| guest.bytes() as f64 / time);
        // One core cannot show it.
        let side = if cpus() >= 2.0 { Side::AtLeast } else { Side::Stated };
        let name = format!("two_workers_{mode}");
        let reference = ("one_worker", one);
        tell(Outcome::of("workers", name, ("bytes/s", two), reference, (side, TWO_WORKERS)))?;
    }
    Ok(())
}

/// Stages that work at once against the same one after the other, on a link that takes about as
/// long as processing does.
pub(crate) fn serial(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    for mode in ["xz:1", "zstd:9"] {
        let mode: Mode = mode.parse()?;
        let chunks =
            contents::chunks(contents::MEMORY, if mode.level() == 9 { 8192 } else { 4096 });
        let bytes = (chunks.len() * CHUNK_SIZE) as f64;
        let alone = Alone::of(mode, &chunks)?;
        let mut compressor = Compressor::new();
        let mut left = 0;
        for body in bodies_of(&chunks)? {
            left += compressor.pack(mode, &body)?.payload.len();
        }
        let processing = (alone.pack + alone.compress + alone.seal) * bytes;
        // Headers of TCP and IP take their share.
        let mbps = left as f64 * 8.0 * 1.04 / processing / 1e6;
        let guest = Still::of(Arc::new(chunks));
        let shape = Shape::of(mbps, Duration::from_millis(1));
        let mut times = [f64::MAX; 2];
        for _ in 0..TURNS {
            for (time, serial) in times.iter_mut().zip([true, false]) {
                let way = Way::new(&shape)?;
                let mut plan = Plan::new(way.road(None), Far::Target);
                plan.send.pipeline =
                    PipelineOptions { serial, ..options(ModeChoice::Fixed(mode), 1) };
                *time = time.min(best(&guest, &no_bases(), &plan, 1)?.0);
            }
        }
        let [one_after_other, at_once] = times.map(|time| time * 1e3);
        let outcome = Outcome::of(
            "serial",
            format!("pipelined_{mode}"),
            ("ms", at_once),
            ("serial", one_after_other),
            (Side::AtMost, PIPELINED),
        );
        let detail = json!({ "link_mbps": mbps, "processing_ms": processing * 1e3 });
        tell(outcome.with(detail))?;
    }
    Ok(())
}
