//! What a link that is cut in the midst of a handoff costs.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use guest_images::CHUNK_SIZE;
use handoff::{adapt::ModeChoice, report::Report, stage::Mode};
use serde_json::json;

use crate::{
    Tell, contents,
    guest::Still,
    hand_off::{Far, Plan, hand_off, no_bases},
    harness::{Outcome, Side},
    link::{Shape, Way},
    pipeline::options,
};

/// The cut, which nobody is told of: packets do not arrive any more.
const CUT: Duration = Duration::from_secs(30);
/// When it begins.
const AT: Duration = Duration::from_secs(10);
/// What the handoff would take without it.
const WHOLE_S: f64 = 25.0;
const MBPS: f64 = 10.0;
const DELAY: Duration = Duration::from_millis(25);
/// By how much the cut may cost more than its time, ...
const BOUND: f64 = 1.1;
/// ... and how many more bytes may be sent.
const BOUND_BYTES: f64 = 1.02;
/// What most kernels use.
const CONGESTION_CONTROL: &str = "cubic";

/// A cut of 30 s at 10 Mbps and 25 ms: time and bytes, against the same handoff without it.
pub(crate) fn costs(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let (whole, _) = run(&Shape::of(MBPS, DELAY))?;
    let (cut, way) = run(&Shape::of(MBPS, DELAY).cut(AT..AT + CUT))?;
    let detail = json!({
        "link": way,
        "congestion_control": CONGESTION_CONTROL,
        "cut_at_s": AT.as_secs_f64(),
        "outages": cut.outages,
        "links": cut.links,
        "downtime_ms": cut.downtime_ms,
        "downtime_without_ms": whole.downtime_ms,
    });
    let more_s = (cut.total_ms - whole.total_ms) / 1e3;
    let time = Outcome::of(
        "cut",
        "cut_30s_time",
        ("s", more_s),
        ("the cut", CUT.as_secs_f64()),
        (Side::AtMost, BOUND),
    );
    tell(time.with(detail.clone()))?;
    let bytes = Outcome::of(
        "cut",
        "cut_30s_bytes",
        ("bytes", cut.bytes_on_link as f64),
        ("without a cut", whole.bytes_on_link as f64),
        (Side::AtMost, BOUND_BYTES),
    );
    tell(bytes.with(detail))
}

fn run(shape: &Shape) -> anyhow::Result<(Report, &'static str)> {
    let chunks = (MBPS * 1e6 / 8.0 * WHOLE_S) as usize / CHUNK_SIZE;
    let chunks = Arc::new(contents::chunks(contents::NOISE, chunks));
    let way = Way::new(shape).context("making a link")?;
    let mut plan = Plan::new(way.road(Some(CONGESTION_CONTROL)), Far::Target);
    plan.send.pipeline = options(ModeChoice::Fixed(Mode::LZ4), 1);
    let ran = hand_off(&mut Still::of(chunks), &no_bases(), &plan)?;
    ensure!(ran.moved, "given up");
    Ok((ran.report, way.name()))
}
