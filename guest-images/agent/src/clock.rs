//! The guest's clocks, and a watch that notices when one of them steps back.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};

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

/// Remembers the last reading of both clocks and counts steps backward.
///
/// The guest sets its clock only at boot, so a REALTIME that goes back was moved by the VMM.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    last: Option<Reading>,
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

/// What a [`Watch`] has seen; read by whoever answers probes.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Readings, of either clock, lower than the one before.
    pub(crate) violations: AtomicU64,
    /// The longest time, by CLOCK_MONOTONIC, between two readings.
    pub(crate) longest_gap_ns: AtomicU64,
}

impl Watch {
    /// Takes a reading in; called at every tick.
    pub(crate) fn observe(&mut self, now: Reading, findings: &Findings) {
        if let Some(last) = self.last.replace(now) {
            let steps = u64::from(now.realtime_ns < last.realtime_ns)
                + u64::from(now.monotonic_ns < last.monotonic_ns);
            findings.violations.fetch_add(steps, Ordering::Relaxed);
            let gap = u64::try_from(now.monotonic_ns.saturating_sub(last.monotonic_ns));
            findings.longest_gap_ns.fetch_max(gap.unwrap_or(0), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe_all(readings: &[(i64, i64)]) -> (u64, u64) {
        let (mut watch, findings) = (Watch::default(), Findings::default());
        for &(realtime_ns, monotonic_ns) in readings {
            watch.observe(Reading { realtime_ns, monotonic_ns }, &findings);
        }
        (findings.violations.into_inner(), findings.longest_gap_ns.into_inner())
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
    }
}
