//! The same figures for people's own plots: one row a run, one a round, one a decision.

use thiserror::Error;

use crate::{Evidence, run::Run};

/// A table as a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvFile {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub content: Vec<u8>,
}

/// A table that could not be written.
#[derive(Debug, Error)]
#[error("{file}: {source}")]
pub struct CsvError {
    /// Which.
    pub file: &'static str,
    source: ::csv::Error,
}

const RUNS: [&str; 37] = [
    "run",
    "file",
    "application",
    "system",
    "variant",
    "link",
    "rate_mbps",
    "delay_ms",
    "loss_percent",
    "changes",
    "measured_rate_bytes_per_s",
    "repetition",
    "finished",
    "bound_s",
    "error",
    "total_ms",
    "downtime_ms",
    "downtime_by",
    "client_gap_ms",
    "bytes_on_link",
    "offline_encoder_bytes",
    "sent",
    "answered",
    "failed",
    "lost",
    "wrong",
    "reconnects",
    "before_p50_ms",
    "before_p99_ms",
    "during_p50_ms",
    "during_p99_ms",
    "after_p50_ms",
    "longest_gap_ms",
    "rounds",
    "setup_ms",
    "utilisation",
    "taken_at",
];
const ROUNDS: [&str; 8] =
    ["run", "round", "began_ms", "duration_ms", "chunks", "bytes", "dirty_after", "outage_ms"];
const DECISIONS: [&str; 8] = [
    "run",
    "at_ms",
    "mode",
    "stronger",
    "link_bytes_per_s",
    "promised_bytes_per_s",
    "workers",
    "why",
];
const SAMPLES: [&str; 6] =
    ["run", "at_ms", "sent_bytes", "delivered_bytes", "in_flight_bytes", "remaining_chunks"];

/// The tables. `run` is the same number in all of them, counted from 1.
pub(crate) fn files(evidence: &Evidence) -> Result<Vec<CsvFile>, CsvError> {
    let runs = || evidence.runs.iter().enumerate().map(|(n, run)| ((n + 1).to_string(), run));
    Ok(vec![
        write("runs.csv", &RUNS, runs().map(|(n, run)| run_row(n, run)))?,
        write("rounds.csv", &ROUNDS, runs().flat_map(|(n, run)| round_rows(&n, run)))?,
        write("decisions.csv", &DECISIONS, runs().flat_map(|(n, run)| decision_rows(&n, run)))?,
        write("samples.csv", &SAMPLES, runs().flat_map(|(n, run)| sample_rows(&n, run)))?,
    ])
}

fn write(
    file: &'static str,
    head: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> Result<CsvFile, CsvError> {
    let failed = |source| CsvError { file, source };
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    writer.write_record(head).map_err(failed)?;
    for row in rows {
        writer.write_record(&row).map_err(failed)?;
    }
    let content = writer.into_inner().map_err(|e| failed(e.into_error().into()))?;
    Ok(CsvFile { name: file, content })
}

/// Text that a spreadsheet takes for text, whatever it begins with.
fn text(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    if formula { format!("'{text}") } else { text.to_owned() }
}

fn number<T: ToString>(number: Option<T>) -> String {
    number.map_or_else(String::new, |number| number.to_string())
}

fn run_row(run_number: String, run: &Run) -> Vec<String> {
    let (facts, link) = (&run.facts, &run.facts.link);
    let requests = facts.requests.unwrap_or_default();
    let changes = link.changes.iter().flatten();
    let changes = changes.map(|change| format!("{}@{}", change.rate_mbps, change.at_s));
    let report = run.report.as_ref();
    vec![
        run_number,
        text(&run.file),
        text(&facts.application),
        text(&facts.system),
        text(&facts.variant),
        text(&link.name),
        number(link.rate_mbps),
        number(link.delay_ms),
        number(link.loss_percent),
        changes.collect::<Vec<_>>().join(" "),
        number(facts.measured_rate_bytes_per_s),
        facts.repetition.to_string(),
        facts.finished.to_string(),
        number(facts.bound_s),
        text(facts.error.as_deref().unwrap_or_default()),
        number(facts.total_ms),
        number(facts.downtime_ms),
        text(facts.downtime_by.as_deref().unwrap_or_default()),
        number(facts.client_gap_ms),
        number(facts.bytes_on_link),
        number(facts.offline_encoder_bytes),
        number(requests.sent),
        number(requests.answered),
        number(requests.failed),
        number(requests.lost),
        number(requests.wrong),
        number(requests.reconnects),
        number(requests.before_p50_ms),
        number(requests.before_p99_ms),
        number(requests.during_p50_ms),
        number(requests.during_p99_ms),
        number(requests.after_p50_ms),
        number(requests.longest_gap_ms),
        number(report.map(|report| report.rounds.len())),
        number(report.map(|report| report.setup_ms)),
        number(report.and_then(|report| report.utilisation)),
        text(facts.taken_at.as_deref().unwrap_or_default()),
    ]
}

fn round_rows(run_number: &str, run: &Run) -> Vec<Vec<String>> {
    let rounds = run.report.iter().flat_map(|report| &report.rounds);
    let rows = rounds.map(|round| {
        vec![
            run_number.to_owned(),
            round.number.to_string(),
            round.began_ms.to_string(),
            round.duration_ms.to_string(),
            round.chunks.to_string(),
            round.bytes.to_string(),
            round.dirty_after.to_string(),
            round.outage_ms.to_string(),
        ]
    });
    rows.collect()
}

fn decision_rows(run_number: &str, run: &Run) -> Vec<Vec<String>> {
    let adaptation = run.report.iter().filter_map(|report| report.adaptation.as_ref());
    let rows = adaptation.flat_map(|adaptation| &adaptation.decisions).map(|decision| {
        vec![
            run_number.to_owned(),
            decision.at_ms.to_string(),
            decision.mode.to_string(),
            decision.stronger.to_string(),
            number(decision.link_bytes_per_s),
            number(decision.promised_bytes_per_s),
            decision.workers.to_string(),
            text(&decision.why),
        ]
    });
    rows.collect()
}

fn sample_rows(run_number: &str, run: &Run) -> Vec<Vec<String>> {
    let samples = run.report.iter().flat_map(|report| &report.samples);
    let rows = samples.map(|sample| {
        vec![
            run_number.to_owned(),
            sample.at_ms.to_string(),
            sample.sent_bytes.to_string(),
            sample.delivered_bytes.to_string(),
            sample.in_flight_bytes.to_string(),
            sample.remaining_chunks.to_string(),
        ]
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use handoff::report::{Report, Round, Sample};

    use super::*;

    fn csv(report: Report) -> Vec<String> {
        let mut evidence = Evidence::default();
        evidence.read("=a,b", &serde_json::to_vec(&report).unwrap()).unwrap();
        let files = evidence.csv().unwrap();
        files.into_iter().map(|file| String::from_utf8(file.content).unwrap()).collect()
    }

    #[test]
    fn tables_have_a_row_each_and_no_formulas() {
        let report = Report {
            handoff: "1".into(),
            vm: "+cmd|' /C calc'!A0".into(),
            rounds: vec![Round { number: 1, bytes: 7, ..Round::default() }; 2],
            samples: vec![Sample::default(); 3],
            ..Report::default()
        };
        let files = csv(report);
        let lines: Vec<usize> = files.iter().map(|file| file.lines().count()).collect();
        assert_eq!(lines, [2, 3, 1, 4]);
        assert!(files[0].contains(",'+cmd") && files[0].contains("\"'=a,b\""), "{}", files[0]);
        assert_eq!(files[1].lines().nth(1), Some("1,1,0,0,0,7,0,0"));
    }
}
