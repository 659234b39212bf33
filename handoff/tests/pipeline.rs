//! The source's pipeline by the real engine over simulated links: full links, and what ends a
//! handoff while everything is full. Limits leave room for a machine that is busy with other things;
//! `--nocapture` shows the figures.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use handoff::{
    engine::{PipelineOptions, ReceiveOptions, SendOptions},
    sim::{Fault, LinkShape, SimConnect},
    tcp::MonotonicClock,
    trace::{
        Play, Trace, TraceVm,
        play::{PlayError, Played, play},
        synth::{Mix, Synth},
    },
};

const MS: Duration = Duration::from_millis(1);

/// A guest that changed so many chunks and rests.
fn resting(changed: u64) -> Arc<Trace> {
    let spec = Synth {
        ram_chunks: 32 << 10,
        disk_chunks: 256,
        cache_chunks: 0,
        changed,
        changed_disk: 0,
        mix: Mix::PAGE_CACHE,
        hot: 0,
        writes_per_s: 0.0,
        duration: MS,
        ..Synth::default()
    };
    Arc::new(spec.build().unwrap())
}

fn hand_off(
    trace: &Arc<Trace>,
    shape: LinkShape,
    faults: &[Fault],
    pipeline: PipelineOptions,
    cancel: &AtomicBool,
) -> Result<Played, PlayError> {
    let (mut connect, ends) = SimConnect::new(shape);
    connect.faults.extend(faults);
    let clock = MonotonicClock::default();
    let mut vm = TraceVm::new(Arc::clone(trace), Play::default(), clock);
    let options = SendOptions { pipeline, ..SendOptions::new("vm", "target", Vec::new()) };
    let scratch = tempfile::tempdir().unwrap();
    let receiving = ReceiveOptions::new("source");
    let both = (&options, &receiving);
    play(&mut vm, &mut connect, &ends, both, scratch.path(), &clock, &mut |_| {}, cancel)
}

fn fixed(mode: &str, workers: usize) -> PipelineOptions {
    let choice = mode.parse().unwrap();
    PipelineOptions { choice, workers, ..PipelineOptions::default() }
}

/// While there is work, the link works: whatever its rate and delay. The first round, the one with a
/// backlog, takes the time that its bytes take on the link, and little more.
#[test]
#[ignore = "takes half a minute; a busy machine fails it"]
fn the_link_is_kept_full() {
    for (mbps, changed) in [(5.0, 1500), (10.0, 3000), (25.0, 7500), (100.0, 28_000)] {
        let trace = resting(changed);
        for delay in [0, 25, 50] {
            let shape = LinkShape::mbps(mbps, MS * delay);
            let options = fixed("lz4", 2);
            let played = hand_off(&trace, shape, &[], options, &AtomicBool::new(false)).unwrap();
            let report = &played.report;
            let round = report.rounds.first().unwrap();
            let on_link_ms = round.bytes as f64 * 8.0 / mbps / 1e3;
            let used = on_link_ms / round.duration_ms;
            println!(
                "{mbps} Mbps, {delay} ms: {:.3} of the link in {:.0} ms; report {:?}",
                used, round.duration_ms, report.utilisation
            );
            assert!(used > 0.9, "{mbps} Mbps, {delay} ms: {used}");
        }
    }
}

/// Whatever is done first, what arrives is what was there: with many workers, small batches, in
/// each kind of mode, one thing after the other, and with links that break while all is full.
#[test]
fn order_is_kept() {
    let trace = resting(3000);
    let cut = |at| Fault { cut_up: Some(at), ..Fault::default() };
    let small = 256 << 10;
    let cases = [
        (PipelineOptions { batch_bytes: small, ..fixed("auto", 8) }, vec![]),
        (PipelineOptions { batch_bytes: small, ..fixed("none", 4) }, vec![cut(1_000_000)]),
        (PipelineOptions { serial: true, ..fixed("zstd:1", 4) }, vec![]),
        (PipelineOptions { cpu_share: 0.5, ..fixed("lz4", 2) }, vec![cut(5000), cut(700_000)]),
    ];
    for (pipeline, faults) in cases {
        let shape = LinkShape::mbps(100.0, MS * 2);
        let told = format!("{pipeline:?}");
        let never = AtomicBool::new(false);
        let played = hand_off(&trace, shape, &faults, pipeline, &never).unwrap();
        assert!(played.target.is_running(), "{told}");
        assert_eq!(played.report.links as usize, faults.len() + 1, "{told}");
    }
}

/// A cancelled handoff ends at once, however much there is in all its queues.
#[test]
fn cancelled_while_everything_is_full() {
    let trace = resting(3000);
    let cancel = AtomicBool::new(false);
    let began = std::time::Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(400 * MS);
            cancel.store(true, SeqCst);
        });
        let shape = LinkShape::mbps(5.0, MS * 25);
        let ended = hand_off(&trace, shape, &[], fixed("zstd:1", 3), &cancel);
        assert!(ended.is_err());
    });
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}
