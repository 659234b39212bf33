//! What the link takes now.

use std::{collections::VecDeque, time::Duration};

use crate::link::LinkReading;

/// Readings are put together until they stand for so much busy time.
const SLICE: Duration = Duration::from_millis(25);
/// The rate is that of so much busy time, ...
const WINDOW: Duration = Duration::from_secs(2);
/// ... unless that of the newest so much differs ...
const QUICK: Duration = Duration::from_millis(250);
/// ... by more than this factor, either way: then what is older is forgotten.
const CHANGED: f64 = 1.2;
/// With less than that, a rate rests on too little ...
const ENOUGH_BUSY: Duration = Duration::from_millis(100);
/// ... unless so much was delivered in it.
const ENOUGH_BYTES: u64 = 256 << 10;

/// A link on which nothing at all arrived for longer than this was broken meanwhile.
const BROKEN: Duration = Duration::from_secs(2);

/// Tells the time that a link took to deliver what it was given from that in which it was broken:
/// which of the two a silence was is known when it is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stuck(Duration);

impl Stuck {
    /// Takes what was delivered in a time in which there was something to deliver. How much of the
    /// time since the last delivery tells how fast the link is.
    pub fn busy(&mut self, bytes: u64, busy: Duration) -> Duration {
        let since = self.0.saturating_add(busy);
        if bytes == 0 {
            self.0 = since;
            return Duration::ZERO;
        }
        let stuck = std::mem::take(&mut self.0);
        if stuck <= BROKEN { since } else { busy }
    }
}

/// The rate at which a link delivers, from a transport's readings. Follows a change within about
/// the third of a second in which the link was busy.
///
/// Counts the time in which there was something to deliver. Of a burst, the first round trip is no
/// such time: nothing can be acknowledged in it, however fast the link is. Otherwise a source that
/// sends little at once would think that the link is slow, and send even less.
#[derive(Clone, Debug, Default)]
pub struct LinkRate {
    last: Option<LinkReading>,
    slices: VecDeque<Slice>,
    stuck: Stuck,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    busy: Duration,
    bytes: u64,
}

impl LinkRate {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// The link is another now, whose readings count from zero. What the last one took is the best
    /// guess until this one was measured.
    pub fn relinked(&mut self) {
        self.last = None;
        self.stuck = Stuck::default();
    }

    /// Takes a reading: the more often, the better, and at least a few times a second.
    pub fn observe(&mut self, reading: LinkReading) {
        let Some(last) = self.last.replace(reading) else { return };
        let bytes = reading.delivered_bytes.saturating_sub(last.delivered_bytes);
        let mut busy = reading.busy.saturating_sub(last.busy);
        if last.unacked_bytes == 0 {
            busy = busy.saturating_sub(reading.min_rtt);
        }
        let busy = self.stuck.busy(bytes, busy);
        if bytes == 0 {
            return;
        }
        match self.slices.back_mut().filter(|slice| slice.busy < SLICE) {
            Some(slice) => {
                slice.busy = slice.busy.saturating_add(busy);
                slice.bytes = slice.bytes.saturating_add(bytes);
            }
            None => self.slices.push_back(Slice { busy, bytes }),
        }
        self.forget();
    }

    /// Bytes a second; `None` before enough was delivered.
    pub fn bytes_per_s(&self) -> Option<f64> {
        let all = self.newest(Duration::MAX);
        let measured = all.busy >= ENOUGH_BUSY || all.bytes >= ENOUGH_BYTES;
        let said = self.last.map_or(0, |last| last.delivery_bytes_per_s);
        match all.rate().filter(|_| measured) {
            Some(rate) => Some(rate),
            // The transport's own word is better than none.
            None => (said > 0 && all.bytes > 0).then_some(said as f64),
        }
    }

    /// Together, the newest slices that stand for `busy`.
    fn newest(&self, busy: Duration) -> Slice {
        let mut sum = Slice::default();
        for slice in self.slices.iter().rev() {
            if sum.busy >= busy {
                break;
            }
            sum.busy = sum.busy.saturating_add(slice.busy);
            sum.bytes = sum.bytes.saturating_add(slice.bytes);
        }
        sum
    }

    fn forget(&mut self) {
        let quick = self.newest(QUICK);
        let all = self.newest(Duration::MAX);
        let changed = match (quick.rate(), all.rate()) {
            (Some(quick), Some(all)) => quick > all * CHANGED || all > quick * CHANGED,
            _ => false,
        };
        let keep = if changed && quick.busy >= QUICK { quick.busy } else { WINDOW };
        let mut left = all.busy;
        while let Some(oldest) = self.slices.front() {
            left = left.saturating_sub(oldest.busy);
            if left < keep {
                break;
            }
            self.slices.pop_front();
        }
    }
}

impl Slice {
    fn rate(self) -> Option<f64> {
        let rate = self.bytes as f64 / self.busy.as_secs_f64();
        (!self.busy.is_zero() && rate.is_finite()).then_some(rate)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A link that is busy throughout, read every `every` milliseconds.
    fn run(rate: &mut LinkRate, at: &mut LinkReading, bytes_per_s: u64, for_ms: u32, every: u32) {
        for _ in 0..for_ms / every {
            at.busy += MS * every;
            at.delivered_bytes += bytes_per_s * u64::from(every) / 1000;
            at.unacked_bytes = 50_000;
            rate.observe(*at);
        }
    }

    fn near(rate: &LinkRate, expected: f64, within: f64) {
        let rate = rate.bytes_per_s().unwrap();
        assert!((rate / expected - 1.0).abs() <= within, "{rate} is not {expected}");
    }

    #[test]
    fn follows_a_change_either_way() {
        let (mut rate, mut at) = (LinkRate::new(), LinkReading::default());
        rate.observe(at);
        assert_eq!(rate.bytes_per_s(), None);
        for every in [5, 70, 300] {
            run(&mut rate, &mut at, 625_000, 10_000, every);
            near(&rate, 625e3, 0.02);
            run(&mut rate, &mut at, 4_375_000, 700, every);
            near(&rate, 4_375e3, 0.05);
            run(&mut rate, &mut at, 4_375_000, 10_000, every);
            run(&mut rate, &mut at, 625_000, 900, every);
            near(&rate, 625e3, 0.2);
        }
        assert!(rate.slices.len() < 100);
    }

    #[test]
    fn noise_is_no_change() {
        let (mut rate, mut at) = (LinkRate::new(), LinkReading::default());
        rate.observe(at);
        for n in 0..1000u64 {
            let wobble = 60 + n * 7919 % 81;
            run(&mut rate, &mut at, 625_000 * wobble / 100, 10, 5);
            if n > 50 {
                near(&rate, 625e3, 0.1);
            }
        }
    }

    #[test]
    fn a_burst_does_not_wait_for_its_round_trip() {
        // 125 kB every 100 ms over 12.5 MB/s with 50 ms round trip: 60 ms busy, 10 ms of work.
        let (mut rate, mut at) = (LinkRate::new(), LinkReading::default());
        at.min_rtt = 50 * MS;
        rate.observe(at);
        for _ in 0..20 {
            at.unacked_bytes = 125_000;
            at.busy += MS;
            rate.observe(at);
            at.busy += 59 * MS;
            (at.delivered_bytes, at.unacked_bytes) = (at.delivered_bytes + 125_000, 0);
            rate.observe(at);
        }
        assert!(rate.bytes_per_s().unwrap() > 2e6);
        at.unacked_bytes = 0;
        let (mut coarse, mut at) = (LinkRate::new(), LinkReading { min_rtt: 50 * MS, ..at });
        coarse.observe(at);
        for _ in 0..40 {
            at.busy += 60 * MS;
            at.delivered_bytes += 125_000;
            coarse.observe(at);
        }
        near(&coarse, 12.5e6, 0.01);
    }

    #[test]
    fn a_new_link_counts_from_zero() {
        let (mut rate, mut at) = (LinkRate::new(), LinkReading::default());
        rate.observe(at);
        run(&mut rate, &mut at, 625_000, 3000, 5);
        rate.relinked();
        let mut at = LinkReading::default();
        rate.observe(at);
        near(&rate, 625e3, 0.02);
        run(&mut rate, &mut at, 1_250_000, 700, 5);
        near(&rate, 1250e3, 0.02);
    }

    /// What was on its way when it broke waits for seconds, and says nothing of the next link.
    #[test]
    fn a_broken_link_is_not_a_slow_one() {
        let (mut rate, mut at) = (LinkRate::new(), LinkReading::default());
        rate.observe(at);
        run(&mut rate, &mut at, 625_000, 3000, 5);
        run(&mut rate, &mut at, 0, 9000, 5);
        near(&rate, 625e3, 0.02);
        let mut same = rate.clone();
        run(&mut same, &mut at, 625_000, 1000, 5);
        near(&same, 625e3, 0.02);
        rate.relinked();
        let mut at = LinkReading::default();
        rate.observe(at);
        run(&mut rate, &mut at, 625_000, 100, 5);
        near(&rate, 625e3, 0.02);

        let mut stuck = Stuck::default();
        assert_eq!(stuck.busy(0, 300 * MS), Duration::ZERO);
        assert_eq!(stuck.busy(1, 5 * MS), 305 * MS, "a retransmission is the link's own");
        assert_eq!(stuck.busy(0, 3000 * MS), Duration::ZERO);
        assert_eq!(stuck.busy(1, 5 * MS), 5 * MS);
    }

    #[test]
    fn the_transports_word_comes_first() {
        let mut rate = LinkRate::new();
        rate.observe(LinkReading::default());
        let reading = LinkReading {
            delivered_bytes: 14_000,
            busy: 30 * MS,
            delivery_bytes_per_s: 1_000_000,
            ..LinkReading::default()
        };
        rate.observe(reading);
        assert_eq!(rate.bytes_per_s(), Some(1e6));
    }

    proptest! {
        #[test]
        fn any_readings(
            readings in prop::collection::vec(any::<(u64, u64, u64, u64, u32)>(), 0..50),
        ) {
            let mut rate = LinkRate::new();
            for (delivered_bytes, unacked_bytes, busy_us, said, rtt_us) in readings {
                rate.observe(LinkReading {
                    rtt: Duration::ZERO,
                    min_rtt: Duration::from_micros(rtt_us.into()),
                    delivered_bytes,
                    unacked_bytes,
                    busy: Duration::from_micros(busy_us),
                    delivery_bytes_per_s: said,
                });
                if let Some(rate) = rate.bytes_per_s() {
                    prop_assert!(rate.is_finite() && rate >= 0.0);
                }
            }
        }
    }
}
