//! One direction of a link: what becomes of a packet, without I/O and without a clock.
//!
//! ```text
//! offer -> queue (bounded: what does not fit is dropped) -> rate -> delay -> poll
//! ```

use std::{collections::VecDeque, ops::Range, time::Duration};

/// What a link is like.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shape {
    /// Bits a second, headers of IP and TCP included, from each time on; the first is from 0.
    pub(crate) rates: Vec<(Duration, f64)>,
    /// What each packet takes besides, one way.
    pub(crate) delay: Duration,
    /// How long a packet may have to wait in the queue before it is dropped instead.
    pub(crate) queue: Duration,
    /// The share of packets that get lost.
    pub(crate) loss: f64,
    /// The largest packet.
    pub(crate) mtu: usize,
    /// From when to when nothing gets through, and nobody is told.
    pub(crate) cuts: Vec<Range<Duration>>,
}

/// A queue holds at least so many packets.
const LEAST_QUEUE_PACKETS: usize = 10;
/// How finely it is known when bytes were carried.
const SPAN: Duration = Duration::from_millis(10);
/// The largest packet of an Ethernet.
pub(crate) const ETHERNET_MTU: usize = 1500;

impl Shape {
    /// So many Mbps, a delay each way, and a queue of one round trip, at least of 50 ms.
    pub(crate) fn of(mbps: f64, delay: Duration) -> Self {
        let queue = (delay * 2).max(Duration::from_millis(50));
        let rates = vec![(Duration::ZERO, mbps * 1e6)];
        Self { rates, delay, queue, loss: 0.0, mtu: ETHERNET_MTU, cuts: Vec::new() }
    }

    /// Another rate from then on.
    pub(crate) fn then(mut self, at: Duration, mbps: f64) -> Self {
        self.rates.push((at, mbps * 1e6));
        self
    }

    /// Cut during that time.
    pub(crate) fn cut(mut self, when: Range<Duration>) -> Self {
        self.cuts.push(when);
        self
    }

    fn is_cut(&self, at: Duration) -> bool {
        self.cuts.iter().any(|cut| cut.contains(&at))
    }

    fn rate(&self, at: Duration) -> f64 {
        let before = self.rates.iter().rev().find(|(from, _)| *from <= at);
        before.or(self.rates.first()).map_or(1.0, |(_, rate)| rate.max(1.0))
    }

    /// Bytes that the link could have carried between two times.
    pub(crate) fn capacity_bytes(&self, from: Duration, to: Duration) -> f64 {
        let starts = self.rates.iter().map(|(at, _)| *at);
        let ends = starts.clone().skip(1).chain([Duration::MAX]);
        let spans = starts.zip(ends).zip(&self.rates);
        spans
            .map(|((start, end), (_, rate))| {
                let span = end.min(to).saturating_sub(start.max(from));
                span.as_secs_f64() * rate / 8.0
            })
            .sum()
    }
}

struct Packet {
    /// When it came; once it has left the queue, when it arrives.
    at: Duration,
    bytes: Vec<u8>,
}

/// One direction.
pub(crate) struct Channel {
    shape: Shape,
    queue: VecDeque<Packet>,
    queued_bytes: usize,
    /// When the packet before has left the queue.
    free_at: Duration,
    /// Packets on their way, the first to arrive first.
    way: VecDeque<Packet>,
    spare: Vec<Vec<u8>>,
    dice: u64,
    /// Bytes that arrived or will.
    pub(crate) carried_bytes: u64,
    /// The same by the time at which they left the queue, in spans of [`SPAN`].
    log: Vec<u64>,
    /// Packets that did not fit.
    pub(crate) dropped: u64,
    /// Packets that got lost.
    pub(crate) lost: u64,
}

impl Channel {
    pub(crate) fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            queue: VecDeque::new(),
            queued_bytes: 0,
            free_at: Duration::ZERO,
            way: VecDeque::new(),
            spare: Vec::new(),
            dice: seed.wrapping_mul(2).wrapping_add(1),
            carried_bytes: 0,
            log: Vec::new(),
            dropped: 0,
            lost: 0,
        }
    }

    /// A packet comes.
    pub(crate) fn offer(&mut self, now: Duration, packet: &[u8]) {
        self.serve(now);
        let limit = self.shape.rate(now) / 8.0 * self.shape.queue.as_secs_f64();
        let limit = (limit as usize).max(LEAST_QUEUE_PACKETS * self.shape.mtu);
        if self.queued_bytes + packet.len() > limit {
            self.dropped += 1;
            return;
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(packet);
        self.queued_bytes += bytes.len();
        self.queue.push_back(Packet { at: now, bytes });
        self.serve(now);
    }

    /// Takes from the queue what has begun to leave it by now.
    fn serve(&mut self, now: Duration) {
        while let Some(head) = self.queue.front() {
            let begins = self.free_at.max(head.at);
            if begins > now {
                return;
            }
            let Some(mut packet) = self.queue.pop_front() else { return };
            self.queued_bytes -= packet.bytes.len();
            let takes = packet.bytes.len() as f64 * 8.0 / self.shape.rate(begins);
            self.free_at = begins + Duration::from_secs_f64(takes);
            if self.shape.is_cut(self.free_at) || self.is_lost() {
                self.lost += 1;
                self.spare.push(packet.bytes);
                continue;
            }
            self.enter(packet.bytes.len() as u64);
            packet.at = self.free_at + self.shape.delay;
            self.way.push_back(packet);
        }
    }

    fn enter(&mut self, bytes: u64) {
        self.carried_bytes += bytes;
        let span = (self.free_at.as_nanos() / SPAN.as_nanos()) as usize;
        if self.log.len() <= span {
            self.log.resize(span + 1, 0);
        }
        self.log[span] += bytes;
    }

    /// Bytes that left the queue between two times, and what share that is of all that the link
    /// could have carried meanwhile.
    pub(crate) fn carried(&self, from: Duration, to: Duration) -> (u64, f64) {
        let span = |at: Duration| (at.as_nanos() / SPAN.as_nanos()) as usize;
        let (first, end) = (span(from), span(to).max(span(from) + 1));
        let bytes: u64 = self.log.iter().take(end).skip(first).sum();
        let at = |span: usize| SPAN * u32::try_from(span).unwrap_or(u32::MAX);
        (bytes, bytes as f64 / self.shape.capacity_bytes(at(first), at(end)))
    }

    fn is_lost(&mut self) -> bool {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        ((self.dice >> 11) as f64) < self.shape.loss * (1u64 << 53) as f64
    }

    /// Gives to `arrive` what has arrived by now.
    pub(crate) fn poll(&mut self, now: Duration, mut arrive: impl FnMut(&[u8])) {
        self.serve(now);
        while self.way.front().is_some_and(|packet| packet.at <= now) {
            let Some(packet) = self.way.pop_front() else { return };
            arrive(&packet.bytes);
            self.spare.push(packet.bytes);
        }
    }

    /// When there is something to do next.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        let leaves = self.queue.front().map(|head| self.free_at.max(head.at));
        let arrives = self.way.front().map(|packet| packet.at);
        leaves.into_iter().chain(arrives).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Offers packets of 1000 bytes at a rate and says when they arrived.
    fn arrivals(shape: Shape, every: Duration, count: u32) -> Vec<Duration> {
        let mut channel = Channel::new(shape, 7);
        let (mut now, mut came) = (Duration::ZERO, Vec::new());
        let mut offered = 0;
        loop {
            let next = (offered < count).then(|| every * offered);
            let Some(at) = next.into_iter().chain(channel.next_due()).min() else { break };
            now = now.max(at);
            if next == Some(at) {
                channel.offer(now, &[0; 1000]);
                offered += 1;
            }
            channel.poll(now, |packet| came.extend((packet.len() == 1000).then_some(now)));
        }
        came
    }

    #[test]
    fn rate_delay_and_queue() {
        // 8 Mbps: a packet of 1000 bytes takes 1 ms.
        let shape = Shape::of(8.0, 20 * MS);
        let slow = arrivals(shape.clone(), 2 * MS, 10);
        assert_eq!(slow, (0..10).map(|n| (2 * n + 21) * MS).collect::<Vec<_>>());
        // All at once: 50 wait at most, and one is on its way.
        let burst = arrivals(shape, Duration::ZERO, 200);
        assert_eq!(burst, (0..51).map(|n| (n + 21) * MS).collect::<Vec<_>>());
    }

    #[test]
    fn the_rate_changes_for_what_waits() {
        let shape = Shape::of(8.0, Duration::ZERO).then(10 * MS, 80.0);
        let came = arrivals(shape.clone(), Duration::ZERO, 50);
        assert_eq!(came.len(), 50);
        assert_eq!(came[9], 10 * MS);
        assert_eq!(came[49], 14 * MS);
        assert_eq!(shape.capacity_bytes(Duration::ZERO, 20 * MS), 10_000.0 + 100_000.0);
        assert_eq!(shape.capacity_bytes(5 * MS, 10 * MS), 5_000.0);
    }

    #[test]
    fn what_was_carried_is_known() {
        let mut channel = Channel::new(Shape::of(8.0, 20 * MS), 7);
        (0..30).for_each(|_| channel.offer(Duration::ZERO, &[0; 1000]));
        channel.poll(100 * MS, |_| ());
        // What ends with a span counts in the next one.
        assert_eq!(channel.carried(Duration::ZERO, 30 * MS), (29_000, 29.0 / 30.0));
        assert_eq!(channel.carried(20 * MS, 40 * MS), (11_000, 11.0 / 20.0));
        assert_eq!(channel.carried(60 * MS, 70 * MS), (0, 0.0));
    }

    #[test]
    fn nothing_gets_through_a_cut() {
        let shape = Shape::of(8.0, MS).cut(5 * MS..20 * MS);
        let came = arrivals(shape, 2 * MS, 15);
        assert_eq!(came, [2, 4, 22, 24, 26, 28, 30].map(|at| at * MS));
    }

    #[test]
    fn some_get_lost() {
        let shape = Shape { loss: 0.1, ..Shape::of(8.0, Duration::ZERO) };
        let came = arrivals(shape, 2 * MS, 1000).len();
        assert!((850..950).contains(&came), "{came}");
    }
}
