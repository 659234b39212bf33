//! One direction of a link, as a function of time: no clock, no thread.

use std::{collections::VecDeque, io, time::Duration};

use super::Shape;
use crate::link::LinkReading;

/// A packet takes about so long to leave, ...
const PACKET: Duration = Duration::from_millis(1);
/// ... but is no smaller than one on Ethernet and no larger than what a network card takes at once.
const PACKET_BYTES: (usize, usize) = (1448, 64 << 10);
/// The weight of a new round trip in the smoothed one, as TCP has it.
const RTT_WEIGHT: u32 = 8;

/// What came of an attempt to write or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    /// So many bytes were taken or given.
    Done(usize),
    /// Nothing before this moment, unless the other end does something.
    Wait(Duration),
    /// No more, ever.
    Over(io::ErrorKind),
}

/// A packet on its way.
#[derive(Clone, Copy, Debug)]
struct Packet {
    /// Where it ends in the stream.
    end: u64,
    entered: Duration,
    /// When the sending end knows that it arrived.
    acked: Duration,
    /// What had been acknowledged when it entered, and when.
    before: (u64, Duration),
}

/// One direction of a link.
#[derive(Debug)]
pub(super) struct Line {
    shape: Shape,
    /// How long an acknowledgement takes.
    back: Duration,
    /// Written and not read.
    bytes: VecDeque<u8>,
    /// Not acknowledged, with what of them has not left and what has not arrived.
    packets: VecDeque<Packet>,
    unsent: VecDeque<(Duration, u64)>,
    flying: VecDeque<(Duration, u64)>,
    written: u64,
    departed: u64,
    arrived: u64,
    read: u64,
    acked: u64,
    acked_at: Duration,
    free_at: Duration,
    /// When the link last began to be busy after it had been idle.
    idle_until: Duration,
    busy: Duration,
    busy_since: Option<Duration>,
    rtt: Option<(Duration, Duration)>,
    rate: f64,
    /// The stream ends after so many bytes: the link breaks there.
    pub(super) cut: Option<u64>,
    /// This byte arrives with a bit turned over.
    pub(super) flip: Option<u64>,
    /// When an end closed the link, or it breaks: what has not arrived then is lost if it broke.
    over: Option<(Duration, io::ErrorKind)>,
}

impl Line {
    pub(super) fn new(shape: Shape, back: Duration) -> Self {
        Self {
            shape,
            back,
            bytes: VecDeque::new(),
            packets: VecDeque::new(),
            unsent: VecDeque::new(),
            flying: VecDeque::new(),
            written: 0,
            departed: 0,
            arrived: 0,
            read: 0,
            acked: 0,
            acked_at: Duration::ZERO,
            free_at: Duration::ZERO,
            idle_until: Duration::ZERO,
            busy: Duration::ZERO,
            busy_since: None,
            rtt: None,
            rate: 0.0,
            cut: None,
            flip: None,
            over: None,
        }
    }

    /// The link breaks at `at`: reads and writes fail from then on, and what is on its way is lost.
    pub(super) fn breaks(&mut self, at: Duration) {
        if self.over.is_none_or(|(before, _)| before > at) {
            self.over = Some((at, io::ErrorKind::ConnectionReset));
        }
    }

    /// One end closed the link: what was written still arrives.
    pub(super) fn close(&mut self, now: Duration) {
        if self.over.is_none_or(|(before, _)| before > now) {
            self.over = Some((now, io::ErrorKind::BrokenPipe));
        }
    }

    /// Whether the stream reached its cut.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.is_some_and(|cut| self.written >= cut)
    }

    fn pop(queue: &mut VecDeque<(Duration, u64)>, now: Duration, counter: &mut u64) {
        while let Some(&(at, end)) = queue.front()
            && at <= now
        {
            queue.pop_front();
            *counter = end;
        }
    }

    /// Brings everything up to `now`.
    fn settle(&mut self, now: Duration) {
        let until = match self.over {
            Some((at, io::ErrorKind::ConnectionReset)) => at.min(now),
            _ => now,
        };
        Self::pop(&mut self.unsent, until, &mut self.departed);
        Self::pop(&mut self.flying, until, &mut self.arrived);
        while let Some(&packet) = self.packets.front()
            && packet.acked <= until
        {
            self.packets.pop_front();
            self.acknowledge(packet);
        }
    }

    fn acknowledge(&mut self, packet: Packet) {
        self.acked = packet.end;
        self.acked_at = packet.acked;
        let took = packet.acked.saturating_sub(packet.entered);
        self.rtt = Some(match self.rtt {
            None => (took, took),
            Some((smooth, least)) => {
                ((smooth * (RTT_WEIGHT - 1) + took) / RTT_WEIGHT, least.min(took))
            }
        });
        if self.packets.is_empty()
            && let Some(since) = self.busy_since.take()
        {
            self.busy += packet.acked.saturating_sub(since);
        }
        // As TCP measures: what was delivered while this packet was on its way. Where the link had
        // nothing to carry meanwhile, that tells of the writer unless it is more than was known.
        let (bytes, since) = packet.before;
        let time = packet.acked.saturating_sub(since).as_secs_f64();
        if time > 0.0 {
            let rate = (packet.end - bytes) as f64 / time;
            let idle = self.idle_until + self.shape.delay + self.back > since;
            if !idle || rate > self.rate {
                self.rate = rate;
            }
        }
    }

    /// Takes what there is room for.
    pub(super) fn write(&mut self, now: Duration, bytes: &[u8]) -> Tried {
        self.settle(now);
        if let Some((at, why)) = self.over
            && at <= now
        {
            return Tried::Over(why);
        }
        if bytes.is_empty() {
            return Tried::Done(0);
        }
        let unsent = (self.written - self.departed) as usize;
        let unread = (self.written - self.read) as usize;
        let room = self.shape.window_bytes.saturating_sub(unread);
        if unsent >= self.shape.queue_bytes || room == 0 {
            // Where the reader is what is waited for, it says so.
            let next = self.unsent.front().map_or(Duration::MAX, |(at, _)| *at);
            return Tried::Wait(next);
        }
        let room = room.min(self.shape.queue_bytes - unsent);
        let mut taken = bytes.get(..room).unwrap_or(bytes);
        if let Some(cut) = self.cut {
            let left = usize::try_from(cut.saturating_sub(self.written)).unwrap_or(usize::MAX);
            taken = taken.get(..left).unwrap_or(taken);
        }
        self.put(now, taken);
        Tried::Done(taken.len())
    }

    fn put(&mut self, now: Duration, taken: &[u8]) {
        let at = self.bytes.len();
        self.bytes.extend(taken);
        if let Some(flip) = self.flip
            && let Some(offset) = flip.checked_sub(self.written)
            && let Ok(offset) = usize::try_from(offset)
            && let Some(byte) = self.bytes.get_mut(at.saturating_add(offset))
        {
            *byte ^= 4;
        }
        if self.packets.is_empty() && !taken.is_empty() {
            self.acked_at = now;
            self.busy_since = Some(now);
        }
        for piece in taken.chunks(self.packet_bytes(now)) {
            if self.free_at <= now {
                self.free_at = now;
                self.idle_until = now;
            }
            let departs =
                self.shape.rate.finish(self.free_at, piece.len() as f64).unwrap_or(Duration::MAX);
            let arrives = departs.saturating_add(self.shape.delay);
            self.free_at = departs;
            self.written += piece.len() as u64;
            let (end, before) = (self.written, (self.acked, self.acked_at));
            let acked = arrives.saturating_add(self.back);
            self.unsent.push_back((departs, end));
            self.flying.push_back((arrives, end));
            self.packets.push_back(Packet { end, entered: now, acked, before });
        }
    }

    fn packet_bytes(&self, now: Duration) -> usize {
        let (least, most) = PACKET_BYTES;
        let bytes = self.shape.rate.at(now) * PACKET.as_secs_f64();
        (bytes.min(most as f64) as usize).max(least)
    }

    /// Gives what has arrived.
    pub(super) fn read(&mut self, now: Duration, into: &mut [u8]) -> Tried {
        self.settle(now);
        let there = usize::try_from(self.arrived - self.read).unwrap_or(usize::MAX);
        let n = there.min(into.len());
        if n > 0 {
            let (first, second) = self.bytes.as_slices();
            let split = first.len().min(n);
            into[..split].copy_from_slice(&first[..split]);
            into[split..n].copy_from_slice(&second[..n - split]);
            self.bytes.drain(..n);
            self.read += n as u64;
            return Tried::Done(n);
        }
        if into.is_empty() {
            return Tried::Done(0);
        }
        let next = self.flying.front().map(|(at, _)| *at);
        match (next, self.over) {
            (_, Some((at, io::ErrorKind::ConnectionReset))) if at <= now => {
                Tried::Over(io::ErrorKind::ConnectionReset)
            }
            (Some(next), Some((at, io::ErrorKind::ConnectionReset))) => Tried::Wait(next.min(at)),
            (Some(next), _) => Tried::Wait(next),
            (None, Some((at, _))) => {
                let known = at.saturating_add(self.shape.delay);
                if known <= now {
                    Tried::Over(io::ErrorKind::BrokenPipe)
                } else {
                    Tried::Wait(known)
                }
            }
            (None, None) => Tried::Wait(Duration::MAX),
        }
    }

    /// What the sending end knows of the link.
    pub(super) fn reading(&mut self, now: Duration) -> Option<LinkReading> {
        self.settle(now);
        if self.over.is_some_and(|(at, _)| at <= now) {
            return None;
        }
        let fresh = self.shape.delay + self.back;
        let (rtt, min_rtt) = self.rtt.unwrap_or((fresh, fresh));
        let running = self.busy_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        Some(LinkReading {
            rtt,
            min_rtt,
            delivered_bytes: self.acked,
            unacked_bytes: self.written - self.acked,
            busy: self.busy + running,
            delivery_bytes_per_s: self.rate as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sim::Rate;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn line(rate: f64, delay_ms: u64) -> Line {
        Line::new(Shape::new(Rate::bytes_per_s(rate), ms(delay_ms)), ms(delay_ms))
    }

    #[test]
    fn a_byte_arrives_when_it_has_left_and_crossed() {
        let mut line = line(10_000.0, 25);
        assert_eq!(line.write(ms(0), &[7; 1000]), Tried::Done(1000));
        let mut into = [0; 2000];
        assert_eq!(line.read(ms(100), &mut into), Tried::Wait(ms(125)));
        assert_eq!(line.read(ms(125), &mut into), Tried::Done(1000));
        assert_eq!(into[..1000], [7; 1000]);
        assert_eq!(line.read(ms(125), &mut into), Tried::Wait(Duration::MAX));
        assert_eq!(line.reading(ms(149)).unwrap().delivered_bytes, 0);
        let reading = line.reading(ms(500)).unwrap();
        assert_eq!((reading.delivered_bytes, reading.unacked_bytes), (1000, 0));
        assert_eq!((reading.busy, reading.min_rtt), (ms(150), ms(150)));
    }

    #[test]
    fn a_full_queue_and_a_full_window_hold_the_writer() {
        let mut line = line(100_000.0, 0);
        let (queue, window) = (line.shape.queue_bytes, line.shape.window_bytes);
        let data = vec![1; window * 2];
        assert_eq!(line.write(ms(0), &data), Tried::Done(queue));
        let Tried::Wait(until) = line.write(ms(0), &data) else { panic!("no bound") };
        assert!(until <= ms(15), "a packet leaves soon: {until:?}");
        let mut now = until;
        let mut taken = queue;
        loop {
            match line.write(now, &data) {
                Tried::Done(n) => taken += n,
                Tried::Wait(Duration::MAX) => break,
                Tried::Wait(until) => now = until,
                Tried::Over(why) => panic!("{why}"),
            }
        }
        assert_eq!(taken, window, "what nobody reads is bounded");
        let mut into = vec![0; window];
        assert_eq!(line.read(now, &mut into), Tried::Done(window));
        assert_eq!(line.write(now, &data), Tried::Done(queue));
    }

    /// The estimate follows the link, and a writer that has little to say does not change it.
    #[test]
    fn the_rate_is_measured_as_tcp_does() {
        let rate = Rate::bytes_per_s(1e6).then_bytes_per_s(ms(2000), 5e6);
        let mut line = Line::new(Shape::new(rate, ms(25)), ms(25));
        let (data, mut into) = (vec![0; 4096], vec![0; 1 << 20]);
        let mut read_at = |line: &mut Line, from: u64, until: u64, every: u64| {
            for now in (from..until).step_by(every as usize) {
                while let Tried::Done(_) = line.write(ms(now), &data) {
                    if every > 1 {
                        break;
                    }
                }
                while let Tried::Done(_) = line.read(ms(now), &mut into) {}
            }
            line.reading(ms(until)).unwrap().delivery_bytes_per_s as f64
        };
        let slow = read_at(&mut line, 0, 1500, 1);
        assert!((0.95e6..1.05e6).contains(&slow), "{slow}");
        let trickle = read_at(&mut line, 1500, 1900, 20);
        assert!((0.95e6..1.05e6).contains(&trickle), "{trickle}");
        let fast = read_at(&mut line, 1900, 3000, 1);
        assert!((4.7e6..5.3e6).contains(&fast), "{fast}");
    }

    #[test]
    fn a_break_loses_what_is_on_its_way_and_a_close_does_not() {
        let mut into = [0; 10];
        let mut broken = line(1e6, 25);
        broken.write(ms(0), &[1; 10]);
        broken.breaks(ms(20));
        assert_eq!(broken.read(ms(0), &mut into), Tried::Wait(ms(20)));
        assert_eq!(broken.read(ms(90), &mut into), Tried::Over(io::ErrorKind::ConnectionReset));
        assert_eq!(broken.write(ms(90), &[1]), Tried::Over(io::ErrorKind::ConnectionReset));
        assert_eq!(broken.reading(ms(90)), None);
        let mut closed = line(1e6, 25);
        closed.write(ms(0), &[1; 10]);
        closed.close(ms(20));
        assert_eq!(closed.write(ms(20), &[1]), Tried::Over(io::ErrorKind::BrokenPipe));
        assert_eq!(closed.read(ms(40), &mut into), Tried::Done(10));
        assert_eq!(closed.read(ms(40), &mut into), Tried::Wait(ms(45)));
        assert_eq!(closed.read(ms(45), &mut into), Tried::Over(io::ErrorKind::BrokenPipe));
    }

    proptest! {
        /// Whatever is written and read when: bytes come out in order, never too soon, and never
        /// faster than the link carries them.
        #[test]
        fn bytes_keep_order_and_rate(
            rate in 1_000.0f64..1e7,
            delay in 0u64..60,
            steps in prop::collection::vec((0u64..40, 0usize..20_000, 0usize..30_000), 1..80),
        ) {
            let mut line = line(rate, delay);
            let (mut now, mut sent, mut got) = (Duration::ZERO, 0usize, 0usize);
            for (wait, write, read) in steps {
                now += ms(wait);
                let data: Vec<u8> = (sent..sent + write).map(|i| (i % 251) as u8).collect();
                if let Tried::Done(n) = line.write(now, &data) {
                    sent += n;
                }
                let mut into = vec![0; read];
                if let Tried::Done(n) = line.read(now, &mut into) {
                    for byte in &into[..n] {
                        prop_assert_eq!(*byte, (got % 251) as u8);
                        got += 1;
                    }
                }
                let most = rate * now.saturating_sub(ms(delay)).as_secs_f64();
                prop_assert!(got as f64 <= most + 1.0, "{} read, {} could have come", got, most);
                let reading = line.reading(now).unwrap();
                prop_assert_eq!(reading.delivered_bytes + reading.unacked_bytes, sent as u64);
                prop_assert!(reading.busy <= now);
            }
        }
    }
}
