//! How full the link is while there is something to send.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use guest_images::CHUNK_SIZE;
use handoff::{adapt::ModeChoice, stage::Mode};
use serde_json::json;

use crate::{
    Tell, contents,
    guest::Still,
    hand_off::{Far, Plan, Road, hand_off, no_bases},
    harness::{Outcome, Side},
    link::{Shape, Way},
    pipeline::{moving_s, options},
};

/// What is asked for.
const BOUND: f64 = 0.95;
/// How long a link is kept busy, at least.
const BUSY_S: f64 = 10.0;
/// What a TCP begins with grows with the rate: a fast link is kept busy for longer.
const BUSY_FAST_S: f64 = 20.0;
/// What most kernels use.
const CONGESTION_CONTROL: &str = "cubic";

/// Links of 5 to 100 Mbps, near and far: bytes that the link carried while the first round was being
/// sent, by what it could have carried.
pub(crate) fn slow_links(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    for mbps in [5.0, 10.0, 25.0, 100.0] {
        let busy_s = if mbps > 50.0 { BUSY_FAST_S } else { BUSY_S };
        let count = (mbps * 1e6 / 8.0 * busy_s) as usize / CHUNK_SIZE;
        let chunks = Arc::new(contents::chunks(contents::NOISE, count));
        for delay_ms in [0, 25, 50] {
            let shape = Shape::of(mbps, Duration::from_millis(delay_ms));
            let way = Way::new(&shape)?;
            let mut plan = Plan::new(way.road(Some(CONGESTION_CONTROL)), Far::Target);
            // What noise becomes in any mode, without asking which.
            plan.send.pipeline = options(ModeChoice::Fixed(Mode::LZ4), 1);
            let ran = hand_off(&mut Still::of(Arc::clone(&chunks)), &no_bases(), &plan)?;
            ensure!(ran.moved, "given up");
            let began = ran.began.saturating_duration_since(way.origin());
            let round = ran.report.rounds.first().context("no round")?;
            let from = began + Duration::from_secs_f64(ran.report.setup_ms / 1e3);
            let until = from + Duration::from_secs_f64(round.duration_ms / 1e3);
            let what = way.name();
            let (bytes, share, dropped) = match way.end() {
                Some(channel) => {
                    let (bytes, share) = channel.carried(from, until);
                    (bytes, share, channel.dropped)
                }
                None => (round.bytes, round.bytes as f64 / shape.capacity_bytes(from, until), 0),
            };
            let capacity = shape.capacity_bytes(from, until) / (until - from).as_secs_f64();
            let outcome = Outcome::of(
                "utilisation",
                format!("utilisation_{mbps}mbps_{delay_ms}ms"),
                ("bytes/s", capacity * share),
                ("link", capacity),
                (Side::AtLeast, BOUND),
            );
            tell(outcome.with(json!({
                "link": what,
                "congestion_control": CONGESTION_CONTROL,
                "one_way_delay_ms": delay_ms,
                "link_bytes": bytes,
                "round_bytes": round.bytes,
                "round_ms": round.duration_ms,
                "dropped_packets": dropped,
                "engine_says": ran.report.utilisation,
            })))?;
        }
    }
    Ok(())
}

/// Links of 1 and 10 Gbps, where processing is what is waited for: stated with where CPU time went.
pub(crate) fn fast_links(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let chunks = Arc::new(contents::chunks(contents::MEMORY, (256 << 20) / CHUNK_SIZE));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for mbps in [1_000.0, 10_000.0] {
        for mode in [Mode::NONE, Mode::LZ4, Mode::DEFAULT] {
            let shape = Shape { mtu: 65_000, ..Shape::of(mbps, Duration::ZERO) };
            // Without a relay in between, above what one thread can relay.
            let way = if mbps > 5_000.0 { None } else { Some(Way::new(&shape)?) };
            let road = way.as_ref().map_or(Road::Loopback, |way| way.road(None));
            let mut plan = Plan::new(road, Far::Target);
            plan.send.pipeline = options(ModeChoice::Fixed(mode), cpus);
            let ran = hand_off(&mut Still::of(Arc::clone(&chunks)), &no_bases(), &plan)?;
            let took = moving_s(&ran.report);
            let stages: Vec<_> = ran
                .report
                .stages
                .iter()
                .map(|s| json!({ "name": s.name, "cpu_s": s.cpu_s, "of_wall": s.cpu_s / took }))
                .collect();
            let outcome = Outcome::of(
                "fast_links",
                format!("fast_link_{mbps}mbps_{mode}"),
                ("bytes/s", ran.report.bytes_sent as f64 / took),
                ("link", mbps * 1e6 / 8.0),
                (Side::Stated, 0.0),
            );
            tell(outcome.with(json!({
                "cpus": cpus,
                "guest_bytes_per_s": (chunks.len() * CHUNK_SIZE) as f64 / took,
                "link": way.as_ref().map_or("loopback", Way::name),
                "stages": stages,
            })))?;
        }
    }
    Ok(())
}
