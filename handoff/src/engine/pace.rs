//! How fast a handoff goes: what its rounds took of chunks, link and CPU.
//!
//! A chunk that the target holds already costs a look and no byte, so that what is left of the
//! link's work is told by chunks that were *sent*, not by chunks that were looked at.

use std::time::Duration;

/// Below so many chunks sent, a round says little about the next.
const ENOUGH_CHUNKS: u64 = 32;
/// The link's rate is taken over at least so long a time in which it was busy, if there was one ...
const ENOUGH_BUSY: Duration = Duration::from_millis(200);
/// ... in which it delivered so much: of less, it mostly waited for acknowledgements.
const ENOUGH_BYTES: u64 = 256 << 10;
/// One in so many parts of the time in which bursts are under way is not waiting, at least.
const LEAST_MOVING: u32 = 8;

/// Counters that only grow, read at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reading {
    pub(super) now: Duration,
    /// CPU time of the thread that reads, classifies and packs.
    pub(super) cpu: Duration,
    /// Chunks that were looked at, and those of them that were not just what the target holds.
    pub(super) looked_at: u64,
    pub(super) sent: u64,
    /// Bytes of segments made.
    pub(super) segment_bytes: u64,
    /// Time that the engine waited for the pipeline to take its work.
    pub(super) waited: Duration,
    /// Bytes delivered, and the time in which there were some to deliver; zero if not measured.
    pub(super) delivered_bytes: u64,
    pub(super) busy: Duration,
    /// The transport's own estimate of the rate; zero if it has none.
    pub(super) delivery_bytes_per_s: u64,
    /// The round trip without queues.
    pub(super) rtt: Duration,
}

/// One round.
#[derive(Clone, Copy, Debug)]
struct Lap {
    began: Reading,
    /// When its chunks were all given to the pipeline, and the CPU time until then.
    packed: Duration,
    packed_cpu: Duration,
    ended: Reading,
}

impl Lap {
    fn looked_at(&self) -> u64 {
        self.ended.looked_at - self.began.looked_at
    }

    fn sent(&self) -> u64 {
        self.ended.sent - self.began.sent
    }

    fn segment_bytes(&self) -> u64 {
        self.ended.segment_bytes - self.began.segment_bytes
    }

    /// Time until all was packed, but for that in which nobody took it.
    fn worked(&self) -> Duration {
        let waited = self.ended.waited - self.began.waited;
        self.packed.saturating_sub(self.began.now).saturating_sub(waited)
    }
}

/// The rounds that are over, and the one under way.
#[derive(Debug, Default)]
pub(super) struct Pace {
    laps: Vec<Lap>,
}

impl Pace {
    pub(super) fn begins(&mut self, reading: Reading) {
        let (packed, packed_cpu) = (reading.now, reading.cpu);
        self.laps.push(Lap { began: reading, packed, packed_cpu, ended: reading });
    }

    /// The round's chunks were all given to the pipeline.
    pub(super) fn packed(&mut self, now: Duration, cpu: Duration) {
        if let Some(lap) = self.laps.last_mut() {
            (lap.packed, lap.packed_cpu) = (now, cpu);
        }
    }

    pub(super) fn ends(&mut self, reading: Reading) {
        if let Some(lap) = self.laps.last_mut() {
            lap.ended = reading;
        }
    }

    /// Bytes on the link for each chunk that becomes dirty; 0 before the first round.
    ///
    /// The first round has page cache, zeros and what the target knows in it, which later ones have
    /// not: they tell more of what is to come, if enough was sent in them.
    pub(super) fn bytes_per_dirty_chunk(&self) -> f64 {
        if let Some(lap) = self.later() {
            return ratio(lap.segment_bytes() as f64, lap.looked_at() as f64);
        }
        let sum = |of: fn(&Lap) -> u64| self.laps.iter().map(of).sum::<u64>() as f64;
        ratio(sum(Lap::segment_bytes), sum(Lap::sent))
    }

    /// The same in the midst of a round: of all that was looked at and has been compressed so far.
    pub(super) fn bytes_per_chunk_so_far(&self, now: Reading) -> f64 {
        ratio(now.segment_bytes as f64, now.looked_at as f64)
    }

    /// The newest round but the first in which enough was sent.
    fn later(&self) -> Option<&Lap> {
        let later = self.laps.get(1..).unwrap_or_default();
        later.iter().rev().find(|lap| lap.sent() >= ENOUGH_CHUNKS)
    }

    /// How many of the chunks that become dirty are not just what the target holds; 0 before a later
    /// round told.
    pub(super) fn news_share(&self) -> f64 {
        self.later().map_or(0.0, |lap| ratio(lap.sent() as f64, lap.looked_at() as f64))
    }

    /// Chunks a second that reading, classifying and packing manage beside the guest when nothing makes
    /// them wait; 0 if not known.
    pub(super) fn chunks_per_s(&self) -> f64 {
        self.newest().map_or(0.0, |lap| ratio(lap.looked_at() as f64, lap.worked().as_secs_f64()))
    }

    /// The same where the guest wants no CPU. Waiting for a CPU and waiting for a page to be read are
    /// told apart by the CPU time: what the last round looks at the guest has just written, so it is there.
    pub(super) fn paused_chunks_per_s(&self) -> f64 {
        let of = |lap: &Lap| {
            let cpu = lap.packed_cpu.saturating_sub(lap.began.cpu);
            // Where CPU time is not measured.
            let busy = if cpu.is_zero() { lap.worked() } else { cpu.min(lap.worked()) };
            ratio(lap.looked_at() as f64, busy.as_secs_f64())
        };
        self.newest().map_or(0.0, of)
    }

    /// The newest round that says enough: the first meets caches that are cold.
    fn newest(&self) -> Option<&Lap> {
        let enough = |lap: &&Lap| lap.looked_at() >= ENOUGH_CHUNKS;
        self.laps.iter().rev().find(enough).or(self.laps.last())
    }

    /// Bytes a second that the link took lately, by its own measure and over the time in which it
    /// had something to take. Of bursts each takes a round trip, however short it is, until its
    /// acknowledgement: that is no part of what a last round waits for, and a round is such a burst at
    /// least. The transport's estimate may tell more then.
    pub(super) fn link_bytes_per_s(&self, now: Reading) -> Option<f64> {
        let is_enough = |lap: &Lap| now.busy.saturating_sub(lap.began.busy) >= ENOUGH_BUSY;
        let newest = self.laps.iter().rev().position(is_enough);
        let (began, laps) = match newest {
            Some(n) => (self.laps[self.laps.len() - 1 - n].began, n + 1),
            None => (Reading::default(), self.laps.len()),
        };
        let busy = now.busy.saturating_sub(began.busy);
        let bytes = now.delivered_bytes.saturating_sub(began.delivered_bytes);
        if busy.is_zero() || bytes == 0 {
            return None;
        }
        if bytes >= ENOUGH_BYTES {
            return Some(bytes as f64 / busy.as_secs_f64());
        }
        let waiting = now.rtt * u32::try_from(laps).unwrap_or(u32::MAX);
        let moving = busy.saturating_sub(waiting).max(busy / LEAST_MOVING);
        Some((bytes as f64 / moving.as_secs_f64()).max(now.delivery_bytes_per_s as f64))
    }
}

fn ratio(of: f64, to: f64) -> f64 {
    if to > 0.0 { of / to } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Rounds of (looked at, sent, bytes), one second each, half of it waiting.
    fn pace(rounds: &[(u64, u64, u64)]) -> (Pace, Reading) {
        let (mut pace, mut at) = (Pace::default(), Reading::default());
        for &(looked_at, sent, bytes) in rounds {
            pace.begins(at);
            at.now += 900 * MS;
            at.waited += 400 * MS;
            at.cpu += 100 * MS;
            pace.packed(at.now, at.cpu);
            at.now += 100 * MS;
            at.looked_at += looked_at;
            at.sent += sent;
            at.segment_bytes += bytes;
            at.delivered_bytes += bytes;
            at.busy += 1000 * MS * u32::try_from(bytes).unwrap() / 100_000;
            pace.ends(at);
        }
        (pace, at)
    }

    #[test]
    fn chunks_that_the_target_holds_do_not_make_others_cheap() {
        let (pace, _) = pace(&[(10_000, 100, 200_000)]);
        assert_eq!(pace.bytes_per_dirty_chunk(), 2000.0);
        assert_eq!(pace.chunks_per_s(), 20_000.0);
        assert_eq!(
            pace.paused_chunks_per_s(),
            100_000.0,
            "what it waited for the CPU is the guest's"
        );
    }

    #[test]
    fn a_later_round_tells_more_if_there_is_enough_of_it() {
        assert_eq!(pace(&[(1000, 1000, 10_000), (60, 50, 6000)]).0.bytes_per_dirty_chunk(), 100.0);
        assert_eq!(pace(&[(1000, 980, 98_000), (20, 20, 2000)]).0.bytes_per_dirty_chunk(), 100.0);
        assert_eq!(pace(&[]).0.bytes_per_dirty_chunk(), 0.0);
        assert_eq!(pace(&[(1000, 1000, 10_000), (60, 45, 6000)]).0.news_share(), 0.75);
        assert_eq!(pace(&[(1000, 980, 98_000), (20, 20, 2000)]).0.news_share(), 0.0);
    }

    #[test]
    fn the_rate_is_that_of_the_time_in_which_the_link_was_busy() {
        let (few, mut at) = pace(&[(1000, 1000, 50_000), (10, 10, 1000)]);
        at.delivery_bytes_per_s = 90_000;
        assert_eq!(few.link_bytes_per_s(at), Some(100_000.0));
        at.delivery_bytes_per_s = 300_000;
        assert_eq!(few.link_bytes_per_s(at), Some(300_000.0), "bursts");
        // Of 510 ms in which bytes were under way, two round trips are waiting for the last of a round.
        (at.delivery_bytes_per_s, at.rtt) = (0, 128 * MS);
        assert_eq!(few.link_bytes_per_s(at).map(f64::round), Some(200_787.0));
        at.rtt = 1000 * MS;
        assert_eq!(few.link_bytes_per_s(at), Some(800_000.0), "never by more than that");
        let (pace, mut at) = pace(&[(1000, 1000, 500_000), (10, 10, 1000)]);
        at.delivery_bytes_per_s = 300_000;
        assert_eq!(pace.link_bytes_per_s(at), Some(100_000.0));
        assert_eq!(pace.link_bytes_per_s(Reading::default()), None);
    }
}
