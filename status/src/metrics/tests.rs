//! What Prometheus would make of it.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::samples;

/// Reads the text as strictly as Prometheus does; every series with its value.
fn read(text: &str) -> BTreeMap<String, f64> {
    let (mut series, mut families, mut current) = (BTreeMap::new(), BTreeSet::new(), String::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            current = help.split(' ').next().unwrap().to_owned();
            assert!(families.insert(current.clone()), "{current} is there twice");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, current);
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        let plain = name.split('{').next().unwrap();
        assert!(plain.starts_with(&current), "{line:?} is not of {current}");
        assert!(plain.bytes().all(|b| b.is_ascii_lowercase() || b"_".contains(&b)), "{plain}");
        let value = value.parse().unwrap_or_else(|e| panic!("{line:?}: {e}"));
        assert!(series.insert(name.to_owned(), value).is_none(), "{name} is there twice");
    }
    series
}

#[test]
fn a_cloudlet_is_told_in_numbers() {
    let mut tally = Tally::default();
    let operation = Box::new(samples::moved());
    tally.see(&howdah_api::Event::Operation { operation });
    let text = render(&samples::snapshot(), &tally);
    let series = read(&text);
    for (name, value) in [
        ("howdah_build_info{version=\"0.1.0\"}", 1.0),
        ("howdah_uptime_seconds", 7500.0),
        ("howdah_vms{state=\"running\"}", 1.0),
        ("howdah_vms{state=\"paused\"}", 0.0),
        ("howdah_vm_up{vm=\"web\"}", 1.0),
        ("howdah_vm_up{vm=\"db\"}", 0.0),
        ("howdah_vm_problems{vm=\"old\"}", 1.0),
        ("howdah_vm_resident_bytes{vm=\"web\"}", 300.0 * 1048576.0),
        ("howdah_handoff_round{vm=\"web\",direction=\"out\"}", 2.0),
        ("howdah_handoff_predicted_downtime_seconds{vm=\"web\",direction=\"out\"}", 0.14),
        ("howdah_last_handoff_seconds{vm=\"db\"}", 9.4),
        ("howdah_operations_running{kind=\"handoff\"}", 1.0),
        ("howdah_operations_ended_total{kind=\"handoff\",state=\"done\"}", 1.0),
        ("howdah_handoff_downtime_seconds_bucket{le=\"0.1\"}", 0.0),
        ("howdah_handoff_downtime_seconds_bucket{le=\"0.2\"}", 1.0),
        ("howdah_handoff_downtime_seconds_bucket{le=\"+Inf\"}", 1.0),
        ("howdah_handoff_downtime_seconds_count", 1.0),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name} in\n{text}");
    }
}

/// A rate needs two points: what never happened has a series too.
#[test]
fn series_are_there_before_anything_happens() {
    let mut seen = samples::snapshot();
    let before = read(&render(&seen, &Tally::default()));
    seen.vms.iter_mut().for_each(|vm| vm.state = VmState::Stopped);
    let after = read(&render(&seen, &Tally::default()));
    let states = |series: &BTreeMap<String, f64>| {
        series.keys().filter(|name| name.starts_with("howdah_vms{")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(states(&before), states(&after));
    assert_eq!(states(&before).len(), STATES.len());
}

/// What operators build alerts on is written down, and nothing else.
#[test]
fn every_family_is_in_the_reference() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics.md");
    let page = std::fs::read_to_string(page).unwrap();
    let documented: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
        .collect();
    let text = render(&samples::snapshot(), &Tally::default());
    let written: BTreeSet<_> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert_eq!(documented, written);
}

proptest! {
    /// Whatever names hold (a damaged book of peers, another version's), it stays one series a line.
    #[test]
    fn names_do_not_break_out(name in any::<String>()) {
        let mut seen = samples::snapshot();
        seen.host.version = name.clone();
        seen.vms.truncate(1);
        seen.vms[0].name = name;
        read(&render(&seen, &Tally::default()));
    }
}
