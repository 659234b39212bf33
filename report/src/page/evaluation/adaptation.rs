//! Modes chosen while a handoff runs, against each mode forced throughout.

use maud::{Markup, html};

use super::{
    cells::{App, Grid, LinkKey},
    time_cell, times,
};
use crate::{page::bits::scroll, stats::Stat, units};

/// A forced mode and what it came to.
struct Forced<'g> {
    mode: &'g str,
    total: Stat,
    downtime: Option<Stat>,
}

/// A table of all links and applications with forced modes; nothing if there are none.
pub(super) fn section(grid: &Grid<'_>) -> Markup {
    let links = grid.links(|mover| mover.forced_mode().is_some());
    if links.is_empty() {
        return html! {};
    }
    html! {
        div class="card" {
            (scroll("Adaptation", html! {
                table {
                    caption {
                        "Adaptation against forced modes"
                        small { "total time / downtime in seconds; the best tenth is the mean of the best 10 % of forced modes" }
                    }
                    thead {
                        tr {
                            th scope="col" { "Link" }
                            th scope="col" { "Application" }
                            th scope="col" { "Adaptive" }
                            th scope="col" { "Best forced" }
                            th scope="col" { "Best tenth" }
                            th scope="col" { "Worst forced" }
                            th scope="col" { "Adaptive ÷ best" }
                        }
                    }
                    tbody {
                        @for link in links {
                            @for app in grid.apps(&[link]) { (row(grid, link, app)) }
                        }
                    }
                }
            }))
        }
    }
}

/// Forced modes that finished, the fastest first.
fn forced<'g>(grid: &'g Grid<'_>, link: &LinkKey, app: &App) -> Vec<Forced<'g>> {
    let cells = grid.iter().filter(|(l, a, ..)| *l == link && *a == app);
    let forced = cells.filter_map(|(_, _, mover, cell)| {
        let mode = mover.forced_mode()?;
        Some(Forced { mode, total: cell.total()?, downtime: cell.downtime() })
    });
    let mut forced: Vec<_> = forced.collect();
    forced.sort_by(|a, b| a.total.mean.total_cmp(&b.total.mean));
    forced
}

/// The mean of the best tenth of these totals, which are in order; of one at least.
fn best_tenth(totals: &[f64]) -> Option<f64> {
    let best = totals.get(..totals.len().div_ceil(10))?;
    Stat::of(best.iter().copied()).map(|stat| stat.mean)
}

fn row(grid: &Grid<'_>, link: &LinkKey, app: &App) -> Markup {
    let modes = forced(grid, link, app);
    let (Some(best), Some(worst)) = (modes.first(), modes.last()) else { return html! {} };
    let ours = grid.default(link, app);
    let totals: Vec<f64> = modes.iter().map(|mode| mode.total.mean).collect();
    let ratio = ours.and_then(|cell| cell.total()).map(|total| total.mean / best.total.mean);
    html! {
        tr {
            th scope="row" { (link.label()) }
            td { (app.label()) }
            td { (times(ours)) }
            td { (forced_cell(best)) }
            td { (best_tenth(&totals).map_or_else(|| "–".into(), units::seconds)) small { "of " (modes.len()) } }
            td { (forced_cell(worst)) }
            td { (ratio.map_or_else(|| "–".into(), units::factor)) }
        }
    }
}

fn forced_cell(forced: &Forced<'_>) -> Markup {
    html! {
        (time_cell(Some(forced.total)))
        @if let Some(downtime) = forced.downtime { small { (units::seconds(downtime.mean)) " down" } }
        small { (forced.mode) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_is_at_least_one() {
        assert_eq!(best_tenth(&[]), None);
        assert_eq!(best_tenth(&[3.0, 4.0]), Some(3.0));
        assert_eq!(best_tenth(&[1.0; 10]), Some(1.0));
        let mut eleven = [9.0; 11];
        (eleven[0], eleven[1]) = (1.0, 3.0);
        assert_eq!(best_tenth(&eleven), Some(2.0));
    }
}
