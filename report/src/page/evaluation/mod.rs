//! The evaluation's tables, in the layout of the paper that howdah follows.

mod adaptation;
mod cells;
mod limits;
mod peers;
mod requests;

use maud::{Markup, html};

use self::cells::{Cell, Grid, LinkKey};
use super::bits::{scroll, stat};
use crate::{
    run::Run,
    stats::Stat,
    units::{digits, seconds},
};

/// Everything that follows from runs of the evaluation; none if there are none.
pub(super) fn section(runs: &[&Run]) -> Option<Markup> {
    if runs.is_empty() {
        return None;
    }
    let grid = Grid::of(runs);
    Some(html! {
        (rates(&grid))
        (peers::section(&grid))
        (adaptation::section(&grid))
        (limits::section(&grid))
        (requests::section(&grid))
        (unfinished(runs))
    })
}

/// Total time and downtime by rate and application: one table for links with the same delay and loss.
fn rates(grid: &Grid<'_>) -> Markup {
    let links = grid.links(|mover| mover.is_default());
    let groups = links.chunk_by(|one, next| one.group() == next.group());
    html! { @for links in groups { (rates_table(grid, links)) } }
}

fn rates_table(grid: &Grid<'_>, links: &[&LinkKey]) -> Markup {
    let apps = grid.apps(links);
    let apps: Vec<_> = apps
        .into_iter()
        .filter(|app| links.iter().any(|l| grid.default(l, app).is_some()))
        .collect();
    let conditions = links.first().map(|link| link.conditions()).unwrap_or_default();
    let name = format!("Total time and downtime, {conditions}");
    html! {
        div class="card" {
            (scroll(&name, html! {
                table {
                    caption { (name) small { "seconds, howdah as it is; below: how far runs differ" } }
                    thead {
                        tr {
                            th scope="col" { "Link" }
                            @for app in &apps { th scope="col" { (app.label()) } }
                        }
                    }
                    tbody {
                        @for link in links {
                            tr {
                                th scope="row" { (link.rates()) }
                                @for app in &apps { td { (times(grid.default(link, app))) } }
                            }
                        }
                    }
                }
            }))
        }
    }
}

/// `17.3 / 4.1`, with both deviations below; or that it did not finish.
fn times(cell: Option<&Cell<'_>>) -> Markup {
    let Some(cell) = cell else { return html! { "–" } };
    html! {
        @match (cell.total(), cell.downtime()) {
            (Some(total), downtime) => {
                (seconds(total.mean)) " / "
                @match downtime { Some(downtime) => (seconds(downtime.mean)), None => "–" }
                (deviations(total, downtime))
            }
            (None, _) => (unmet(cell)),
        }
        (partly(cell))
    }
}

/// How far runs differ in total time and downtime.
fn deviations(total: Stat, downtime: Option<Stat>) -> Markup {
    let percent = |stat: Stat| stat.deviation.map(|d| format!("{:.0}", d * 100.0));
    let Some(of_total) = percent(total) else { return html! {} };
    let of_downtime = downtime.and_then(percent);
    let flagged = total.is_flagged() || downtime.is_some_and(|stat| stat.is_flagged());
    let text = match of_downtime {
        Some(of_downtime) => format!("±{of_total} / ±{of_downtime} %"),
        None => format!("±{of_total} %"),
    };
    html! { @if flagged { small class="flag" { "▲ " (text) } } @else { small { (text) } } }
}

/// That no run finished, and how long they were let.
fn unmet(cell: &Cell<'_>) -> Markup {
    html! {
        @match cell.bound_ms() {
            Some(bound) => { "> " (seconds(bound)) small { "not finished" } }
            None => span class="bad" { "failed" },
        }
    }
}

/// Where some runs finished and some did not.
fn partly(cell: &Cell<'_>) -> Markup {
    let (finished, all) = (cell.finished(), cell.runs.len());
    html! {
        @if finished > 0 && finished < all {
            small class="flag" { "▲ " (finished) " of " (all) " finished" }
        }
    }
}

fn unfinished(runs: &[&Run]) -> Markup {
    let open: Vec<_> = runs.iter().filter(|run| !run.facts.finished).collect();
    html! {
        @if !open.is_empty() {
            div class="card" {
                h3 { "What did not finish" }
                ul {
                    @for run in open {
                        li {
                            (run.title())
                            @if let Some(bound) = run.facts.bound_s { ": let for " (digits(bound)) " s" }
                            @if let Some(error) = &run.facts.error { ": " (error) }
                        }
                    }
                }
            }
        }
    }
}

/// A mean in a cell of a table, of a time.
fn time_cell(of: Option<Stat>) -> Markup {
    stat(of, seconds)
}
