//! Bars in rows: waterfalls, shares of a time, and comparisons.
//!
//! A row's words stand over its bar, not beside it: so they have the whole width of a phone.

use maud::{Markup, html};

use super::{bar, pct, text_at};

/// The height of a row.
const ROW: f64 = 38.0;
/// Room for the scale's figures below the rows.
const SCALE: f64 = 20.0;

/// What a bar stands for, and so its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// What there is: at the start or at the end.
    Whole,
    /// What was taken away.
    Saved,
    /// What was added.
    Added,
    /// One of equals.
    Plain,
    /// What was compared with.
    Peer,
    /// A bound that was not met: at least so much.
    Open,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Saved => "saved",
            Self::Added => "added",
            Self::Plain => "plain",
            Self::Peer => "peer",
            Self::Open => "open",
        }
    }
}

/// A row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) value: String,
    /// From where to where, of the width.
    pub(crate) bar: (f64, f64),
    pub(crate) tone: Tone,
    /// What a pointer over the bar says.
    pub(crate) hint: String,
}

/// Rows under one another. `lines` are values of the scale: where they are, and what they say.
pub(crate) fn draw(title: &str, rows: &[Row], lines: &[(f64, String)]) -> Markup {
    let bottom = rows.len() as f64 * ROW;
    let height = bottom + if lines.is_empty() { 2.0 } else { SCALE };
    html! {
        svg class="chart" width="100%" height=(height) role="img" {
            title { (title) }
            @for (share, text) in lines {
                line class="grid" x1=(pct(*share)) x2=(pct(*share)) y1="2" y2=(bottom) {}
                (text_at("tick", *share, bottom + 14.0, text))
            }
            @for (n, row) in rows.iter().enumerate() {
                @let y = n as f64 * ROW;
                rect class="track" x="0" y=(y + 20.0) width="100%" height="10" {}
                (bar(row.tone.class(), row.bar, (y + 20.0, 10.0), &row.hint))
                text class="label halo" x="0" y=(y + 14.0) { (row.label) }
                text class="value halo" x="100%" y=(y + 14.0) text-anchor="end" { (row.value) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_words_bars_and_lines() {
        let row = Row {
            label: "a<b".into(),
            value: "1".into(),
            bar: (0.25, 0.75),
            tone: Tone::Saved,
            hint: "h".into(),
        };
        let drawn = draw("t", &[row.clone(), row], &[(0.5, "10".into())]).into_string();
        assert_eq!(drawn.matches("a&lt;b").count(), 2);
        assert_eq!(drawn.matches(r#"class="saved" x="25.00%" width="50.00%""#).count(), 2);
        assert!(drawn.contains(r#"height="96""#) && drawn.contains(">10<"), "{drawn}");
    }
}
