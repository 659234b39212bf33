//! What the clients of applications saw.

use maud::{Markup, html};

use super::cells::{Cell, Grid};
use crate::{
    page::bits::{or_dash, scroll, stat},
    run::Requests,
    stats::Stat,
    units::{count, time},
};

/// One row for each application, link and system whose client said something.
pub(super) fn section(grid: &Grid<'_>) -> Markup {
    let rows: Vec<_> = grid
        .iter()
        .filter(|(_, _, mover, _)| mover.forced_mode().is_none())
        .filter(|(.., cell)| !seen(cell).is_empty())
        .collect();
    if rows.is_empty() {
        return html! {};
    }
    html! {
        div class="card" {
            (scroll("Requests", html! {
                table {
                    caption {
                        "Requests of clients throughout"
                        small { "latency: the middle one, and that of 99 in 100; means over runs, sums of requests" }
                    }
                    thead {
                        tr {
                            th scope="col" { "Link" }
                            th scope="col" { "Application" }
                            th scope="col" { "System" }
                            th scope="col" { "Sent" }
                            th scope="col" { "Failed" }
                            th scope="col" { "Lost" }
                            th scope="col" { "Wrong" }
                            th scope="col" { "Reconnects" }
                            th scope="col" { "Before" }
                            th scope="col" { "During" }
                            th scope="col" { "During, 99 %" }
                            th scope="col" { "After" }
                            th scope="col" { "Longest gap" }
                            th scope="col" { "Downtime" }
                        }
                    }
                    tbody {
                        @for (link, app, mover, cell) in rows {
                            tr {
                                th scope="row" { (link.label()) }
                                td { (app.label()) }
                                td { (mover.label()) }
                                td { (sum(cell, |r| r.sent)) }
                                td { (sum(cell, |r| r.failed)) }
                                td { (sum(cell, |r| r.lost)) }
                                td { (sum(cell, |r| r.wrong)) }
                                td { (sum(cell, |r| r.reconnects)) }
                                td { (mean(cell, |r| r.before_p50_ms)) }
                                td { (mean(cell, |r| r.during_p50_ms)) }
                                td { (mean(cell, |r| r.during_p99_ms)) }
                                td { (mean(cell, |r| r.after_p50_ms)) }
                                td { (mean(cell, |r| r.longest_gap_ms)) }
                                td { (stat(cell.downtime(), time)) }
                            }
                        }
                    }
                }
            }))
        }
    }
}

fn seen<'a>(cell: &Cell<'a>) -> Vec<&'a Requests> {
    cell.runs.iter().filter_map(|run| run.facts.requests.as_ref()).collect()
}

fn sum(cell: &Cell<'_>, of: fn(&Requests) -> Option<u64>) -> String {
    or_dash(seen(cell).into_iter().filter_map(of).reduce(u64::saturating_add), count)
}

fn mean(cell: &Cell<'_>, of: fn(&Requests) -> Option<f64>) -> Markup {
    stat(Stat::of(seen(cell).into_iter().filter_map(of)), time)
}
