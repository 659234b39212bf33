//! From values to places.

/// Where values are in a picture, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scale {
    /// From zero to this.
    Linear(f64),
    /// From the one to the other, each ten times as much as far.
    Log(f64, f64),
}

impl Scale {
    /// From zero to a round number that has room for `most`.
    pub(crate) fn linear(most: f64) -> Self {
        let step = step(most, 4);
        Self::Linear((most / step).ceil().max(1.0) * step)
    }

    /// Whole decades around these values, all of which are above zero.
    pub(crate) fn log(values: impl Iterator<Item = f64>) -> Self {
        let positive = values.filter(|value| *value > 0.0);
        let (least, most) = positive.fold((f64::MAX, 0.0f64), |(l, m), v| (l.min(v), m.max(v)));
        if most <= 0.0 {
            return Self::Log(1.0, 10.0);
        }
        // What is least must be seen too, so it is not at the very edge.
        let low = 10f64.powf((least * 0.999).log10().floor());
        let high = 10f64.powf(most.log10().ceil());
        Self::Log(low, high.max(low * 10.0))
    }

    /// Where a value is.
    pub(crate) fn share(&self, value: f64) -> f64 {
        let share = match *self {
            Self::Linear(most) => value / most,
            Self::Log(..) if value <= 0.0 => 0.0,
            Self::Log(low, high) => (value / low).ln() / (high / low).ln(),
        };
        if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
    }

    /// Values worth a line: about `about` round ones, or the decades.
    pub(crate) fn ticks(&self, about: usize) -> Vec<f64> {
        match *self {
            Self::Linear(most) => {
                let step = step(most, about);
                let n = (most / step * 1.000_001).floor() as usize;
                (0..=n.min(100)).map(|i| i as f64 * step).collect()
            }
            Self::Log(low, high) => {
                let decades = (high / low).log10().round() as i32;
                let every = (decades / i32::try_from(about).unwrap_or(1).max(1)).max(0) + 1;
                let every = usize::try_from(every).unwrap_or(1);
                (0..=decades).step_by(every).map(|d| low * 10f64.powi(d)).collect()
            }
        }
    }
}

/// A round number of which about `about` make up `most`.
fn step(most: f64, about: usize) -> f64 {
    let rough = most / about.max(1) as f64;
    if !rough.is_finite() || rough <= f64::MIN_POSITIVE {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn scales_end_at_round_numbers() {
        assert_eq!(Scale::linear(17.8), Scale::Linear(20.0));
        assert_eq!(Scale::linear(9.63), Scale::Linear(10.0));
        assert_eq!(Scale::linear(0.0), Scale::Linear(1.0));
        assert_eq!(Scale::Linear(20.0).ticks(4), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert_eq!(Scale::log([15.7, 6243.0].into_iter()), Scale::Log(10.0, 10_000.0));
        assert_eq!(Scale::Log(10.0, 10_000.0).ticks(5), [10.0, 100.0, 1000.0, 10_000.0]);
        assert_eq!(Scale::Log(10.0, 1000.0).share(100.0), 0.5);
    }

    #[test]
    fn a_least_value_on_a_decade_is_seen() {
        assert!(Scale::log([10.0, 50.0].into_iter()).share(10.0) > 0.0);
    }

    proptest! {
        #[test]
        fn every_value_has_a_place(most in 0.0f64..1e15, at in 0.0f64..1.0, about in 1usize..9) {
            for scale in [Scale::linear(most), Scale::log([most, most * at].into_iter())] {
                prop_assert!((0.0..=1.0).contains(&scale.share(most * at)));
                let ticks = scale.ticks(about);
                prop_assert!(!ticks.is_empty() && ticks.len() <= 101, "{scale:?} {ticks:?}");
                prop_assert!(ticks.iter().all(|tick| (0.0..=1.0).contains(&scale.share(*tick))));
            }
        }
    }
}
