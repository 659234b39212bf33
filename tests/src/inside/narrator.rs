//! Tells a person who watches what goes on. Silent in tests.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{guest, product::Running};
use crate::{
    results::{Leg, Outcome},
    say,
};

/// How often the watcher is told how it stands.
const EVERY: Duration = Duration::from_secs(1);

/// Talks, or does not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Narrator {
    since: Option<Instant>,
}

impl Narrator {
    /// One that talks when `talks`.
    pub(crate) fn new(talks: bool) -> Self {
        Self { since: talks.then(Instant::now) }
    }

    /// Whether it talks.
    pub(crate) fn talks(self) -> bool {
        self.since.is_some()
    }

    /// Says one line.
    pub(crate) fn say(self, text: &str) {
        if let Some(since) = self.since {
            say(&format!("{:6.1} s  {text}", since.elapsed().as_secs_f64()));
        }
    }

    /// Lets time pass, saying now and then what the client sees of the guest.
    pub(crate) fn wait(self, time: Duration) {
        let started = Instant::now();
        while started.elapsed() < time {
            thread::sleep(EVERY.min(time.saturating_sub(started.elapsed())));
            self.guest();
        }
    }

    fn guest(self) {
        if !self.talks() {
            return;
        }
        match guest::vitals() {
            Ok(vitals) => self.say(&format!(
                "  client: counter {:>6}, {:>5} records on disk, boot id {}",
                vitals.counter, vitals.durable_seq, vitals.boot_id
            )),
            Err(_) => self.say("  client: the guest does not answer"),
        }
    }

    /// Shows a handoff's own progress lines, and the guest's counter between them.
    pub(crate) fn follow(self, running: &mut Running) -> Result<()> {
        if !self.talks() {
            return Ok(());
        }
        let mut shown = 0;
        let mut last = Instant::now();
        loop {
            let ended = running.ended()?;
            let said = running.said();
            let lines: Vec<&str> = said.lines().collect();
            for line in lines.iter().skip(shown) {
                self.say(&format!("  howdah: {line}"));
            }
            shown = lines.len();
            if ended {
                return Ok(());
            }
            if last.elapsed() > 2 * EVERY {
                self.guest();
                last = Instant::now();
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Says how a handoff ended.
    pub(crate) fn leg(self, leg: &Leg) {
        self.say(&format!(
            "the handoff ended: {:?}; {:.1} s in all, {:.0} ms without a running guest",
            leg.ended,
            leg.total_ms.unwrap_or_default() / 1000.0,
            leg.downtime_ms.unwrap_or_default()
        ));
    }

    /// Sums up: the figures, and what was checked.
    pub(crate) fn table(self, outcome: &Outcome) {
        if !self.talks() {
            return;
        }
        let mut rows = Vec::new();
        let mut row = |name: &str, value: Option<String>| {
            rows.extend(value.map(|value| format!("  {name:<22} {value}")));
        };
        row("total time", outcome.total_ms.map(|ms| format!("{:.1} s", ms / 1000.0)));
        row("downtime", outcome.downtime_ms.map(|ms| format!("{ms:.0} ms")));
        row("gap the client saw", outcome.client_gap_ms.map(|ms| format!("{ms:.0} ms")));
        let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        row("bytes on the link", outcome.bytes_on_link.map(megabytes));
        row("rounds", outcome.rounds.map(|rounds| rounds.to_string()));
        for check in &outcome.checks {
            let held = if check.passed { "yes" } else { "NO" };
            row(&check.name, Some(format!("{held}: {}", check.detail)));
        }
        say("");
        rows.iter().for_each(|row| say(row));
    }
}
