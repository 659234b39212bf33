//! What a simulated link is like.

use std::time::Duration;

/// Bytes a second of one Mbit/s.
const MBPS: f64 = 125_000.0;
/// How much of the link's rate may wait unsent.
const QUEUE: Duration = Duration::from_millis(100);
/// Bounds on what may wait unsent.
const QUEUE_BYTES: (usize, usize) = (32 << 10, 4 << 20);
/// What the receiving end holds for a reader besides what is on its way.
const RECEIVE_BYTES: usize = 4 << 20;

/// Bytes a second over time, counted from the first link.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// From when on, and how many bytes a second; ascending, the first from zero.
    phases: Vec<(Duration, f64)>,
}

impl Rate {
    /// As fast as memory is.
    pub fn unlimited() -> Self {
        Self::bytes_per_s(f64::INFINITY)
    }

    /// The same all the time. Zero carries nothing.
    pub fn bytes_per_s(rate: f64) -> Self {
        Self { phases: vec![(Duration::ZERO, sane(rate))] }
    }

    /// The same all the time, in Mbit/s.
    pub fn mbps(rate: f64) -> Self {
        Self::bytes_per_s(rate * MBPS)
    }

    /// Another rate from `at` on. Phases are named in their order in time: one that is not later
    /// than the last replaces it.
    #[must_use]
    pub fn then_bytes_per_s(mut self, at: Duration, rate: f64) -> Self {
        while self.phases.len() > 1 && self.phases.last().is_some_and(|(from, _)| *from >= at) {
            self.phases.pop();
        }
        if at.is_zero() {
            self.phases.clear();
        }
        self.phases.push((at, sane(rate)));
        self
    }

    /// Another rate from `at` on, in Mbit/s.
    #[must_use]
    pub fn then_mbps(self, at: Duration, rate: f64) -> Self {
        self.then_bytes_per_s(at, rate * MBPS)
    }

    /// The rate at a moment, in bytes a second.
    pub fn at(&self, now: Duration) -> f64 {
        let phase = self.phases.iter().rev().find(|(from, _)| *from <= now);
        phase.map_or(0.0, |(_, rate)| *rate)
    }

    /// The highest rate there ever is.
    pub fn highest(&self) -> f64 {
        self.phases.iter().map(|(_, rate)| *rate).fold(0.0, f64::max)
    }

    /// When `bytes` that begin to leave at `start` have left; `None` if they never have.
    pub(super) fn finish(&self, start: Duration, bytes: f64) -> Option<Duration> {
        let (mut at, mut left) = (start, bytes);
        let mut ends = self.phases.iter().skip(1).map(|(from, _)| *from).chain([Duration::MAX]);
        for (_, rate) in &self.phases {
            let end = ends.next().unwrap_or(Duration::MAX);
            if end <= at {
                continue;
            }
            let room = rate * (end - at).as_secs_f64();
            if left <= room {
                return Some(at.saturating_add(seconds(left / rate)));
            }
            left -= room;
            at = end;
        }
        None
    }

    /// How many bytes leave between two moments: what a full link could have carried.
    pub fn bytes_between(&self, from: Duration, until: Duration) -> f64 {
        let mut ends = self.phases.iter().skip(1).map(|(from, _)| *from).chain([Duration::MAX]);
        let mut bytes = 0.0;
        for (began, rate) in &self.phases {
            let end = ends.next().unwrap_or(Duration::MAX).min(until);
            let began = (*began).max(from);
            if end > began {
                bytes += rate * (end - began).as_secs_f64();
            }
        }
        bytes
    }
}

fn sane(rate: f64) -> f64 {
    if rate.is_nan() { 0.0 } else { rate.max(0.0) }
}

/// A time that may be as long as times get.
fn seconds(s: f64) -> Duration {
    Duration::try_from_secs_f64(s).unwrap_or(if s.is_nan() {
        Duration::ZERO
    } else {
        Duration::MAX
    })
}

/// One direction of a link.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// What it carries.
    pub rate: Rate,
    /// How long a byte is on its way after it has left.
    pub delay: Duration,
    /// How many bytes may wait unsent before a write blocks: socket and bottleneck together.
    pub queue_bytes: usize,
    /// How many bytes may be written and not yet read: what the receiving end makes room for. Less
    /// than rate times round trip keeps the link from being full.
    pub window_bytes: usize,
}

impl Shape {
    /// A link with a queue of 100 ms and room for all that it holds.
    pub fn new(rate: Rate, delay: Duration) -> Self {
        let highest = rate.highest();
        let (least, most) = QUEUE_BYTES;
        let queue_bytes = match highest * QUEUE.as_secs_f64() {
            bytes if bytes.is_finite() => (bytes as usize).clamp(least, most),
            _ => most,
        };
        let flying = highest * delay.as_secs_f64();
        let flying = if flying.is_finite() { flying as usize } else { most };
        Self { rate, delay, queue_bytes, window_bytes: queue_bytes + flying + RECEIVE_BYTES }
    }
}

/// A time in which the link is broken: links that are up break and lose what is on its way, and none
/// can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    /// Its begin, counted from the first link.
    pub from: Duration,
    /// Its end.
    pub until: Duration,
}

/// A link in both directions.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkShape {
    /// From the side that connects.
    pub up: Shape,
    /// To it.
    pub down: Shape,
    /// When it is broken.
    pub outages: Vec<Outage>,
}

impl LinkShape {
    /// The same in both directions.
    pub fn symmetric(rate: Rate, delay: Duration) -> Self {
        let up = Shape::new(rate, delay);
        Self { down: up.clone(), up, outages: Vec::new() }
    }

    /// So many Mbit/s each way, and a one-way delay.
    pub fn mbps(rate: f64, delay: Duration) -> Self {
        Self::symmetric(Rate::mbps(rate), delay)
    }

    /// As fast as memory is, and without delay.
    pub fn unlimited() -> Self {
        Self::symmetric(Rate::unlimited(), Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn bytes_leave_at_the_rate_of_each_phase() {
        let rate =
            Rate::bytes_per_s(100.0).then_bytes_per_s(s(1.0), 0.0).then_bytes_per_s(s(3.0), 1000.0);
        assert_eq!(rate.finish(s(0.0), 50.0), Some(s(0.5)));
        assert_eq!(rate.finish(s(0.5), 50.0), Some(s(1.0)));
        assert_eq!(rate.finish(s(0.5), 150.0), Some(s(3.1)));
        assert_eq!(rate.finish(s(2.0), 1000.0), Some(s(4.0)));
        assert_eq!(rate.bytes_between(s(0.5), s(3.5)), 550.0);
        assert_eq!((rate.at(s(0.0)), rate.at(s(2.0)), rate.at(s(9.0))), (100.0, 0.0, 1000.0));
        assert_eq!(rate.highest(), 1000.0);
    }

    #[test]
    fn a_dead_link_never_ends_and_a_free_one_at_once() {
        assert_eq!(Rate::bytes_per_s(0.0).finish(s(1.0), 1.0), None);
        assert_eq!(Rate::unlimited().finish(s(1.0), 1e12), Some(s(1.0)));
        let dies = Rate::mbps(1.0).then_mbps(s(1.0), f64::NAN);
        assert_eq!(dies.finish(s(0.5), 1e6), None);
    }

    #[test]
    fn a_phase_named_late_replaces_what_it_overlaps() {
        let rate = Rate::mbps(1.0).then_mbps(s(5.0), 2.0).then_mbps(s(3.0), 4.0);
        assert_eq!(rate, Rate::mbps(1.0).then_mbps(s(3.0), 4.0));
        assert_eq!(rate.clone().then_mbps(s(0.0), 8.0), Rate::mbps(8.0));
    }
}
