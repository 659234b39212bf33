//! What the engine's thread and the courier know of the link, together.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed},
        },
    },
    time::Duration,
};

use super::{
    ahead::{Ahead, LinkView},
    commit::CommitGate,
    worker::micros,
};
use crate::{
    adapt::{LinkRate, Stuck},
    link::{LinkGauge, LinkReading},
    source::DEFAULT_WINDOW_BYTES,
    target::ACK_BYTES,
    wire::MAX_SEGMENT_BYTES,
};

/// What waits in the transport lasts for so long, besides what is on the wire: long enough that the
/// link never runs dry, short enough that what is said next is soon on its way.
const QUEUE: Duration = Duration::from_millis(100);
/// It is no less than this: a fresh connection sends so much within its first round trips.
const LEAST_QUEUE_BYTES: u64 = 128 << 10;
/// What the kernel holds unsent, however fast the link.
const MOST_UNSENT_BYTES: u64 = 4 << 20;
/// The peer may take so long to apply what it has received.
const WINDOW: Duration = Duration::from_millis(1000);
/// A piece is what the link takes in so long a time, within bounds.
const PIECE: Duration = Duration::from_millis(10);
const MIN_PIECE_BYTES: usize = 16 << 10;
const MAX_PIECE_BYTES: usize = 256 << 10;
/// While something is on its way the link is measured so often, ...
const MEASURE: Duration = Duration::from_millis(5);
/// ... a full one is not looked at more often than this, ...
const SHORTEST: Duration = Duration::from_micros(500);
/// ... and an idle one only now and then.
const IDLE: Duration = Duration::from_millis(20);

/// Before so much was delivered, what a link's rate seems to be is mostly its slow start.
pub(super) const TRUSTED_BYTES: u64 = 256 << 10;

/// Counters that the engine reads while the courier works.
#[derive(Default)]
pub(super) struct LinkStatus {
    pub(super) bytes_sent: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    /// Jobs that the engine gave to the pipeline and the session has not taken yet.
    pub(super) queued_jobs: AtomicU64,
    /// Bytes of segments that the session took and that were not given to the transport.
    pub(super) unsent_bytes: AtomicU64,
    pub(super) unapplied_bytes: AtomicU64,
    pub(super) applied_bytes: AtomicU64,
    /// Bytes of segments that have not reached the peer's end of the link; where the transport
    /// cannot tell, those not applied.
    pub(super) in_flight_bytes: AtomicU64,
    /// Bytes delivered on all links, and the microseconds in which there were some to deliver. Zero
    /// where the transport does not measure.
    pub(super) delivered_bytes: AtomicU64,
    pub(super) busy_us: AtomicU64,
    /// The transport's own estimate of the rate, zero if it has none.
    pub(super) delivery_bytes_per_s: AtomicU64,
    pub(super) rtt_us: AtomicU64,
    pub(super) rtt_min_us: AtomicU64,
    pub(super) links: AtomicU64,
    /// When anything was last heard, in microseconds of the clock.
    pub(super) heard_us: AtomicU64,
    /// What is between the workers and the courier.
    pub(super) ahead: Ahead,
    /// Whether Commit may be said, and was.
    pub(super) commit: CommitGate,
    measured: Mutex<Measured>,
}

#[derive(Default)]
struct Measured {
    /// That of the present link.
    gauge: Option<Box<dyn LinkGauge>>,
    last: Option<LinkReading>,
    rate: LinkRate,
    /// What the transport itself had sent and received when that was last counted.
    overhead: (u64, u64),
    stuck: Stuck,
    /// What the transport was last told of [`LinkGauge::limit_unsent`].
    unsent_limit: u64,
}

/// How the link stands, where its transport measures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    /// Bytes that the transport holds and the peer has not acknowledged.
    pub(super) unacked_bytes: u64,
    pub(super) min_rtt: Duration,
    /// Bytes a second that the link takes, at most; none while that is not known.
    pub(super) bytes_per_s: Option<f64>,
}

/// How much the link may be given now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Bytes of segments in one piece; none if it has enough.
    pub(super) bytes: usize,
    /// How long until it is worth looking again, unless something happens.
    pub(super) pause: Duration,
}

impl Room {
    /// Where nothing is known but that the transport takes no more than it can.
    pub(super) const UNMEASURED: Self = Self { bytes: MAX_PIECE_BYTES, pause: IDLE };
}

impl Flow {
    /// Bytes that the link carries in so long a time, or `unknown` while its rate is not known.
    fn carries(&self, time: Duration, unknown: u64) -> u64 {
        self.bytes_per_s.map_or(unknown, |rate| (rate * time.as_secs_f64()) as u64)
    }

    /// How many bytes may be with the transport. What fills the link, twice, so that a link
    /// that became faster shows it; and some more, so that it never runs dry.
    fn queue_bytes(&self) -> u64 {
        self.carries(self.min_rtt * 2 + QUEUE, LEAST_QUEUE_BYTES).max(LEAST_QUEUE_BYTES)
    }

    /// How many of those may be unsent.
    pub(super) fn unsent_bytes(&self) -> u64 {
        self.carries(QUEUE, LEAST_QUEUE_BYTES).clamp(LEAST_QUEUE_BYTES, MOST_UNSENT_BYTES)
    }

    /// How many bytes of segments may be unacknowledged by the peer, which applies them first.
    pub(super) fn window_bytes(&self) -> u64 {
        let acks = 2 * ACK_BYTES + MAX_SEGMENT_BYTES as u64;
        let bytes = self.carries(self.min_rtt * 2 + WINDOW, DEFAULT_WINDOW_BYTES);
        bytes.saturating_add(acks).min(DEFAULT_WINDOW_BYTES)
    }

    /// How much the transport may be given now.
    pub(super) fn room(&self) -> Room {
        let piece = self.carries(PIECE, MIN_PIECE_BYTES as u64);
        let piece = usize::try_from(piece).unwrap_or(usize::MAX);
        let piece = piece.clamp(MIN_PIECE_BYTES, MAX_PIECE_BYTES);
        let over = (self.unacked_bytes + piece as u64).saturating_sub(self.queue_bytes());
        if over == 0 {
            // Woken by what comes; meanwhile the rate is to be measured.
            let pause = if self.unacked_bytes > 0 { MEASURE } else { IDLE };
            return Room { bytes: piece, pause };
        }
        let until = self.bytes_per_s.filter(|rate| *rate > 0.0).map(|rate| over as f64 / rate);
        let until = until.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(MEASURE);
        Room { bytes: 0, pause: until.clamp(SHORTEST, MEASURE) }
    }
}

impl LinkStatus {
    fn measured(&self) -> MutexGuard<'_, Measured> {
        // Numbers that are a little wrong do no harm.
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a link, and perhaps something that measures it.
    pub(super) fn link_up(&self, gauge: Option<Box<dyn LinkGauge>>) {
        self.links.fetch_add(1, Relaxed);
        let mut measured = self.measured();
        measured.last = gauge.as_deref().and_then(LinkGauge::read);
        measured.gauge = gauge;
        measured.overhead = (0, 0);
        measured.rate.relinked();
        measured.stuck = Stuck::default();
        measured.unsent_limit = 0;
        if let Some(reading) = measured.last {
            measured.rate.observe(reading);
        }
    }

    /// There is none.
    pub(super) fn link_down(&self) {
        let mut measured = self.measured();
        self.count_overhead(&mut measured);
        (measured.gauge, measured.last) = (None, None);
    }

    /// Adds what the transport sent and received by itself.
    fn count_overhead(&self, measured: &mut Measured) {
        let Some(gauge) = measured.gauge.as_deref() else { return };
        let ((sent, received), before) = (gauge.overhead_bytes(), measured.overhead);
        measured.overhead = (sent, received);
        self.bytes_sent.fetch_add(sent.saturating_sub(before.0), Relaxed);
        self.bytes_received.fetch_add(received.saturating_sub(before.1), Relaxed);
    }

    /// Asks the transport how the link stands; none if it does not measure.
    pub(super) fn refresh(&self) -> Option<Flow> {
        let mut measured = self.measured();
        let measured = &mut *measured;
        self.count_overhead(measured);
        // In this order: what is on its way from here to the transport is counted at least once.
        let unsent = self.unsent_bytes.load(Acquire);
        let reading = measured.gauge.as_deref().and_then(LinkGauge::read);
        if let (Some(reading), Some(before)) = (reading, measured.last) {
            let delivered = reading.delivered_bytes.saturating_sub(before.delivered_bytes);
            let busy = reading.busy.saturating_sub(before.busy);
            self.delivered_bytes.fetch_add(delivered, Relaxed);
            self.busy_us.fetch_add(micros(measured.stuck.busy(delivered, busy)), Relaxed);
        }
        measured.last = reading;
        let said = reading.map_or(0, |reading| reading.delivery_bytes_per_s);
        self.delivery_bytes_per_s.store(said, Relaxed);
        let in_flight = match reading {
            Some(reading) => unsent + reading.unacked_bytes,
            None => self.unapplied_bytes.load(Relaxed),
        };
        self.in_flight_bytes.store(in_flight, Relaxed);
        if let Some(reading) = reading {
            measured.rate.observe(reading);
        }
        let bytes_per_s = measured.rate.bytes_per_s();
        if let Some(reading) = reading.filter(|reading| !reading.rtt.is_zero()) {
            self.rtt_us.store(micros(reading.rtt), Relaxed);
            self.rtt_min_us.store(micros(reading.min_rtt), Relaxed);
        }
        let rtt = Duration::from_micros(self.rtt_min_us.load(Relaxed));
        // Over a link that waited for the workers, ours is less than it can take.
        let said = (said > 0).then_some(said as f64);
        let bytes_per_s = match (bytes_per_s, said) {
            (Some(ours), Some(said)) => Some(ours.max(said)),
            (ours, said) => ours.or(said),
        };
        let is_known = self.delivered_bytes.load(Relaxed) >= TRUSTED_BYTES;
        let trusted = bytes_per_s.filter(|_| is_known);
        self.ahead.link(LinkView { bytes_per_s: trusted, rtt, in_flight_bytes: in_flight });
        let reading = reading?;
        Some(Flow { unacked_bytes: reading.unacked_bytes, min_rtt: reading.min_rtt, bytes_per_s })
    }

    /// Something was heard.
    pub(super) fn heard(&self, now: Duration) {
        self.heard_us.store(micros(now), Relaxed);
    }

    /// The round trip of pings and the shortest of them. The transport's own measure is better: it
    /// has no queueing of ours in it.
    pub(super) fn pinged(&self, rtt: Duration, least: Duration) {
        if self.measured().last.is_none_or(|reading| reading.rtt.is_zero()) {
            self.rtt_us.store(micros(rtt), Relaxed);
            self.rtt_min_us.store(micros(least), Relaxed);
        }
    }

    /// Tells the transport how much may wait in it unsent, if that is not about what it was told.
    pub(super) fn limit_unsent(&self, bytes: u64) {
        let mut measured = self.measured();
        if bytes.abs_diff(measured.unsent_limit) > measured.unsent_limit / 4 {
            measured.unsent_limit = bytes;
            if let Some(gauge) = &measured.gauge {
                gauge.limit_unsent(bytes);
            }
        }
    }
}
