//! `howdah doctor`: what of this host would keep VMs from running or moving, and the command that
//! mends it.
//!
//! Every check is two functions: one looks at the host, one judges what was seen. The second is pure,
//! so that what a host of another kind would be told can be tested on this one.
//!
//! Goals: to find before a handoff what would fail in one; each finding with its mend. Non-goals: to
//! change anything (all that is done here is undone when it returns), and to look at peers.

mod clock;
mod kernel;
mod kvm;
mod limits;
mod memory;
mod network;
mod storage;

use std::{fmt::Write, fs, path::Path};

use anstyle::{AnsiColor, Style};
use serde::{Deserialize, Serialize};

use crate::{
    failure::{Exit, Failure, one_line},
    home::Home,
    output::Output,
};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// Works; somebody may want to know.
    Note,
    /// Works now, or slowly: worth mending.
    Warning,
    /// Handoffs cannot work here.
    Broken,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Broken => "broken",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Ok => AnsiColor::Green.on_default(),
            Self::Note => AnsiColor::Cyan.on_default(),
            Self::Warning => AnsiColor::Yellow.on_default(),
            Self::Broken => AnsiColor::Red.on_default().bold(),
        }
    }
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finding {
    /// What was looked at: a word that stays the same.
    pub(crate) check: String,
    /// How much it matters.
    pub(crate) verdict: Verdict,
    /// What was seen, and what that means.
    pub(crate) says: String,
    /// The command, or the deed, that mends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mend: Option<String>,
}

impl Finding {
    fn new(check: &str, verdict: Verdict, says: impl std::fmt::Display) -> Self {
        let says = one_line(&says.to_string());
        Self { check: check.to_owned(), verdict, says, mend: None }
    }

    fn ok(check: &str, says: impl std::fmt::Display) -> Self {
        Self::new(check, Verdict::Ok, says)
    }

    fn note(check: &str, says: impl std::fmt::Display) -> Self {
        Self::new(check, Verdict::Note, says)
    }

    fn warning(check: &str, says: impl std::fmt::Display) -> Self {
        Self::new(check, Verdict::Warning, says)
    }

    fn broken(check: &str, says: impl std::fmt::Display) -> Self {
        Self::new(check, Verdict::Broken, says)
    }

    fn mended_by(self, mend: impl Into<String>) -> Self {
        Self { mend: Some(mend.into()), ..self }
    }
}

/// All that was found, for programs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Examination {
    /// Whether VMs can run and move here.
    pub(crate) fit: bool,
    /// In the order in which the checks were made.
    pub(crate) findings: Vec<Finding>,
}

/// Looks at this host as the cloudlet of `home`.
pub(crate) fn examine(home: &Home) -> Examination {
    let mut findings = Vec::new();
    findings.extend(kvm::look());
    findings.extend(kernel::look());
    findings.extend(memory::look());
    findings.extend(limits::look());
    findings.extend(clock::look());
    findings.extend(storage::look(home.root()));
    findings.extend(network::look());
    let fit = findings.iter().all(|finding| finding.verdict < Verdict::Broken);
    Examination { fit, findings }
}

/// Runs `howdah doctor`.
pub(crate) fn run(home: &Home, output: Output) -> anyhow::Result<()> {
    let examination = examine(home);
    output.result(&examination, |seen| page(seen, output.is_quiet()));
    if examination.fit {
        return Ok(());
    }
    let broken: Vec<_> =
        examination.findings.iter().filter(|f| f.verdict == Verdict::Broken).collect();
    let names: Vec<_> = broken.iter().map(|finding| finding.check.as_str()).collect();
    let why = format!("broken: {}", names.join(", "));
    let failure =
        Failure::new(Exit::Host, "this host", why, "`howdah doctor` says what mends each");
    Err(failure.into())
}

/// A line for each finding, its mend below it; when little is wanted, only what is wrong.
fn page(seen: &Examination, briefly: bool) -> String {
    let shown = seen
        .findings
        .iter()
        .filter(|f| !briefly || f.verdict >= Verdict::Warning)
        .collect::<Vec<_>>();
    let width = shown.iter().map(|f| f.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in &shown {
        let (style, word) = (finding.verdict.style(), finding.verdict.word());
        let check = &finding.check;
        let _ = writeln!(text, "{style}{word:<8}{style:#} {check:<width$}  {}", finding.says);
        if let Some(mend) = &finding.mend {
            let _ = writeln!(text, "{:9}{:width$}  mend: {mend}", "", "");
        }
    }
    let count = |verdict| seen.findings.iter().filter(|f| f.verdict == verdict).count();
    if !briefly {
        let (broken, warnings) = (count(Verdict::Broken), count(Verdict::Warning));
        let fit = if seen.fit { "VMs can run and move here" } else { "handoffs cannot work here" };
        let _ = write!(text, "\n{fit}: {broken} broken, {warnings} warnings");
    }
    text
}

/// A small file of /proc or /sys, without the white space around it; `None` if it cannot be read.
fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Examination {
        let findings = vec![
            Finding::ok("kvm", "there"),
            Finding::broken("io-uring", "not\nthere")
                .mended_by("sysctl -w kernel.io_uring_disabled=0"),
        ];
        Examination { fit: false, findings }
    }

    #[test]
    fn a_page_has_a_line_for_each_and_the_mend_below() {
        let text = anstream::adapter::strip_str(&page(&seen(), false)).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "ok       kvm       there");
        assert_eq!(lines[1], "broken   io-uring  not there");
        assert_eq!(lines[2], "                   mend: sysctl -w kernel.io_uring_disabled=0");
        assert_eq!(lines[4], "handoffs cannot work here: 1 broken, 0 warnings");
        assert!(!page(&seen(), true).contains("kvm"));
    }

    #[test]
    fn this_host_can_be_examined() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(&dir.path().join("not/yet")).unwrap();
        let seen = examine(&home);
        assert!(seen.findings.len() >= 12, "{seen:#?}");
        for finding in &seen.findings {
            let needs_mend = finding.verdict >= Verdict::Warning;
            assert!(!needs_mend || finding.mend.is_some(), "no mend: {finding:?}");
        }
        assert!(!home.root().exists(), "a look must change nothing");
    }
}
