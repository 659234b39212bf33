//! What the lab's scenarios say of themselves. Of their fields, only those that are shown.

use handoff::report::Report;
use serde::Deserialize;
use serde_json::Value;

use super::{Document, Found, Problem};
use crate::run::{Origin, PaperRun, Run, Scenario, howdah_default};

#[derive(Deserialize)]
struct Outcome {
    name: String,
    passed: bool,
    #[serde(default)]
    scenario_ms: Option<f64>,
    checks: Vec<Check>,
    legs: Vec<Leg>,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    host_fault: Option<String>,
}

#[derive(Deserialize)]
struct Check {
    name: String,
    passed: bool,
    #[serde(default)]
    detail: String,
}

#[derive(Deserialize)]
struct Leg {
    from: String,
    to: String,
    #[serde(default)]
    ended: String,
    #[serde(default)]
    client_gap_ms: Option<f64>,
    #[serde(default)]
    encoded: Option<Encoded>,
    #[serde(default)]
    report: Value,
}

#[derive(Deserialize)]
struct Encoded {
    bytes: u64,
}

/// Takes a scenario's outcome: itself, and a run for each of its handoffs.
pub(super) fn take(document: Document<'_>, value: Value, found: &mut Found) -> Result<(), Problem> {
    let outcome: Outcome = document.typed(value)?;
    let failed = outcome.checks.iter().filter(|check| !check.passed);
    let mut failures: Vec<_> =
        failed.map(|check| format!("{}: {}", check.name, check.detail)).collect();
    failures.extend(outcome.error);
    failures.extend(outcome.host_fault);
    found.scenarios.push(Scenario {
        name: outcome.name.clone(),
        passed: outcome.passed,
        scenario_ms: outcome.scenario_ms,
        checks: outcome.checks.len(),
        failures,
    });
    for (n, leg) in outcome.legs.into_iter().enumerate() {
        found.runs.push(leg.run(document, &outcome.name, n + 1)?);
    }
    Ok(())
}

impl Leg {
    fn run(self, document: Document<'_>, scenario: &str, number: usize) -> Result<Run, Problem> {
        // Of a handoff that failed there may be no report, but its error.
        let report: Option<Report> = match self.report.get("rounds") {
            Some(_) => Some(document.typed(self.report)?),
            None => None,
        };
        let mut facts = PaperRun {
            finished: self.ended == "moved",
            error: (self.ended != "moved").then_some(self.ended),
            ..howdah_default()
        };
        if let Some(report) = &report {
            facts = Run::of_report(document.name, report.clone()).facts;
        }
        facts.application = scenario.to_owned();
        facts.variant = format!("leg {number} {}→{}", self.from, self.to);
        facts.client_gap_ms = self.client_gap_ms;
        facts.offline_encoder_bytes = self.encoded.map(|encoded| encoded.bytes);
        Ok(Run { file: document.name.into(), origin: Origin::Lab, facts, report })
    }
}
