//! What a scenario yields: the figures of its handoffs and the outcome of every check.

use std::collections::BTreeMap;

use howdah_apps::{client::Application, summary::Requests};
use serde::{Deserialize, Serialize};

use crate::{
    compare::Comparison,
    encode::Encoded,
    scenario::{Expect, Side},
};

/// The outcome of one scenario.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// The scenario's name.
    pub(crate) name: String,
    /// Whether every step went as it should and every check holds.
    pub(crate) passed: bool,
    /// Total time of the first handoff.
    pub(crate) total_ms: Option<f64>,
    /// Downtime of the first handoff.
    pub(crate) downtime_ms: Option<f64>,
    /// The longest silence that the client met around the first handoff.
    pub(crate) client_gap_ms: Option<f64>,
    /// Payload bytes on the link in the first handoff, both directions.
    pub(crate) bytes_on_link: Option<u64>,
    /// Rounds of the first handoff.
    pub(crate) rounds: Option<u64>,
    /// The application that was used meanwhile.
    pub(crate) application: Option<Application>,
    /// What the first handoff did to its users.
    pub(crate) requests: Option<Requests>,
    /// How long the scenario took, set-up and checks included.
    pub(crate) scenario_ms: u64,
    /// Every check.
    pub(crate) checks: Vec<Check>,
    /// Every handoff.
    pub(crate) legs: Vec<Leg>,
    /// Figures that were measured beside the handoffs, each several times.
    pub(crate) figures: BTreeMap<String, Vec<f64>>,
    /// What figures were held against: bounds, and other figures of the run.
    pub(crate) compared: Vec<Comparison>,
    /// Why the scenario could not be carried through.
    pub(crate) error: Option<String>,
    /// What was seen of a guest whose agent could not be reached.
    pub(crate) silent: Option<String>,
    /// What tells that not the product failed but the lab host under it.
    pub(crate) host_fault: Option<String>,
    /// The fault for which the scenario was run a second time; what stands here is the second run.
    pub(crate) repeated_for: Option<String>,
}

/// One thing that must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Check {
    /// Its name.
    pub(crate) name: String,
    /// Whether it holds.
    pub(crate) passed: bool,
    /// What was found.
    pub(crate) detail: String,
}

/// A guest that fell silent, where nothing else speaks against the run: whatever a check says of
/// data or of owners stays a failure.
pub(crate) fn only_silent(silent: Option<&str>, checks: &[Check]) -> Option<String> {
    let held = checks.iter().all(|check| check.passed);
    silent.filter(|_| held).map(|seen| format!("silent guest: {seen}"))
}

/// One handoff.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Leg {
    /// From where.
    pub(crate) from: Side,
    /// To where.
    pub(crate) to: Side,
    /// Whether both sides hashed everything at cutover.
    pub(crate) audit: bool,
    /// How it ended.
    pub(crate) ended: Expect,
    /// By howdah's report.
    pub(crate) total_ms: Option<f64>,
    /// By howdah's report.
    pub(crate) downtime_ms: Option<f64>,
    /// By howdah's report.
    pub(crate) bytes_on_link: Option<u64>,
    /// By howdah's report.
    pub(crate) rounds: Option<u64>,
    /// By the counters of the link, headers included.
    pub(crate) link_counter_bytes: u64,
    /// The longest silence that the client met around it.
    pub(crate) client_gap_ms: Option<f64>,
    /// What it did to the application's users.
    pub(crate) requests: Option<Requests>,
    /// BLAKE3 of all RAM and disk at cutover, by the source and by the target.
    pub(crate) hashes: (Option<String>, Option<String>),
    /// What an offline encoder makes of the state that arrived.
    pub(crate) encoded: Option<Encoded>,
    /// When it was asked for and when it was over, by CLOCK_MONOTONIC.
    #[serde(skip)]
    pub(crate) window_ns: (i64, i64),
    /// howdah's report, or its error.
    pub(crate) report: serde_json::Value,
}

impl Outcome {
    /// Notes a check.
    pub(crate) fn check(&mut self, name: &str, passed: bool, detail: impl Into<String>) {
        self.checks.push(Check { name: name.into(), passed, detail: detail.into() });
    }

    /// Notes a measured figure.
    pub(crate) fn figure(&mut self, name: impl Into<String>, value: f64) {
        self.figures.entry(name.into()).or_default().push(value);
    }

    /// Takes the figures of the first handoff that moved the guest, and decides.
    pub(crate) fn conclude(&mut self) {
        if let Some(leg) = self.legs.iter().find(|leg| leg.ended == Expect::Moved) {
            self.total_ms = leg.total_ms;
            self.downtime_ms = leg.downtime_ms;
            self.client_gap_ms = leg.client_gap_ms;
            self.bytes_on_link = leg.bytes_on_link;
            self.rounds = leg.rounds;
            self.requests = leg.requests.clone();
        } else if let Some(leg) = self.legs.first() {
            self.client_gap_ms = leg.client_gap_ms;
        }
        let checked = !self.checks.is_empty() && self.checks.iter().all(|check| check.passed);
        self.passed = self.error.is_none() && checked;
    }

    /// The outcome on one line.
    pub(crate) fn line(&self) -> String {
        let mut line =
            format!("{} {:<20}", if self.passed { "ok    " } else { "FAILED" }, self.name);
        if let (Some(total), Some(down)) = (self.total_ms, self.downtime_ms) {
            line += &format!(" total {:.1} s, down {down:.0} ms,", total / 1000.0);
        }
        if let Some(bytes) = self.bytes_on_link {
            line += &format!(" {:.1} MB on the link,", bytes as f64 / 1e6);
        }
        if let Some(rounds) = self.rounds {
            line += &format!(" {rounds} rounds,");
        }
        if let Some(gap) = self.client_gap_ms {
            line += &format!(" client gap {gap:.0} ms,");
        }
        if let Some(requests) = &self.requests {
            let counts = requests.counts;
            line += &format!(" {} of {} requests answered,", counts.answered, counts.sent);
        }
        let held = self.checks.iter().filter(|check| check.passed).count();
        line += &format!(" {held} of {} checks hold", self.checks.len());
        line
    }

    /// What went wrong, a line each.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let failed = self.checks.iter().filter(|check| !check.passed);
        let mut lines: Vec<String> =
            failed.map(|check| format!("{}: {}", check.name, check.detail)).collect();
        lines.extend(self.error.iter().map(|error| format!("error: {error}")));
        lines.extend(self.silent.iter().map(|seen| format!("silent guest: {seen}")));
        lines.extend(self.host_fault.iter().map(|fault| format!("lab host: {fault}")));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_guest_excuses_no_failed_check() {
        let mut outcome = Outcome::default();
        outcome.check("one-owner", true, "");
        let excuse = only_silent(Some("it spins"), &outcome.checks);
        assert_eq!(excuse.as_deref(), Some("silent guest: it spins"));
        assert_eq!(only_silent(None, &outcome.checks), None);
        outcome.check("records", false, "one is lost");
        assert_eq!(only_silent(Some("it spins"), &outcome.checks), None);
    }

    #[test]
    fn nothing_checked_is_not_passed() {
        let mut outcome = Outcome::default();
        outcome.conclude();
        assert!(!outcome.passed);
        outcome.check("a", true, "");
        outcome.conclude();
        assert!(outcome.passed);
        outcome.check("b", false, "why");
        outcome.conclude();
        assert!(!outcome.passed);
        assert_eq!(outcome.complaints(), ["b: why"]);
    }

    #[test]
    fn an_error_is_not_passed() {
        let mut outcome = Outcome { error: Some("e".into()), ..Outcome::default() };
        outcome.check("a", true, "");
        outcome.conclude();
        assert!(!outcome.passed);
    }
}
