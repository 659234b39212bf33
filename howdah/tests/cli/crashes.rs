//! Processes that die around the commit, as a user meets it: the guest runs on one side, and a command
//! says which.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use crate::guests::{Site, wait_for};

/// Two cloudlets that hold the same bases.
fn pair() -> Option<(Site, Site)> {
    let here = Site::new()?;
    here.warm();
    let there = here.twin();
    Some((here, there))
}

fn state(site: &Site) -> String {
    let seen = site.0.line("--json vm inspect a").json();
    seen["state"].as_str().unwrap_or("none").to_owned()
}

/// A process that said its word is still there for a moment, and is what is shown.
fn comes_to(site: &Site, wanted: &str) {
    wait_for(wanted, || (state(site) == wanted).then_some(()));
}

/// The target has everything, verified, and dies before it owns it. What it noted before its Welcome
/// answers the commit; the guest goes on here with all that it had in memory.
#[test]
fn a_target_that_dies_after_the_early_commit_gives_the_guest_back() {
    let Some((here, there)) = pair() else { return };
    here.0.line("vm run a --base warm --detach").ok();
    let count = here.counts_beyond("a", "");
    let listener = there.listen_on("verified:kill");
    let handoff = format!("handoff a {} --plain", listener.address());
    let ran = here.0.line(&handoff);
    assert!(ran.code == Some(7) && ran.stderr.contains("goes on here"), "{ran:?}");
    assert_eq!(state(&here), "running");
    here.counts_beyond("a", &count);
    assert_eq!(here.booted("a"), 0, "it never booted: its memory went on");
    comes_to(&there, "declined");
    let seen = here.0.line("--json vm inspect a").json();
    assert_eq!(seen["record"]["epoch"], 3, "{seen}");
}

/// The source dies with its commit on disk. Whether it was said it does not know any more: it asks.
#[test]
fn a_source_that_dies_with_its_commit_on_disk_asks() {
    let Some((here, there)) = pair() else { return };
    let mut run = here.0.command();
    run.env("HOWDAH_STEP", "committed-durable:kill").stdout(Stdio::null());
    let ran = run.args(["vm", "run", "a", "--base", "warm", "--detach"]).status().unwrap();
    assert!(ran.success());
    here.counts_beyond("a", "");
    let listener = there.listen_on("");
    let handoff = format!("handoff a {} --plain", listener.address());
    assert_ne!(here.0.line(&handoff).code, Some(0), "its process died");
    assert_eq!(state(&here), "in-doubt");
    let began = Instant::now();
    let verdict = loop {
        let told = here.0.line("--json recover a");
        let verdict = told.json()[0]["verdict"].as_str().unwrap().to_owned();
        if verdict != "in-doubt" {
            break verdict;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{told:?}");
    };
    match verdict.as_str() {
        // All of it was there already.
        "gone" => {
            assert_eq!(state(&here), "handed-off");
            comes_to(&there, "running");
            there.counts_beyond("a", "");
        }
        "may-run" => {
            assert_eq!(state(&here), "stopped");
            comes_to(&there, "declined");
            here.0.line("vm run a --detach").ok();
            here.counts_beyond("a", "");
        }
        other => panic!("{other}"),
    }
}
