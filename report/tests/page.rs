//! The page as a browser sees it: parsed by a parser that says what is wrong.

use std::cell::Ref;

use handoff::{
    adapt::{Adaptation, ModeDecision},
    report::{Cutover, Downtime, Outage, Outcome, Report, Round, Sample, StageShare},
};
use howdah_report::{Evidence, Link, PAPER_RUN_FORMAT, PaperRun, Requests};
use html5ever::{parse_document, tendril::TendrilSink};
use markup5ever_rcdom::{Handle, NodeData, RcDom};
use serde_json::{Value, json};

/// What would run, or do harm, if it ever came through.
const HOSTILE: &str =
    "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;\u{202e}\0";

fn report() -> Report {
    let stage = |name: &str, bytes_in, bytes_out| StageShare {
        name: name.into(),
        chunks: 100,
        bytes_in,
        bytes_out,
        cpu_s: 0.2,
    };
    let sample = |n: u32| Sample {
        at_ms: f64::from(n) * 100.0,
        sent_bytes: u64::from(n) * 120_000,
        delivered_bytes: u64::from(n) * 110_000,
        in_flight_bytes: 60_000,
        remaining_chunks: u64::from(100 - n),
    };
    let decision = |at_ms, why: &str| ModeDecision {
        at_ms,
        link_bytes_per_s: Some(1.2e6),
        why: why.into(),
        ..ModeDecision::default()
    };
    Report {
        handoff: "00ff".into(),
        vm: "guest".into(),
        peer: "b:7070".into(),
        outcome: Outcome::Moved,
        total_ms: 10_000.0,
        setup_ms: 400.0,
        downtime_ms: Some(900.0),
        downtime: Some(Downtime { upper_bound_ms: 925.0, ..Downtime::default() }),
        bytes_on_link: 1_100_000,
        outages: vec![Outage { began_ms: 3000.0, lasted_ms: 500.0, reason: "cut".into() }],
        rounds: vec![
            Round { number: 1, began_ms: 400.0, duration_ms: 8000.0, ..Round::default() },
            Round { number: 2, began_ms: 9000.0, duration_ms: 900.0, ..Round::default() },
        ],
        samples: (0..100).map(sample).collect(),
        classes: vec![stage("unchanged", 5_000_000, 0), stage("data", 4_000_000, 4_000_000)],
        stages: vec![stage("compress", 4_000_000, 1_000_000)],
        adaptation: Some(Adaptation {
            decisions: vec![decision(500.0, "the link was measured"), decision(5000.0, "later")],
            ..Adaptation::default()
        }),
        cutover: Some(Cutover { began_ms: 9000.0, commit_ms: 900.0, ..Cutover::default() }),
        ..Report::default()
    }
}

fn paper(
    application: &str,
    system: &str,
    variant: &str,
    total_ms: f64,
    repetition: u32,
) -> PaperRun {
    PaperRun {
        format: PAPER_RUN_FORMAT.into(),
        application: application.into(),
        system: system.into(),
        variant: variant.into(),
        link: Link { name: "10".into(), rate_mbps: Some(10.0), ..Link::default() },
        measured_rate_bytes_per_s: Some(1.2e6),
        repetition,
        finished: true,
        total_ms: Some(total_ms),
        downtime_ms: Some(total_ms / 10.0),
        bytes_on_link: Some((total_ms * 1000.0) as u64),
        offline_encoder_bytes: Some(1_000_000),
        requests: Some(Requests { sent: Some(100), lost: Some(1), ..Requests::default() }),
        commands: Some(vec!["howdah handoff guest b".into()]),
        report: (system == "howdah").then(report),
        ..PaperRun::default()
    }
}

fn page(documents: &[Value]) -> String {
    let mut evidence = Evidence::default();
    for document in documents {
        evidence.read("a.json", document.to_string().as_bytes()).expect("a sound document");
    }
    evidence.html()
}

fn evaluation() -> Vec<Value> {
    let mut runs = vec![
        paper("fluid", "howdah", "default", 10_000.0, 1),
        paper("fluid", "howdah", "default", 14_000.0, 2),
        paper("fluid", "howdah", "static:zstd:3", 9_000.0, 1),
        paper("fluid", "howdah", "static:xz:6", 20_000.0, 1),
        paper("fluid", "qemu", "precopy", 240_000.0, 1),
        paper("faces", "howdah", "default", 40_000.0, 1),
    ];
    let mut stuck = paper("faces", "qemu", "precopy", 0.0, 1);
    (stuck.finished, stuck.total_ms, stuck.bound_s) = (false, None, Some(900.0));
    stuck.error = Some("did not converge".into());
    runs.push(stuck);
    runs.iter().map(|run| json!(run)).collect()
}

struct Page(RcDom);

impl Page {
    /// Parses it; a page that is not well-formed is a failure.
    fn parse(html: &str) -> Self {
        let dom = parse_document(RcDom::default(), Default::default()).one(html);
        let errors: Ref<'_, Vec<_>> = dom.errors.borrow();
        assert!(errors.is_empty(), "{errors:?}");
        drop(errors);
        Self(dom)
    }

    fn all(&self, name: &str) -> Vec<Handle> {
        let mut found = Vec::new();
        walk(&self.0.document, &mut |node| {
            if element(node).is_some_and(|(local, _)| local == name) {
                found.push(node.clone());
            }
        });
        found
    }

    fn attributes(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        walk(&self.0.document, &mut |node| {
            found.extend(element(node).into_iter().flat_map(|(_, attributes)| attributes));
        });
        found
    }
}

fn element(node: &Handle) -> Option<(String, Vec<(String, String)>)> {
    let NodeData::Element { name, attrs, .. } = &node.data else { return None };
    let attributes = attrs.borrow();
    let attributes = attributes.iter().map(|a| (a.name.local.to_string(), a.value.to_string()));
    Some((name.local.to_string(), attributes.collect()))
}

fn walk(node: &Handle, see: &mut dyn FnMut(&Handle)) {
    see(node);
    node.children.borrow().iter().for_each(|child| walk(child, see));
}

fn text(node: &Handle) -> String {
    let mut all = String::new();
    walk(node, &mut |node| {
        if let NodeData::Text { contents } = &node.data {
            all.push_str(&contents.borrow());
        }
    });
    all
}

#[test]
fn a_handoff_is_drawn_with_words_and_tables_beside() {
    let page = Page::parse(&page(&[serde_json::to_value(report()).unwrap()]));
    let charts: Vec<_> = page
        .all("svg")
        .into_iter()
        .filter(|svg| element(svg).unwrap().1.contains(&("role".into(), "img".into())))
        .collect();
    assert_eq!(charts.len(), 3);
    for chart in &charts {
        let first = chart.children.borrow()[0].clone();
        assert_eq!(element(&first).unwrap().0, "title", "a chart has a name");
        assert!(!text(&first).is_empty());
    }
    let drawn = text(&charts[0]);
    for said in
        ["10.0 s in all, paused for 900 ms", "Rounds", "Modes", "the guest is paused", "cut"]
    {
        assert!(drawn.contains(said), "{said} in {drawn}");
    }
    assert_eq!(page.all("figure").len(), 3);
    for figure in page.all("figure") {
        let mut tables = 0;
        walk(&figure, &mut |node| {
            tables += usize::from(element(node).is_some_and(|(name, _)| name == "table"));
        });
        assert_eq!(tables, 1, "a chart has its figures as a table");
    }
}

#[test]
fn the_papers_tables_have_means_deviations_and_bounds() {
    let html = page(&evaluation());
    let page = Page::parse(&html);
    let words: String = text(&page.0.document);
    // 10 and 14 s: a mean of 12, and a deviation that must be pointed out.
    for said in
        ["12.0 / 1.20", "▲ ±24 / ±24 %", "takes 20.0× as long", "not finished", "did not converge"]
    {
        assert!(words.contains(said), "{said}");
    }
    assert!(words.contains("Adaptation against forced modes") && words.contains("xz:6"));
    assert!(words.contains("1.33×"), "adaptive over best: 12 s to 9 s");
    assert!(words.contains("Against what is possible") && words.contains("12.0×"), "12 MB to 1 MB");
    // Of repetitions the first is drawn.
    let handoffs = page
        .all("details")
        .into_iter()
        .filter(|details| element(details).unwrap().1.contains(&("class".into(), "card".into())));
    assert_eq!(handoffs.count(), 4);
}

#[test]
fn the_same_files_give_the_same_page() {
    assert_eq!(page(&evaluation()), page(&evaluation()));
}

/// Puts hostile text wherever a file can bring text.
fn poison(value: &mut Value, keep: &[&str]) {
    match value {
        Value::String(text) => *text = format!("{text}{HOSTILE}"),
        Value::Array(items) => items.iter_mut().for_each(|item| poison(item, keep)),
        Value::Object(fields) => {
            for (key, field) in fields {
                if !keep.contains(&key.as_str()) {
                    poison(field, keep);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn nothing_that_files_bring_becomes_markup() {
    // What has few values, any other of which is an error.
    let keep = ["format", "outcome", "mode", "stronger", "choice"];
    let mut documents = evaluation();
    documents.push(serde_json::to_value(report()).unwrap());
    documents.push(json!({
        "name": "idle", "passed": false, "error": "e", "legs": [],
        "checks": [{ "name": "alive", "passed": false, "detail": "d" }],
    }));
    documents.iter_mut().for_each(|document| poison(document, &keep));
    let mut evidence = Evidence::default();
    for document in &documents {
        evidence.read(HOSTILE, &serde_json::to_vec(document).unwrap()).unwrap();
    }
    let html = evidence.html();
    let page = Page::parse(&html);
    for name in
        ["script", "img", "iframe", "object", "link", "form", "foreignObject", "image", "use"]
    {
        assert!(page.all(name).is_empty(), "{name}");
    }
    for (name, value) in page.attributes() {
        assert!(!name.starts_with("on"), "{name}");
        let refers = ["href", "src", "xlink:href", "style"].contains(&name.as_str());
        assert!(!refers || value.starts_with('#'), "{name}={value}");
    }
    assert!(text(&page.0.document).contains("<script>alert(1)</script>"), "it is shown as text");
    assert!(!html.contains('\0') && !html.contains('\u{202e}'));
}

#[test]
fn the_page_allows_itself_nothing() {
    let html = page(&[serde_json::to_value(report()).unwrap()]);
    assert!(html.contains("default-src &#39;none&#39;") || html.contains("default-src 'none'"));
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("url("));
    let page = Page::parse(&html);
    assert_eq!(page.all("style").len(), 1);
}

#[test]
fn ids_are_unique_and_links_lead_somewhere() {
    let page = Page::parse(&page(&evaluation()));
    let mut ids: Vec<_> =
        page.attributes().into_iter().filter(|(name, _)| name == "id").map(|(_, id)| id).collect();
    let links = page.attributes().into_iter().filter(|(name, _)| name == "href");
    for (_, link) in links {
        assert!(ids.iter().any(|id| format!("#{id}") == link), "{link}");
    }
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), all);
}

#[test]
fn a_report_of_nothing_is_a_page() {
    let empty = Report { handoff: "1".into(), ..Report::default() };
    Page::parse(&page(&[serde_json::to_value(empty).unwrap()]));
    Page::parse(&Evidence::default().html());
}
