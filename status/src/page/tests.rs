//! What a browser and a reader would make of it.

use std::collections::BTreeMap;

use html5ever::{parse_document, tendril::TendrilSink};
use markup5ever_rcdom::{Handle, NodeData, RcDom};
use proptest::prelude::*;

use super::*;
use crate::samples;

/// Every element's count, and all text outside style and script. Panics on what no browser should have
/// to mend.
fn read(page: &str) -> (BTreeMap<String, usize>, String) {
    fn walk(node: &Handle, elements: &mut BTreeMap<String, usize>, text: &mut String) {
        match &node.data {
            NodeData::Element { name, .. } => {
                *elements.entry(name.local.to_string()).or_default() += 1;
                if matches!(&*name.local, "style" | "script") {
                    return;
                }
            }
            NodeData::Text { contents } => {
                text.push_str(&contents.borrow());
                text.push(' ');
            }
            _ => {}
        }
        node.children.borrow().iter().for_each(|child| walk(child, elements, text));
    }
    let dom = parse_document(RcDom::default(), Default::default()).one(page);
    assert!(dom.errors.borrow().is_empty(), "{:?}", dom.errors.borrow());
    let (mut elements, mut text) = (BTreeMap::new(), String::new());
    walk(&dom.document, &mut elements, &mut text);
    (elements, text)
}

#[test]
fn a_page_shows_what_goes_on() {
    let (elements, text) = read(&render(&samples::snapshot()));
    for holds in [
        "cloudlet-a",
        "handing-off",
        "b@10.0.0.2:7070",
        "round",
        "140 ms",
        "12.0 MiB",
        "9.4 s",
        "120 ms down",
        "3 bytes are missing",
        "edge",
        "10.0.0.1:7070",
        "howdah:xyz",
        "5e5e5e5e5e5e",
    ] {
        assert!(text.contains(holds), "no {holds:?} in {text}");
    }
    assert_eq!((elements["progress"], elements["table"], elements["script"]), (1, 4, 1));
    assert!(!elements.contains_key("form"), "read-only");
}

#[test]
fn an_empty_cloudlet_says_what_to_do() {
    let mut seen = samples::snapshot();
    (seen.vms, seen.bases, seen.peers, seen.operations) = Default::default();
    let (elements, text) = read(&render(&seen));
    assert!(!elements.contains_key("table"));
    for command in ["howdah vm run", "howdah peer add", "howdah base import"] {
        assert!(text.contains(command), "{text}");
    }
}

#[test]
fn many_rows_are_cut_off() {
    let mut seen = samples::snapshot();
    let one = seen.vms[0].clone();
    seen.vms = vec![one; MOST_ROWS + 7];
    let (_, text) = read(&render(&seen));
    assert!(text.contains("and 7 more") || text.contains("and  7  more"), "{text}");
}

#[test]
fn no_other_script_may_run() {
    let policy = security_policy();
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    assert_eq!(policy.matches("'sha256-").count(), 2);
    assert!(!policy.contains("unsafe"), "{policy}");
    // The elements hold exactly what was hashed, and inline styles would not be let through.
    let page = render(&samples::snapshot());
    assert!(page.contains(&format!("<style>{STYLE}</style>")));
    assert!(page.contains(&format!("<script>{SCRIPT}</script>")));
    assert!(!page.contains(" style=") && !page.contains(" onclick="));
}

proptest! {
    /// What users and peers wrote stays text.
    #[test]
    fn names_stay_text(name in "[ -~]{0,40}|<script>alert\\(1\\)</script>|\"><img src=x onerror=y>") {
        let mut seen = samples::snapshot();
        let before = read(&render(&seen)).0;
        seen.host.hostname.clone_from(&name);
        seen.vms[1].problems = vec![name.clone()];
        seen.vms[2].process.as_mut().unwrap().progress.as_mut().unwrap().peer.clone_from(&name);
        seen.peers[0].address = Some(name.clone());
        seen.bases[0].names = vec![name];
        prop_assert_eq!(read(&render(&seen)).0, before);
    }
}
