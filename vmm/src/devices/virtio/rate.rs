//! Limits on what a device may pass on in a second.
//!
//! A token bucket: it fills at the rate up to what may pass at once, and what passes is taken from it.
//! Something larger than what is left may pass as long as anything is left, and leaves a debt: so no
//! request is too large ever to pass, and the rate holds all the same. A device that must wait sets a
//! timer to when the debt is paid and takes nothing more from its queue until then; nobody polls.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use super::{DeviceError, timer::Timer};

/// What may pass at once, as time at the full rate.
const BURST: Duration = Duration::from_millis(100);
/// What may pass at once at the least: a rate of very little must not mean a wait for each frame.
const LEAST_BURST_BYTES: u64 = 64 << 10;
const LEAST_BURST_OPERATIONS: u64 = 1;
/// The longest wait that is set: a driver's huge request must not stop its device for ever.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What may pass in a second; nothing said is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes, without headers.
    pub bytes_per_s: Option<u64>,
    /// Requests or frames.
    pub operations_per_s: Option<u64>,
}

/// Tokens of one kind. May go below zero: a debt.
#[derive(Clone, Debug)]
struct Bucket {
    per_s: f64,
    most: f64,
    tokens: f64,
}

impl Bucket {
    fn new(per_s: u64, least_burst: u64) -> Self {
        let per_s = per_s.max(1) as f64;
        let most = (per_s * BURST.as_secs_f64()).max(least_burst as f64);
        Self { per_s, most, tokens: most }
    }

    fn fill(&mut self, passed: Duration) {
        self.tokens = (self.tokens + self.per_s * passed.as_secs_f64()).min(self.most);
    }

    /// How long until something may pass.
    fn wait(&self) -> Duration {
        if self.tokens > 0.0 {
            return Duration::ZERO;
        }
        // A little more than the debt, so that there is something to pass when the time is over.
        let one = 1.0_f64.min(self.most);
        let wait = Duration::try_from_secs_f64((one - self.tokens) / self.per_s);
        wait.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)
    }
}

/// The buckets of one direction of a device, without a clock.
#[derive(Clone, Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// When they were filled.
    filled: Instant,
}

impl Buckets {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            bytes: rate.bytes_per_s.map(|n| Bucket::new(n, LEAST_BURST_BYTES)),
            operations: rate.operations_per_s.map(|n| Bucket::new(n, LEAST_BURST_OPERATIONS)),
            filled: now,
        }
    }

    /// How long until something may pass.
    fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = now;
        let buckets = self.bytes.iter_mut().chain(&mut self.operations);
        let waits = buckets.map(|bucket| {
            bucket.fill(passed);
            bucket.wait()
        });
        waits.max().unwrap_or_default()
    }

    fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= bytes as f64;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.tokens -= 1.0;
        }
    }
}

/// Holds one direction of a device to a rate.
#[derive(Debug)]
pub(super) struct Limiter {
    /// None: no limit.
    buckets: Option<Buckets>,
    timer: Timer,
}

impl Limiter {
    /// A limiter to this rate, whose buckets are full.
    pub(super) fn new(rate: Rate) -> io::Result<Self> {
        let limited = rate != Rate::default();
        let buckets = limited.then(|| Buckets::new(rate, Instant::now()));
        Ok(Self { buckets, timer: Timer::new()? })
    }

    /// Whether something may pass now. If not, the timer is set to when it is worth asking again.
    pub(super) fn may_pass(&mut self) -> io::Result<bool> {
        let Some(buckets) = &mut self.buckets else { return Ok(true) };
        let wait = buckets.wait(Instant::now());
        if wait.is_zero() {
            return Ok(true);
        }
        self.timer.set(wait)?;
        Ok(false)
    }

    /// Something passes.
    pub(super) fn take(&mut self, bytes: u64) {
        if let Some(buckets) = &mut self.buckets {
            buckets.take(bytes);
        }
    }

    /// What is readable when it is worth asking again.
    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes the timer's event.
    pub(super) fn clear(&self) {
        self.timer.take();
    }
}

/// A timer that cannot be set: the device would wait for ever.
pub(super) fn timer_failed(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "setting the timer of a rate limit", source }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Passes as much as may pass until the time is over: how much that was, and in how many waits.
    fn pass(rate: Rate, each: u64, for_: Duration) -> (u64, u64) {
        let start = Instant::now();
        let mut buckets = Buckets::new(rate, start);
        let (mut now, mut passed, mut waits) = (start, 0, 0);
        while now - start < for_ {
            let wait = buckets.wait(now);
            if wait.is_zero() {
                buckets.take(each);
                passed += each;
            } else {
                now += wait;
                waits += 1;
            }
        }
        (passed, waits)
    }

    #[test]
    fn bytes_and_operations_are_held_to_the_lesser() {
        let rate = Rate { bytes_per_s: Some(10 << 20), operations_per_s: Some(100) };
        // 100 a second of 4 KiB, and what may pass at once.
        let (passed, waits) = pass(rate, 4096, Duration::from_secs(10));
        assert!((1005..=1011).contains(&(passed >> 12)), "{passed}");
        assert!(waits < 1200, "{waits} waits for 1010 requests");
        let (passed, _) = pass(rate, 1 << 20, Duration::from_secs(10));
        assert!((100..=103).contains(&(passed >> 20)), "{passed}");
    }

    #[test]
    fn what_rested_may_pass_at_once_but_no_more_than_that() {
        let rate = Rate { bytes_per_s: Some(1_000_000), ..Rate::default() };
        let start = Instant::now();
        let mut buckets = Buckets::new(rate, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(buckets.wait(later), Duration::ZERO);
        buckets.take(100_000);
        let wait = buckets.wait(later);
        assert!(wait <= Duration::from_micros(2) && !wait.is_zero(), "{wait:?}");
    }

    #[test]
    fn no_limit_never_waits() {
        let mut limiter = Limiter::new(Rate::default()).unwrap();
        for _ in 0..1000 {
            assert!(limiter.may_pass().unwrap());
            limiter.take(u64::MAX);
        }
    }

    proptest! {
        /// Whatever the sizes: over a time no more passes than rate, burst and one request allow, and
        /// no less than the rate does.
        #[test]
        fn the_rate_holds(per_s in 1_000_u64..1 << 30, each in 1_u64..1 << 20) {
            let rate = Rate { bytes_per_s: Some(per_s), ..Rate::default() };
            let seconds = (each / per_s + 1) * 10;
            prop_assume!(per_s * seconds / each < 200_000);
            let (passed, _) = pass(rate, each, Duration::from_secs(seconds));
            let burst = (per_s / 10).max(LEAST_BURST_BYTES);
            let full = per_s * seconds;
            prop_assert!(passed <= full + burst + 2 * each, "{} of {}", passed, full);
            prop_assert!(passed + 2 * each >= full * 99 / 100, "{} of {}", passed, full);
        }
    }
}
