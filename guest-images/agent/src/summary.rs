//! What a client's exchanges say about the guest, taken together.

use serde::{Deserialize, Serialize};

use crate::client::Exchange;
use crate::vitals::Snapshot;

/// Gaps at least this long are listed one by one.
const LISTED_GAP_NS: i64 = 100_000_000;
const MAX_LISTED_GAPS: usize = 64;
/// Answers slower than this say too little about the guest's clock to estimate its offset.
const MAX_RTT_FOR_OFFSET_NS: i64 = 100_000_000;

/// Collects exchanges as they come in.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) asked: u64,
    pub(crate) send_errors: u64,
    pub(crate) malformed: u64,
    pub(crate) duplicates: u64,
    pub(crate) too_late: u64,
    answered: u64,
    reordered: u64,
    first: Option<Snapshot>,
    /// The newest answer, by the number of its probe.
    newest: Option<(u64, Snapshot)>,
    last_received_ns: Option<i64>,
    longest_gap_ns: i64,
    gaps: Vec<Gap>,
    longest_rtt_ns: i64,
    steps_back: u64,
    boot_id_changed: bool,
    nonce_changed: bool,
    clock: ClockOffset,
}

/// A time without answers, by the client's CLOCK_MONOTONIC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Gap {
    pub(crate) start_monotonic_ns: i64,
    pub(crate) ms: f64,
}

/// How far the guest's CLOCK_REALTIME is from the client's.
#[derive(Debug, Default)]
struct ClockOffset {
    first_ns: Option<i64>,
    last_ns: i64,
    min_ns: i64,
    max_ns: i64,
    /// By how much, at worst, the guest's time lay outside question and answer: no estimate,
    /// but an error that network delay cannot explain.
    certain_ns: i64,
}

impl ClockOffset {
    fn take(&mut self, exchange: &Exchange) {
        let guest_ns = exchange.answer.vitals.realtime_ns;
        let sent_ns = exchange.sent_realtime_ns;
        let received_ns = sent_ns.saturating_add(exchange.rtt_ns);
        let outside = sent_ns.saturating_sub(guest_ns).max(guest_ns.saturating_sub(received_ns));
        self.certain_ns = self.certain_ns.max(outside);
        if exchange.rtt_ns > MAX_RTT_FOR_OFFSET_NS {
            return;
        }
        let offset = guest_ns.saturating_sub(sent_ns.saturating_add(exchange.rtt_ns / 2));
        let first = *self.first_ns.get_or_insert(offset);
        self.last_ns = offset;
        self.min_ns = self.min_ns.min(offset.min(first));
        self.max_ns = self.max_ns.max(offset.max(first));
    }
}

/// The summary as it is printed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) asked: u64,
    pub(crate) answered: u64,
    pub(crate) send_errors: u64,
    pub(crate) malformed: u64,
    /// Second answers to one probe: two guests may be answering.
    pub(crate) duplicates: u64,
    pub(crate) too_late: u64,
    pub(crate) reordered: u64,
    /// The longest time without an answer, the start and the end of the watch included.
    pub(crate) longest_gap_ms: f64,
    pub(crate) gaps: Vec<Gap>,
    pub(crate) longest_rtt_ms: f64,
    /// Boot id and nonce never changed, and somebody answered.
    pub(crate) same_guest: bool,
    pub(crate) boot_id_constant: bool,
    pub(crate) nonce_constant: bool,
    /// Counter, durable record and guest clocks never went back from one answer to the next.
    pub(crate) counter_monotonic: bool,
    /// Estimates from answers within 100 ms, relative to the client's CLOCK_REALTIME.
    pub(crate) first_offset_ms: f64,
    pub(crate) last_offset_ms: f64,
    pub(crate) worst_offset_ms: f64,
    /// The part of the worst offset that network delay cannot explain.
    pub(crate) certain_offset_ms: f64,
    /// The newest answer.
    pub(crate) last: Option<Snapshot>,
}

impl Summary {
    /// Takes an exchange in, in the order of arrival.
    pub(crate) fn take(&mut self, exchange: &Exchange) {
        let now = &exchange.answer.vitals;
        self.answered += 1;
        self.longest_rtt_ns = self.longest_rtt_ns.max(exchange.rtt_ns);
        let received_ns = exchange.received_monotonic_ns();
        if let Some(last_ns) = self.last_received_ns.replace(received_ns) {
            self.gap(last_ns, received_ns);
        }
        self.clock.take(exchange);

        let first = self.first.get_or_insert_with(|| now.clone());
        self.boot_id_changed |= first.boot_id != now.boot_id;
        self.nonce_changed |= first.nonce != now.nonce;
        match &self.newest {
            // An answer overtaken on the way says nothing about what went back.
            Some((seq, _)) if *seq > exchange.seq => self.reordered += 1,
            newest => {
                let back = newest.as_ref().is_some_and(|(_, before)| steps_back(before, now));
                self.steps_back += u64::from(back);
                self.newest = Some((exchange.seq, now.clone()));
            }
        }
    }

    fn gap(&mut self, start_ns: i64, end_ns: i64) {
        let ns = end_ns.saturating_sub(start_ns);
        self.longest_gap_ns = self.longest_gap_ns.max(ns);
        if ns >= LISTED_GAP_NS && self.gaps.len() < MAX_LISTED_GAPS {
            self.gaps.push(Gap { start_monotonic_ns: start_ns, ms: ms(ns) });
        }
    }

    /// Closes the watch, which lasted from `started_ns` to `ended_ns`.
    pub(crate) fn report(&mut self, started_ns: i64, ended_ns: i64) -> Report {
        // Silence at the end is a gap too; with no answer at all it is the whole watch.
        self.gap(self.last_received_ns.unwrap_or(started_ns), ended_ns);
        let last = self.newest.as_ref().map(|(_, snapshot)| snapshot.clone());
        Report {
            asked: self.asked,
            answered: self.answered,
            send_errors: self.send_errors,
            malformed: self.malformed,
            duplicates: self.duplicates,
            too_late: self.too_late,
            reordered: self.reordered,
            longest_gap_ms: ms(self.longest_gap_ns),
            gaps: self.gaps.clone(),
            longest_rtt_ms: ms(self.longest_rtt_ns),
            same_guest: self.answered > 0 && !self.boot_id_changed && !self.nonce_changed,
            boot_id_constant: !self.boot_id_changed,
            nonce_constant: !self.nonce_changed,
            counter_monotonic: self.steps_back == 0,
            first_offset_ms: ms(self.clock.first_ns.unwrap_or(0)),
            last_offset_ms: ms(self.clock.last_ns),
            worst_offset_ms: ms(self.clock.max_ns.max(self.clock.min_ns.saturating_neg())),
            certain_offset_ms: ms(self.clock.certain_ns),
            last,
        }
    }
}

fn steps_back(before: &Snapshot, now: &Snapshot) -> bool {
    now.counter < before.counter
        || now.durable_seq < before.durable_seq
        || now.realtime_ns < before.realtime_ns
        || now.monotonic_ns < before.monotonic_ns
}

fn ms(ns: i64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Answer;
    use crate::vitals::{Identity, Vitals};

    const MS: i64 = 1_000_000;

    /// An exchange asked at `sent_ms` and answered `rtt_ms` later by a guest in step.
    fn exchange(seq: u64, sent_ms: i64, rtt_ms: i64) -> Exchange {
        let identity = Identity { boot_id: "boot".into(), nonce: [1; 16] };
        let mut vitals = Vitals::new(identity).snapshot();
        vitals.counter = seq;
        vitals.realtime_ns = (sent_ms + rtt_ms / 2) * MS;
        vitals.monotonic_ns = vitals.realtime_ns;
        Exchange {
            seq,
            sent_monotonic_ns: sent_ms * MS,
            sent_realtime_ns: sent_ms * MS,
            rtt_ns: rtt_ms * MS,
            answer: Answer { token: String::new(), vitals },
        }
    }

    fn report(exchanges: &[Exchange]) -> Report {
        let mut summary = Summary::default();
        exchanges.iter().for_each(|e| summary.take(e));
        summary.report(0, 1000 * MS)
    }

    #[test]
    fn the_longest_gap_counts_silence_at_the_end() {
        let report = report(&[exchange(0, 0, 2), exchange(1, 400, 2), exchange(2, 480, 2)]);
        assert_eq!(report.longest_gap_ms, 518.0);
        assert_eq!(report.gaps.len(), 2);
        assert!(report.same_guest && report.counter_monotonic);
    }

    #[test]
    fn nobody_there_is_one_long_gap() {
        let report = report(&[]);
        assert_eq!((report.longest_gap_ms, report.same_guest), (1000.0, false));
    }

    #[test]
    fn another_guest_is_noticed_even_if_the_first_comes_back() {
        let mut other = exchange(1, 10, 2);
        other.answer.vitals.nonce = "ff".into();
        let report = report(&[exchange(0, 0, 2), other, exchange(2, 20, 2)]);
        assert!(!report.same_guest && !report.nonce_constant && report.boot_id_constant);
    }

    #[test]
    fn anything_that_goes_back_is_noticed_but_not_an_overtaken_answer() {
        let steps: [fn(&mut Snapshot); 3] =
            [|s| s.counter = 0, |s| s.realtime_ns = 0, |s| s.monotonic_ns = 0];
        for step in steps {
            let mut back = exchange(2, 20, 2);
            step(&mut back.answer.vitals);
            assert!(!report(&[exchange(1, 10, 2), back]).counter_monotonic);
        }
        let overtaken = report(&[exchange(1, 10, 2), exchange(0, 5, 9)]);
        assert!(overtaken.counter_monotonic);
        assert_eq!(overtaken.reordered, 1);
    }

    #[test]
    fn clock_offsets_are_estimated_and_bounded() {
        let mut late = exchange(1, 10, 4);
        late.answer.vitals.realtime_ns -= 30 * MS;
        let report = report(&[exchange(0, 0, 4), late]);
        assert_eq!((report.first_offset_ms, report.worst_offset_ms), (0.0, 30.0));
        assert_eq!(report.certain_offset_ms, 28.0);
    }

    #[test]
    fn a_slow_answer_does_not_blur_the_offset() {
        let mut slow = exchange(1, 10, 2000);
        slow.answer.vitals.realtime_ns += 900 * MS;
        let report = report(&[exchange(0, 0, 4), slow]);
        assert_eq!((report.worst_offset_ms, report.certain_offset_ms), (0.0, 0.0));
    }
}
