//! What has happened since the daemon started.

use std::collections::BTreeMap;

use howdah_api::{Event, Kind, Operation, State};
use serde_json::Value;

/// Upper bounds of a histogram's buckets, ascending.
pub type Bounds = &'static [f64];

/// Pauses of a guest: from what nobody notices to what breaks connections.
const DOWNTIME_S: Bounds = &[0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0, 30.0];
/// Whole handoffs: from a guest that idled on a LAN to one of gigabytes over a thin link.
const DURATION_S: Bounds = &[0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];
/// What the listener for peers may say; other words are not counted, so that a peer makes no series.
const RECEPTIONS: [&str; 4] = ["receiving", "received", "not-received", "dropped"];

/// How often something was how large.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    pub(crate) bounds: Bounds,
    /// For each bound those not above it and above the one before, and at last those above all.
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    fn new(bounds: Bounds) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn add(&mut self, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
            self.sum += value;
        }
    }
}

/// Counts what happens, from the daemon's events.
#[derive(Clone, Debug)]
pub struct Tally {
    pub(crate) ended: BTreeMap<(&'static str, &'static str), u64>,
    pub(crate) receptions: BTreeMap<&'static str, u64>,
    pub(crate) downtime: Histogram,
    pub(crate) duration: Histogram,
    pub(crate) handoff_bytes: u64,
    pub(crate) events_lost: u64,
    /// Ids of operations that were counted: a stream that is taken up again tells of them again.
    counted: std::collections::VecDeque<String>,
}

/// More ended operations than this are not told of twice: the daemon remembers fewer.
const MOST_COUNTED: usize = 4096;

impl Default for Tally {
    fn default() -> Self {
        let mut ended = BTreeMap::new();
        // Series are there from the start: a rate of what happens for the first time is then seen.
        for kind in KINDS {
            for state in [State::Done, State::Failed, State::Cancelled] {
                ended.insert((kind_name(kind), state.name()), 0);
            }
        }
        Self {
            ended,
            receptions: RECEPTIONS.into_iter().map(|what| (what, 0)).collect(),
            downtime: Histogram::new(DOWNTIME_S),
            duration: Histogram::new(DURATION_S),
            handoff_bytes: 0,
            events_lost: 0,
            counted: std::collections::VecDeque::new(),
        }
    }
}

pub(crate) const KINDS: [Kind; 6] = [
    Kind::Handoff,
    Kind::BaseVerify,
    Kind::BasePull,
    Kind::BasePush,
    Kind::BaseHeal,
    Kind::BaseImport,
];

/// The word for a kind, the same as in JSON.
pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Handoff => "handoff",
        Kind::BaseVerify => "base-verify",
        Kind::BasePull => "base-pull",
        Kind::BasePush => "base-push",
        Kind::BaseHeal => "base-heal",
        Kind::BaseImport => "base-import",
    }
}

impl Tally {
    /// Takes an event into account.
    pub fn see(&mut self, event: &Event) {
        match event {
            Event::Operation { operation } if operation.state.is_over() => self.ended(operation),
            Event::Receive { what } => {
                let word = what.get("event").and_then(Value::as_str).unwrap_or_default();
                if let Some(count) = self.receptions.get_mut(word) {
                    *count += 1;
                }
            }
            Event::Lost { events } => self.events_lost = self.events_lost.saturating_add(*events),
            _ => {}
        }
    }

    fn ended(&mut self, operation: &Operation) {
        if self.counted.contains(&operation.id) {
            return;
        }
        if self.counted.len() == MOST_COUNTED {
            self.counted.pop_front();
        }
        self.counted.push_back(operation.id.clone());
        *self.ended.entry((kind_name(operation.kind), operation.state.name())).or_default() += 1;
        if operation.kind != Kind::Handoff {
            return;
        }
        let Some(report) = &operation.result else { return };
        let number = |key: &str| report.get(key).and_then(Value::as_f64);
        self.handoff_bytes =
            self.handoff_bytes.saturating_add(number("bytes_on_link").unwrap_or(0.0) as u64);
        if operation.state == State::Done {
            number("downtime_ms").into_iter().for_each(|ms| self.downtime.add(ms / 1000.0));
            number("total_ms").into_iter().for_each(|ms| self.duration.add(ms / 1000.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    fn over(id: &str, state: State) -> Event {
        let operation = Operation { id: id.into(), state, ..samples::moved() };
        Event::Operation { operation: Box::new(operation) }
    }

    #[test]
    fn what_ended_is_counted_once() {
        let mut tally = Tally::default();
        for event in [
            over("1", State::Done),
            over("1", State::Done),
            over("2", State::Failed),
            over("3", State::Running),
        ] {
            tally.see(&event);
        }
        assert_eq!(tally.ended[&("handoff", "done")], 1);
        assert_eq!(tally.ended[&("handoff", "failed")], 1);
        assert_eq!(tally.ended[&("base-pull", "done")], 0);
        assert_eq!(tally.handoff_bytes, 2 * samples::BYTES_ON_LINK);
        // 120.4 ms fall between 0.1 and 0.2.
        assert_eq!((tally.downtime.counts[3], tally.downtime.counts.iter().sum::<u64>()), (1, 1));
    }

    #[test]
    fn a_peer_makes_no_series() {
        let mut tally = Tally::default();
        for what in ["received", "received", "a word of its own"] {
            tally.see(&Event::Receive { what: serde_json::json!({ "event": what }) });
        }
        assert_eq!(tally.receptions["received"], 2);
        assert_eq!(tally.receptions.len(), RECEPTIONS.len());
    }

    #[test]
    fn odd_numbers_count_nowhere() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0, f64::NAN, -1.0].into_iter().for_each(|value| histogram.add(value));
        assert_eq!((histogram.counts, histogram.sum), (vec![2, 1, 1], 12.0));
    }
}
