//! The source's thread that owns the session: makes links, sends, hears, and makes them again.

use std::{
    io,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, Release},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};

use super::{
    Limits, Untold,
    farewell::Owed,
    pipeline::Outlet,
    reader::{Heard, read_link, weight},
    status::{LinkStatus, Room},
};
use crate::{
    Clock, Connect, Transport,
    root::StateRoot,
    source::{Outgoing, SourceEvent, SourceSession},
    stage::Segment,
    step::{Step, StepHook},
    wire::{FrameReader, FrameWriter},
};

/// How long a courier without a link sleeps between looking at what waits for it.
const IDLE: Duration = Duration::from_millis(5);
/// How often a courier that is about to end looks whether all is said.
const ENDING: Duration = Duration::from_millis(100);
/// Until the target has welcomed the handoff once, links are made again only for so many times the
/// bound on the first: what answers there may be no cloudlet at all.
const FIRST_PATIENCE: u32 = 2;
/// How long the last words may take to be sent, and to be heard.
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
    /// The gate is open: say Commit as soon as it is its turn, and keep saying it.
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

pub(super) struct Courier<'a, C: Connect> {
    pub(super) session: SourceSession,
    pub(super) connect: &'a mut C,
    pub(super) outlet: Outlet,
    pub(super) orders: Receiver<Order>,
    pub(super) notices: Sender<Notice>,
    pub(super) status: &'a LinkStatus,
    pub(super) limits: &'a Limits,
    pub(super) steps: &'a StepHook,
    /// The step that is done when the frame under way is written.
    pub(super) under_way: Option<Step>,
    pub(super) clock: &'a dyn Clock,
    pub(super) over: bool,
    /// Nothing more comes from the workers.
    pub(super) exhausted: bool,
    pub(super) submitted_bytes: u64,
    /// The target has taken the handoff.
    pub(super) welcomed: bool,
    /// Attempts to make a link since one worked.
    pub(super) misses: u32,
    /// What the target may have to be told later.
    pub(super) owed: Owed,
    /// Abort is the last word.
    pub(super) aborted: bool,
}

/// Why a link is no longer used.
enum End {
    /// The handoff is over: nothing more is to be said.
    Done,
    /// It broke.
    Broke(String),
}

impl<C: Connect> Courier<'_, C> {
    /// Works until the engine says that the handoff is over, or no link can be made any more. What is
    /// left to say then.
    pub(super) fn run(mut self) -> Option<Untold> {
        self.use_links();
        self.owed.left()
    }

    fn use_links(&mut self) {
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
                    if worked {
                        (self.welcomed, self.misses) = (true, 0);
                    }
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

    /// For how long links are made again.
    fn grace(&self) -> Duration {
        let limits = self.limits;
        match (self.session.is_committed(), self.welcomed) {
            (true, _) => limits.commit,
            (false, true) => limits.relink_grace,
            (false, false) => limits.relink_grace.min(limits.connect * FIRST_PATIENCE),
        }
    }

    /// Makes a link within the bound that holds now; `None` if the handoff ended meanwhile.
    fn make_link(&mut self, lost_at: Option<Duration>) -> Result<Option<C::Link>, String> {
        let Some(lost_at) = lost_at else {
            let first = self.connect.connect(self.limits.connect);
            return first.map(Some).map_err(|e| format!("cannot reach the peer: {e}"));
        };
        let mut last = String::new();
        loop {
            let grace = self.grace();
            let left = (lost_at + grace).saturating_sub(self.clock.now());
            if left.is_zero() {
                return Err(format!("no link for {grace:?}{last}"));
            }
            let wait = self.limits.retry.wait(self.misses, rand::random());
            self.misses = self.misses.saturating_add(1);
            match self.orders.recv_timeout(wait.min(left)) {
                Ok(order) => self.obey(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
            if self.over {
                return Ok(None);
            }
            match self.connect.connect(left.min(self.limits.attempt)) {
                Ok(link) => return Ok(Some(link)),
                Err(e) => last = format!(" ({e})"),
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            // Only to wake this thread: whether it may be said, the gate knows.
            Order::Commit => {}
            Order::Abort(reason) => {
                let patience = self.limits.target_waits(self.session.is_complete());
                self.owed.aborted(self.session.handoff(), &reason, patience);
                self.session.abort(&reason);
                (self.over, self.aborted) = (true, true);
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
        self.owed.link_up();
        self.status.link_up(gauge);
        self.status.heard(self.clock.now());
        self.session.link_up(self.clock.now());
        let (stop, queued) = (AtomicBool::new(false), AtomicU64::new(0));
        let (to, heard) = unbounded();
        let (clock, status) = (self.clock, self.status);
        let end = std::thread::scope(|scope| {
            let (stop, queued) = (&stop, &queued);
            scope.spawn(move || {
                let reader = FrameReader::new(rx);
                let budget = (queued, MAX_QUEUED_BYTES);
                read_link(reader, &to, clock, stop, &status.bytes_received, budget, Some)
            });
            let end = self.converse(tx, &heard, queued);
            stop.store(true, Relaxed);
            end
        });
        self.session.link_down();
        self.status.link_down();
        end
    }

    /// Sends and hears on one link until it breaks or all is said. Drops the sending half at its
    /// end, which closes the link.
    fn converse(
        &mut self,
        mut tx: <C::Link as Transport>::Tx,
        heard: &Receiver<Heard>,
        queued: &AtomicU64,
    ) -> End {
        let mut writer = FrameWriter::default();
        let (mut over_at, mut said) = (None, false);
        let mut received = self.status.bytes_received.load(Relaxed);
        loop {
            let mut busy = match self.hear(heard, queued) {
                Ok(busy) => busy,
                // The peer heard all there was to say, and closed the link.
                Err(_) if said => {
                    self.owed.said();
                    return End::Done;
                }
                Err(why) => return End::Broke(why),
            };
            busy |= self.take_order();
            // Bytes and not frames are a sign of life: of a long frame on a slow link each part is.
            let bytes = self.status.bytes_received.load(Relaxed);
            if std::mem::replace(&mut received, bytes) != bytes {
                let now = self.clock.now();
                self.session.heard(now);
                self.status.heard(now);
            }
            let room = self.publish(writer.left());
            let mut pause = room.pause;
            match self.transmit(&mut tx, &mut writer, room) {
                Ok(sent) => busy |= sent,
                Err(e) => return End::Broke(format!("the link broke: {e}")),
            }
            let now = self.clock.now();
            if self.over {
                let since = *over_at.get_or_insert(now);
                // A connection that is closed while the peer's words lie unread in it is reset, and what the
                // peer has not read of ours is lost with it. A target that does not hear that it is over
                // holds its copy for minutes: so it closes, if it does so in time.
                said |= !busy && writer.left() == 0;
                let heard = said && !self.aborted;
                if heard || now.saturating_sub(since) > LAST_WORDS {
                    return End::Done;
                }
                pause = pause.min(ENDING);
            }
            if !self.session.tick(now) {
                return End::Broke(format!("nothing heard for {:?}", self.limits.silence));
            }
            if !busy {
                self.wait(heard, writer.left() == 0, pause);
            }
        }
    }

    /// Writes the next piece of what there is to send, unless the link has enough; `true` if it did.
    fn transmit(
        &mut self,
        tx: &mut <C::Link as Transport>::Tx,
        writer: &mut FrameWriter,
        room: Room,
    ) -> io::Result<bool> {
        if writer.left() == 0 && !self.next_frame(writer, room.bytes > 0)? {
            return Ok(false);
        }
        // Words are short, and are not held back.
        let most = if writer.is_segment() { room.bytes } else { usize::MAX };
        if most == 0 {
            return Ok(false);
        }
        let taken = writer.write(tx, most)?;
        self.status.bytes_sent.fetch_add(taken as u64, Relaxed);
        if writer.left() == 0 {
            self.steps.reached(self.under_way.take());
        }
        Ok(taken > 0)
    }

    /// Gives the writer the next frame: a word, a segment of the window, or a new one, which is
    /// taken only when all before it was given to the link.
    fn next_frame(&mut self, writer: &mut FrameWriter, room: bool) -> io::Result<bool> {
        loop {
            match self.session.poll_outgoing() {
                Some(Outgoing::Frame(frame)) => {
                    self.under_way = Step::sent(&frame);
                    writer.put(&frame)?;
                }
                Some(Outgoing::Segment(segment)) => {
                    self.under_way = Some(Step::sent_segment(&segment));
                    writer.put_segment(segment)?;
                }
                Some(Outgoing::Rest(segment, from)) => {
                    self.under_way = Some(Step::sent_segment(&segment));
                    writer.put_rest(segment, from)?;
                }
                None if self.commit() => continue,
                None if room && self.take_work() => continue,
                None => return Ok(false),
            }
            return Ok(true);
        }
    }

    /// Says Commit if it is its turn and may be said; `true` if it does.
    fn commit(&mut self) -> bool {
        let says =
            !self.over && self.session.may_commit() && self.status.commit.pass(self.clock.now());
        if says {
            self.session.commit();
        }
        says
    }

    /// Handles what the target said; `Ok(true)` if it said anything.
    fn hear(&mut self, heard: &Receiver<Heard>, queued: &AtomicU64) -> Result<bool, String> {
        let mut busy = false;
        loop {
            match heard.try_recv() {
                Ok(Ok((frame, at))) => {
                    queued.fetch_sub(weight(&frame), Relaxed);
                    let got = Step::got(&frame);
                    self.session
                        .handle(frame, at)
                        .map_err(|e| format!("the peer broke the protocol: {e}"))?;
                    self.steps.reached(got);
                    busy = true;
                    while let Some(event) = self.session.poll_event() {
                        self.owed.heard(&event);
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
                Ok(Err(e)) => {
                    self.owed.link_ended(&e);
                    return Err(e.to_string());
                }
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
            Err(_) if self.session.is_committed() => {
                Err("the peer does not know this handoff now".into())
            }
            Err(_) => {
                self.over = true;
                Ok(true)
            }
        }
    }

    /// Takes an order; `true` if there was one.
    fn take_order(&mut self) -> bool {
        match self.orders.try_recv() {
            Ok(order) => {
                self.obey(order);
                return true;
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => self.over = true,
        }
        false
    }

    /// Takes the next of what was sealed, if there is room for it; `true` if there was any.
    fn take_work(&mut self) -> bool {
        if self.over || !self.session.has_room() {
            return false;
        }
        match self.outlet.sealed.try_recv() {
            Ok(Sealed::Segment(segment)) => {
                let bytes = segment.encoded_len() as u64;
                self.submitted_bytes += bytes;
                self.session.submit(segment);
                self.status.unsent_bytes.fetch_add(bytes, Release);
                self.status.ahead.taken(bytes);
            }
            Ok(Sealed::Prepare(root, full_hash)) => self.session.prepare(root, full_hash),
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => {
                self.exhausted = true;
                return false;
            }
        }
        self.status.unapplied_bytes.store(self.session.unapplied_bytes(), Relaxed);
        self.status.refresh();
        // Last, so that work in hand is counted at least once at any moment.
        self.status.queued_jobs.fetch_sub(1, Release);
        self.outlet.taken();
        true
    }

    /// Tells the others how the link stands, with `unwritten` bytes of a frame under way. How much
    /// it may be given now follows from that.
    fn publish(&mut self, unwritten: usize) -> Room {
        let unapplied = self.session.unapplied_bytes();
        self.status.unapplied_bytes.store(unapplied, Relaxed);
        self.status.applied_bytes.store(self.submitted_bytes - unapplied, Relaxed);
        let unsent = self.session.unsent_bytes() + unwritten as u64;
        self.status.unsent_bytes.store(unsent, Release);
        if let Some((rtt, least)) = self.session.rtt() {
            self.status.pinged(rtt, least);
        }
        let flow = self.status.refresh();
        let memory = self.outlet.window(unapplied);
        let Some(flow) = flow else {
            self.session.limit_window(memory);
            return Room::UNMEASURED;
        };
        self.session.limit_window(flow.window_bytes().min(memory));
        self.status.limit_unsent(flow.unsent_bytes());
        flow.room()
    }

    /// Sleeps until there may be something to do, `pause` at most.
    fn wait(&self, heard: &Receiver<Heard>, idle: bool, pause: Duration) {
        let mut select = crossbeam_channel::Select::new();
        select.recv(heard);
        select.recv(&self.orders);
        if idle && !self.over && !self.exhausted && self.session.has_room() {
            select.recv(&self.outlet.sealed);
        }
        // Ready or not, the loop looks at everything again.
        let _ = select.ready_timeout(pause);
    }
}
