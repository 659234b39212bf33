//! What TLS adds to the time of a handoff: the same guest over the same link with it and without.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use guest_images::CHUNK_SIZE;
use handoff::{adapt::ModeChoice, stage::Mode};
use serde_json::json;

use crate::{
    Tell, contents,
    guest::Still,
    hand_off::{Far, Keys, Plan, Road, hand_off, no_bases},
    harness::{Outcome, Side},
    link::{Shape, Way},
    pipeline::options,
};

/// A link, and what TLS may cost on it.
struct Case {
    mbps: f64,
    delay: Duration,
    guest_bytes: usize,
    turns: usize,
    bound: f64,
}

const CASES: [Case; 2] = [
    Case {
        mbps: 10.0,
        delay: Duration::from_millis(10),
        guest_bytes: 16 << 20,
        turns: 3,
        bound: 1.03,
    },
    Case { mbps: 1000.0, delay: Duration::ZERO, guest_bytes: 512 << 20, turns: 5, bound: 1.10 },
];

/// Total time with TLS by that without, the best of several turns each.
pub(crate) fn total_time(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let keys = Keys::new()?;
    for case in CASES {
        let chunks = Arc::new(contents::chunks(contents::MEMORY, case.guest_bytes / CHUNK_SIZE));
        let mut best = [f64::MAX; 2];
        let mut sent = [0; 2];
        let mut cpu_s = [0.0; 2];
        for _ in 0..case.turns {
            for (n, keys) in [None, Some(keys.clone())].into_iter().enumerate() {
                // A large packet, where one thread's relay is to carry a fast link.
                let mtu = if case.mbps > 500.0 { 65_000 } else { 1500 };
                let way = Way::new(&Shape { mtu, ..Shape::of(case.mbps, case.delay) })?;
                ensure!(matches!(way, Way::Real(_)), "TLS needs a real link: namespaces");
                let road: Road<'_> = way.road(None);
                let mut plan = Plan::new(road, Far::Target);
                plan.keys = keys;
                let workers = std::thread::available_parallelism().map_or(1, usize::from);
                plan.send.pipeline = options(ModeChoice::Fixed(Mode::LZ4), workers);
                let before = process_cpu_s()?;
                let ran = hand_off(&mut Still::of(Arc::clone(&chunks)), &no_bases(), &plan)?;
                ensure!(ran.moved, "given up");
                if ran.report.total_ms < best[n] {
                    best[n] = ran.report.total_ms;
                    sent[n] = ran.report.bytes_sent + ran.report.bytes_received;
                    cpu_s[n] = process_cpu_s()? - before;
                }
            }
        }
        let [plain, tls] = best;
        let outcome = Outcome::of(
            "tls",
            format!("tls_{}mbps", case.mbps),
            ("ms", tls),
            ("without", plain),
            (Side::AtMost, case.bound),
        );
        tell(outcome.with(json!({
            "guest_bytes": case.guest_bytes,
            "one_way_delay_ms": case.delay.as_millis() as u64,
            "link_bytes": { "plain": sent[0], "tls": sent[1] },
            "cpu_s_of_both_ends_and_the_link": { "plain": cpu_s[0], "tls": cpu_s[1] },
        })))?;
    }
    Ok(())
}

/// CPU time of this process: both ends, and what stands for the link.
fn process_cpu_s() -> anyhow::Result<f64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID);
    Ok(Duration::from(time.context("reading the CPU clock")?).as_secs_f64())
}
