//! The whole engine: two in-memory VMs, real threads, a link with faults.
#![allow(clippy::unwrap_used)]

mod sim;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::unbounded;
use handoff::{
    BaseView, Refusal,
    engine::{KeptReason, ReceiveError, Recovery, SendOutcome, recover, send, send_resume},
    ownership::{Journal, Record, State, Tenure, VmId},
    sim::{Fault, LinkShape, Outage, SimConnect},
    tcp::{MonotonicClock, TcpConnect, accept_tcp},
    wire::{VERSION_MAX, Versions},
};
use proptest::prelude::*;
use sim::{
    Host, HostFaults,
    pair::{assert_kept, assert_moved, limits, mib_per_s, pair, pair_over, target_side},
};

#[test]
fn an_idle_guest_moves() {
    assert_moved(pair(&[], HostFaults::default(), 0));
}

#[test]
fn a_guest_that_writes_moves_whole() {
    let mut pair = pair(&[], HostFaults::default(), 2000);
    pair.connect.shape = mib_per_s(4);
    assert_moved(pair);
}

#[test]
fn a_link_cut_anywhere_goes_on_where_it_stopped() {
    // Where Hello is, in segments, at the end, and in what the target says.
    for cut in [10, 100, 400, 5_000, 70_000, 300_000, 500_000] {
        let up = Fault { cut_up: Some(cut), ..Fault::default() };
        let down = Fault { cut_down: Some(cut / 100 + 3), ..Fault::default() };
        assert_moved(pair(&[up, down, up], HostFaults::default(), 500));
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0u64..600_000).prop_map(|cut| Fault { cut_up: Some(cut), ..Fault::default() }),
        (0u64..4_000).prop_map(|cut| Fault { cut_down: Some(cut), ..Fault::default() }),
        // Behind Hello, which nothing but the link protects, and before the end.
        (1_000u64..200_000).prop_map(|flip| Fault { flip: Some(flip), ..Fault::default() }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 8, ..ProptestConfig::with_cases(8) })]

    /// Links that are slow, delay, lose what is on its way and come back, whenever that is; with
    /// however many decoders: the guest arrives whole, and runs once.
    #[test]
    fn any_delay_loss_and_reconnect(
        faults in prop::collection::vec(fault(), 0..5),
        (mbps, delay_ms) in (20.0f64..400.0, 0u64..15),
        outage in prop::option::of((0u64..300, 1u64..200)),
        writes_per_s in 0u64..600,
        workers in 1usize..=4,
    ) {
        let ms = Duration::from_millis;
        let mut shape = LinkShape::mbps(mbps, ms(delay_ms));
        let outage = outage.map(|(at, took)| Outage { from: ms(at), until: ms(at + took) });
        shape.outages.extend(outage);
        assert_moved(pair_over(shape, &faults, HostFaults::default(), writes_per_s, workers));
    }
}

#[test]
fn a_flipped_bit_costs_a_link_and_nothing_else() {
    for flip in [300, 20_000, 400_000] {
        let fault = Fault { flip: Some(flip), ..Fault::default() };
        assert_moved(pair(&[fault], HostFaults::default(), 200));
    }
}

/// Behind the last segments the word is under way already that these are all: it must not be believed
/// where one of them is not whole.
#[test]
fn a_bit_flipped_in_the_last_segments_is_sent_again() {
    let mut whole = pair(&[], HostFaults::default(), 0);
    assert!(matches!(whole.send(), SendOutcome::Moved { .. }));
    let needed = whole.connect.carried_bytes();
    whole.finish();
    for back in (500..10_000).step_by(500) {
        let fault = Fault { flip: Some(needed - back), ..Fault::default() };
        assert_moved(pair(&[fault], HostFaults::default(), 0));
    }
}

#[test]
fn what_was_applied_is_not_sent_again() {
    let mut whole = pair(&[], HostFaults::default(), 0);
    assert!(matches!(whole.send(), SendOutcome::Moved { .. }));
    let needed = whole.connect.carried_bytes();
    whole.finish();

    // The first segment carries most of it; the break comes in a later one.
    let cut = Fault { cut_up: Some(needed / 10 * 9), ..Fault::default() };
    let mut broken = pair(&[cut], HostFaults::default(), 0);
    // Slow, so that the target keeps up and little is on its way when the link breaks.
    broken.connect.shape = mib_per_s(4);
    assert!(matches!(broken.send(), SendOutcome::Moved { .. }));
    let took = broken.connect.carried_bytes();
    broken.finish();
    assert!(took < needed + needed / 4, "{took} bytes, {needed} without a break");
}

#[test]
fn a_refusal_leaves_the_guest_alone() {
    let refusal = Refusal::NoSpace { what: "disk".into(), needed_bytes: 2, available_bytes: 1 };
    let faults = HostFaults { refuse: Some(refusal.clone()), ..HostFaults::default() };
    let pair = pair(&[], faults, 100);
    assert_kept(pair, |r| matches!(r, KeptReason::Refused(got) if *got == refusal));
}

#[test]
fn a_target_that_takes_long_to_get_ready_is_waited_for() {
    let slow = Duration::from_millis(1500);
    let mut pair = pair(&[], HostFaults { slow, ..HostFaults::default() }, 100);
    pair.options.limits.silence = Duration::from_millis(400);
    assert_moved(pair);
}

#[test]
fn an_unknown_version_is_refused() {
    let mut pair = pair(&[], HostFaults::default(), 100);
    pair.options.versions = Versions { min: 90, max: 99 };
    let expected = Refusal::Version { ours: VERSION_MAX, theirs: 99 };
    assert_kept(pair, |r| matches!(r, KeptReason::Refused(got) if *got == expected));
}

#[test]
fn a_machine_that_cannot_be_loaded_is_declined() {
    let faults = HostFaults { fail_load: true, ..HostFaults::default() };
    let outcomes = assert_kept(
        pair(&[], faults, 100),
        |r| matches!(r, KeptReason::Declined(why) if why.contains("lacks a feature")),
    );
    assert!(matches!(outcomes[0], Err(ReceiveError::Declined(_))));
}

#[test]
fn a_machine_that_does_not_start_comes_back_after_the_commit() {
    let faults = HostFaults { fail_resume: true, ..HostFaults::default() };
    let pair = pair(&[], faults, 100);
    let path = pair.journals.path().join("source");
    let seen = path.clone();
    let outcomes = assert_kept(pair, move |r| {
        let record = Journal::open(&seen).unwrap().record().unwrap().clone();
        // The epoch that was given away is not used again.
        record.epoch.0 == 3
            && matches!(r, KeptReason::Declined(why) if why.contains("vCPU 0 does not start"))
    });
    assert!(matches!(outcomes[0], Err(ReceiveError::Declined(_))));
}

#[test]
fn a_state_that_cannot_be_saved_keeps_the_guest() {
    let mut pair = pair(&[], HostFaults::default(), 100);
    pair.source.fail_save = true;
    assert_kept(pair, |r| matches!(r, KeptReason::Vm { .. }));
}

#[test]
fn a_guest_that_cannot_be_tracked_stays() {
    let mut pair = pair(&[], HostFaults::default(), 100);
    pair.source.fail_track = true;
    assert_kept(pair, |r| matches!(r, KeptReason::Vm { .. }));
}

#[test]
fn a_peer_that_is_gone_mid_stream_keeps_the_guest_within_the_grace() {
    let fault = Fault { cut_up: Some(100_000), ..Fault::default() };
    let mut pair = pair(&[fault], HostFaults::default(), 100);
    pair.connect.reachable_after = false;
    let start = Instant::now();
    assert_kept(pair, |r| matches!(r, KeptReason::Link(_)));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn nobody_there_is_an_error_at_once() {
    let mut pair = pair(&[], HostFaults::default(), 100);
    pair.connect.reachable_after = false;
    assert_kept(pair, |r| matches!(r, KeptReason::Link(_)));
}

#[test]
fn cancel_keeps_the_guest_and_a_second_try_moves_it() {
    let mut pair = pair(&[], HostFaults::default(), 500);
    pair.connect.shape = mib_per_s(1);
    let cancel = Arc::new(AtomicBool::new(false));
    let soon = Arc::clone(&cancel);
    let waiter = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        soon.store(true, SeqCst);
    });
    let outcome = pair.send_until(&cancel);
    waiter.join().unwrap();
    let SendOutcome::KeptHere { reason: KeptReason::Cancelled, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(pair.source.guest.is_running());
    pair.connect.shape = LinkShape::unlimited();
    // The target drops the first copy before it takes another offer: seen in its last link closing.
    thread::sleep(Duration::from_millis(1500));
    assert_moved(pair);
}

/// The same over real sockets: a guest that writes moves, and a decline reaches a source that is
/// still sending.
#[test]
fn over_tcp() {
    for fail_load in [false, true] {
        let mut pair = pair(&[], HostFaults { fail_load, ..HostFaults::default() }, 500);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut connect = TcpConnect::new(listener.local_addr().unwrap().to_string());
        let (to, links) = unbounded();
        thread::spawn(move || {
            while let Ok(link) = accept_tcp(&listener) {
                if to.send(link).is_err() {
                    return;
                }
            }
        });
        let faults = HostFaults { fail_load, ..HostFaults::default() };
        let host = Host { base: Arc::clone(&pair.base), runners: pair.runners.clone(), faults };
        let target = target_side(links, pair.journals.path().join("target"), host, 2);
        let mut journal = pair.journal("source");
        let base = Arc::clone(&pair.base) as Arc<dyn BaseView>;
        let outcome = send(
            &mut pair.source,
            base.into(),
            &mut connect,
            &mut journal,
            &pair.options,
            &pair.clock,
            &mut |_| {},
            &AtomicBool::new(false),
        )
        .unwrap();
        match outcome {
            SendOutcome::Moved { report, .. } => {
                assert!(!fail_load && report.downtime.unwrap().rtt_ms > 0.0, "{report:?}");
            }
            SendOutcome::KeptHere { reason: KeptReason::Declined(_), .. } => assert!(fail_load),
            other => panic!("{other:?}"),
        }
        assert_eq!(pair.source.guest.is_running(), fail_load);
        assert_eq!(pair.runners.now(), 1);
        assert!(!pair.runners.ever_two());
        // The listener's thread blocks in accept until the test's process ends.
        drop(target);
    }
}

/// The link dies right after Commit was sent, or right before Resumed comes, for good: the source
/// is in doubt, stays paused, and learns later how it ended.
#[test]
fn in_doubt_until_the_peer_can_be_asked() {
    let mut whole = pair(&[], HostFaults::default(), 0);
    assert!(matches!(whole.send(), SendOutcome::Moved { .. }));
    whole.finish();
    // Down: Welcome, acks, pongs, then Prepared; which byte is the last of Prepared varies with
    // the acks, so cut at many places and look at what became of it.
    let mut in_doubt = 0;
    for cut in (0..5).flat_map(|more| (40 + more..400).step_by(40)) {
        // On a busy host there are other acks, and all nine may fall elsewhere.
        if cut % 40 == 1 && in_doubt > 0 {
            break;
        }
        let fault = Fault { cut_down: Some(cut), ..Fault::default() };
        let mut pair = pair(&[fault], HostFaults::default(), 0);
        pair.connect.reachable_after = false;
        let outcome = pair.send();
        match outcome {
            SendOutcome::KeptHere { .. } => assert!(pair.source.guest.is_running()),
            SendOutcome::Moved { .. } => assert!(!pair.source.guest.is_running()),
            SendOutcome::InDoubt { .. } => {
                in_doubt += 1;
                assert!(!pair.source.guest.is_running());
                pair.connect.reachable_after = true;
                let mut journal = pair.journal("source");
                let recovery = send_resume(
                    &mut pair.source,
                    &mut journal,
                    "vm",
                    &mut pair.connect,
                    &limits(),
                    &pair.clock,
                )
                .unwrap();
                match recovery {
                    Recovery::Gone { .. } => assert!(!pair.source.guest.is_running()),
                    Recovery::MayRun => assert!(pair.source.guest.is_running()),
                    other => panic!("{other:?}"),
                }
            }
        }
        let (source, runners, outcomes) = pair.finish();
        assert_eq!(runners.now(), 1, "cut at {cut}: {outcomes:?}", outcomes = outcomes.len());
        assert!(!runners.ever_two());
        drop(source);
    }
    assert!(in_doubt > 0, "no cut fell between Commit and Resumed");
}

#[test]
fn a_source_that_died_before_the_commit_may_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path().join("source")).unwrap();
    let record = Record::created(VmId::random());
    let handoff = handoff::ownership::HandoffId::random();
    let state = State::HandingOff { handoff, peer: "target".into() };
    journal.write(Record { state, ..record }).unwrap();
    let clock = MonotonicClock::default();
    let none: Option<&mut SimConnect> = None;
    assert_eq!(recover(&mut journal, "vm", none, &limits(), &clock).unwrap(), Recovery::MayRun);
    assert_eq!(journal.record().unwrap().state, State::Owner(Tenure::Settled));
}

#[test]
fn a_target_that_died_prepared_declines() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path().join("target")).unwrap();
    let handoff = handoff::ownership::HandoffId::random();
    let root = handoff::StateRoot([3; 32]);
    let state = State::Prepared { handoff, peer: "source".into(), root };
    journal.write(Record { state, ..Record::created(VmId::random()) }).unwrap();
    let clock = MonotonicClock::default();
    let none: Option<&mut SimConnect> = None;
    let recovery = recover(&mut journal, "vm", none, &limits(), &clock).unwrap();
    assert!(matches!(recovery, Recovery::NeverHere { .. }));
    assert!(matches!(journal.record().unwrap().state, State::Declined { .. }));
}
