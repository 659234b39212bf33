//! How many distinct chunks a guest makes dirty in a given time.
//!
//! A guest that writes the same thousand chunks all the time makes a thousand dirty in half a second
//! and a thousand in ten: a rate says nothing about it. So what is noted is a curve, from looks at the
//! dirty log in the middle of rounds, and what a round will leave is read from it.

/// Points kept of one round.
const MOST_POINTS: usize = 128;
/// One is so many times as late as the last but one before it.
const APART: f64 = 1.15;

/// Dirty chunks over the time since they were last taken. Time is the guest's: where its vCPUs are
/// throttled, less passes for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DirtyCurve {
    /// (seconds, chunks) of the last round, growing in both.
    newest: Vec<(f64, f64)>,
    /// The same of rounds before it, beyond its end.
    older: Vec<(f64, f64)>,
    /// Dirty in both of the last two harvests.
    working_set: f64,
}

impl DirtyCurve {
    /// What was dirty was taken: counting begins anew.
    pub fn taken(&mut self) {
        let reaches = self.newest.last().map_or(0.0, |(at, _)| *at);
        let kept = self.older.iter().copied().filter(|(at, _)| *at > reaches);
        self.older = std::mem::take(&mut self.newest).into_iter().chain(kept).collect();
        self.older.truncate(MOST_POINTS);
    }

    /// So many were dirty so many seconds after they were last taken.
    pub fn saw(&mut self, seconds: f64, chunks: u64) {
        let (last_at, last) = self.newest.last().copied().unwrap_or_default();
        if !seconds.is_finite() || seconds <= last_at {
            return;
        }
        // The further from the beginning, the further apart.
        let before = self.newest.len().checked_sub(2).and_then(|at| self.newest.get(at));
        let near = before.is_some_and(|(at, _)| seconds < at * APART);
        if near || self.newest.len() >= MOST_POINTS {
            self.newest.pop();
        }
        self.newest.push((seconds, (chunks as f64).max(last)));
    }

    /// So many chunks were dirty in both of the last two harvests: the guest writes them all the time.
    pub fn again(&mut self, chunks: u64) {
        self.working_set = chunks as f64;
    }

    /// How many will be dirty `seconds` after they are next taken.
    pub fn at(&self, seconds: f64) -> f64 {
        let reaches = self.newest.last().map_or(0.0, |(at, _)| *at);
        let older = self.older.iter().filter(|(at, _)| *at > reaches);
        let mut before: Option<(f64, f64)> = None;
        let mut last = (0.0, 0.0);
        for &(at, chunks) in self.newest.iter().chain(older) {
            let chunks = chunks.max(last.1);
            // Between nothing and the first look only two harvests tell.
            let (from_at, from) = before.unwrap_or((0.0, self.working_set.min(chunks)));
            if seconds <= at {
                return from + (chunks - from) * ((seconds - from_at) / (at - from_at)).max(0.0);
            }
            before = Some((at, chunks));
            last = (at, chunks);
        }
        self.beyond(last, seconds)
    }

    /// Further than was ever looked: as it went on from half of that time to the whole.
    fn beyond(&self, (end, chunks): (f64, f64), seconds: f64) -> f64 {
        if end <= 0.0 {
            return 0.0;
        }
        let mut half = self.newest.iter().chain(&self.older).filter(|(at, _)| *at <= end / 2.0);
        let steepness = match half.next_back() {
            Some(&(at, then)) if then > 0.0 => (chunks / then).ln() / (end / at).ln(),
            _ => 1.0,
        };
        chunks * (seconds / end).powf(steepness.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_working_set_is_seen_by_looking() {
        let mut curve = DirtyCurve::default();
        assert_eq!(curve.at(1.0), 0.0);
        for (at, chunks) in [(0.1, 900), (0.5, 1000), (1.0, 1010)] {
            curve.saw(at, chunks);
        }
        assert_eq!(curve.at(0.5), 1000.0);
        assert!(curve.at(0.05) < 500.0);
        assert!((1010.0..1050.0).contains(&curve.at(4.0)), "{}", curve.at(4.0));
        curve.taken();
        curve.saw(0.2, 300);
        assert!(curve.at(0.2) == 300.0 && curve.at(0.5) == 1000.0);
    }

    #[test]
    fn without_looks_two_harvests_tell() {
        let mut curve = DirtyCurve::default();
        curve.saw(10.0, 3000);
        assert_eq!(curve.at(1.0), 300.0);
        curve.taken();
        curve.saw(1.0, 1100);
        assert_eq!(curve.at(0.5), 550.0);
        curve.again(1000);
        assert_eq!(curve.at(0.5), 1050.0);
    }

    proptest! {
        /// Whatever is seen, the curve is finite and never falls.
        #[test]
        fn it_never_falls(
            seen in prop::collection::vec((0.0f64..20.0, 0u64..100_000, any::<bool>()), 0..300),
            again in 0u64..100_000,
            (a, b) in (0.0f64..40.0, 0.0f64..40.0),
        ) {
            let mut curve = DirtyCurve::default();
            for (at, chunks, taken) in seen {
                curve.saw(at, chunks);
                if taken {
                    curve.taken();
                }
            }
            curve.again(again);
            let (less, more) = (curve.at(a.min(b)), curve.at(a.max(b)));
            prop_assert!(less.is_finite() && more.is_finite() && less >= 0.0);
            prop_assert!(less <= more + 1e-6, "{less} then {more}");
        }
    }
}
