use handoff::report::{Outcome, Round};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::run::{Link, Origin};

fn report() -> Report {
    Report {
        handoff: "00ff".into(),
        vm: "guest".into(),
        outcome: Outcome::Moved,
        total_ms: 1500.0,
        downtime_ms: Some(80.0),
        bytes_on_link: 4096,
        rounds: vec![Round { number: 1, ..Round::default() }],
        ..Report::default()
    }
}

fn paper() -> Value {
    json!({
        "format": PAPER_RUN_FORMAT, "application": "fluid", "system": "qemu", "variant": "precopy",
        "link": { "name": "10" }, "repetition": 2, "finished": false,
    })
}

fn read_value(value: &Value) -> Result<Found, InputError> {
    read("a.json", &serde_json::to_vec(value).unwrap())
}

fn refused(content: &[u8]) -> String {
    read("a.json", content).unwrap_err().to_string()
}

#[test]
fn a_report_alone_is_a_run() {
    let found = read_value(&serde_json::to_value(report()).unwrap()).unwrap();
    let run = &found.runs[0];
    assert_eq!((run.origin.clone(), run.file.as_str()), (Origin::Handoff, "a.json"));
    assert_eq!((run.facts.total_ms, run.facts.downtime_ms), (Some(1500.0), Some(80.0)));
    assert!(run.facts.finished && run.report.is_some());
}

#[test]
fn a_paper_run_needs_little() {
    let run = &read_value(&paper()).unwrap().runs[0];
    assert_eq!((run.origin.clone(), run.facts.repetition), (Origin::Paper, 2));
    assert_eq!(run.facts.link.rate_mbps, None);
    let mut others = paper();
    others["peer"] = json!({ "max-bandwidth": u64::MAX, "offset": -1 });
    assert_eq!(read_value(&others).unwrap().runs.len(), 1);
    let mut failed = paper();
    failed["report"] = json!({ "error": { "message": "no room" } });
    assert!(read_value(&failed).unwrap().runs[0].report.is_none());
}

#[test]
fn what_is_shown_is_written_as_documented() {
    let run = PaperRun { format: PAPER_RUN_FORMAT.into(), ..PaperRun::default() };
    let run = PaperRun { report: Some(report()), link: Link::default(), ..run };
    let found = read_value(&serde_json::to_value(&run).unwrap()).unwrap();
    assert_eq!(found.runs[0].report.as_ref().unwrap().rounds.len(), 1);
}

#[test]
fn scenarios_and_their_legs_are_found() {
    let leg = |ended: &str, report: Value| {
        json!({ "from": "a", "to": "b", "ended": ended, "client_gap_ms": 99.0,
                "encoded": { "bytes": 3000, "left": 7 }, "report": report })
    };
    let outcome = json!([{
        "name": "idle", "passed": false, "scenario_ms": 4000,
        "checks": [{ "name": "alive", "passed": false, "detail": "it is not" },
                   { "name": "clock", "passed": true, "detail": "" }],
        "legs": [leg("moved", serde_json::to_value(report()).unwrap()),
                 leg("kept-here", json!({ "error": { "message": "no" } }))],
        "error": "step 3",
    }]);
    let found = read_value(&outcome).unwrap();
    assert_eq!(found.scenarios[0].failures, ["alive: it is not", "step 3"]);
    let (moved, kept) = (&found.runs[0].facts, &found.runs[1].facts);
    assert_eq!((moved.finished, moved.offline_encoder_bytes), (true, Some(3000)));
    assert_eq!((kept.finished, kept.error.as_deref()), (false, Some("kept-here")));
    assert_eq!(found.runs[1].title(), "idle, leg 2 a→b");
}

#[test]
fn documents_may_follow_one_another_and_be_mixed() {
    let one = serde_json::to_string_pretty(&report()).unwrap();
    let both = format!("{one}\n{}\n[{}]\n", paper(), paper());
    assert_eq!(read("a.json", both.as_bytes()).unwrap().runs.len(), 3);
}

#[test]
fn a_failed_handoff_is_shown_as_far_as_it_came() {
    let failed = json!({ "error": { "message": "no room" }, "report": report() });
    assert_eq!(read_value(&failed).unwrap().runs.len(), 1);
    let nothing = json!({ "error": { "message": "no room" } });
    let said = read_value(&nothing).unwrap_err().to_string();
    assert_eq!(said, "a.json: document 1 is a failure without a report: no room");
}

#[test]
fn what_cannot_be_shown_is_named() {
    let whole = serde_json::to_string_pretty(&report()).unwrap();
    let cut = &whole.as_bytes()[..whole.len() / 2];
    assert!(refused(cut).starts_with("a.json: it is cut off after line"), "{}", refused(cut));
    assert_eq!(refused(b" \n"), "a.json: it is empty");
    assert!(refused(b"{]").starts_with("a.json: document 1 is no JSON"));
    assert!(refused(b"\xff\xfe").starts_with("a.json: document 1 is no JSON"));
    assert!(refused(b"{}").contains("is no handoff's report"));
    assert!(refused(b"[]").contains("is no handoff's report"));
    assert!(refused(b"[[{}]]").contains("is no handoff's report"));
    assert!(refused(&b"[".repeat(100_000)).contains("recursion limit"));
    let mut later = paper();
    later["format"] = "howdah-paper-run-2".into();
    assert!(read_value(&later).unwrap_err().to_string().contains("\"howdah-paper-run-2\""));
    let mut wrong = paper();
    wrong["link"]["rate_mbps"] = "fast".into();
    let said = read_value(&wrong).unwrap_err().to_string();
    assert!(said.starts_with("a.json: document 1, at link.rate_mbps: invalid type"), "{said}");
    wrong["link"]["rate_mbps"] = json!(-1);
    let said = read_value(&wrong).unwrap_err().to_string();
    assert_eq!(said, "a.json: document 1, at link.rate_mbps: -1 is not between 0 and 1e15");
}

proptest! {
    #[test]
    fn damaged_files_are_read_or_refused(
        at in 0usize..4000, byte in any::<u8>(), cut in 0usize..4000, other in any::<Vec<u8>>()
    ) {
        let mut whole = serde_json::to_vec_pretty(&json!([report(), paper()])).unwrap();
        let (at, cut) = (at % whole.len(), cut % whole.len());
        let _ = read("a", &whole[..cut]);
        let _ = read("a", &other);
        whole[at] = byte;
        let _ = read("a", &whole);
    }
}
