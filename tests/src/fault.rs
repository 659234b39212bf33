//! Faults of one handoff: which there are, and what came of each.

mod plan;

use serde::{Deserialize, Serialize};

use crate::{results::Check, scenario::Side};

pub(crate) use self::plan::{Choice, Seed, cases};

/// One handoff from A to B, and what is done to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    /// Its name: with the seed it tells all that is below.
    pub(crate) name: String,
    /// When.
    pub(crate) moment: Moment,
    /// What.
    pub(crate) hits: Vec<Hit>,
    /// How long after that the link, or what was killed, comes back.
    pub(crate) back_after_ms: u64,
    /// The link's rate.
    pub(crate) rate_mbps: u32,
    /// Whether the user gives the handoff up, so that steps are reached which a handoff that goes well
    /// does not have.
    pub(crate) cancelled: bool,
    /// How howdah is to commit, as `--commit` takes it; its own way when absent.
    pub(crate) commit: Option<String>,
}

/// When a fault comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Moment {
    /// At a step of [`handoff::step`], where the process stands still until the fault is there.
    Step {
        /// The step's name.
        step: String,
        /// Whose step it is.
        side: Side,
        /// So long after it, with the process going on; 0 for while it stands still.
        then_ms: u64,
    },
    /// So long after the handoff was asked for.
    Part {
        /// Thousandths of the time that a handoff takes there which nothing disturbs.
        permille: u64,
    },
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Hit {
    /// SIGKILL to the VM's process on a cloudlet.
    KillProcess(Side),
    /// SIGKILL to every process of howdah on a cloudlet.
    KillCloudlet(Side),
    /// Every packet on the link is lost.
    CutLink,
}

impl Case {
    /// No fault at all: whether the lab works, and how long a handoff takes in it.
    pub(crate) fn undisturbed() -> Self {
        Self {
            name: "undisturbed".into(),
            moment: Moment::Part { permille: 0 },
            hits: Vec::new(),
            back_after_ms: 0,
            rate_mbps: plan::RATE_MBPS,
            cancelled: false,
            commit: None,
        }
    }
}

impl Hit {
    /// Where something is killed.
    pub(crate) fn kills(self) -> Option<Side> {
        match self {
            Self::KillProcess(side) | Self::KillCloudlet(side) => Some(side),
            Self::CutLink => None,
        }
    }
}

/// What came of a case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    /// The case's name.
    pub(crate) name: String,
    /// The case.
    pub(crate) case: Option<Case>,
    /// Whether every check holds.
    pub(crate) passed: bool,
    /// How long it took in all.
    pub(crate) took_ms: u64,
    /// When each part of it was done, from its start.
    pub(crate) done_ms: Vec<(String, u64)>,
    /// Where the guest ran in the end.
    pub(crate) ran_on: Option<Side>,
    /// Whether it lost its RAM and booted from its disk.
    pub(crate) rebooted: bool,
    /// From the return of the link or the process until the guest ran on one side.
    pub(crate) runs_after_ms: Option<u64>,
    /// From then until it answered.
    pub(crate) answers_after_ms: Option<u64>,
    /// The longest silence that the client met, the fault included.
    pub(crate) client_gap_ms: Option<f64>,
    /// How long the handoff took by its own report, if it moved the guest.
    pub(crate) total_ms: Option<f64>,
    /// What `howdah handoff` said: its exit status, and its last line if that was not 0.
    pub(crate) handoff: Option<String>,
    /// What `howdah vm run` said where something had been killed.
    pub(crate) recovered: Vec<String>,
    /// Every check.
    pub(crate) checks: Vec<Check>,
    /// Why the case could not be carried through.
    pub(crate) error: Option<String>,
    /// What was seen of a guest whose agent could not be reached.
    pub(crate) silent: Option<String>,
    /// What tells that the lab host broke under it.
    pub(crate) host_fault: Option<String>,
    /// The fault of the host for which it was run again.
    pub(crate) repeated_for: Option<String>,
}

impl Verdict {
    /// Notes a check.
    pub(crate) fn check(&mut self, name: &str, passed: bool, detail: impl Into<String>) {
        self.checks.push(Check { name: name.into(), passed, detail: detail.into() });
    }

    /// Decides: what was not checked did not pass.
    pub(crate) fn conclude(&mut self) {
        let checked = !self.checks.is_empty() && self.checks.iter().all(|check| check.passed);
        self.passed = self.error.is_none() && checked;
    }

    /// The verdict on one line.
    pub(crate) fn line(&self) -> String {
        let word = if self.passed { "ok    " } else { "FAILED" };
        let ran_on = self.ran_on.map_or("nowhere".to_owned(), |side| format!("on {side:?}"));
        let how = if self.rebooted { "booted again" } else { "went on" };
        let mut line = format!("{word} {:<34} {how} {ran_on}", self.name);
        if let Some(ms) = self.runs_after_ms {
            line += &format!(", {:.1} s after the return", ms as f64 / 1e3);
        }
        if let Some(gap) = self.client_gap_ms {
            line += &format!(", client gap {:.1} s", gap / 1e3);
        }
        line += &format!(", took {:.1} s", self.took_ms as f64 / 1e3);
        line
    }

    /// What went wrong, a line each.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let failed = self.checks.iter().filter(|check| !check.passed);
        let mut lines: Vec<String> =
            failed.map(|check| format!("{}: {}", check.name, check.detail)).collect();
        lines.extend(self.error.iter().map(|error| format!("error: {error}")));
        lines.extend(self.host_fault.iter().map(|fault| format!("lab host: {fault}")));
        if !lines.is_empty() {
            lines.extend(self.handoff.iter().map(|said| format!("handoff: {said}")));
            lines.extend(self.recovered.iter().map(|said| format!("recovery: {said}")));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_without_checks_or_with_an_error_is_a_failure() {
        let mut verdict = Verdict::default();
        verdict.conclude();
        assert!(!verdict.passed);
        verdict.check("one-owner", true, "");
        verdict.conclude();
        assert!(verdict.passed);
        verdict.error = Some("the guest never booted".into());
        verdict.conclude();
        assert!(!verdict.passed && verdict.complaints().len() == 1);
    }
}
