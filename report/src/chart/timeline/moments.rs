//! When things happened in a handoff, by its report.

use handoff::{adapt::Adaptation, report::Report};

/// The rate is shown for pieces of time no shorter than this.
const SHORTEST_MS: f64 = 200.0;
/// It is shown for about so many pieces.
const PIECES: f64 = 110.0;

/// A stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Span {
    pub(super) from_ms: f64,
    pub(super) to_ms: f64,
}

/// The modes that were used for a while.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Modes {
    pub(super) span: Span,
    pub(super) mode: String,
    pub(super) stronger: String,
    pub(super) why: String,
}

/// The moments of a handoff.
pub(super) struct Moments {
    /// The end of the picture; above zero.
    pub(super) end_ms: f64,
    /// For each round.
    pub(super) rounds: Vec<Span>,
    pub(super) pause: Option<Span>,
    /// Whether the report says when rounds began; those of older versions do not.
    pub(super) placed: bool,
    rates: Vec<(Span, f64)>,
}

impl Moments {
    pub(super) fn of(report: &Report) -> Self {
        let placed = report.rounds.iter().any(|round| round.began_ms > 0.0);
        let mut next = report.setup_ms;
        let mut rounds = Vec::with_capacity(report.rounds.len());
        for round in &report.rounds {
            let from_ms = if placed { round.began_ms } else { next };
            next = from_ms + round.duration_ms;
            rounds.push(Span { from_ms, to_ms: next });
        }
        let pause = pause(report);
        let known = rounds.iter().chain(&pause).map(|span| span.to_ms);
        // An empty report still has a picture.
        let end_ms =
            if report.total_ms > 0.0 { report.total_ms } else { known.fold(1.0, f64::max) };
        let rates = match report.samples.len() {
            0 | 1 => rates_of_rounds(report, &rounds),
            _ => rates_of_samples(report),
        };
        Self { end_ms, rounds, pause, placed, rates }
    }

    /// Bytes a second that the link took, piece by piece.
    pub(super) fn rates(&self) -> Vec<(Span, f64)> {
        self.rates.clone()
    }

    /// The modes that were decided on, each until the next decision.
    pub(super) fn modes(&self, adaptation: &Adaptation) -> Vec<Modes> {
        let ends = adaptation.decisions.iter().skip(1).map(|next| next.at_ms);
        let ends = ends.chain([self.end_ms]);
        let decided = adaptation.decisions.iter().zip(ends).map(|(decision, to_ms)| Modes {
            span: Span { from_ms: decision.at_ms, to_ms },
            mode: decision.mode.to_string(),
            stronger: decision.stronger.to_string(),
            why: decision.why.clone(),
        });
        decided.collect()
    }
}

fn pause(report: &Report) -> Option<Span> {
    let cutover = report.cutover.as_ref()?;
    let parts = [
        cutover.pause_ms,
        cutover.final_round_ms,
        cutover.state_ms,
        cutover.prepare_ms,
        cutover.commit_ms,
    ];
    let lasted: f64 = parts.into_iter().sum();
    let lasted = report.downtime.map_or(lasted, |downtime| downtime.upper_bound_ms);
    // Where the report does not say when: the pause was about the last that happened.
    let from_ms = match cutover.began_ms {
        0.0 => (report.total_ms - lasted).max(0.0),
        began => began,
    };
    Some(Span { from_ms, to_ms: from_ms + lasted })
}

fn rates_of_rounds(report: &Report, spans: &[Span]) -> Vec<(Span, f64)> {
    let rounds = report.rounds.iter().zip(spans);
    let rates = rounds.filter(|(round, _)| round.duration_ms > 0.0);
    rates.map(|(round, span)| (*span, round.bytes as f64 / round.duration_ms * 1e3)).collect()
}

fn rates_of_samples(report: &Report) -> Vec<(Span, f64)> {
    // What the transport was given is more jumpy than what it delivered.
    let measured = report.samples.iter().any(|sample| sample.delivered_bytes > 0);
    let points = report.samples.iter().map(|sample| {
        (sample.at_ms, if measured { sample.delivered_bytes } else { sample.sent_bytes })
    });
    let piece = SHORTEST_MS.max(report.total_ms / PIECES);
    let mut rates = Vec::new();
    let mut from: Option<(f64, u64)> = None;
    for (at_ms, bytes) in points {
        let Some((from_ms, before)) = from else {
            from = Some((at_ms, bytes));
            continue;
        };
        let took = at_ms - from_ms;
        if took >= piece * 0.95 {
            let rate = bytes.saturating_sub(before) as f64 / took * 1e3;
            rates.push((Span { from_ms, to_ms: at_ms }, rate));
            from = Some((at_ms, bytes));
        }
    }
    rates
}

#[cfg(test)]
mod tests {
    use handoff::report::{Cutover, Downtime, Round, Sample};

    use super::*;

    fn round(number: u32, began_ms: f64, duration_ms: f64, bytes: u64) -> Round {
        Round { number, began_ms, duration_ms, bytes, ..Round::default() }
    }

    #[test]
    fn rounds_of_older_reports_follow_one_another() {
        let rounds = vec![round(1, 0.0, 1000.0, 500), round(2, 0.0, 500.0, 0)];
        let report = Report { total_ms: 2000.0, setup_ms: 100.0, rounds, ..Report::default() };
        let moments = Moments::of(&report);
        let second = Span { from_ms: 1100.0, to_ms: 1600.0 };
        assert_eq!((moments.placed, moments.rounds[1]), (false, second));
        assert_eq!(moments.rates()[0], (Span { from_ms: 100.0, to_ms: 1100.0 }, 500.0));
    }

    #[test]
    fn rates_are_those_between_samples() {
        let sample =
            |at_ms, delivered_bytes| Sample { at_ms, delivered_bytes, ..Sample::default() };
        let samples = [(0.0, 0), (100.0, 0), (250.0, 250), (300.0, 900), (600.0, 800)];
        let samples = samples.map(|(at, bytes)| sample(at, bytes)).to_vec();
        let rounds = vec![round(1, 50.0, 500.0, 0)];
        let report = Report { total_ms: 600.0, samples, rounds, ..Report::default() };
        let moments = Moments::of(&report);
        assert!(moments.placed);
        let span = |from_ms, to_ms| Span { from_ms, to_ms };
        assert_eq!(
            moments.rates(),
            [(span(0.0, 250.0), 1000.0), (span(250.0, 600.0), 550.0 / 350.0 * 1e3)]
        );
    }

    #[test]
    fn the_pause_is_where_the_report_says_or_at_the_end() {
        let downtime = Some(Downtime { upper_bound_ms: 300.0, ..Downtime::default() });
        let cutover = Cutover { began_ms: 500.0, ..Cutover::default() };
        let report = Report { total_ms: 1000.0, downtime, ..Report::default() };
        assert_eq!(Moments::of(&report).pause, None);
        let said = Report { cutover: Some(cutover), ..report.clone() };
        assert_eq!(Moments::of(&said).pause, Some(Span { from_ms: 500.0, to_ms: 800.0 }));
        let older = Report { cutover: Some(Cutover::default()), ..report };
        assert_eq!(Moments::of(&older).pause, Some(Span { from_ms: 700.0, to_ms: 1000.0 }));
    }
}
