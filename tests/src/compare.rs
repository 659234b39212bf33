//! Holds the figures of a run against bounds and against each other, once all of them are there.

use serde::{Deserialize, Serialize};

use crate::{
    results::{Leg, Outcome},
    scenario::{Expect, Figure, FigureLimit, LegLimits, Ratio, Scenario},
};

/// One figure and what it was held against.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Comparison {
    /// The figure, `leg N FIGURE` where it is one of a handoff.
    pub(crate) figure: String,
    /// Its value.
    pub(crate) value: Option<f64>,
    /// The other figure, if it was compared with one.
    pub(crate) to: Option<String>,
    /// Its value.
    pub(crate) to_value: Option<f64>,
    /// `value` divided by `to_value`.
    pub(crate) ratio: Option<f64>,
    /// The most that the ratio, or without one the value, may be; absent where it is only stated.
    pub(crate) at_most: Option<f64>,
    /// Whether the figure, a rate, must not be less than the other one beyond noise.
    pub(crate) no_slower: bool,
    /// Least and most of what was measured, of both figures.
    pub(crate) ranges: Option<[[f64; 2]; 2]>,
    /// Whether it holds; true where nothing had to.
    pub(crate) holds: bool,
}

impl Comparison {
    /// Whether anything had to hold.
    pub(crate) fn is_bound(&self) -> bool {
        self.at_most.is_some() || self.no_slower
    }

    /// In words.
    pub(crate) fn detail(&self) -> String {
        let word = |value: Option<f64>| value.map_or("unknown".to_owned(), short);
        let mut text = word(self.value);
        if let Some(to) = &self.to {
            text += &format!(", {} times the {} of {to}", word(self.ratio), word(self.to_value));
        }
        if let Some([[least, most], [to_least, to_most]]) = self.ranges {
            let [a, b, c, d] = [least, most, to_least, to_most].map(short);
            text += &format!("; measured {a} to {b} and {c} to {d}");
        }
        match (self.at_most, self.no_slower) {
            (Some(most), _) => text += &format!("; {} allowed", short(most)),
            (None, true) => text += "; the best must reach the other's worst",
            (None, false) => {}
        }
        text
    }
}

fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Compares the figures of every scenario that came to its end, and notes each bound as a check.
/// The second list holds the scenarios' outcomes, in the same order.
pub(crate) fn compare(scenarios: &[&Scenario], outcomes: &mut [Outcome]) {
    let all = outcomes.to_vec();
    for (scenario, outcome) in scenarios.iter().zip(outcomes) {
        if outcome.error.is_some() {
            continue;
        }
        let legs = scenario.leg_limits().enumerate();
        let mut compared: Vec<Comparison> =
            legs.flat_map(|(at, limits)| of_leg(outcome, at, limits, &all)).collect();
        for limit in &scenario.limits.figures {
            if limit.at_most.is_some() || limit.to.is_some() {
                compared.push(of_figure(outcome, limit, &all));
            }
            compared.extend(limit.grows_at_most.map(|most| growth(outcome, &limit.figure, most)));
        }
        for comparison in compared.iter().filter(|comparison| comparison.is_bound()) {
            let name = comparison.figure.replace([' ', '_', '.'], "-");
            let name = match &comparison.to {
                Some(to) => format!("{name}-to-{}", to.replace([' ', '_', '.'], "-")),
                None => name,
            };
            outcome.check(&name, comparison.holds, comparison.detail());
        }
        outcome.compared = compared;
        outcome.conclude();
    }
}

fn of_leg(outcome: &Outcome, at: usize, limits: &LegLimits, all: &[Outcome]) -> Vec<Comparison> {
    let leg = outcome.legs.get(at);
    let bounds = [
        (Figure::TotalMs, limits.total_ms),
        (Figure::DowntimeMs, limits.downtime_ms),
        (Figure::Bytes, limits.bytes.map(|bytes| bytes as f64)),
    ];
    let bounds = bounds.into_iter().filter(|(_, most)| most.is_some());
    let mut compared: Vec<Comparison> = bounds
        .map(|(figure, most)| {
            let value = leg.and_then(|leg| of(leg, figure));
            bound(leg_figure(at, figure.name()), value, most)
        })
        .collect();
    for ratio in &limits.ratios {
        let (to_value, compares) = of_ratio(outcome, at, ratio, all);
        if let Some(more) = ratio.max_more {
            let most = to_value.map_or(f64::NAN, |other| other + more);
            compared.push(bound(compares.figure.clone(), compares.value, Some(most)));
        }
        compared.push(compares);
    }
    if let Some(most) = limits.encoder_ratio {
        let encoded = leg.and_then(|leg| leg.encoded.as_ref()).map(|made| made.bytes as f64);
        let value = leg.and_then(|leg| of(leg, Figure::Bytes));
        let name = leg_figure(at, Figure::Bytes.name());
        compared.push(quotient(name, value, "offline encoder".into(), encoded, Some(most)));
    }
    compared
}

fn of_ratio(
    outcome: &Outcome,
    at: usize,
    ratio: &Ratio,
    all: &[Outcome],
) -> (Option<f64>, Comparison) {
    let value = outcome.legs.get(at).and_then(|leg| of(leg, ratio.of));
    let name = ratio.scenario.as_ref().unwrap_or(&outcome.name);
    let other = all.iter().find(|other| other.name == *name);
    let to_value =
        other.and_then(|other| other.legs.get(ratio.leg - 1)).and_then(|leg| of(leg, ratio.of));
    let to = match &ratio.scenario {
        Some(scenario) => format!("{scenario} leg {}", ratio.leg),
        None => format!("leg {}", ratio.leg),
    };
    (to_value, quotient(leg_figure(at, ratio.of.name()), value, to, to_value, ratio.max))
}

/// Whether what was measured again and again stays as large as it was once it was warm.
fn growth(outcome: &Outcome, figure: &str, most: f64) -> Comparison {
    let values = outcome.figures.get(figure).map_or(&[][..], Vec::as_slice);
    let quarter = values.len() / 4;
    let second = values.get(quarter..2 * quarter).and_then(median);
    let last = values.get(values.len() - quarter..).and_then(median);
    let name = format!("{figure} at the end");
    quotient(name, last, format!("{figure} when warm"), second, Some(most))
}

fn of_figure(outcome: &Outcome, limit: &FigureLimit, all: &[Outcome]) -> Comparison {
    let values = outcome.figures.get(&limit.figure).map_or(&[][..], Vec::as_slice);
    let name = limit.figure.clone();
    let Some(to) = &limit.to else { return bound(name, median(values), limit.at_most) };
    let scenario = limit.scenario.as_ref().unwrap_or(&outcome.name);
    let other = all.iter().find(|other| other.name == *scenario);
    let others = other.and_then(|other| other.figures.get(to)).map_or(&[][..], Vec::as_slice);
    let to = match &limit.scenario {
        Some(scenario) => format!("{scenario} {to}"),
        None => to.clone(),
    };
    let mut compared = quotient(name, median(values), to, median(others), limit.at_most);
    compared.ranges = range(values).zip(range(others)).map(|(a, b)| [a, b]);
    compared.no_slower = limit.no_slower;
    if limit.no_slower {
        compared.holds &= compared.ranges.is_some_and(|[own, other]| own[1] >= other[0]);
    }
    compared
}

fn bound(figure: String, value: Option<f64>, at_most: Option<f64>) -> Comparison {
    Comparison {
        figure,
        value,
        to: None,
        to_value: None,
        ratio: None,
        at_most,
        no_slower: false,
        ranges: None,
        holds: at_most.is_none_or(|most| value.is_some_and(|value| value <= most)),
    }
}

fn quotient(
    figure: String,
    value: Option<f64>,
    to: String,
    to_value: Option<f64>,
    at_most: Option<f64>,
) -> Comparison {
    let ratio = value.zip(to_value).and_then(|(value, to)| (to > 0.0).then(|| value / to));
    let holds = at_most.is_none_or(|most| ratio.is_some_and(|ratio| ratio <= most));
    let to = Some(to);
    Comparison { to, to_value, ratio, holds, ..bound(figure, value, at_most) }
}

fn leg_figure(at: usize, name: &str) -> String {
    format!("leg {} {name}", at + 1)
}

fn of(leg: &Leg, figure: Figure) -> Option<f64> {
    // What a handoff cost that failed is no measure of one that did not.
    if leg.ended != Expect::Moved {
        return None;
    }
    match figure {
        Figure::TotalMs => leg.total_ms,
        Figure::DowntimeMs => leg.downtime_ms,
        Figure::Bytes => leg.bytes_on_link.map(|bytes| bytes as f64),
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

fn range(values: &[f64]) -> Option<[f64; 2]> {
    let least = values.iter().copied().min_by(f64::total_cmp)?;
    let most = values.iter().copied().max_by(f64::total_cmp)?;
    Some([least, most])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{encode::Encoded, scenario::Side};
    use serde_json::Value;

    fn leg(total_ms: f64, bytes: u64, ended: Expect) -> Leg {
        Leg {
            from: Side::A,
            to: Side::B,
            audit: false,
            ended,
            total_ms: Some(total_ms),
            downtime_ms: Some(5.0),
            bytes_on_link: Some(bytes),
            rounds: None,
            link_counter_bytes: bytes,
            client_gap_ms: None,
            requests: None,
            hashes: (None, None),
            encoded: None,
            window_ns: (0, 0),
            report: Value::Null,
        }
    }

    fn outcome(name: &str, legs: Vec<Leg>) -> Outcome {
        let mut outcome = Outcome { name: name.into(), legs, ..Outcome::default() };
        outcome.check("one-owner", true, "");
        outcome
    }

    fn scenario(name: &str, steps: &str, limits: &str) -> Scenario {
        let text = format!(
            "name = '{name}'\ndescription = 'd'\nends_on = 'a'\n\
             steps = [{{ do = 'start' }}, {steps}]\n[vm]\nbase_memory = true\n[limits]\n{limits}\n"
        );
        Scenario::parse(&text).unwrap()
    }

    fn there(limits: &str) -> String {
        format!(
            "{{ do = 'handoff', from = 'a', to = 'b', encode = true, limits = {{ {limits} }} }}"
        )
    }

    fn failed(outcome: &Outcome) -> Vec<&str> {
        let failed = outcome.checks.iter().filter(|check| !check.passed);
        failed.map(|check| check.name.as_str()).collect()
    }

    #[test]
    fn bounds_of_a_handoff_become_checks() {
        let loose = scenario("a", &there("total_ms = 3000, bytes = 2_000_000"), "");
        let tight = scenario("b", &there("total_ms = 2999.9, downtime_ms = 5, bytes = 99"), "");
        let one = || vec![leg(3000.0, 100, Expect::Moved)];
        let mut outcomes = [outcome("a", one()), outcome("b", one())];
        compare(&[&loose, &tight], &mut outcomes);
        assert!(outcomes[0].passed && !outcomes[1].passed);
        assert_eq!(failed(&outcomes[1]), ["leg-1-total-ms", "leg-1-bytes"]);
        assert_eq!(outcomes[1].compared.len(), 3);
    }

    #[test]
    fn ratios_reach_over_legs_and_scenarios() {
        let back = there("ratios = [{ of = 'bytes', max = 0.25 }]");
        let both = format!("{}, {}", there(""), back.replace("'a', to = 'b'", "'b', to = 'a'"));
        let far = there("ratios = [{ of = 'total_ms', scenario = 'a', max = 1.3 }]");
        let scenarios = [scenario("a", &both, ""), scenario("b", &far, "")];
        let refs: Vec<&Scenario> = scenarios.iter().collect();
        let moved = |total, bytes| leg(total, bytes, Expect::Moved);
        let mut good = [
            outcome("a", vec![moved(100.0, 400), moved(50.0, 100)]),
            outcome("b", vec![moved(130.0, 0)]),
        ];
        compare(&refs, &mut good);
        assert!(good.iter().all(|outcome| outcome.passed), "{:?}", good[0].checks);
        assert_eq!(good[0].compared[0].ratio, Some(0.25));
        let mut bad = [
            outcome("a", vec![moved(100.0, 400), moved(50.0, 101)]),
            outcome("b", vec![moved(131.0, 0)]),
        ];
        compare(&refs, &mut bad);
        assert_eq!(failed(&bad[0]), ["leg-2-bytes-to-leg-1"]);
        assert_eq!(failed(&bad[1]), ["leg-1-total-ms-to-a-leg-1"]);
    }

    #[test]
    fn what_is_not_there_does_not_hold() {
        let limits = "ratios = [{ of = 'bytes', scenario = 'gone', max = 9 }], encoder_ratio = 2";
        let one = scenario("a", &there(limits), "figures = [{ figure = 'x.y', at_most = 9 }]");
        let mut outcomes = [outcome("a", vec![leg(1.0, 1, Expect::Moved)])];
        compare(&[&one], &mut outcomes);
        assert_eq!(failed(&outcomes[0]).len(), 3);
        let kept = scenario("a", &there("total_ms = 9"), "");
        let mut outcomes = [outcome("a", vec![leg(1.0, 1, Expect::Kept)])];
        compare(&[&kept], &mut outcomes);
        assert_eq!(failed(&outcomes[0]), ["leg-1-total-ms"]);
    }

    #[test]
    fn the_offline_encoder_is_a_yardstick() {
        let one = scenario("a", &there("encoder_ratio = 1.1"), "");
        for (bytes, holds) in [(1100, true), (1101, false)] {
            let mut moved = leg(1.0, bytes, Expect::Moved);
            moved.encoded = Some(Encoded { bytes: 1000, ..Encoded::default() });
            let mut outcomes = [outcome("a", vec![moved])];
            compare(&[&one], &mut outcomes);
            assert_eq!(outcomes[0].passed, holds, "{bytes}");
        }
    }

    #[test]
    fn growth_is_seen_from_the_second_quarter_on() {
        let limits = "figures = [{ figure = 'size.kib', grows_at_most = 1.1 }]";
        let one = scenario("a", "", limits);
        for (values, holds) in [
            (vec![1.0, 2.0, 100.0, 100.0, 103.0, 105.0, 108.0, 109.0], true),
            (vec![1.0, 2.0, 100.0, 100.0, 103.0, 105.0, 112.0, 112.0], false),
            (vec![100.0, 100.0], false),
        ] {
            let mut measured = outcome("a", vec![]);
            measured.figures.insert("size.kib".into(), values.clone());
            let mut outcomes = [measured];
            compare(&[&one], &mut outcomes);
            assert_eq!(outcomes[0].passed, holds, "{values:?}");
        }
    }

    #[test]
    fn a_difference_is_held_against_a_bound() {
        let limits = "ratios = [{ of = 'total_ms', scenario = 'b', max_more = 30 }]";
        let one = scenario("a", &there(limits), "");
        let other = scenario("b", &there(""), "");
        for (total, holds) in [(130.0, true), (131.0, false)] {
            let mut outcomes = [
                outcome("a", vec![leg(total, 1, Expect::Moved)]),
                outcome("b", vec![leg(100.0, 1, Expect::Moved)]),
            ];
            compare(&[&one, &other], &mut outcomes);
            assert_eq!(outcomes[0].passed, holds, "{total}");
        }
    }

    #[test]
    fn noise_is_the_range_of_what_was_measured() {
        let limits = "figures = [{ figure = 'before.w', to = 'plain.w', scenario = 'p', \
                      no_slower = true }, { figure = 'during.w', to = 'before.w' }]";
        let one = scenario("a", "", limits);
        let plain = scenario("p", "", "");
        for (before, holds) in [
            ([90.0, 101.0, 95.0], true),
            ([90.0, 91.0, 92.0], false),
            ([190.0, 191.0, 192.0], true),
        ] {
            let mut measured = outcome("a", vec![]);
            measured.figures.insert("before.w".into(), before.to_vec());
            measured.figures.insert("during.w".into(), vec![45.0]);
            let mut other = outcome("p", vec![]);
            other.figures.insert("plain.w".into(), vec![100.0, 110.0]);
            let mut outcomes = [measured, other];
            compare(&[&one, &plain], &mut outcomes);
            assert_eq!(outcomes[0].passed, holds, "{:?}", outcomes[0].checks);
            let [like, stated] = &outcomes[0].compared[..] else { panic!("two comparisons") };
            assert_eq!(like.to_value, Some(105.0));
            assert!(stated.holds && stated.at_most.is_none() && stated.ratio.is_some());
        }
    }
}
