//! What a handoff did to those who used the guest.

use serde::{Deserialize, Serialize};

use crate::{
    client::Application,
    record::{Exchange, Fate},
};

/// A whole run of a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The application.
    pub application: Application,
    /// How long the client asked, in seconds.
    pub duration_s: f64,
    /// Requests that were due while too many were outstanding, or while there was no connection.
    pub skipped: u64,
    /// Connections after the first.
    pub reconnects: u32,
    /// Median time to an answer.
    pub p50_ms: Option<f64>,
    /// 99 % of answers came within.
    pub p99_ms: Option<f64>,
    /// The slowest answer.
    pub max_ms: Option<f64>,
    /// The longest time between two answers.
    pub longest_gap_ms: Option<f64>,
    /// What became of the requests.
    #[serde(flatten)]
    pub counts: Counts,
}

/// How many requests met which fate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// All of them.
    pub sent: u64,
    /// Answered.
    pub answered: u64,
    /// Answered with a failure, or with what nobody can read.
    pub failed: u64,
    /// Never answered.
    pub lost: u64,
    /// Answered, and not as the client's knowledge of its request calls for.
    pub wrong: u64,
}

impl Counts {
    /// Counts.
    pub fn of(exchanges: &[Exchange]) -> Self {
        let count = |fate| exchanges.iter().filter(|one| one.fate == fate).count() as u64;
        Self {
            sent: exchanges.len() as u64,
            answered: count(Fate::Answered),
            failed: count(Fate::Failed),
            lost: count(Fate::Lost),
            wrong: exchanges.iter().filter(|one| one.right == Some(false)).count() as u64,
        }
    }
}

/// A client's requests around a handoff: `requests` of a paper run (`docs/formats.md`).
///
/// A request counts as *during* the handoff if any of the time until its answer was, as *before*
/// if it was answered by then, as *after* if it was sent later.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// What became of all requests of the run.
    #[serde(flatten)]
    pub counts: Counts,
    /// Connections after the first.
    pub reconnects: u32,
    /// Median latency before.
    pub before_p50_ms: Option<f64>,
    /// 99th percentile before.
    pub before_p99_ms: Option<f64>,
    /// Median latency during the handoff.
    pub during_p50_ms: Option<f64>,
    /// 99th percentile during the handoff.
    pub during_p99_ms: Option<f64>,
    /// Median latency after.
    pub after_p50_ms: Option<f64>,
    /// 99th percentile after.
    pub after_p99_ms: Option<f64>,
    /// The longest time between two answers, of those that touch the handoff.
    pub longest_gap_ms: Option<f64>,
}

impl Requests {
    /// Sums up around a stretch of CLOCK_MONOTONIC.
    pub fn around(exchanges: &[Exchange], reconnects: u32, from_ns: i64, to_ns: i64) -> Self {
        let (mut before, mut during, mut after) = (Vec::new(), Vec::new(), Vec::new());
        for one in exchanges {
            let (Some(answered), Some(latency)) = (one.answered_monotonic_ns, one.latency_ms())
            else {
                continue;
            };
            if answered < from_ns {
                before.push(latency);
            } else if one.sent_monotonic_ns > to_ns {
                after.push(latency);
            } else {
                during.push(latency);
            }
        }
        Self {
            counts: Counts::of(exchanges),
            reconnects,
            before_p50_ms: percentile(&mut before, 50),
            before_p99_ms: percentile(&mut before, 99),
            during_p50_ms: percentile(&mut during, 50),
            during_p99_ms: percentile(&mut during, 99),
            after_p50_ms: percentile(&mut after, 50),
            after_p99_ms: percentile(&mut after, 99),
            longest_gap_ms: longest_gap_ms(exchanges, from_ns, to_ns),
        }
    }
}

/// The value that so many per cent of the values do not exceed (nearest rank).
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.max(1) - 1).copied()
}

/// The longest time between two answers that touches a stretch of time.
pub(crate) fn longest_gap_ms(exchanges: &[Exchange], from_ns: i64, to_ns: i64) -> Option<f64> {
    let mut answered: Vec<i64> =
        exchanges.iter().filter_map(|one| one.answered_monotonic_ns).collect();
    answered.sort_unstable();
    let gaps = answered.windows(2).filter_map(|pair| match pair {
        [before, after] if *after >= from_ns && *before <= to_ns => Some(after - before),
        _ => None,
    });
    gaps.max().map(|gap| gap as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(sent_ms: i64, latency_ms: Option<i64>) -> Exchange {
        Exchange {
            seq: 0,
            connection: 1,
            sent_monotonic_ns: sent_ms * 1_000_000,
            answered_monotonic_ns: latency_ms.map(|latency| (sent_ms + latency) * 1_000_000),
            fate: if latency_ms.is_some() { Fate::Answered } else { Fate::Lost },
            request_bytes: 1,
            answer_bytes: 1,
            right: (sent_ms == 300).then_some(false),
            mark: None,
            problem: None,
        }
    }

    #[test]
    fn requests_belong_to_the_time_that_they_touch() {
        let all = [
            exchange(0, Some(10)),
            exchange(100, Some(20)),
            // Under way when the handoff begins, and when it ends.
            exchange(190, Some(30)),
            exchange(300, Some(400)),
            exchange(350, None),
            exchange(801, Some(5)),
        ];
        let requests = Requests::around(&all, 0, 200_000_000, 600_000_000);
        let Counts { sent, answered, failed, lost, wrong } = requests.counts;
        assert_eq!((sent, answered, failed, lost, wrong), (6, 5, 0, 1, 1));
        assert_eq!((requests.before_p50_ms, requests.before_p99_ms), (Some(10.0), Some(20.0)));
        assert_eq!((requests.during_p50_ms, requests.during_p99_ms), (Some(30.0), Some(400.0)));
        assert_eq!(requests.after_p50_ms, Some(5.0));
        // From the answer at 220 to that at 700.
        assert_eq!(requests.longest_gap_ms, Some(480.0));
    }

    #[test]
    fn nothing_has_no_percentile() {
        assert_eq!(percentile(&mut [], 50), None);
        assert_eq!(percentile(&mut [3.0], 99), Some(3.0));
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&mut values, 50), Some(100.0));
        assert_eq!(percentile(&mut values, 99), Some(198.0));
        assert_eq!(Requests::around(&[], 0, 0, 1), Requests::default());
    }
}
