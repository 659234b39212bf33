//! How a handoff went over time: samples of the link and of what is left to do.
//!
//! A handoff lasts a second or an hour, and its report stays small: where there are too many samples,
//! every second one goes, and from then on they are taken half as often.

use std::time::Duration;

use crate::report::Sample;

/// So many samples are kept at most.
const MOST: usize = 240;
/// They are taken so often at first.
const FIRST_EVERY: Duration = Duration::from_millis(100);

/// The samples of one handoff.
#[derive(Debug)]
pub(super) struct Series {
    every: Duration,
    due: Duration,
    samples: Vec<Sample>,
}

impl Series {
    /// None yet; the first is due at once.
    pub(super) fn new(now: Duration) -> Self {
        Self { every: FIRST_EVERY, due: now, samples: Vec::new() }
    }

    /// Whether a sample should be taken now.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        now >= self.due
    }

    /// Takes one, due or not.
    pub(super) fn take(&mut self, now: Duration, sample: Sample) {
        if self.samples.len() >= MOST {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.every *= 2;
        }
        self.samples.push(sample);
        self.due = now + self.every;
    }

    /// Those that are kept, in order.
    pub(super) fn samples(&self) -> &[Sample] {
        &self.samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::millis;

    /// Takes a sample whenever one is due, looking every 20 ms.
    fn over(time: Duration) -> Series {
        let mut series = Series::new(Duration::ZERO);
        let mut now = Duration::ZERO;
        while now <= time {
            if series.is_due(now) {
                series.take(now, Sample { at_ms: millis(now), ..Sample::default() });
            }
            now += Duration::from_millis(20);
        }
        series
    }

    #[test]
    fn a_short_handoff_is_sampled_often() {
        let at: Vec<_> = over(Duration::from_secs(1)).samples().iter().map(|s| s.at_ms).collect();
        assert_eq!(at.len(), 11);
        assert_eq!((at[0], at[1], at[10]), (0.0, 100.0, 1000.0));
    }

    #[test]
    fn a_long_one_keeps_few_samples_that_span_it() {
        let series = over(Duration::from_secs(1800));
        let at: Vec<_> = series.samples().iter().map(|s| s.at_ms).collect();
        assert!((MOST / 2..=MOST).contains(&at.len()), "{}", at.len());
        assert_eq!(at[0], 0.0);
        assert!(at.last().is_some_and(|last| *last > 1_780_000.0), "{at:?}");
        assert!(at.windows(2).all(|two| two[0] < two[1]));
        let steps = at.windows(2).map(|two| two[1] - two[0]);
        let (least, most) = steps.fold((f64::MAX, 0.0f64), |(l, m), s| (l.min(s), m.max(s)));
        assert!(most <= 2.5 * least, "{least} to {most}");
    }
}
