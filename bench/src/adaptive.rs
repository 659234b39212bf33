//! The engine's own choice of mode against every fixed one, on guests that go on working.

use std::{cmp::Ordering, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use guest_images::CHUNK_SIZE;
use handoff::{
    BaseView, Bases,
    adapt::ModeChoice,
    engine::PipelineOptions,
    stage::{Compressor, Mode, thread_cpu_ns},
    tcp::MonotonicClock,
    trace::{
        Play, Trace, TraceVm,
        synth::{Mix, Synth},
    },
};
use serde_json::{Value, json};

use crate::{
    Tell,
    hand_off::{Far, Plan, Ran, hand_off},
    harness::{Outcome, Side},
    link::{Shape, Way},
    pipeline::{cpus, moving_s, options},
};

/// What adaptation may take, by what the best of all fixed modes takes.
const BOUND: f64 = 1.05;
/// The same on a link that changes, by the best for each phase.
const BOUND_CHANGING: f64 = 1.1;
/// In which a change of the link must change the mode.
const REACTS_S: f64 = 3.0;
/// What a handoff takes, about, in the best mode.
const WANT_S: f64 = 5.0;
/// A mode is tried if the stages' rates promise at most so many times what the best promises, ...
const HOPE: f64 = 1.15;
/// ... and given up after so many times what the best so far took.
const PATIENCE: f64 = 1.5;
/// Turns of the engine's own choice and of the best fixed one.
const TURNS: usize = 2;
/// One way.
const DELAY: Duration = Duration::from_millis(10);
/// Cores of the handoff on a link that changes, as the share of one that a busy guest leaves. With a whole core
/// the same mode would be the best at both rates, and a change of mode would show nothing.
const CORES_CHANGING: f64 = 0.15;
/// When links change, and how long each phase lasts.
const PHASE: Duration = Duration::from_secs(10);

/// A kind of guest.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    mix: Mix,
    /// What of the changed chunks no base has.
    own: f64,
}

/// One that has read much from its disk, as a detector has, and one of texts and media.
const KINDS: [Kind; 2] = [
    Kind { name: "page_cache", mix: Mix::PAGE_CACHE, own: 10.0 / 35.0 },
    Kind { name: "text_and_media", mix: Mix { text: 1, random: 1, ..Mix::NOTHING }, own: 1.0 },
];

/// What a mode costs and brings on a guest's data: seconds of CPU a byte, and bytes out for each in.
#[derive(Clone, Copy, Debug)]
struct Rates {
    mode: Mode,
    cost: f64,
    left: f64,
}

impl Rates {
    /// The seconds that so many bytes promise to take with so many cores.
    fn promise(&self, bytes: f64, mbps: f64, cores: f64) -> f64 {
        (self.cost / cores.min(cpus())).max(self.left * 8e-6 / mbps) * bytes
    }
}

struct Guest {
    name: &'static str,
    trace: Arc<Trace>,
    bases: Bases,
    rates: Vec<Rates>,
}

impl Kind {
    fn guest(&self, own_bytes: f64) -> anyhow::Result<Guest> {
        let changed = (own_bytes / CHUNK_SIZE as f64 / self.own) as u64;
        let synth = Synth {
            changed,
            cache_chunks: 16_384,
            mix: self.mix,
            hot: 200,
            writes_per_s: 50.0,
            ..Synth::default()
        };
        let trace = Arc::new(synth.build()?);
        let bases = Bases::from(Arc::clone(trace.base()) as Arc<dyn BaseView>);
        let rates = rates_on(&trace)?;
        Ok(Guest { name: self.name, trace, bases, rates })
    }
}

/// Tries every mode on some of what the guest changed and no base has.
fn rates_on(trace: &Trace) -> anyhow::Result<Vec<Rates>> {
    let mut body = Vec::new();
    for (_, content) in trace.initial() {
        let chunk = trace.contents().get(*content).context("a content of the trace")?;
        let known = trace.base().lookup(&guest_images::ChunkHash::of(chunk)).is_some();
        if !known && chunk.iter().any(|byte| *byte != 0) {
            body.extend_from_slice(chunk);
        }
        if body.len() >= 1 << 20 {
            break;
        }
    }
    let batch = &body[..body.len().min(handoff::stage::pack::MAX_BATCH_DATA_CHUNKS * CHUNK_SIZE)];
    let (mut compressor, mut payload) = (Compressor::new(), Vec::new());
    let rates = Mode::STATIC.iter().map(|mode| {
        compressor.compress(*mode, batch, &mut payload)?;
        let start = thread_cpu_ns();
        compressor.compress(*mode, batch, &mut payload)?;
        let bytes = batch.len().max(1) as f64;
        let cost = (thread_cpu_ns() - start) as f64 / 1e9 / bytes;
        Ok(Rates { mode: *mode, cost, left: payload.len() as f64 / bytes })
    });
    rates.collect()
}

/// One handoff of a guest as its trace has it.
fn run(
    guest: &Guest,
    way: &Way,
    pipeline: PipelineOptions,
    limit_s: Option<f64>,
) -> anyhow::Result<Ran> {
    let mut plan = Plan::new(way.road(None), Far::TargetOnBase);
    plan.send.pipeline = pipeline;
    plan.give_up_after = limit_s.map(Duration::from_secs_f64);
    let play = Play::default();
    let mut vm = TraceVm::new(Arc::clone(&guest.trace), play, MonotonicClock::default());
    hand_off(&mut vm, &guest.bases, &plan)
}

fn by_seconds(a: &f64, b: &f64) -> Ordering {
    a.total_cmp(b)
}

/// Each rate, with one worker and with two, on two guests.
pub(crate) fn steady(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    for kind in KINDS {
        for mbps in [5.0, 10.0, 20.0, 30.0, 100.0] {
            let probe = kind.guest(1e6)?;
            let per_byte = |rates: &Rates| rates.promise(1.0, mbps, 1.0);
            let best = probe.rates.iter().map(per_byte).min_by(by_seconds).context("no mode")?;
            let own_bytes = WANT_S / best;
            let guest = kind.guest(own_bytes)?;
            for workers in [1, 2] {
                tell(cell(&guest, own_bytes, mbps, workers)?)?;
            }
        }
    }
    Ok(())
}

/// One place of the table.
fn cell(guest: &Guest, own_bytes: f64, mbps: f64, workers: usize) -> anyhow::Result<Outcome> {
    let shape = Shape::of(mbps, DELAY);
    let promised = |rates: &Rates| rates.promise(own_bytes, mbps, workers as f64);
    let mut order: Vec<_> = guest.rates.iter().collect();
    order.sort_by(|a, b| promised(a).total_cmp(&promised(b)));
    let hope = order.first().map_or(0.0, |rates| promised(rates)) * HOPE;
    let mut best: Option<(Mode, f64)> = None;
    let mut modes = Vec::new();
    for rates in order {
        let mode = rates.mode;
        let mut row = json!({ "mode": mode, "promised_s": promised(rates) });
        if promised(rates) <= hope {
            let limit = best.map(|(_, s)| s * PATIENCE);
            let way = Way::new(&shape)?;
            let ran = run(guest, &way, options(ModeChoice::Fixed(mode), workers), limit)?;
            row["total_s"] = json!(ran.report.total_ms / 1e3);
            row["given_up"] = json!(!ran.moved);
            let took = ran.report.total_ms / 1e3;
            if ran.moved && best.is_none_or(|(_, least)| took < least) {
                best = Some((mode, took));
            }
        }
        modes.push(row);
    }
    let (mode, mut fixed_s) = best.context("no mode moved the guest")?;
    let mut auto: Option<(f64, Value)> = None;
    let mut kind = "";
    for turn in 0..TURNS {
        let way = Way::new(&shape)?;
        let ran = run(guest, &way, options(ModeChoice::Auto, workers), None)?;
        ensure!(ran.moved, "given up");
        kind = way.name();
        let took = ran.report.total_ms / 1e3;
        if auto.as_ref().is_none_or(|(least, _)| took < *least) {
            auto = Some((took, adaptation(&ran)));
        }
        if turn > 0 {
            let way = Way::new(&shape)?;
            let ran = run(guest, &way, options(ModeChoice::Fixed(mode), workers), None)?;
            fixed_s = fixed_s.min(ran.report.total_ms / 1e3);
        }
    }
    let (auto_s, adaptation) = auto.context("no turn")?;
    let name = format!("adaptive_{}_{mbps}mbps_{workers}_workers", guest.name);
    let reference = (format!("best_static_{mode}"), fixed_s * 1e3);
    let outcome =
        Outcome::of("adaptive", name, ("ms", auto_s * 1e3), reference, (Side::AtMost, BOUND));
    Ok(outcome.with(json!({
        "link": kind,
        "own_bytes": own_bytes,
        "modes": modes,
        "used": adaptation["modes"],
        "decisions": adaptation["decisions"].as_array().map_or(0, Vec::len),
    })))
}

/// What the report says of modes; nothing if it says nothing.
fn adaptation(ran: &Ran) -> Value {
    let report = serde_json::to_value(&ran.report).unwrap_or_default();
    report["adaptation"].clone()
}

/// Links of 5 Mbps that become 35 Mbps, and 5 again.
pub(crate) fn changing(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let kind = KINDS[0];
    let pipeline = |choice| PipelineOptions { cpu_share: CORES_CHANGING, ..options(choice, 1) };
    // What the best fixed mode gets done at each rate, as bytes of the guest a second.
    let mut pace = Vec::new();
    for mbps in [5.0, 35.0] {
        let probe = kind.guest(1e6)?;
        let per_byte = |rates: &Rates| rates.promise(1.0, mbps, CORES_CHANGING);
        let mut order: Vec<_> = probe.rates.iter().collect();
        order.sort_by(|a, b| per_byte(a).total_cmp(&per_byte(b)));
        let own_bytes = 4.0 / order.first().map_or(1.0, |rates| per_byte(rates));
        let guest = kind.guest(own_bytes)?;
        let mut best: Option<(f64, Mode)> = None;
        for rates in order.iter().take(4) {
            let way = Way::new(&Shape::of(mbps, DELAY))?;
            let ran = run(&guest, &way, pipeline(ModeChoice::Fixed(rates.mode)), None)?;
            let rate = own_bytes / moving_s(&ran.report);
            if best.is_none_or(|(most, _)| rate > most) {
                best = Some((rate, rates.mode));
            }
        }
        pace.push(best.context("no mode")?);
    }
    let [(slow, slow_mode), (fast, fast_mode)] = pace[..] else { anyhow::bail!("two rates") };
    let phase_s = PHASE.as_secs_f64();
    let up = Shape::of(5.0, DELAY).then(PHASE, 35.0);
    let up_down = up.clone().then(PHASE * 2, 5.0);
    let links = [
        ("5_35", up, vec![PHASE], slow * phase_s + fast * phase_s),
        ("5_35_5", up_down, vec![PHASE, PHASE * 2], slow * phase_s * 1.7 + fast * phase_s),
    ];
    for (name, shape, changes, own_bytes) in links {
        let guest = kind.guest(own_bytes)?;
        let way = Way::new(&shape)?;
        let ran = run(&guest, &way, pipeline(ModeChoice::Auto), None)?;
        let adaptation = adaptation(&ran);
        let began = ran.began.saturating_duration_since(way.origin());
        // The best of each phase, and what is not sent at all.
        let mut ideal_s = began.as_secs_f64() + ran.report.setup_ms / 1e3;
        let mut left = own_bytes;
        let ends = changes.iter().map(Duration::as_secs_f64).chain([f64::MAX]);
        for (end, pace) in ends.zip([slow, fast, slow]) {
            let phase = (left / pace).min(end - ideal_s).max(0.0);
            ideal_s += phase;
            left -= phase * pace;
        }
        ideal_s -= began.as_secs_f64();
        let reference = ("best_of_each_phase", ideal_s * 1e3);
        let outcome = Outcome::of(
            "changing",
            format!("changing_{name}mbps"),
            ("ms", ran.report.total_ms),
            reference,
            (Side::AtMost, BOUND_CHANGING),
        );
        tell(outcome.with(json!({
            "link": way.name(),
            "own_bytes": own_bytes,
            "cores": CORES_CHANGING,
            "best_at_5mbps": slow_mode,
            "best_at_35mbps": fast_mode,
            "used": adaptation["modes"],
        })))?;
        for (n, change) in (1..).zip(&changes) {
            let at = change.saturating_sub(began).as_secs_f64() * 1e3;
            let reacted = reacted_ms(&adaptation, at);
            let value = reacted.map_or(f64::MAX, |to| to - at);
            let outcome = Outcome::of(
                "changing",
                format!("changing_{name}mbps_reaction_{n}"),
                ("ms", value),
                ("bound", REACTS_S * 1e3),
                (Side::AtMost, 1.0),
            );
            tell(outcome.with(json!({ "changed_at_ms": at, "mode_changed": reacted })))?;
        }
    }
    Ok(())
}

/// When the mode was first another than before the link changed.
fn reacted_ms(adaptation: &Value, changed_ms: f64) -> Option<f64> {
    let decisions = adaptation["decisions"].as_array()?;
    let of = |decision: &Value| (decision["mode"].clone(), decision["stronger"].clone());
    let at = |decision: &Value| decision["at_ms"].as_f64().unwrap_or(0.0);
    let before = decisions.iter().rev().find(|decision| at(decision) <= changed_ms).map(of)?;
    decisions.iter().find(|d| at(d) > changed_ms && of(d) != before).map(at)
}
