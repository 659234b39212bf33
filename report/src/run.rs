//! What the page and the tables are made of.

use std::collections::BTreeMap;

use handoff::report::{Outcome, Report};
use serde::{Deserialize, Serialize};

/// What a run of the evaluation calls its format.
pub const PAPER_RUN_FORMAT: &str = "howdah-paper-run-1";

/// One run of the evaluation, as `docs/formats.md` has it: a guest under an application was moved
/// once, by howdah or by something that it is compared with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PaperRun {
    /// [`PAPER_RUN_FORMAT`].
    pub format: String,
    /// What the guest did.
    pub application: Application,
    /// What moved it: `howdah`, `qemu`, `criu`.
    pub system: String,
    /// How: `default`, `static:zstd:3`, `precopy-xbzrle`, ...
    pub variant: String,
    /// Over which link.
    pub link: Link,
    /// The rate that a burst through the link had before, in bytes a second.
    #[serde(default)]
    pub measured_rate_bytes_per_s: Option<f64>,
    /// Which repetition of the same, from 1.
    pub repetition: u32,
    /// Whether the guest was moved within the bound.
    pub finished: bool,
    /// For how long it was let.
    #[serde(default)]
    pub bound_s: Option<f64>,
    /// Why it did not finish.
    #[serde(default)]
    pub error: Option<String>,
    /// From the command to the source being needed for nothing more.
    #[serde(default)]
    pub total_ms: Option<f64>,
    /// For how long the guest did not run.
    #[serde(default)]
    pub downtime_ms: Option<f64>,
    /// Who says so: `hypervisor` or `client`.
    #[serde(default)]
    pub downtime_by: Option<String>,
    /// The longest silence that a client met.
    #[serde(default)]
    pub client_gap_ms: Option<f64>,
    /// Bytes on the link, both ways.
    #[serde(default)]
    pub bytes_on_link: Option<u64>,
    /// What an offline encoder makes of the same final state.
    #[serde(default)]
    pub offline_encoder_bytes: Option<u64>,
    /// What the application's client saw.
    #[serde(default)]
    pub requests: Option<Requests>,
    /// The commands that were run.
    #[serde(default)]
    pub commands: Option<Vec<String>>,
    /// What ran them.
    #[serde(default)]
    pub versions: Option<BTreeMap<String, String>>,
    /// On which machine.
    #[serde(default)]
    pub host: Option<HostFacts>,
    /// When, as RFC 3339 has it.
    #[serde(default)]
    pub taken_at: Option<String>,
    /// howdah's own report.
    #[serde(default)]
    pub report: Option<Report>,
}

/// An application's name: `fluid`, `faces`, `ar`, `detect`, `desktop`, `idle`, or any other.
pub type Application = String;

/// A shaped link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// What it is called.
    pub name: String,
    /// Its rate at first.
    #[serde(default)]
    pub rate_mbps: Option<f64>,
    /// How long a packet is under way, one way.
    #[serde(default)]
    pub delay_ms: Option<f64>,
    /// Packets lost, of a hundred.
    #[serde(default)]
    pub loss_percent: Option<f64>,
    /// Its rates later.
    #[serde(default)]
    pub changes: Option<Vec<LinkChange>>,
}

/// A link's rate from a moment on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkChange {
    /// Seconds from the start of the run.
    pub at_s: f64,
    /// Its rate from then on.
    pub rate_mbps: f64,
}

/// What the client of an application saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requests {
    /// Requests that it sent.
    pub sent: Option<u64>,
    /// Those that were answered.
    pub answered: Option<u64>,
    /// Those that were answered with a failure.
    pub failed: Option<u64>,
    /// Those that were not answered.
    pub lost: Option<u64>,
    /// Those that were answered with what cannot be right.
    pub wrong: Option<u64>,
    /// Connections after the first.
    pub reconnects: Option<u64>,
    /// Latency before the move: half were answered faster.
    pub before_p50_ms: Option<f64>,
    /// Latency before the move: 99 of 100 were answered faster.
    pub before_p99_ms: Option<f64>,
    /// Latency during the move.
    pub during_p50_ms: Option<f64>,
    /// Latency during the move.
    pub during_p99_ms: Option<f64>,
    /// Latency after it.
    pub after_p50_ms: Option<f64>,
    /// The longest time between two answers.
    pub longest_gap_ms: Option<f64>,
}

/// The machine that a run was made on.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// Its CPU.
    pub cpu: Option<String>,
    /// Whether that was emulated.
    pub emulated: Option<bool>,
    /// How many.
    pub cpus: Option<u32>,
}

/// Where a run comes from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Origin {
    /// A handoff's own report.
    Handoff,
    /// A leg of a scenario of the lab.
    Lab,
    /// A run of the evaluation.
    Paper,
}

/// A guest was moved once, or should have been.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The file.
    pub(crate) file: String,
    pub(crate) origin: Origin,
    /// Everything but the report. What was no evaluation has the same shape with less in it.
    pub(crate) facts: PaperRun,
    /// howdah's report.
    pub(crate) report: Option<Report>,
}

impl Run {
    /// A handoff that nothing is known of but its own report.
    pub(crate) fn of_report(file: &str, report: Report) -> Self {
        let facts = PaperRun {
            application: report.vm.clone(),
            repetition: 1,
            finished: report.outcome == Outcome::Moved,
            error: report.reason.clone(),
            total_ms: Some(report.total_ms),
            downtime_ms: report.downtime_ms,
            downtime_by: report.downtime_ms.map(|_| "hypervisor".into()),
            bytes_on_link: Some(report.bytes_on_link),
            ..howdah_default()
        };
        Self { file: file.into(), origin: Origin::Handoff, facts, report: Some(report) }
    }

    /// A run of the evaluation.
    pub(crate) fn of_paper(file: &str, mut facts: PaperRun) -> Self {
        let report = facts.report.take();
        Self { file: file.into(), origin: Origin::Paper, facts, report }
    }

    /// What it is, in a few words.
    pub(crate) fn title(&self) -> String {
        let facts = &self.facts;
        match self.origin {
            Origin::Handoff => format!("Handoff of {}", facts.application),
            Origin::Lab => format!("{}, {}", facts.application, facts.variant),
            Origin::Paper => format!(
                "{} over {}, {} {}, run {}",
                facts.application, facts.link.name, facts.system, facts.variant, facts.repetition
            ),
        }
    }
}

/// The facts of a handoff by howdah of which nothing else is known.
pub(crate) fn howdah_default() -> PaperRun {
    PaperRun { system: "howdah".into(), variant: "default".into(), ..PaperRun::default() }
}

/// A scenario of the lab.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: String,
    pub(crate) passed: bool,
    pub(crate) scenario_ms: Option<f64>,
    pub(crate) checks: usize,
    /// Checks that do not hold, and why the scenario was not carried through.
    pub(crate) failures: Vec<String>,
}
