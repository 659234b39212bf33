//! How far a handoff is from what its link and its data allow.

use maud::{Markup, html};

use super::{
    cells::{Cell, Grid},
    time_cell,
};
use crate::{
    page::bits::{scroll, stat},
    stats::Stat,
    units::{factor, megabytes},
};

/// Total time against the time that the bytes alone take, and bytes against an offline encoder's.
pub(super) fn section(grid: &Grid<'_>) -> Markup {
    let rows = grid.iter().filter(|(_, _, mover, _)| mover.is_default());
    let rows: Vec<_> = rows.filter(|(.., cell)| is_known(cell)).collect();
    if rows.is_empty() {
        return html! {};
    }
    html! {
        div class="card" {
            (scroll("Against what is possible", html! {
                table {
                    caption {
                        "Against what is possible"
                        small { "howdah as it is; the link at the rate that was measured, the encoder on the same final state" }
                    }
                    thead {
                        tr {
                            th scope="col" { "Link" }
                            th scope="col" { "Application" }
                            th scope="col" { "Total, s" }
                            th scope="col" { "Bytes ÷ rate, s" }
                            th scope="col" { "Ratio" }
                            th scope="col" { "Sent, MB" }
                            th scope="col" { "Encoder, MB" }
                            th scope="col" { "Ratio" }
                        }
                    }
                    tbody {
                        @for (link, app, _, cell) in rows {
                            tr {
                                th scope="row" { (link.label()) }
                                td { (app.label()) }
                                td { (time_cell(cell.total())) }
                                td { (time_cell(cell.link_ms())) }
                                td { (ratio(cell.total(), cell.link_ms())) }
                                td { (stat(cell.bytes(), megabytes)) }
                                td { (stat(cell.encoder_bytes(), megabytes)) }
                                td { (ratio(cell.bytes(), cell.encoder_bytes())) }
                            }
                        }
                    }
                }
            }))
        }
    }
}

fn is_known(cell: &Cell<'_>) -> bool {
    cell.link_ms().is_some() || cell.encoder_bytes().is_some()
}

fn ratio(of: Option<Stat>, to: Option<Stat>) -> String {
    match (of, to) {
        (Some(of), Some(to)) if to.mean > 0.0 => factor(of.mean / to.mean),
        _ => "–".into(),
    }
}
