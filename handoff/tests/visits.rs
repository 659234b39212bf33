//! A guest that goes there and back, again and again: whatever it writes, frees and discards while
//! it is handed off, however often that is cancelled or its link breaks, it finds what it wrote.
#![allow(clippy::unwrap_used)]

mod model;

use std::sync::Arc;

use handoff::{base_view::testing::MemBase, sim::Fault};
use model::{
    Act, acts, chunk, disk, ram,
    sites::{hand_off, sites, sites_with},
};
use proptest::prelude::*;

#[test]
fn the_way_back_costs_what_changed_since() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = sites(dir.path());
    (10..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
    (0..20).for_each(|i| a.memory().act(Act::Write(disk(i), 700 + i)));
    let there = hand_off(&mut a, &mut b, &[], &[]).unwrap();
    assert_eq!(b.host.started_from, None);

    b.memory().act(Act::Write(ram(11), 1));
    b.memory().act(Act::Write(disk(3), 2));
    // Back to base: the other side holds something else there.
    b.memory().act(Act::Zero(ram(12)));
    b.memory().act(Act::Restore(disk(4)));
    let back = hand_off(&mut b, &mut a, &[], &[]).unwrap();
    assert!(a.host.started_from.is_some());
    assert!(back.bytes_on_link * 4 < there.bytes_on_link, "{back:?} after {there:?}");

    // Switched off, or forgotten by the other side: all of it again.
    for forgets in [false, true] {
        if forgets {
            b.host.visit = None;
        }
        let without: &[&str] = if forgets { &[] } else { &["known"] };
        let again = hand_off(&mut a, &mut b, &[], without).unwrap();
        assert_eq!(b.host.started_from, None);
        assert!(again.bytes_on_link * 2 > there.bytes_on_link, "{again:?}");
        hand_off(&mut b, &mut a, &[], &[]).unwrap();
    }
}

#[test]
fn what_changed_in_what_came_is_sent_as_that() {
    let back = |remembers: bool| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        (10..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
        hand_off(&mut a, &mut b, &[], &[]).unwrap();
        (10..60).for_each(|i| b.memory().act(Act::Touch(ram(i), i as u8)));
        if !remembers {
            b.contents = None;
        }
        hand_off(&mut b, &mut a, &[], &[]).unwrap().bytes_on_link
    };
    let (with, without) = (back(true), back(false));
    assert!(with * 4 < without, "{with} bytes, {without} without what came");
}

#[test]
fn what_the_guest_calls_free_is_not_sent() {
    let sent = |without: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        (0..60).for_each(|i| a.memory().act(Act::Write(ram(i), 500 + i)));
        // At the very start of the handoff, and some of it taken again soon after.
        let free = (10..60).map(Act::Free);
        let taken = (50..60).map(|i| Act::Write(ram(i), 900 + i));
        a.memory().script = free.chain(taken).collect();
        let report = hand_off(&mut a, &mut b, &[], without).unwrap();
        (report.bytes_on_link, a.host.visit.unwrap().0.hints_taken)
    };
    let ((with, hints), (all, none)) = (sent(&[]), sent(&["free"]));
    assert!(hints > 0 && none == 0);
    assert!(with < all, "{with} bytes with {hints} hints, {all} without");
}

#[test]
fn contents_of_another_base_that_both_hold_are_named() {
    let sent = |there: bool, without: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = sites(dir.path());
        let others: Vec<_> = [300, 400]
            .map(|from| {
                Arc::new(MemBase::new((0..60).map(|i| chunk(from + i)).collect(), vec![], vec![]))
            })
            .into();
        a.host.also = others.clone();
        // The target holds the second only: numbers must not get mixed up.
        b.host.also = others[1..].iter().filter(|_| there).cloned().collect();
        (0..50).for_each(|i| a.memory().act(Act::Write(ram(i), 400 + i)));
        hand_off(&mut a, &mut b, &[], without).unwrap().bytes_on_link
    };
    let (named, unknown, off) = (sent(true, &[]), sent(false, &[]), sent(true, &["other-bases"]));
    assert!(named * 3 < unknown && named * 3 < off, "{named}, {unknown}, {off}");
}

/// One attempt: what the guest does before and during it, when it is cancelled, where the link
/// breaks, what is switched off, and whether the other side forgot the last visit.
#[derive(Clone, Debug)]
struct Leg {
    before: Vec<Act>,
    during: Vec<Act>,
    cancel_at: Option<usize>,
    cut: Option<u64>,
    without: Vec<&'static str>,
    forgets: bool,
}

fn legs() -> impl Strategy<Value = Vec<Leg>> {
    let switches = handoff::stage::StageOptions::SWITCHES.to_vec();
    let leg = (
        acts(60),
        acts(120),
        prop::option::weighted(0.3, 0usize..150),
        prop::option::weighted(0.2, 50u64..20_000),
        prop::sample::subsequence(switches, 0..3),
        prop::bool::weighted(0.2),
    );
    let leg = leg.prop_map(|(before, during, cancel_at, cut, without, forgets)| Leg {
        before,
        during,
        cancel_at,
        cut,
        without,
        forgets,
    });
    prop::collection::vec(leg, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_the_guest_finds_what_it_wrote(legs in legs(), base_memory: bool) {
        let dir = tempfile::tempdir().unwrap();
        let (mut here, mut there) = sites_with(dir.path(), base_memory);
        for leg in legs {
            let mut during = leg.during;
            if let Some(at) = leg.cancel_at {
                during.insert(at.min(during.len()), Act::Cancel);
            }
            leg.before.iter().for_each(|act| here.memory().act(*act));
            here.memory().script = during.into();
            if leg.forgets {
                there.host.visit = None;
            }
            let faults: Vec<_> =
                leg.cut.map(|cut| Fault { cut_up: Some(cut), ..Fault::default() }).into_iter().collect();
            if hand_off(&mut here, &mut there, &faults, &leg.without).is_some() {
                std::mem::swap(&mut here, &mut there);
            }
        }
    }
}
