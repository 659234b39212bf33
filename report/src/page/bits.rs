//! Small parts that all sections use.

use maud::{Markup, html};

use crate::{
    chart::{Chart, Data},
    stats::Stat,
    units,
};

/// A chart in its place, with its figures as a table for those who cannot see or want to copy it.
pub(super) fn figure(caption: &str, note: &str, chart: Chart, legend: Markup) -> Markup {
    html! {
        figure {
            figcaption { (caption) @if !note.is_empty() { small { (note) } } }
            (chart.svg)
            (legend)
            (fold("Figures of this chart", table(caption, &chart.data)))
        }
    }
}

/// Something that is shown when it is asked for.
pub(super) fn fold(name: &str, content: Markup) -> Markup {
    html! { details { summary { (name) } (content) } }
}

/// A table of plain text.
pub(super) fn table(caption: &str, data: &Data) -> Markup {
    html! {
        (scroll(caption, html! {
            table {
                thead { tr { @for head in &data.head { th scope="col" { (head) } } } }
                tbody {
                    @for row in &data.rows {
                        tr {
                            @for (n, cell) in row.iter().enumerate() {
                                @let words = cell.chars().count() > 28;
                                @if n == 0 && !words { th scope="row" { (cell) } }
                                @else if words { td class="words" { (cell) } }
                                @else { td { (cell) } }
                            }
                        }
                    }
                }
            }
        }))
    }
}

/// What may be wider than a phone: it scrolls by itself, with the keyboard too.
pub(super) fn scroll(name: &str, content: Markup) -> Markup {
    html! { div class="scroll" role="region" tabindex="0" aria-label=(name) { (content) } }
}

/// A figure over repetitions: its mean, and below it how far runs differ.
pub(super) fn stat(stat: Option<Stat>, show: fn(f64) -> String) -> Markup {
    html! { @match stat { Some(stat) => { (show(stat.mean)) (deviation(&stat)) } None => "–" } }
}

/// How far runs differ.
pub(super) fn deviation(stat: &Stat) -> Markup {
    html! {
        @if let Some(deviation) = stat.deviation {
            @let text = format!("±{}", units::percent(deviation));
            @if stat.is_flagged() { small class="flag" { "▲ " (text) } } @else { small { (text) } }
        }
    }
}

/// One figure of a few that matter most.
pub(super) fn tile(name: &str, value: String, note: String) -> Markup {
    html! { div { dt { (name) } dd { (value) @if !note.is_empty() { small { (note) } } } } }
}

/// `1 run`, `2 runs`.
pub(super) fn plural(n: usize, one: &str, several: &str) -> String {
    format!("{} {}", units::count(n as u64), if n == 1 { one } else { several })
}

/// An optional figure.
pub(super) fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), show)
}
