//! What one handoff did: over time, by stage, in its pause.

mod tables;
mod waterfall;

use handoff::report::{Outcome, Report};
use maud::{Markup, html};

use super::bits::{figure, fold, or_dash, plural, table, tile};
use crate::{
    chart::timeline::{self, Shaped},
    run::{Origin, Run},
    units::{bytes, percent, rate, time},
};

/// More are not drawn: the page would be too large to open.
const MOST_DRAWN: usize = 48;
/// So many are shown at once, more when they are asked for.
const MOST_OPEN: usize = 3;

/// All handoffs by howdah of which there is a report.
pub(super) fn section(runs: &[Run]) -> Option<Markup> {
    let told: Vec<(&Run, &Report)> =
        runs.iter().filter_map(|run| Some((run, run.report.as_ref()?))).collect();
    let drawn: Vec<_> = told.iter().filter(|(run, _)| is_first(run)).take(MOST_DRAWN).collect();
    let left_out = told.len() - drawn.len();
    if drawn.is_empty() {
        return None;
    }
    Some(html! {
        @if left_out > 0 {
            p class="note-text" {
                "Of repetitions the first is drawn, and of all at most " (MOST_DRAWN) ": "
                (plural(left_out, "handoff is", "handoffs are")) " only in the tables and in the CSV."
            }
        }
        @for (run, report) in &drawn {
            details class="card" open[drawn.len() <= MOST_OPEN] {
                summary {
                    h3 { (run.title()) " " (badge(report.outcome)) }
                    span { (headline(report)) }
                }
                div { (body(run, report)) }
            }
        }
    })
}

fn is_first(run: &Run) -> bool {
    run.origin != Origin::Paper || run.facts.repetition <= 1
}

fn badge(outcome: Outcome) -> Markup {
    match outcome {
        Outcome::Moved => html! { span class="badge good" { "moved" } },
        Outcome::KeptHere => html! { span class="badge bad" { "not moved" } },
        Outcome::InDoubt => html! { span class="badge bad" { "in doubt" } },
    }
}

fn headline(report: &Report) -> String {
    let downtime = or_dash(report.downtime_ms, |ms| format!("{} down", time(ms)));
    format!("{} · {downtime} · {}", time(report.total_ms), bytes(report.bytes_on_link as f64))
}

fn body(run: &Run, report: &Report) -> Markup {
    let timeline = timeline::draw(report, &shaped(run));
    html! {
        p class="lede" { (words(run, report)) }
        @if let Some(reason) = &report.reason { p class="bad" { (reason) } }
        (tiles(run, report))
        (figure("Over time", "Seconds from the request", timeline, legend(run, report)))
        div class="pair" {
            @if let Some(chart) = waterfall::reduction(report) {
                (figure("Where the bytes went", "From what was looked at to the link", chart, html! {}))
            }
            @if let Some(chart) = waterfall::pause(report) {
                (figure("Where the downtime went", &why_cut(report), chart, html! {}))
            }
        }
        (fold("Rounds", table("Rounds", &tables::rounds(report))))
        (fold("Stages", table("Stages", &tables::stages(report))))
        @if let Some(adaptation) = &report.adaptation {
            (fold("Modes", table("Modes", &tables::modes(adaptation))))
            @if !adaptation.decisions.is_empty() {
                (fold("Decisions on modes", table("Decisions", &tables::decisions(adaptation))))
            }
        }
    }
}

/// What the link was shaped to, if the run says so.
fn shaped(run: &Run) -> Vec<Shaped> {
    let link = &run.facts.link;
    let bytes_per_s = |mbps: f64| mbps * 1e6 / 8.0;
    // No rate, and a rate of zero, is no limit.
    let Some(first) = link.rate_mbps.filter(|rate| *rate > 0.0) else { return Vec::new() };
    let changes = link.changes.iter().flatten();
    let later = changes.map(|change| (change.at_s * 1e3, bytes_per_s(change.rate_mbps)));
    [(0.0, bytes_per_s(first))].into_iter().chain(later).collect()
}

fn words(run: &Run, report: &Report) -> String {
    // Its key is 52 letters, which nobody compares here.
    let to = report.peer.rsplit('@').next().filter(|to| !to.is_empty()).unwrap_or("a peer");
    let mut text = format!("{} to {to}, epoch {}", report.vm, report.epoch);
    if report.full_hash.is_some() {
        text += ", all of RAM and disk compared at both ends";
    }
    if report.links > 1 {
        text += &format!(", over {} links", report.links);
    }
    format!("{text}. From {}.", run.file)
}

fn tiles(run: &Run, report: &Report) -> Markup {
    let predicted = report.downtime.and_then(|downtime| downtime.predicted_ms);
    let bound = report.downtime.map(|downtime| downtime.upper_bound_ms);
    let downtime_note = match (predicted, bound) {
        (Some(predicted), Some(bound)) => {
            format!("at most {}, {} predicted", time(bound), time(predicted))
        }
        (None, Some(bound)) => format!("at most {}", time(bound)),
        _ => String::new(),
    };
    let looked_at: u64 = report.classes.iter().map(|class| class.bytes_in).sum();
    let factor = looked_at as f64 / report.bytes_on_link as f64;
    let factor = if factor.is_finite() && factor >= 1.0 {
        format!("{factor:.1} times as much was looked at")
    } else {
        String::new()
    };
    let outage =
        (report.outage_ms > 0.0).then(|| format!("{} without a link", time(report.outage_ms)));
    let gap = run.facts.client_gap_ms;
    html! {
        dl class="tiles" {
            (tile("Total time", time(report.total_ms), outage.unwrap_or_default()))
            (tile("Downtime", or_dash(report.downtime_ms, time), downtime_note))
            @if let Some(gap) = gap { (tile("Longest silence of a client", time(gap), String::new())) }
            (tile("On the link", bytes(report.bytes_on_link as f64), factor))
            (tile("Link rate", or_dash(report.link_rate_bytes_per_s, rate), link_use(report)))
            (tile("Rounds", report.rounds.len().to_string(), String::new()))
        }
    }
}

fn link_use(report: &Report) -> String {
    report.utilisation.map_or_else(String::new, |used| format!("{} of it used", percent(used)))
}

fn why_cut(report: &Report) -> String {
    let Some(cutover) = &report.cutover else { return String::new() };
    let mut text = String::from("The guest was paused");
    if !cutover.cut_because.is_empty() {
        text += &format!(" because {}", cutover.cut_because);
    }
    if !cutover.commit.is_empty() {
        text += &format!("; commit: {}", cutover.commit);
    }
    text
}

fn legend(run: &Run, report: &Report) -> Markup {
    let assumed = report.adaptation.iter().flat_map(|a| &a.decisions);
    let assumed = assumed.into_iter().any(|decision| decision.link_bytes_per_s.is_some());
    html! {
        ul class="legend" {
            li { i class="k-setup" {} "the target gets ready" }
            @if report.cutover.is_some() { li { i class="k-pause" {} "the guest is paused" } }
            @if !report.outages.is_empty() { li { i class="k-outage" {} "no link" } }
            @if assumed { li { i class="k-dot" {} "what modes were chosen for" } }
            @if run.facts.link.rate_mbps.is_some() { li { i class="k-shaped" {} "what the link was shaped to" } }
        }
    }
}
