//! Charts as SVG that fits any width.
//!
//! A chart is as wide as its place and never scaled: what is text keeps its size on a phone and on
//! paper. So horizontal places are shares of the width (`38.2%`), vertical ones are pixels, and lines
//! are drawn in a nested picture that is stretched (`preserveAspectRatio="none"`) while their strokes
//! are not. Every chart has a title for those who do not see it, and its figures as a table.

pub(crate) mod rows;
pub(crate) mod scale;
pub(crate) mod timeline;

use maud::{Markup, html};

/// A chart with its figures as a table.
pub(crate) struct Chart {
    pub(crate) svg: Markup,
    pub(crate) data: Data,
}

/// A chart's figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Data {
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Data {
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { head: head.map(str::to_owned).to_vec(), rows: Vec::new() }
    }

    pub(crate) fn push<const N: usize>(&mut self, row: [String; N]) {
        self.rows.push(row.to_vec());
    }
}

/// A share of the width, as SVG has it. What is beyond the picture is at its edge.
pub(crate) fn pct(share: f64) -> String {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    format!("{:.2}%", share * 100.0)
}

/// A horizontal bar from one share of the width to another. What is too short to be seen is a hair
/// wide.
pub(crate) fn bar(
    class: &str,
    (from, to): (f64, f64),
    (y, height): (f64, f64),
    title: &str,
) -> Markup {
    let width = (to - from).max(0.0015);
    html! {
        rect class=(class) x=(pct(from.min(1.0 - width))) width=(pct(width)) y=(y) height=(height) {
            title { (title) }
        }
    }
}

/// Text that ends, begins or is centred at a share of the width, whatever keeps it in the picture.
pub(crate) fn text_at(class: &str, share: f64, y: f64, text: &str) -> Markup {
    let anchor = match share {
        s if s < 0.04 => "start",
        s if s > 0.96 => "end",
        _ => "middle",
    };
    html! { text class=(class) x=(pct(share)) y=(y) text-anchor=(anchor) { (text) } }
}

/// Whether so much text fits into so much of the width: of a wide picture, and of a phone's.
pub(crate) fn fits(text: &str, share: f64) -> Fit {
    let needed = text.chars().count() as f64 * 6.6 + 6.0;
    match share {
        s if s * 330.0 >= needed => Fit::Always,
        s if s * 960.0 >= needed => Fit::Wide,
        _ => Fit::Never,
    }
}

/// Where text fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    Always,
    Wide,
    Never,
}

impl Fit {
    /// The class that hides text where it does not fit; none if it fits nowhere.
    pub(crate) fn class(self) -> Option<&'static str> {
        match self {
            Self::Always => Some("in"),
            Self::Wide => Some("in wide"),
            Self::Never => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_in_the_picture() {
        assert_eq!([0.3821, -1.0, 7.0, f64::NAN].map(pct), ["38.21%", "0.00%", "100.00%", "0.00%"]);
        let hair = bar("a", (1.0, 1.0), (0.0, 5.0), "b").into_string();
        assert!(hair.contains(r#"x="99.85%""#) && hair.contains(r#"width="0.15%""#), "{hair}");
    }

    #[test]
    fn text_is_left_out_where_it_does_not_fit() {
        assert_eq!(fits("zstd:3", 0.5), Fit::Always);
        assert_eq!(fits("zstd:3", 0.06), Fit::Wide);
        assert_eq!(fits("zstd:3", 0.01), Fit::Never);
    }
}
