//! The page.

mod bits;
mod evaluation;
mod handoff;
mod lab;
mod provenance;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use self::bits::plural;
use crate::{
    Evidence,
    run::{Origin, Run},
};

/// All of the page's style. It is a part of the program, so it needs no escaping.
const STYLE: &str = include_str!("style.css");
/// Nothing but that style may be loaded or run, whatever a file brings.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// A part of the page, and where it is.
struct Section {
    id: &'static str,
    name: &'static str,
    content: Markup,
}

/// The whole page.
pub(crate) fn page(evidence: &Evidence) -> Markup {
    let of = |origin| evidence.runs.iter().filter(move |run: &&Run| run.origin == origin);
    let paper: Vec<&Run> = of(Origin::Paper).collect();
    let sections = [
        ("evaluation", "Evaluation", evaluation::section(&paper)),
        ("scenarios", "Scenarios of the lab", lab::section(&evidence.scenarios)),
        ("handoffs", "Handoffs", handoff::section(&evidence.runs)),
        ("runs", "All runs", provenance::runs(&evidence.runs)),
        ("setup", "How it was run", provenance::section(&paper)),
    ];
    let sections = sections
        .into_iter()
        .filter_map(|(id, name, content)| content.map(|content| Section { id, name, content }));
    let sections: Vec<Section> = sections.collect();
    let title = title(evidence);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="referrer" content="no-referrer";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (title) }
                    p class="lede" { (lede(evidence)) }
                    @if sections.len() > 1 { (contents(&sections)) }
                }
                main {
                    @for section in &sections {
                        section id=(section.id) aria-labelledby={ (section.id) "-title" } {
                            h2 id={ (section.id) "-title" } { (section.name) }
                            (section.content)
                        }
                    }
                }
                footer {
                    p {
                        "Sizes are decimal: 1 MB is 1,000,000 bytes. Deviations are standard deviations of a sample, \
                         relative to the mean; ▲ marks those over 15 %. Made by howdah report."
                    }
                }
            }
        }
    }
}

fn contents(sections: &[Section]) -> Markup {
    html! {
        nav aria-label="On this page" {
            ul {
                @for section in sections {
                    li { a href={ "#" (section.id) } { (section.name) } }
                }
            }
        }
    }
}

fn title(evidence: &Evidence) -> String {
    match &evidence.runs[..] {
        [_] => "Report of a handoff".into(),
        runs if runs.iter().any(|run| run.origin == Origin::Paper) => {
            "Evaluation of handoffs".into()
        }
        _ => "Report of handoffs".into(),
    }
}

fn lede(evidence: &Evidence) -> String {
    let unfinished = evidence.runs.iter().filter(|run| !run.facts.finished).count();
    let mut text = format!(
        "{} of {}",
        plural(evidence.runs.len(), "run", "runs"),
        plural(evidence.files, "file", "files")
    );
    if unfinished > 0 {
        text += &format!(", {unfinished} of which did not finish");
    }
    text + "."
}
