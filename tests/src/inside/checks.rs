//! What must hold at the end of every scenario, however it went.

use std::{
    path::Path,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{
    application,
    guest::{self, AGENT, Vitals, Watched},
    product::{Cloudlet, VM},
    runner::Stage,
};
use crate::{
    results::{Leg, Outcome},
    scenario::{Expect, Place, Side},
};

/// How far the guest's clock may be from the lab's.
const CLOCK_MS: f64 = 50.0;
/// How long the cloudlets may take to agree on who runs the guest.
const SETTLES: Duration = Duration::from_secs(45);
/// How long a guest may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(40);
/// Silence just before and after a handoff counts as its own.
const AROUND_NS: i64 = 2_000_000_000;
/// What the link's counters may show beyond the payload: headers, acknowledgements, what was sent
/// again. A part of the payload, and a fixed sum for the ends of the connection.
const OVERHEAD_PART: f64 = 0.25;
const OVERHEAD_BYTES: u64 = 128 << 10;
/// States of a VM that has vCPUs, or soon may have.
pub(super) const ACTIVE: [&str; 6] =
    ["starting", "running", "paused", "handing-off", "receiving", "not answering"];
/// The records, in the guest's file system.
const RECORDS: &str = "/data/records";

/// Runs every check that the scenario's end allows.
pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    one_owner(stage)?;
    let lives = stage.scenario.ends_on != Place::None;
    let at_end = if lives { Some(alive(stage)?) } else { None };
    let client = stage.client.take().context("the client was never started")?;
    let watched = client.stop()?;
    through_the_client(stage, &watched, at_end.as_ref());
    if let Some(application) = stage.application.take() {
        application::conclude(&mut stage.outcome, &application.stop()?, lives);
    }
    let promised = at_end.as_ref().or(watched.summary.last.as_ref());
    let promised = promised.context("the guest never answered the client")?.durable_seq;
    on_the_disk(stage, promised, lives)?;
    let Stage { outcome, scenario, .. } = stage;
    handoffs(outcome);
    outcome.conclude();
    let limits = &scenario.limits;
    let figures = [
        ("total-time", outcome.total_ms, limits.total_ms),
        ("downtime", outcome.downtime_ms, limits.downtime_ms),
        ("client-gap", outcome.client_gap_ms, limits.client_gap_ms),
    ];
    for (name, figure, limit) in figures {
        if let Some(limit) = limit {
            let within = figure.is_some_and(|figure| figure <= limit);
            let figure = figure.map_or("unknown".into(), |figure| format!("{figure:.0} ms"));
            outcome.check(name, within, format!("{figure} of {limit:.0} ms allowed"));
        }
    }
    Ok(())
}

/// The guest runs where it should, and nowhere else.
fn one_owner(stage: &mut Stage<'_>) -> Result<()> {
    let home = stage.scenario.ends_on.side();
    let started = Instant::now();
    loop {
        let (a, b) = (stage.a.states()?, stage.b.states()?);
        let active = |states: &[String]| {
            // A target whose source is dead goes on waiting for it: it may not run what it has.
            let waits = |state: &str| home.is_none() && state == "receiving";
            let active = |state: &str| ACTIVE.contains(&state) && !waits(state);
            states.iter().filter(|state| active(state.as_str())).count()
        };
        let right = [(Side::A, &a), (Side::B, &b)].into_iter().all(|(side, states)| {
            let runs = states.iter().filter(|state| *state == "running").count();
            let wanted = usize::from(home == Some(side));
            runs == wanted && active(states) == wanted
        });
        if right || started.elapsed() > SETTLES {
            let detail = format!("VMs on A: {a:?}, on B: {b:?}");
            stage.outcome.check("one-owner", right, detail);
            return Ok(());
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The guest that answers now is the one that was started, and it works.
fn alive(stage: &mut Stage<'_>) -> Result<Vitals> {
    let born = stage.born.clone().context("the guest was never started")?;
    let ram = guest::ask("verify-ram");
    let before = guest::vitals()?;
    thread::sleep(Duration::from_millis(300));
    let now = guest::vitals()?;
    let outcome = &mut stage.outcome;
    outcome.check(
        "same-boot",
        now.boot_id == born.boot_id,
        format!("boot id {} at the start, {} at the end", born.boot_id, now.boot_id),
    );
    outcome.check(
        "same-ram",
        now.nonce == born.nonce,
        format!("nonce {} at the start, {} at the end", born.nonce, now.nonce),
    );
    outcome.check(
        "alive",
        now.counter > before.counter && before.counter > born.counter,
        format!("counter {}, then {}, then {}", born.counter, before.counter, now.counter),
    );
    let sound = ram.is_ok() && now.ram_errors == 0 && now.write_errors == 0;
    let verified = ram.map_or_else(|error| format!("{error:#}"), |answer| answer.to_string());
    outcome.check(
        "ram-sound",
        sound,
        format!("{} wrong pages, {} failed writes; {verified}", now.ram_errors, now.write_errors),
    );
    Ok(now)
}

/// What the client saw throughout.
fn through_the_client(stage: &mut Stage<'_>, watched: &Watched, at_end: Option<&Vitals>) {
    let outcome = &mut stage.outcome;
    let summary = &watched.summary;
    outcome.check(
        "same-guest",
        summary.answered > 0
            && summary.boot_id_constant
            && summary.nonce_constant
            && summary.duplicates == 0,
        format!(
            "{} answers to {} probes, {} of them twice; boot id {}, nonce {}",
            summary.answered,
            summary.asked,
            summary.duplicates,
            if summary.boot_id_constant { "constant" } else { "CHANGED" },
            if summary.nonce_constant { "constant" } else { "CHANGED" },
        ),
    );
    outcome.check(
        "nothing-back",
        summary.counter_monotonic,
        "counter, durable record and clocks from one answer to the next",
    );
    let inside = at_end.or(summary.last.as_ref()).map_or(0, |vitals| vitals.clock_violations);
    outcome.check(
        "clock",
        summary.certain_offset_ms <= CLOCK_MS && inside == 0,
        format!(
            "at most {:.1} ms off (estimate {:.1} ms); the guest saw {inside} steps backward",
            summary.certain_offset_ms, summary.worst_offset_ms
        ),
    );
    for leg in &mut outcome.legs {
        let (from, to) = leg.window_ns;
        leg.client_gap_ms = Some(watched.longest_gap_ms(from - AROUND_NS, to + AROUND_NS));
    }
}

/// Shuts the guest down and looks at its disk from outside.
fn on_the_disk(stage: &mut Stage<'_>, promised: u64, lives: bool) -> Result<()> {
    let side = stage.scenario.ends_on.side().unwrap_or(Side::A);
    if lives {
        let gently = shut_down(stage.cloudlet(side))?;
        let detail = if gently { "the guest powered off" } else { "it had to be stopped" };
        stage.outcome.check("shutdown", gently, detail);
    }
    let disk = stage.work.join("disk.raw");
    stage.cloudlet(side).howdah(&["vm", "export-disk", VM, &disk.to_string_lossy()])?;
    if !lives {
        // The guest died as by a power cut: its journal is replayed first, as a reboot would.
        let replay = tool("/usr/sbin/e2fsck", &["-fy"], &disk)?;
        let usable = matches!(replay.status.code(), Some(0 | 1));
        stage.outcome.check("disk-replays", usable, one_line(&replay));
    }
    let (clean, detail) = is_clean(&disk)?;
    stage.outcome.check("disk-clean", clean, detail);
    let found = Records::on(&disk, &stage.work)?;
    stage.outcome.check(
        "records",
        found.ok && found.last_seq >= promised,
        format!(
            "{promised} promised, {} on the disk{}",
            found.last_seq,
            found.first_error.map(|error| format!(", {error}")).unwrap_or_default()
        ),
    );
    Ok(())
}

/// What `howdah-agent verify` prints.
#[derive(Deserialize)]
pub(super) struct Records {
    pub(super) last_seq: u64,
    pub(super) ok: bool,
    pub(super) first_error: Option<String>,
}

impl Records {
    /// Reads and verifies those on a disk image; `work` is a scratch directory.
    pub(super) fn on(disk: &Path, work: &Path) -> Result<Self> {
        let records = work.join("records");
        records_of(disk, &records)?;
        let verify = Command::new(AGENT).arg("verify").arg(&records).output()?;
        serde_json::from_slice(&verify.stdout)
            .with_context(|| format!("howdah-agent verify: {}", one_line(&verify)))
    }
}

/// Lets the guest power off; whether it did.
pub(super) fn shut_down(cloudlet: &Cloudlet) -> Result<bool> {
    // The answer may be lost with the guest.
    let _ = guest::ask("poweroff");
    let started = Instant::now();
    while started.elapsed() < SHUTDOWN {
        if !cloudlet.states()?.iter().any(|state| state == "running" || state == "stopping") {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(100));
    }
    cloudlet.howdah(&["vm", "stop", VM])?;
    Ok(false)
}

fn records_of(disk: &Path, to: &Path) -> Result<()> {
    let request = format!("dump {RECORDS} {}", to.display());
    let dumped = Command::new("/usr/sbin/debugfs").args(["-R", &request]).arg(disk).output()?;
    if !to.exists() {
        anyhow::bail!("{RECORDS} cannot be read from the disk: {}", one_line(&dumped));
    }
    Ok(())
}

/// What the handoffs themselves must show.
fn handoffs(outcome: &mut Outcome) {
    for (at, leg) in outcome.legs.clone().iter().enumerate() {
        let name = |what: &str| format!("{what}-{}", at + 1);
        if leg.ended != Expect::Moved {
            continue;
        }
        if leg.audit {
            let (source, target) = &leg.hashes;
            let equal = source.is_some() && source == target;
            let word = |hash: &Option<String>| hash.clone().unwrap_or("none reported".into());
            let detail = format!("all RAM and disk: {}, {}", word(source), word(target));
            outcome.check(&name("equal-at-cutover"), equal, detail);
        }
        let (agree, detail) = bytes_agree(leg);
        outcome.check(&name("link-bytes"), agree, detail);
    }
}

/// The payload that howdah reports fits what the link's counters show.
fn bytes_agree(leg: &Leg) -> (bool, String) {
    let counted = leg.link_counter_bytes;
    let Some(reported) = leg.bytes_on_link else {
        return (false, format!("the report has no bytes_on_link; the link carried {counted}"));
    };
    let most = reported + (reported as f64 * OVERHEAD_PART) as u64 + OVERHEAD_BYTES;
    let agree = (reported..=most).contains(&counted);
    (agree, format!("{reported} reported, {counted} through the link's counters"))
}

/// Whether a file system is clean, and in words.
pub(super) fn is_clean(disk: &Path) -> Result<(bool, String)> {
    let fsck = tool("/usr/sbin/e2fsck", &["-fn"], disk)?;
    let clean = fsck.status.success();
    // Of a clean disk the totals are enough; of another one everything counts.
    let totals = String::from_utf8_lossy(&fsck.stdout).lines().last().map(str::to_owned);
    Ok((clean, totals.filter(|_| clean).unwrap_or_else(|| one_line(&fsck))))
}

fn tool(program: &str, args: &[&str], disk: &Path) -> Result<Output> {
    Command::new(program)
        .args(args)
        .arg(disk)
        .output()
        .with_context(|| format!("cannot run {program}"))
}

/// A tool's output on one line, with its exit status.
fn one_line(output: &Output) -> String {
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    let words: Vec<&str> = text.iter().flat_map(|text| text.split_whitespace()).collect();
    let status = output.status.code().map_or("a signal".to_owned(), |code| code.to_string());
    format!("exit {status}: {}", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn leg(reported: Option<u64>, counted: u64) -> Leg {
        Leg {
            from: Side::A,
            to: Side::B,
            audit: false,
            ended: Expect::Moved,
            total_ms: None,
            downtime_ms: None,
            bytes_on_link: reported,
            rounds: None,
            link_counter_bytes: counted,
            client_gap_ms: None,
            requests: None,
            hashes: (None, None),
            encoded: None,
            window_ns: (0, 0),
            report: Value::Null,
        }
    }

    #[test]
    fn payload_and_counters_must_fit() {
        assert!(bytes_agree(&leg(Some(10_000_000), 10_600_000)).0);
        assert!(!bytes_agree(&leg(Some(10_000_000), 9_999_999)).0, "less than the payload");
        assert!(!bytes_agree(&leg(Some(10_000_000), 13_000_000)).0, "bytes nobody reported");
        assert!(!bytes_agree(&leg(None, 1)).0);
    }

    #[test]
    fn an_audit_that_differs_or_lacks_is_a_failure() {
        let mut outcome = Outcome::default();
        let hashes = |source: &str, target: &str| (Some(source.into()), Some(target.into()));
        outcome.legs.push(Leg { audit: true, hashes: hashes("aa", "bb"), ..leg(Some(1), 1) });
        outcome.legs.push(Leg { audit: true, ..leg(Some(1), 1) });
        outcome.legs.push(Leg { audit: true, hashes: hashes("aa", "aa"), ..leg(Some(1), 1) });
        handoffs(&mut outcome);
        let failed: Vec<&str> = outcome
            .checks
            .iter()
            .filter(|check| !check.passed)
            .map(|check| check.name.as_str())
            .collect();
        assert_eq!(failed, ["equal-at-cutover-1", "equal-at-cutover-2"]);
    }
}
