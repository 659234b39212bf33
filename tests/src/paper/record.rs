//! One run of the evaluation as it is kept: a JSON file in `target/paper/runs` (docs/formats.md).
//!
//! What was not measured is absent, never zero: a peer that does not finish has no downtime.

use howdah_apps::summary::Requests;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::plan::{NamedLink, Run, System};

/// The format's name.
pub(crate) const FORMAT: &str = "howdah-paper-run-1";

/// What one run yields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// [`FORMAT`].
    pub(crate) format: String,
    /// What the guest does.
    pub(crate) application: String,
    /// What moves it.
    pub(crate) system: System,
    /// How.
    pub(crate) variant: String,
    /// The link as it was asked for.
    pub(crate) link: NamedLink,
    /// What a burst through the idle link got, right before.
    #[serde(default)]
    pub(crate) measured_rate_bytes_per_s: Option<f64>,
    /// Counted from 1.
    pub(crate) repetition: u32,
    /// Whether the guest runs at the other side, and nothing of it is needed at the first any more.
    pub(crate) finished: bool,
    /// When a run that has not finished is given up.
    #[serde(default)]
    pub(crate) bound_s: Option<f64>,
    /// What went wrong.
    #[serde(default)]
    pub(crate) error: Option<String>,
    /// From asking for the move until the first side is no longer needed.
    #[serde(default)]
    pub(crate) total_ms: Option<f64>,
    /// How long the guest ran nowhere.
    #[serde(default)]
    pub(crate) downtime_ms: Option<f64>,
    /// Who says so.
    #[serde(default)]
    pub(crate) downtime_by: Option<Witness>,
    /// The longest silence that the client outside met around the move.
    #[serde(default)]
    pub(crate) client_gap_ms: Option<f64>,
    /// By the counters of the link, both directions, headers included.
    #[serde(default)]
    pub(crate) bytes_on_link: Option<u64>,
    /// What an offline encoder makes of the state that arrived.
    #[serde(default)]
    pub(crate) offline_encoder_bytes: Option<u64>,
    /// What the application's own client met.
    #[serde(default)]
    pub(crate) requests: Option<Requests>,
    /// The commands that began it, as they could be typed.
    #[serde(default)]
    pub(crate) commands: Vec<String>,
    /// Programs and kernels.
    #[serde(default)]
    pub(crate) versions: Value,
    /// The machine.
    #[serde(default)]
    pub(crate) host: Option<Host>,
    /// When, by RFC 3339.
    #[serde(default)]
    pub(crate) taken_at: Option<String>,
    /// howdah's own report.
    #[serde(default)]
    pub(crate) report: Value,
    /// What a peer says of itself: its figures and events.
    #[serde(default)]
    pub(crate) peer: Value,
    /// What tells that not the system failed but the lab host under it.
    #[serde(default)]
    pub(crate) host_fault: Option<String>,
    /// How long the run took, everything included.
    #[serde(default)]
    pub(crate) run_ms: Option<u64>,
}

/// Who measured a downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Witness {
    /// What runs the guest: when its virtual CPUs stopped and when they ran again.
    Hypervisor,
    /// The client outside.
    Client,
}

/// The machine that a run was made on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// Its processor.
    pub(crate) cpu: String,
    /// Whether the lab host's processor is emulated.
    pub(crate) emulated: bool,
    /// CPUs of the lab host.
    pub(crate) cpus: u8,
}

impl Record {
    /// The record of a run of which nothing is known yet.
    pub(crate) fn begin(run: &Run) -> Self {
        Self {
            format: FORMAT.into(),
            application: run.application.name.clone(),
            system: run.variant.system,
            variant: run.variant.name.clone(),
            link: run.link.clone(),
            measured_rate_bytes_per_s: None,
            repetition: run.repetition,
            finished: false,
            bound_s: Some(run.bound_s),
            error: None,
            total_ms: None,
            downtime_ms: None,
            downtime_by: None,
            client_gap_ms: None,
            bytes_on_link: None,
            offline_encoder_bytes: None,
            requests: None,
            commands: Vec::new(),
            versions: Value::Null,
            host: None,
            taken_at: None,
            report: Value::Null,
            peer: Value::Null,
            host_fault: None,
            run_ms: None,
        }
    }

    /// The run on one line, for people.
    pub(crate) fn line(&self) -> String {
        let state = match (self.finished, &self.error) {
            (true, None) => "done  ",
            (false, None) => "BOUND ",
            _ => "FAILED",
        };
        let mut line = format!(
            "{state} {} {} {} over {} #{}",
            self.application,
            self.system.name(),
            self.variant,
            self.link.name,
            self.repetition
        );
        if let Some(total) = self.total_ms {
            line += &format!(": total {:.1} s", total / 1e3);
        }
        if let Some(down) = self.downtime_ms {
            line += &format!(", down {down:.0} ms");
        }
        if let Some(gap) = self.client_gap_ms {
            line += &format!(", client gap {gap:.0} ms");
        }
        if let Some(bytes) = self.bytes_on_link {
            line += &format!(", {:.1} MB", bytes as f64 / 1e6);
        }
        if let Some(Requests { counts, .. }) = &self.requests {
            line += &format!(", {} of {} requests answered", counts.answered, counts.sent);
        }
        if let Some(rate) = self.measured_rate_bytes_per_s {
            line += &format!(", link {:.2} Mbps", rate * 8.0 / 1e6);
        }
        if let Some(error) = &self.error {
            line += &format!(": {error}");
        }
        line
    }
}
