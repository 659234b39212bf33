//! How fast the guest's RAM is, as a program in the guest sees it.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

/// Largest region.
pub(crate) const MAX_SPEED_MIB: u32 = 1 << 16;
/// Longest measurement of either kind.
pub(crate) const MAX_SPEED_MS: u32 = 20_000;
const WORDS_PER_MIB: usize = (1 << 20) / 8;

/// Why nothing can be measured.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum GaugeError {
    #[error("a region of {mib} MiB cannot be had")]
    NoRegion { mib: u32 },
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Speed {
    /// Every word of the region written, one after the other, again and again.
    pub(crate) write_mib_per_s: f64,
    /// The same, read.
    pub(crate) read_mib_per_s: f64,
}

/// A region that is kept from one measurement to the next, so that only the first one pays for
/// pages that were never touched.
#[derive(Default)]
pub(crate) struct Gauge {
    region: Mutex<Vec<u64>>,
}

impl Gauge {
    /// Measures writing, then reading, each for about so long, at least one pass.
    pub(crate) fn measure(&self, mib: u32, time: Duration) -> Result<Speed, GaugeError> {
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let words = mib as usize * WORDS_PER_MIB;
        if words == 0 {
            return Err(GaugeError::NoRegion { mib });
        }
        if region.len() != words {
            *region = Vec::new();
            region.try_reserve_exact(words).map_err(|_| GaugeError::NoRegion { mib })?;
            region.resize(words, 1);
        }
        let write_mib_per_s = rate(mib, time, |pass| {
            for word in region.iter_mut() {
                *word = pass;
            }
            black_box(&mut *region);
        });
        let read_mib_per_s = rate(mib, time, |_| {
            let sum = black_box(&*region).iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
            black_box(sum);
        });
        Ok(Speed { write_mib_per_s, read_mib_per_s })
    }
}

/// Repeats a pass over so many MiB until the time is over.
fn rate(mib: u32, time: Duration, mut pass: impl FnMut(u64)) -> f64 {
    let started = Instant::now();
    let mut passes = 0;
    while passes == 0 || started.elapsed() < time {
        passes += 1;
        pass(passes);
    }
    passes as f64 * f64::from(mib) / started.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_of_this_world_and_the_region_stays() {
        let gauge = Gauge::default();
        for _ in 0..2 {
            let speed = gauge.measure(1, Duration::from_millis(2)).unwrap();
            for rate in [speed.write_mib_per_s, speed.read_mib_per_s] {
                assert!((1.0..10_000_000.0).contains(&rate), "{speed:?}");
            }
        }
        assert_eq!(gauge.region.lock().unwrap().len(), WORDS_PER_MIB);
        assert_eq!(gauge.measure(0, Duration::ZERO), Err(GaugeError::NoRegion { mib: 0 }));
    }
}
