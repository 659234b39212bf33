//! Means over repetitions, and how far they can be trusted.

/// A figure that differs more from run to run is flagged.
pub(crate) const FLAGGED_FROM: f64 = 0.15;

/// A figure over repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stat {
    pub(crate) n: usize,
    pub(crate) mean: f64,
    /// The standard deviation (that of a sample) over the mean; none of a single run.
    pub(crate) deviation: Option<f64>,
}

impl Stat {
    /// Of these values; none if there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (n > 1 && mean > 0.0).then(|| (squares / (n - 1) as f64).sqrt() / mean);
        Some(Self { n, mean, deviation })
    }

    /// Whether the runs differ so much that the mean says little.
    pub(crate) fn is_flagged(&self) -> bool {
        self.deviation.is_some_and(|deviation| deviation > FLAGGED_FROM)
    }
}

/// The mean of factors: the one that, applied each time, gives the same product.
pub(crate) fn geometric_mean(factors: &[f64]) -> Option<f64> {
    if factors.is_empty() || factors.iter().any(|factor| *factor <= 0.0) {
        return None;
    }
    let logs: f64 = factors.iter().map(|factor| factor.ln()).sum();
    Some((logs / factors.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_relative_and_of_a_sample() {
        let stat = Stat::of([9.0, 10.0, 11.0]).unwrap();
        assert_eq!((stat.n, stat.mean, stat.deviation), (3, 10.0, Some(0.1)));
        assert!(!stat.is_flagged());
        assert!(Stat::of([8.0, 10.0, 12.0]).unwrap().is_flagged());
        assert_eq!(Stat::of([5.0]).unwrap().deviation, None);
        assert_eq!(Stat::of([0.0, 0.0]).unwrap().deviation, None);
        assert_eq!(Stat::of([]), None);
    }

    #[test]
    fn factors_have_their_own_mean() {
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-9);
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
    }
}
