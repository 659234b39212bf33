//! A handoff over time: what the link carried, what was left to do, rounds, modes, the pause.

mod moments;

use handoff::report::Report;
use maud::{Markup, html};

use self::moments::{Moments, Span};
use super::{Chart, Data, bar, fits, pct, scale::Scale, text_at};
use crate::units::{self, bytes, count, digits, rate, time};

/// Bytes of a chunk.
const CHUNK_BYTES: f64 = 4096.0;
/// Room for a panel's name above it.
const NAME: f64 = 20.0;
/// Room between panels.
const GAP: f64 = 14.0;
/// The height of a row of a lane.
const LANE: f64 = 16.0;

/// A rate that the link was shaped to, from a moment on: milliseconds, bytes a second.
pub(crate) type Shaped = (f64, f64);

/// Draws a handoff. `shaped` is what is known of the link from elsewhere.
pub(crate) fn draw(report: &Report, shaped: &[Shaped]) -> Chart {
    let picture = Picture { report, moments: Moments::of(report), shaped };
    let mut stack = Stack::default();
    stack.add(132.0, |y| picture.rate(y));
    if !report.samples.is_empty() {
        stack.add(56.0, |y| picture.left(y));
        stack.add(40.0, |y| picture.in_flight(y));
    }
    stack.add(LANE, |y| picture.rounds(y));
    if report.adaptation.is_some() {
        stack.add(2.0 * LANE, |y| picture.modes(y));
    }
    let bottom = stack.y - GAP;
    let svg = html! {
        svg class="chart" width="100%" height=(bottom + 22.0) role="img" {
            title { (picture.title()) }
            (picture.spans(bottom))
            @for panel in stack.panels { (panel) }
            (picture.axis(bottom))
        }
    };
    Chart { svg, data: picture.data() }
}

/// Panels under one another.
#[derive(Default)]
struct Stack {
    y: f64,
    panels: Vec<Markup>,
}

impl Stack {
    fn add(&mut self, height: f64, panel: impl FnOnce(f64) -> Markup) {
        self.panels.push(panel(self.y + NAME));
        self.y += NAME + height + GAP;
    }
}

struct Picture<'a> {
    report: &'a Report,
    moments: Moments,
    shaped: &'a [Shaped],
}

impl Picture<'_> {
    fn x(&self, at_ms: f64) -> f64 {
        at_ms / self.moments.end_ms
    }

    fn bounds(&self, span: &Span) -> (f64, f64) {
        (self.x(span.from_ms), self.x(span.to_ms))
    }

    fn title(&self) -> String {
        let mut title = format!("Over time: {} in all", time(self.report.total_ms));
        if let Some(downtime) = self.report.downtime_ms {
            title += &format!(", paused for {}", time(downtime));
        }
        title
    }

    /// Behind all panels: until the target was ready, the pause, and times without a link.
    fn spans(&self, height: f64) -> Markup {
        let setup = Span { from_ms: 0.0, to_ms: self.report.setup_ms };
        let said = format!("the target gets ready: {}", time(self.report.setup_ms));
        html! {
            (bar("setup", self.bounds(&setup), (0.0, height), &said))
            @for outage in &self.report.outages {
                @let span = Span { from_ms: outage.began_ms, to_ms: outage.began_ms + outage.lasted_ms };
                @let said = format!("no link for {}: {}", time(outage.lasted_ms), outage.reason);
                (bar("outage", self.bounds(&span), (0.0, height), &said))
            }
            @if let Some(pause) = &self.moments.pause {
                @let said = format!("the guest is paused: {}", time(pause.to_ms - pause.from_ms));
                (bar("pause", self.bounds(pause), (0.0, height), &said))
            }
        }
    }

    fn rate(&self, y: f64) -> Markup {
        const HEIGHT: f64 = 132.0;
        let steps = self.moments.rates();
        let assumed = self.assumed();
        let rates = steps.iter().map(|step| step.1);
        let known = assumed.iter().chain(self.shaped).map(|(_, rate)| *rate);
        let most = rates.chain(known).fold(0.0, f64::max);
        let scale = Scale::linear(most * 8.0 / 1e6);
        let up = |bytes_per_s: f64| 1.0 - scale.share(bytes_per_s * 8.0 / 1e6);
        let area = steps.iter().map(|(span, rate)| (self.bounds(span), up(*rate)));
        html! {
            (name(y, "Rate on the link, Mbit/s", &self.mean_rate()))
            (grid(&scale, y, HEIGHT, 4))
            (plot(y, HEIGHT, html! { path class="area" d=(step_area(area)) {} }))
            @for (n, (from, rate)) in self.shaped.iter().enumerate() {
                @let to = self.shaped.get(n + 1).map_or(self.moments.end_ms, |next| next.0);
                @let at = y + HEIGHT * up(*rate);
                line class="shaped" x1=(pct(self.x(*from))) x2=(pct(self.x(to))) y1=(at) y2=(at) {}
            }
            @for (at, assumed) in assumed {
                circle class="dot" cx=(pct(self.x(at))) cy=(y + HEIGHT * up(assumed)) r="3" {
                    title { "assumed of the link: " (rate(assumed)) }
                }
            }
        }
    }

    /// What was assumed of the link at each decision on modes.
    fn assumed(&self) -> Vec<(f64, f64)> {
        let decisions = self.report.adaptation.iter().flat_map(|a| &a.decisions);
        decisions.filter_map(|d| Some((d.at_ms, d.link_bytes_per_s?))).collect()
    }

    fn mean_rate(&self) -> String {
        match self.report.link_rate_bytes_per_s {
            Some(mean) => format!("{} while busy", rate(mean)),
            None => String::new(),
        }
    }

    fn left(&self, y: f64) -> Markup {
        let left = self.report.samples.iter();
        let left = left.map(|s| (s.at_ms, s.remaining_chunks as f64 * CHUNK_BYTES)).collect();
        self.series(y, 56.0, "Left to look at in the round", "area left", left)
    }

    fn in_flight(&self, y: f64) -> Markup {
        let samples = self.report.samples.iter();
        let waiting = samples.map(|s| (s.at_ms, s.in_flight_bytes as f64)).collect();
        self.series(y, 40.0, "Sent and not arrived", "area flight", waiting)
    }

    fn series(&self, y: f64, height: f64, title: &str, class: &str, of: Vec<(f64, f64)>) -> Markup {
        let most = of.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        let scale = Scale::linear(most);
        let points = of.into_iter().map(|(at, value)| (self.x(at), 1.0 - scale.share(value)));
        html! {
            (name(y, title, &format!("at most {}", bytes(most))))
            line class="grid" x1="0" x2="100%" y1=(y + height) y2=(y + height) {}
            (plot(y, height, html! { path class=(class) d=(line_area(points)) {} }))
        }
    }

    fn rounds(&self, y: f64) -> Markup {
        let rounds = self.report.rounds.iter().zip(&self.moments.rounds);
        let note = if self.moments.placed { "" } else { "placed by how long they took" };
        html! {
            (name(y, "Rounds", note))
            @for (n, (round, span)) in rounds.enumerate() {
                @let said = format!(
                    "round {}: {} chunks, {}, {}", round.number, count(round.chunks),
                    bytes(round.bytes as f64), time(round.duration_ms)
                );
                @let class = if n % 2 == 0 { "round" } else { "round odd" };
                (bar(class, self.bounds(span), (y, LANE - 1.0), &said))
                (within(self.bounds(span), y + 12.0, &round.number.to_string()))
            }
        }
    }

    fn modes(&self, y: f64) -> Markup {
        let Some(adaptation) = &self.report.adaptation else { return html! {} };
        let spans = self.moments.modes(adaptation);
        let note = match spans.len() {
            0 => "none was decided on",
            _ => "above: when the link has little to do",
        };
        html! {
            (name(y, "Modes", note))
            @for mode in &spans {
                @let bounds = self.bounds(&mode.span);
                @for (lane, name) in [&mode.mode, &mode.stronger].into_iter().enumerate() {
                    @let y = y + lane as f64 * LANE;
                    (bar(tone(name), bounds, (y, LANE - 1.0), &format!("{name}: {}", mode.why)))
                    (within(bounds, y + 12.0, name))
                }
            }
        }
    }

    fn axis(&self, y: f64) -> Markup {
        let seconds = Scale::Linear(self.moments.end_ms / 1e3);
        html! {
            line class="axis" x1="0" x2="100%" y1=(y) y2=(y) {}
            @for tick in seconds.ticks(5) {
                (text_at("tick", seconds.share(tick), y + 16.0, &units::tick(&format!("{} s", digits(tick)))))
            }
        }
    }

    fn data(&self) -> Data {
        let mut data = Data::new(["From", "To", "What"]);
        let mut add = |span: &Span, what: String| {
            data.push([time(span.from_ms), time(span.to_ms), what]);
        };
        for (round, span) in self.report.rounds.iter().zip(&self.moments.rounds) {
            let put = bytes(round.bytes as f64);
            add(span, format!("round {}, {put} on the link", round.number));
        }
        for mode in self.report.adaptation.iter().flat_map(|a| self.moments.modes(a)) {
            let modes = format!("modes {} and {}: {}", mode.mode, mode.stronger, mode.why);
            add(&mode.span, modes);
        }
        for (span, bytes_per_s) in self.moments.rates() {
            add(&span, format!("{} on the link", rate(bytes_per_s)));
        }
        if let Some(pause) = &self.moments.pause {
            add(pause, "the guest is paused".into());
        }
        data
    }
}

/// A panel's name, and a note at its other end.
fn name(y: f64, name: &str, note: &str) -> Markup {
    html! {
        text class="name halo" x="0" y=(y - 6.0) { (name) }
        text class="note halo" x="100%" y=(y - 6.0) text-anchor="end" { (note) }
    }
}

fn grid(scale: &Scale, y: f64, height: f64, about: usize) -> Markup {
    html! {
        @for tick in scale.ticks(about) {
            @let at = y + height * (1.0 - scale.share(tick));
            line class="grid" x1="0" x2="100%" y1=(at) y2=(at) {}
            @if tick > 0.0 {
                text class="tick halo" x="0" y=(at + 11.0) { (units::tick(&digits(tick))) }
            }
        }
    }
}

/// A picture of 1000 by 100 that fills the width.
fn plot(y: f64, height: f64, content: Markup) -> Markup {
    html! {
        svg x="0" y=(y) width="100%" height=(height) viewBox="0 0 1000 100" preserveAspectRatio="none" {
            (content)
        }
    }
}

/// Text in a bar, if there is room for it.
fn within((from, to): (f64, f64), y: f64, text: &str) -> Markup {
    html! {
        @if let Some(class) = fits(text, to.min(1.0) - from).class() {
            text class=(class) x=(pct((from + to.min(1.0)) / 2.0)) y=(y) text-anchor="middle" { (text) }
        }
    }
}

/// The colour of a mode: the harder it works, the darker.
fn tone(mode: &str) -> &'static str {
    let (codec, level) = mode.split_once(':').unwrap_or((mode, ""));
    let level: i32 = level.parse().unwrap_or(0);
    match (codec, level) {
        ("none", _) => "m0",
        ("lz4", _) => "m1",
        ("zstd", ..=2) => "m2",
        ("zstd", 3..=5) | ("gzip", _) => "m3",
        ("zstd", _) | ("bzip2", _) => "m4",
        _ => "m5",
    }
}

/// The outline of steps: each with its bounds, and how far down its top is. Steps that follow one
/// another make one outline.
fn step_area(steps: impl Iterator<Item = ((f64, f64), f64)>) -> String {
    let mut path = String::new();
    let mut end: Option<f64> = None;
    for ((from, to), top) in steps {
        let (from, to) = (from.clamp(0.0, 1.0) * 1e3, to.clamp(0.0, 1.0) * 1e3);
        let follows = end.is_some_and(|end| (end - from).abs() < 0.05);
        if !follows {
            let close = if end.is_some() { "V100Z" } else { "" };
            path += &format!("{close}M{from:.1} 100");
        }
        path += &format!("V{:.1}H{to:.1}", top * 100.0);
        end = Some(to);
    }
    path + if end.is_some() { "V100Z" } else { "" }
}

/// The outline of what is below a line through points.
fn line_area(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut path = String::new();
    let mut last = 0.0;
    for (x, top) in points {
        let x = x.clamp(0.0, 1.0) * 1e3;
        if path.is_empty() {
            path += &format!("M{x:.1} 100");
        }
        path += &format!("L{x:.1} {:.1}", top * 100.0);
        last = x;
    }
    if !path.is_empty() {
        path += &format!("L{last:.1} 100Z");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlines_are_closed_and_in_the_picture() {
        let steps = [((0.0, 0.25), 0.25), ((0.25, 0.5), 0.5), ((0.75, 7.0), 0.0)];
        assert_eq!(
            step_area(steps.into_iter()),
            "M0.0 100V25.0H250.0V50.0H500.0V100ZM750.0 100V0.0H1000.0V100Z"
        );
        let line = line_area([(0.1, 1.0), (0.5, 0.5)].into_iter());
        assert_eq!(line, "M100.0 100L100.0 100.0L500.0 50.0L500.0 100Z");
        assert_eq!(line_area([].into_iter()), "");
    }

    #[test]
    fn harder_modes_are_darker() {
        let modes = ["none", "lz4", "zstd:-1", "zstd:3", "zstd:9", "xz:6", "later:1"];
        assert_eq!(modes.map(tone), ["m0", "m1", "m2", "m3", "m4", "m5", "m5"]);
    }
}
