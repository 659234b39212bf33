//! The times in which there was no link: they say nothing of how fast the link is, and a guest that is
//! paused does not wait through them for long.

use std::time::Duration;

use crate::report::{Outage, millis};

/// So many are listed; more are only counted in the total.
const MOST_LISTED: usize = 64;

/// The outages of one handoff.
#[derive(Debug, Default)]
pub(super) struct Outages {
    /// Since when there is no link, and why.
    present: Option<(Duration, String)>,
    over: Vec<Outage>,
    /// Of those that are over.
    total: Duration,
}

impl Outages {
    /// The link is gone, or one that was made meanwhile was gone before it was of use.
    pub(super) fn lost(&mut self, now: Duration, why: String) {
        self.present.get_or_insert((now, why));
    }

    /// There is a link again.
    pub(super) fn back(&mut self, now: Duration, started: Duration) {
        if let Some((since, why)) = self.present.take() {
            self.total += now.saturating_sub(since);
            if self.over.len() < MOST_LISTED {
                self.over.push(outage(since, now, started, why));
            }
        }
    }

    /// Since when there is no link.
    pub(super) fn since(&self) -> Option<Duration> {
        self.present.as_ref().map(|(since, _)| *since)
    }

    /// Why there is none.
    pub(super) fn why(&self) -> Option<&str> {
        self.present.as_ref().map(|(_, why)| why.as_str())
    }

    /// For how long in all there was none.
    pub(super) fn total(&self, now: Duration) -> Duration {
        self.total + self.since().map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// All of them, one that lasts as if it were over now.
    pub(super) fn listed(&self, now: Duration, started: Duration) -> Vec<Outage> {
        let present = self.present.clone();
        let present = present.map(|(since, why)| outage(since, now, started, why));
        self.over.iter().cloned().chain(present).take(MOST_LISTED).collect()
    }
}

fn outage(since: Duration, until: Duration, started: Duration, reason: String) -> Outage {
    Outage {
        began_ms: millis(since.saturating_sub(started)),
        lasted_ms: millis(until.saturating_sub(since)),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_outage_lasts_until_a_link_is_of_use() {
        let mut outages = Outages::default();
        outages.back(s(5), s(1));
        assert_eq!((outages.since(), outages.total(s(9))), (None, s(0)));
        outages.lost(s(10), "cut".into());
        outages.lost(s(12), "again".into());
        assert_eq!((outages.since(), outages.why()), (Some(s(10)), Some("cut")));
        assert_eq!(outages.total(s(13)), s(3));
        outages.back(s(20), s(1));
        outages.lost(s(30), "silent".into());
        assert_eq!(outages.total(s(31)), s(11));
        let listed = outages.listed(s(31), s(1));
        let times: Vec<_> = listed.iter().map(|o| (o.began_ms, o.lasted_ms)).collect();
        assert_eq!(times, [(9000.0, 10_000.0), (29_000.0, 1000.0)]);
    }

    #[test]
    fn a_link_that_breaks_all_the_time_does_not_fill_memory() {
        let mut outages = Outages::default();
        for n in 0..1000 {
            outages.lost(s(2 * n), "cut".into());
            outages.back(s(2 * n + 1), s(0));
        }
        outages.lost(s(3000), "cut".into());
        assert_eq!(outages.listed(s(3001), s(0)).len(), MOST_LISTED);
        assert_eq!(outages.total(s(3001)), s(1001));
    }
}
