//! The book: every page is in it, and its links lead somewhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").canonicalize().unwrap()
}

fn pages(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            pages(&entry, found);
        } else if entry.extension().is_some_and(|kind| kind == "md") {
            found.insert(entry);
        }
    }
}

/// Where the links of a page lead that stay in the project.
fn links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|to| !to.contains("://"))
        .collect()
}

/// What a heading is called in a link, as GitHub and mdBook have it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_page_is_in_the_book() {
    let docs = docs();
    let summary = docs.join("SUMMARY.md");
    let mut all = BTreeSet::new();
    pages(&docs, &mut all);
    assert!(all.remove(&summary));
    let text = fs::read_to_string(&summary).unwrap();
    let listed: BTreeSet<_> = links(&text).into_iter().map(|link| docs.join(link)).collect();
    // A decision that was just written down may wait for its place.
    let waiting = docs.join("adr");
    let missing: Vec<_> =
        all.difference(&listed).filter(|page| !page.starts_with(&waiting)).collect();
    assert!(missing.is_empty(), "not in SUMMARY.md: {missing:?}");
    let gone: Vec<_> = listed.difference(&all).collect();
    assert!(gone.is_empty(), "in SUMMARY.md, and not there: {gone:?}");
}

#[test]
fn links_lead_somewhere() {
    let docs = docs();
    let mut all = BTreeSet::new();
    pages(&docs, &mut all);
    all.extend(
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| docs.join("..").join(name)),
    );
    for page in all {
        let text = fs::read_to_string(&page).unwrap();
        for link in links(&text) {
            let (path, place) =
                link.split_once('#').map_or((link, None), |(path, at)| (path, Some(at)));
            let target =
                if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link}", page.display());
            if let Some(place) = place {
                let target = fs::read_to_string(&target).unwrap();
                let mut headings = target.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.any(|heading| anchor(heading) == place),
                    "{}: {link}",
                    page.display()
                );
            }
        }
    }
}
