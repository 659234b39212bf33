//! The guest's clocks, and a watch that notices when one of them steps back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

const NS_PER_S: i64 = 1_000_000_000;

/// CLOCK_REALTIME, in nanoseconds since 1970.
pub(crate) fn realtime_ns() -> i64 {
    read(ClockId::CLOCK_REALTIME)
}

/// CLOCK_MONOTONIC, in nanoseconds since some start.
pub(crate) fn monotonic_ns() -> i64 {
    read(ClockId::CLOCK_MONOTONIC)
}

fn read(clock: ClockId) -> i64 {
    // Both clocks exist on every Linux; a kernel without them answers 0, which the watch reports.
    clock_gettime(clock).map_or(0, |t| t.tv_sec() * NS_PER_S + t.tv_nsec())
}

/// Both clocks, read one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    pub(crate) realtime_ns: i64,
    pub(crate) monotonic_ns: i64,
}

impl Reading {
    pub(crate) fn now() -> Self {
        Self { realtime_ns: realtime_ns(), monotonic_ns: monotonic_ns() }
    }
}

/// Remembers the last reading of both clocks and counts steps backward.
///
/// In the guest nobody but [`Watch::step`] sets the clock: a REALTIME that goes back otherwise was
/// moved by the VMM.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    last: Mutex<Option<Reading>>,
    violations: AtomicU64,
    longest_gap_ns: AtomicU64,
}

impl Watch {
    /// Looks at the clocks; called at every tick.
    pub(crate) fn look(&self) {
        // Read under the lock, so that a step is not seen as a violation.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.compare(&mut last, Reading::now());
    }

    fn compare(&self, last: &mut Option<Reading>, now: Reading) {
        if let Some(last) = last.replace(now) {
            let steps = u64::from(now.realtime_ns < last.realtime_ns)
                + u64::from(now.monotonic_ns < last.monotonic_ns);
            self.violations.fetch_add(steps, Ordering::Relaxed);
            let gap = u64::try_from(now.monotonic_ns.saturating_sub(last.monotonic_ns));
            self.longest_gap_ns.fetch_max(gap.unwrap_or(0), Ordering::Relaxed);
        }
    }

    /// Moves CLOCK_REALTIME, forward or back, on the asker's wish.
    pub(crate) fn step(&self, by_ns: i64) -> nix::Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let to_ns = realtime_ns().checked_add(by_ns).filter(|ns| *ns > 0).ok_or(Errno::EINVAL)?;
        let to = TimeSpec::new(to_ns / NS_PER_S, to_ns % NS_PER_S);
        clock_settime(ClockId::CLOCK_REALTIME, to)?;
        *last = None;
        Ok(())
    }

    /// Readings, of either clock, lower than the one before.
    pub(crate) fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed)
    }

    /// The longest time, by CLOCK_MONOTONIC, between two readings.
    pub(crate) fn longest_gap_ns(&self) -> u64 {
        self.longest_gap_ns.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe_all(readings: &[(i64, i64)]) -> (u64, u64) {
        let (watch, mut last) = (Watch::default(), None);
        for &(realtime_ns, monotonic_ns) in readings {
            watch.compare(&mut last, Reading { realtime_ns, monotonic_ns });
        }
        (watch.violations(), watch.longest_gap_ns())
    }

    #[test]
    fn clocks_that_move_forward_are_fine() {
        assert_eq!(observe_all(&[(10, 1), (10, 1), (12, 5), (90, 6)]), (0, 4));
    }

    #[test]
    fn each_clock_that_steps_back_counts() {
        assert_eq!(observe_all(&[(10, 1), (9, 2), (10, 1), (9, 0)]).0, 4);
    }

    #[test]
    fn real_clocks_read() {
        let now = Reading::now();
        assert!(now.realtime_ns > 0 && now.monotonic_ns > 0);
        let watch = Watch::default();
        watch.look();
        watch.look();
        assert_eq!(watch.violations(), 0);
    }

    #[test]
    fn a_step_to_before_1970_is_refused() {
        assert_eq!(Watch::default().step(i64::MIN), Err(Errno::EINVAL));
        assert_eq!(Watch::default().step(i64::MAX), Err(Errno::EINVAL));
    }
}
