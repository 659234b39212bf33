//! What `howdah report` reads: reports of handoffs, results of the lab, runs of the evaluation.
//!
//! What is read becomes a page and tables, whatever its numbers are; no script, and no character
//! that a page must not have, gets through.

use handoff::report::{Cutover, Report, Round, Sample};
use howdah_report::{Evidence, Link, LinkChange, PAPER_RUN_FORMAT, PaperRun};
use serde_json::{Value, json};

use super::{Origin, Target};

pub(super) const TARGET: Target =
    Target { name: "report", from: Origin::File, run, seeds, max_len: 32 << 10 };

fn run(data: &[u8]) -> bool {
    let mut evidence = Evidence::default();
    if evidence.read("a.json", data).is_err() {
        return false;
    }
    let page = evidence.html();
    assert!(!page.contains("<script") && !page.contains('\0'), "{page}");
    assert!(!page.contains("NaN") && !page.contains("inf%"), "{page}");
    evidence.csv().expect("tables of whatever was read");
    true
}

fn seeds() -> Vec<Vec<u8>> {
    let report = Report {
        handoff: "1".into(),
        total_ms: 1000.0,
        rounds: vec![Round { number: 1, began_ms: 10.0, duration_ms: 800.0, ..Round::default() }],
        samples: vec![Sample::default(), Sample { at_ms: 900.0, ..Sample::default() }],
        cutover: Some(Cutover { began_ms: 810.0, commit_ms: 90.0, ..Cutover::default() }),
        ..Report::default()
    };
    let link = Link {
        name: "10".into(),
        rate_mbps: Some(10.0),
        changes: Some(vec![LinkChange { at_s: 1.0, rate_mbps: 35.0 }]),
        ..Link::default()
    };
    let run = |system: &str, variant: &str| PaperRun {
        format: PAPER_RUN_FORMAT.into(),
        application: "fluid".into(),
        system: system.into(),
        variant: variant.into(),
        link: link.clone(),
        finished: true,
        total_ms: Some(900.0),
        report: Some(report.clone()),
        ..PaperRun::default()
    };
    let lab = json!({
        "name": "idle", "passed": true, "checks": [],
        "legs": [{ "from": "a", "to": "b", "ended": "moved", "report": report }],
    });
    let both =
        json!([run("howdah", "default"), run("howdah", "static:lz4"), run("qemu", "precopy")]);
    let bytes = |value: &Value| serde_json::to_vec(value).expect("plain data");
    vec![bytes(&json!(report)), bytes(&both), bytes(&lab)]
}
