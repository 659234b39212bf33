//! The source's thread that owns the session: makes links, sends, hears, and makes them again.

use std::{
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, Release},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};

use super::{
    Limits,
    pipeline::Outlet,
    reader::{Heard, read_link, weight},
    worker::micros,
};
use crate::{
    Clock, Connect, Transport,
    link::{LinkGauge, LinkReading},
    root::StateRoot,
    source::{SourceEvent, SourceSession},
    stage::Segment,
    wire::{FrameReader, write_frame},
};

/// How long the courier sleeps when there is nothing to send.
const IDLE: Duration = Duration::from_millis(5);
/// Between two attempts to make a link.
const RETRY: Duration = Duration::from_millis(100);
/// How long the last words may take to be sent.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How many links one handoff may use.
const MAX_LINKS: u32 = 256;
/// Bytes of the target's frames that may wait to be handled.
const MAX_QUEUED_BYTES: u64 = 1 << 20;

/// What comes out of the sequencer, in order.
pub(super) enum Sealed {
    /// A segment.
    Segment(Segment),
    /// All was sealed: ask the target to verify.
    Prepare(StateRoot, Option<[u8; 32]>),
}

/// What the engine tells the courier, besides what goes through the pipeline.
#[derive(Debug)]
pub(super) enum Order {
    /// Durable here: say Commit, and keep saying it.
    Commit,
    /// Over: say so if there is a link, and end.
    Abort(String),
    /// Durable here: say Released, and end.
    Release,
    /// End without a word.
    Leave,
}

/// What the courier and the workers tell the engine.
#[derive(Debug)]
pub(super) enum Notice {
    /// What the target said, and when it came.
    Event(SourceEvent, Duration),
    /// There is no link now.
    Lost(String),
    /// There will be none.
    Gone(String),
    /// A worker cannot go on.
    Compressor(String),
}

/// Counters that the engine reads while the courier works.
#[derive(Debug, Default)]
pub(super) struct LinkStatus {
    pub(super) bytes_sent: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    /// Jobs that the engine gave to the pipeline and the session has not taken yet.
    pub(super) queued_jobs: AtomicU64,
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
}

pub(super) struct Courier<'a, C: Connect> {
    pub(super) session: SourceSession,
    pub(super) connect: &'a mut C,
    pub(super) outlet: Outlet,
    pub(super) orders: Receiver<Order>,
    pub(super) notices: Sender<Notice>,
    pub(super) status: &'a LinkStatus,
    pub(super) limits: &'a Limits,
    pub(super) clock: &'a dyn Clock,
    pub(super) committed: bool,
    pub(super) over: bool,
    pub(super) submitted_bytes: u64,
    /// What the present link's gauge said last.
    pub(super) reading: Option<LinkReading>,
}

/// Why a link is no longer used.
enum End {
    /// The handoff is over: nothing more is to be said.
    Done,
    /// It broke.
    Broke(String),
}

impl<C: Connect> Courier<'_, C> {
    /// Works until the engine says that the handoff is over, or no link can be made any more.
    pub(super) fn run(&mut self) {
        let mut lost_at: Option<Duration> = None;
        let mut why = String::new();
        for _ in 0..MAX_LINKS {
            let link = match self.make_link(lost_at) {
                Ok(Some(link)) => link,
                Ok(None) => return,
                Err(e) if why.is_empty() => return self.gone(e),
                Err(e) => return self.gone(format!("{why}; then {e}")),
            };
            match self.drive(link) {
                End::Done => return,
                End::Broke(reason) => {
                    if !self.notify(Notice::Lost(reason.clone())) {
                        return;
                    }
                    // Grace counts from the loss of a link that worked, not from each attempt.
                    let now = self.clock.now();
                    let worked = self.session.take_progress();
                    lost_at = Some(lost_at.filter(|_| !worked).unwrap_or(now));
                    why = reason;
                }
            }
        }
        self.gone(format!("{MAX_LINKS} links broke; the last: {why}"));
    }

    fn gone(&mut self, why: String) {
        self.notify(Notice::Gone(why));
        // The engine decides what that means, and says so; the pipeline must not block meanwhile.
        while !self.over {
            match self.orders.recv_timeout(IDLE) {
                Ok(order) => self.obey(order),
                Err(RecvTimeoutError::Timeout) => {
                    self.outlet.sealed.try_iter().for_each(|_| self.outlet.taken());
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn notify(&mut self, notice: Notice) -> bool {
        let heard = self.notices.send(notice).is_ok();
        self.over |= !heard;
        heard
    }

    /// Makes a link within the bound that holds now; `None` if the handoff ended meanwhile.
    fn make_link(&mut self, lost_at: Option<Duration>) -> Result<Option<C::Link>, String> {
        loop {
            let grace = if self.committed { self.limits.commit } else { self.limits.relink_grace };
            let left = match lost_at {
                None => self.limits.connect,
                Some(at) => (at + grace).saturating_sub(self.clock.now()),
            };
            if left.is_zero() {
                return Err(format!("no link for {grace:?}"));
            }
            if lost_at.is_some() {
                match self.orders.recv_timeout(RETRY.min(left)) {
                    Ok(order) => self.obey(order),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(None),
                }
            }
            if self.over {
                return Ok(None);
            }
            match self.connect.connect(left.min(self.limits.connect)) {
                Ok(link) => return Ok(Some(link)),
                Err(e) if lost_at.is_none() => return Err(format!("cannot reach the peer: {e}")),
                Err(_) => {}
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Commit => {
                self.committed = true;
                self.session.commit();
            }
            Order::Abort(reason) => {
                self.session.abort(&reason);
                self.over = true;
            }
            Order::Release => {
                self.session.release();
                self.over = true;
            }
            Order::Leave => self.over = true,
        }
    }

    fn drive(&mut self, link: C::Link) -> End {
        let gauge = link.gauge();
        let (tx, rx) = match link.split() {
            Ok(halves) => halves,
            Err(e) => return End::Broke(format!("cannot use the link: {e}")),
        };
        self.status.links.fetch_add(1, Relaxed);
        self.session.link_up(self.clock.now());
        self.reading = gauge.as_deref().and_then(LinkGauge::read);
        let (stop, queued) = (AtomicBool::new(false), AtomicU64::new(0));
        let (to, heard) = unbounded();
        let (clock, status) = (self.clock, self.status);
        let end = std::thread::scope(|scope| {
            let (stop, queued) = (&stop, &queued);
            scope.spawn(move || {
                let reader = FrameReader::new(rx);
                let budget = (queued, MAX_QUEUED_BYTES);
                read_link(reader, &to, clock, stop, &status.bytes_received, budget, Some);
            });
            let end = self.converse(tx, &heard, queued, gauge.as_deref());
            stop.store(true, Relaxed);
            end
        });
        self.session.link_down();
        self.reading = None;
        end
    }

    /// Sends and hears on one link until it breaks or all is said. Drops the sending half at its
    /// end, which closes the link.
    fn converse(
        &mut self,
        mut tx: <C::Link as Transport>::Tx,
        heard: &Receiver<Heard>,
        queued: &AtomicU64,
        gauge: Option<&dyn LinkGauge>,
    ) -> End {
        let mut scratch = Vec::new();
        let mut over_at = None;
        loop {
            let mut busy = match self.hear(heard, queued) {
                Ok(busy) => busy,
                Err(why) => return End::Broke(why),
            };
            busy |= self.take_work();
            if let Some(frame) = self.session.poll_transmit() {
                match write_frame(&mut tx, &frame, &mut scratch) {
                    Ok(bytes) => self.status.bytes_sent.fetch_add(bytes, Relaxed),
                    Err(e) => return End::Broke(format!("the link broke: {e}")),
                };
                busy = true;
            }
            let now = self.clock.now();
            if self.over {
                let since = *over_at.get_or_insert(now);
                if !busy || now.saturating_sub(since) > LAST_WORDS {
                    return End::Done;
                }
            }
            if !self.session.tick(now) {
                return End::Broke(format!("nothing heard for {:?}", self.limits.silence));
            }
            self.publish(gauge);
            if !busy {
                self.wait(heard);
            }
        }
    }

    /// Handles what the target said; `Ok(true)` if it said anything.
    fn hear(&mut self, heard: &Receiver<Heard>, queued: &AtomicU64) -> Result<bool, String> {
        let mut busy = false;
        loop {
            match heard.try_recv() {
                Ok(Ok((frame, at))) => {
                    queued.fetch_sub(weight(&frame), Relaxed);
                    self.session
                        .handle(frame, at)
                        .map_err(|e| format!("the peer broke the protocol: {e}"))?;
                    busy = true;
                    while let Some(event) = self.session.poll_event() {
                        let last =
                            matches!(event, SourceEvent::Refused(_) | SourceEvent::Answer(_));
                        if !self.notify(Notice::Event(event, at)) {
                            return Ok(true);
                        }
                        if last {
                            return self.after_last_word();
                        }
                    }
                }
                Ok(Err(e)) => return Err(e.to_string()),
                Err(TryRecvError::Empty) => return Ok(busy),
                Err(TryRecvError::Disconnected) => return Err("the link broke".into()),
            }
        }
    }

    /// The target closes this link; what is to be done now, the engine says.
    fn after_last_word(&mut self) -> Result<bool, String> {
        match self.orders.recv_timeout(LAST_WORDS) {
            Ok(order) => {
                self.obey(order);
                Ok(true)
            }
            Err(_) if self.committed => Err("the peer does not know this handoff now".into()),
            Err(_) => {
                self.over = true;
                Ok(true)
            }
        }
    }

    /// Takes orders, and segments where there is room; `true` if there were any.
    fn take_work(&mut self) -> bool {
        let mut busy = false;
        match self.orders.try_recv() {
            Ok(order) => {
                self.obey(order);
                busy = true;
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => self.over = true,
        }
        if self.over {
            return busy;
        }
        while self.session.has_room() {
            match self.outlet.sealed.try_recv() {
                Ok(Sealed::Segment(segment)) => {
                    self.submitted_bytes += segment.encoded_len() as u64;
                    self.session.submit(segment);
                }
                Ok(Sealed::Prepare(root, full_hash)) => self.session.prepare(root, full_hash),
                Err(_) => break,
            }
            // In this order, so that work in hand is counted at least once at any moment.
            self.status.unapplied_bytes.store(self.session.unapplied_bytes(), Relaxed);
            self.status.in_flight_bytes.store(self.in_flight_bytes(), Relaxed);
            self.status.queued_jobs.fetch_sub(1, Release);
            self.outlet.taken();
            busy = true;
        }
        busy
    }

    /// What the transport holds counts by its own word: the peer's acknowledgements of segments
    /// come late, so that there are few of them.
    fn in_flight_bytes(&self) -> u64 {
        match self.reading {
            Some(reading) => self.session.unsent_bytes() + reading.unacked_bytes,
            None => self.session.unapplied_bytes(),
        }
    }

    fn publish(&mut self, gauge: Option<&dyn LinkGauge>) {
        let unapplied = self.session.unapplied_bytes();
        self.status.unapplied_bytes.store(unapplied, Relaxed);
        self.status.applied_bytes.store(self.submitted_bytes - unapplied, Relaxed);
        let pings = self.session.rtt();
        let reading = gauge.and_then(LinkGauge::read);
        if let (Some(reading), Some(before)) = (reading, self.reading) {
            let delivered = reading.delivered_bytes.saturating_sub(before.delivered_bytes);
            self.status.delivered_bytes.fetch_add(delivered, Relaxed);
            self.status
                .busy_us
                .fetch_add(micros(reading.busy.saturating_sub(before.busy)), Relaxed);
        }
        let rate = reading.map_or(0, |reading| reading.delivery_bytes_per_s);
        self.status.delivery_bytes_per_s.store(rate, Relaxed);
        self.reading = reading;
        self.status.in_flight_bytes.store(self.in_flight_bytes(), Relaxed);
        // The transport's own measure has no queueing of ours in it.
        let (rtt, least) = match (reading, pings) {
            (Some(reading), _) if !reading.rtt.is_zero() => (reading.rtt, reading.min_rtt),
            (_, Some(pings)) => pings,
            _ => return,
        };
        self.status.rtt_us.store(micros(rtt), Relaxed);
        self.status.rtt_min_us.store(micros(least), Relaxed);
    }

    /// Sleeps until there may be something to do.
    fn wait(&self, heard: &Receiver<Heard>) {
        let mut select = crossbeam_channel::Select::new();
        select.recv(heard);
        select.recv(&self.orders);
        if !self.over && self.session.has_room() {
            select.recv(&self.outlet.sealed);
        }
        // Ready or not, the loop looks at everything again.
        let _ = select.ready_timeout(IDLE);
    }
}
