//! howdah beside what it is compared with: same application, same link.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::{
    cells::{App, Cell, Grid, LinkKey, Mover},
    partly, times, unmet,
};
use crate::{
    chart::{
        Chart, Data,
        rows::{self, Row, Tone},
        scale::Scale,
    },
    page::bits::{deviation, figure, plural, scroll},
    stats::geometric_mean,
    units::{self, bytes, factor, megabytes, time},
};

/// A card for each link over which something else was run too.
pub(super) fn section(grid: &Grid<'_>) -> Markup {
    let links = grid.links(Mover::is_peer);
    html! { @for link in links { (card(grid, link)) } }
}

fn card(grid: &Grid<'_>, link: &LinkKey) -> Markup {
    let (apps, movers) = (grid.apps(&[link]), grid.movers(link));
    let figures = [
        ("Total time", Figure { of: |cell| mean(cell.total()), bound: true, show: time }),
        ("Downtime", Figure { of: |cell| mean(cell.downtime()), bound: false, show: time }),
        ("On the link", Figure { of: |cell| mean(cell.bytes()), bound: false, show: bytes }),
    ];
    html! {
        div class="card" {
            h3 { "Against peers over " (link.label()) }
            p class="note-text" { "Same guest kernel, image, application and link, one after the other." }
            @for words in in_words(grid, link, &apps, &movers) { p { (words) } }
            (table(grid, link, &apps, &movers))
            div class="pair" {
                @for (name, measured) in figures {
                    @let chart = bars(name, &measured, grid, link, (&apps, &movers));
                    (figure(name, "Logarithmic: each line is ten times the one before", chart, legend()))
                }
            }
        }
    }
}

/// Of each system, how its best variant for each application compares.
fn in_words(grid: &Grid<'_>, link: &LinkKey, apps: &[&App], movers: &[&Mover]) -> Vec<String> {
    let systems: BTreeSet<&str> =
        movers.iter().filter(|mover| mover.is_peer()).map(|mover| mover.system()).collect();
    let words = systems.into_iter().filter_map(|system| {
        let best = |of: fn(&Cell<'_>) -> Option<f64>| {
            let factors = apps.iter().filter_map(|app| {
                let variants = movers.iter().filter(|mover| mover.system() == system);
                let theirs = variants.filter_map(|mover| of(grid.get(link, app, mover)?));
                ratio(theirs.reduce(f64::min), of(grid.default(link, app)?))
            });
            factors.collect::<Vec<f64>>()
        };
        let totals = best(|cell| mean(cell.total()));
        let times = geometric_mean(&totals)?;
        let n = plural(totals.len(), "application", "applications");
        let mut text = format!("Of {system}, the best variant takes {} as long", factor(times));
        if let Some(sizes) = geometric_mean(&best(|cell| mean(cell.bytes()))) {
            text += &format!(", sends {} as much", factor(sizes));
        }
        if let Some(pauses) = geometric_mean(&best(|cell| mean(cell.downtime()))) {
            text += &format!(", and pauses the guest {} as long", factor(pauses));
        }
        Some(format!("{text} as howdah: geometric means over the {n} that it finished."))
    });
    words.collect()
}

fn mean(stat: Option<crate::stats::Stat>) -> Option<f64> {
    stat.map(|stat| stat.mean)
}

fn legend() -> Markup {
    html! {
        ul class="legend" {
            li { i class="k-main" {} "howdah" }
            li { i class="k-peer" {} "others" }
            li { i class="k-open" {} "not finished: at least so much" }
        }
    }
}

/// A figure of a cell.
struct Figure {
    of: fn(&Cell<'_>) -> Option<f64>,
    /// Whether the bound of what did not finish is a bound of this figure.
    bound: bool,
    show: fn(f64) -> String,
}

impl Figure {
    /// The figure, and whether it is only a lower bound.
    fn value(&self, cell: &Cell<'_>) -> Option<(f64, bool)> {
        let known = (self.of)(cell).map(|value| (value, false));
        known.or_else(|| cell.bound_ms().filter(|_| self.bound).map(|bound| (bound, true)))
    }
}

fn bars(
    name: &str,
    figure: &Figure,
    grid: &Grid<'_>,
    link: &LinkKey,
    (apps, movers): (&[&App], &[&Mover]),
) -> Chart {
    let mut data = Data::new(["Application", "System", "Figure"]);
    let mut found = Vec::new();
    for app in apps {
        for mover in movers {
            let cell = grid.get(link, app, mover);
            if let Some((value, open)) = cell.and_then(|cell| figure.value(cell)) {
                found.push((app, mover, value, open));
            }
        }
    }
    let scale = Scale::log(found.iter().map(|(_, _, value, _)| *value));
    let rows: Vec<Row> = found
        .into_iter()
        .map(|(app, mover, value, open)| {
            let shown = (figure.show)(value);
            let shown = if open { format!("> {shown}") } else { shown };
            data.push([app.label().to_owned(), mover.label(), shown.clone()]);
            Row {
                label: format!("{} · {}", app.label(), mover.label()),
                value: shown,
                bar: (0.0, scale.share(value)),
                tone: match (open, mover.is_peer()) {
                    (true, _) => Tone::Open,
                    (false, true) => Tone::Peer,
                    (false, false) => Tone::Whole,
                },
                hint: mover.label(),
            }
        })
        .collect();
    let lines = scale
        .ticks(5)
        .into_iter()
        .map(|tick| (scale.share(tick), units::tick(&(figure.show)(tick))));
    let lines: Vec<_> = lines.collect();
    Chart { svg: rows::draw(name, &rows, &lines), data }
}

fn table(grid: &Grid<'_>, link: &LinkKey, apps: &[&App], movers: &[&Mover]) -> Markup {
    let name = format!("Against peers, {}", link.label());
    html! {
        (scroll(&name, html! {
            table {
                caption {
                    "Total time / downtime in seconds, and megabytes on the link"
                    small { "of peers also how many times as long, and as much, as with howdah" }
                }
                thead {
                    tr {
                        th scope="col" { "Application" }
                        @for mover in movers { th scope="col" { (mover.label()) } }
                    }
                }
                tbody {
                    @for app in apps {
                        tr {
                            th scope="row" { (app.label()) }
                            @for mover in movers { td { (entry(grid, link, app, mover)) } }
                        }
                    }
                    (means(grid, link, apps, movers))
                }
            }
        }))
    }
}

fn entry(grid: &Grid<'_>, link: &LinkKey, app: &App, mover: &Mover) -> Markup {
    let Some(cell) = grid.get(link, app, mover) else { return html! { "–" } };
    let ours = grid.default(link, app).filter(|_| mover.is_peer());
    html! {
        @if cell.total().is_some() { (times(Some(cell))) } @else { (unmet(cell)) (partly(cell)) }
        @if let Some(sent) = cell.bytes() {
            div { (megabytes(sent.mean)) " MB" (deviation(&sent)) }
        }
        @if let Some(ours) = ours {
            @let times = ratio(cell.total().map(|s| s.mean), ours.total().map(|s| s.mean));
            @let sizes = ratio(cell.bytes().map(|s| s.mean), ours.bytes().map(|s| s.mean));
            @if let Some(times) = times { small { (factor(times)) " as long" } }
            @if let Some(sizes) = sizes { small { (factor(sizes)) " as much" } }
        }
    }
}

fn ratio(of: Option<f64>, to: Option<f64>) -> Option<f64> {
    let ratio = of? / to.filter(|to| *to > 0.0)?;
    (ratio > 0.0).then_some(ratio)
}

/// The mean of factors over the applications that both finished.
fn means(grid: &Grid<'_>, link: &LinkKey, apps: &[&App], movers: &[&Mover]) -> Markup {
    let mean = |mover: &Mover, of: fn(&Cell<'_>) -> Option<f64>| {
        let both = apps
            .iter()
            .filter_map(|app| ratio(of(grid.get(link, app, mover)?), of(grid.default(link, app)?)));
        let both: Vec<f64> = both.collect();
        Some((geometric_mean(&both)?, both.len()))
    };
    html! {
        tr class="sum" {
            th scope="row" { "Geometric mean" }
            @for mover in movers {
                td {
                    @if mover.is_peer() {
                        @match mean(mover, |cell| cell.total().map(|stat| stat.mean)) {
                            Some((times, n)) => { (factor(times)) " as long" small { "of " (n) } }
                            None => "–",
                        }
                        @if let Some((sizes, _)) = mean(mover, |cell| cell.bytes().map(|stat| stat.mean)) {
                            small { (factor(sizes)) " as much" }
                        }
                    }
                }
            }
        }
    }
}
