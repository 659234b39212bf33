//! A played guest moves by the real engine over a simulated link.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use handoff::{
    Connect,
    engine::{ReceiveOptions, SendOptions},
    sim::{Fault, LinkShape, Outage, Rate, SimConnect},
    tcp::MonotonicClock,
    trace::{
        Play, Trace, TraceVm,
        play::{Played, play},
        synth::{Mix, Synth},
    },
};

fn guest() -> Arc<Trace> {
    let spec = Synth {
        ram_chunks: 8192,
        disk_chunks: 2048,
        cache_chunks: 500,
        changed: 1500,
        changed_disk: 100,
        mix: Mix::PAGE_CACHE,
        base_memory: true,
        hot: 100,
        writes_per_s: 500.0,
        duration: Duration::from_secs(2),
        ..Synth::default()
    };
    Arc::new(spec.build().unwrap())
}

fn hand_off(trace: &Arc<Trace>, shape: LinkShape, faults: &[Fault]) -> Played {
    let (mut connect, ends) = SimConnect::new(shape);
    connect.faults.extend(faults);
    let clock = MonotonicClock::default();
    let mut vm = TraceVm::new(Arc::clone(trace), Play::default(), clock);
    let mut options = SendOptions::new("vm", "target", Vec::new());
    options.audit = true;
    let scratch = tempfile::tempdir().unwrap();
    let played = play(
        &mut vm,
        &mut connect,
        &ends,
        (&options, &ReceiveOptions::new("source")),
        scratch.path(),
        &clock,
        &mut |_| {},
        &AtomicBool::new(false),
    )
    .unwrap();
    assert_eq!(played.report.links as usize, faults.len() + 1);
    assert!(played.target.is_running());
    // A link is made to nobody once the target is gone.
    drop(ends);
    assert!(connect.connect(Duration::from_secs(1)).is_err());
    played
}

/// What arrives is what the guest was when it was paused, over any link.
#[test]
fn a_played_guest_arrives_as_it_was() {
    let trace = guest();
    let ms = Duration::from_millis;
    let fast = hand_off(&trace, LinkShape::unlimited(), &[]);
    let far = hand_off(&trace, LinkShape::mbps(40.0, ms(10)), &[]);
    for report in [&fast.report, &far.report] {
        assert!(report.classes.iter().any(|class| class.name == "base_disk" && class.chunks > 300));
    }
    assert!(far.report.total_ms > fast.report.total_ms, "{:?}", far.report);
    assert!(far.report.downtime_ms.unwrap() >= 10.0, "a commit takes half a round trip");
    let used = far.report.link_rate_bytes_per_s.unwrap();
    assert!((3e6..6e6).contains(&used), "{used} of 5e6 bytes a second measured");
}

#[test]
fn broken_links_and_changing_rates_cost_time_only() {
    let trace = guest();
    let ms = Duration::from_millis;
    let cut = Fault { cut_up: Some(200_000), ..Fault::default() };
    let flip = Fault { flip: Some(100_000), ..Fault::default() };
    let rate = Rate::mbps(20.0).then_mbps(ms(300), 80.0);
    hand_off(&trace, LinkShape::symmetric(rate, ms(2)), &[cut, flip]);
    let mut shape = LinkShape::mbps(10.0, ms(2));
    shape.outages.push(Outage { from: ms(400), until: ms(600) });
    let (mut connect, ends) = SimConnect::new(shape);
    let clock = MonotonicClock::default();
    let mut vm = TraceVm::new(trace, Play::default(), clock);
    let scratch = tempfile::tempdir().unwrap();
    let options = SendOptions::new("vm", "target", Vec::new());
    let receiving = ReceiveOptions::new("source");
    let (progress, cancel) = (&mut |_: &_| {}, AtomicBool::new(false));
    let both = (&options, &receiving);
    let played =
        play(&mut vm, &mut connect, &ends, both, scratch.path(), &clock, progress, &cancel)
            .unwrap();
    assert!(played.report.links >= 2);
}
