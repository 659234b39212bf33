//! How long to wait before a link is tried again.

use std::time::Duration;

/// Waits that double, each shortened at random by up to half: peers that lost the same link do not
/// all come back at the same instants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first wait, at most.
    pub first: Duration,
    /// What no wait is longer than.
    pub most: Duration,
}

impl Backoff {
    /// The wait before the next attempt after `misses` in vain; `dice` is any number.
    pub fn wait(&self, misses: u32, dice: u32) -> Duration {
        let factor = 1u32.checked_shl(misses).unwrap_or(u32::MAX);
        let whole = self.first.saturating_mul(factor).min(self.most);
        let shorter = whole.mul_f64(0.5 * f64::from(dice) / f64::from(u32::MAX));
        whole.saturating_sub(shorter)
    }
}

impl Default for Backoff {
    /// The first attempts come soon, since most breaks are short; after a long one the link is found
    /// within a second.
    fn default() -> Self {
        Self { first: Duration::from_millis(100), most: Duration::from_secs(1) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn waits_double_up_to_a_bound() {
        let backoff = Backoff { first: 100 * MS, most: 1000 * MS };
        let waits: Vec<_> = (0..6).map(|misses| backoff.wait(misses, 0) / 1_000_000).collect();
        let ns = |ms: u64| Duration::from_nanos(ms);
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000].map(ns));
        assert_eq!(backoff.wait(u32::MAX, 0), 1000 * MS);
        assert_eq!(backoff.wait(0, u32::MAX), 50 * MS);
    }

    proptest! {
        #[test]
        fn no_wait_is_out_of_bounds(
            (first, most) in (0u64..100_000, 0u64..1_000_000),
            (misses, dice) in any::<(u32, u32)>(),
        ) {
            let (first, most) = (Duration::from_millis(first), Duration::from_millis(most));
            let wait = Backoff { first, most }.wait(misses, dice);
            prop_assert!(wait <= most);
            prop_assert!(wait + MS >= first.min(most) / 2);
        }
    }
}
