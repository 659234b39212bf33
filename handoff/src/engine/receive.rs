//! The target's driver.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, Select, TryRecvError, bounded, never, select, unbounded,
};

use super::{
    Incoming, ReceiveError, ReceiveOptions, Received,
    arriving::{Arriving, Running, Settled},
    reader::{Heard, read_link, segment_weight, weight},
    settle::decline_lost_copy,
};
use crate::{
    Clock, Geometry, Offer, Refusal, StateTable, TargetHost, Transport,
    ownership::{Journal, Question, answer, target},
    step::{Side, Step, StepHook},
    target::TargetSession,
    vm::{Prepared, TargetVm},
    wire::{Agreed, Frame, Hello, Intent, MAX_SEGMENT_BYTES, write_frame},
};

/// How long the engine sleeps when nothing comes.
const TICK: Duration = Duration::from_millis(10);
/// How long a side that has said its last word waits for the other to close.
const LINGER: Duration = Duration::from_secs(2);
/// Frames that are taken from the link before anything else is looked at.
const MOST_HEARD: usize = 64;
/// How many links one handoff may use.
const MAX_LINKS: u32 = 256;

/// Receives one guest over a link whose Hello begins a handoff. Returns when the guest runs here
/// and the source has let go (or did not say so in time), or when it is settled that it will not.
///
/// `relinks` brings later links of the same handoff, after the first one broke.
pub fn receive<L: Transport, H: TargetHost>(
    mut first: Incoming<L>,
    host: &mut H,
    journal: &mut Journal,
    relinks: &Receiver<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
) -> Result<Received<H::Vm>, ReceiveError> {
    let question = first.hello.handoff;
    // The id that the source made, and logs too.
    let span = tracing::error_span!("handoff", trace = %question.handoff, side = "target");
    let _entered = span.enter();
    tracing::info!(peer = options.peer, epoch = %question.epoch, "begun");
    options.steps.reached(Step::HelloGot);
    // Whoever wrote of a copy in its memory is gone: this process has the journal now.
    decline_lost_copy(journal)?;
    let fresh = journal.record().is_none();
    let counts = Counts::default();
    let admitted = {
        let Incoming { hello, tx, .. } = &mut first;
        keep_alive(tx, &counts, options, || admit(hello, host, journal, options))
    };
    let (prepared, agreed, geometry) = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => {
            // A peer that is gone already need not be told.
            let _ = first.refuse(refusal.clone());
            return Err(refusal.into());
        }
    };
    let limits = &options.limits;
    let handoff = first.hello.handoff;
    let audit = first.hello.audit;
    let session = TargetSession::new(
        handoff,
        agreed,
        options.window_bytes,
        limits.silence,
        limits.ping_every,
    );
    std::thread::scope(|scope| {
        let mut arriving =
            Arriving::new(scope, prepared, geometry, session, journal, options, audit, clock)
                .fresh(fresh);
        serve_links(first, &mut arriving, relinks, options, clock, &counts);
        arriving.finish(&counts)
    })
}

/// Serves one link after the other, until it is settled what becomes of the guest.
fn serve_links<L: Transport, Vm: TargetVm>(
    mut link: Incoming<L>,
    arriving: &mut Arriving<'_, Vm>,
    relinks: &Receiver<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
    counts: &Counts,
) {
    for _ in 0..MAX_LINKS {
        let served = serve(link, arriving, relinks, options, clock, counts);
        if !matches!(served, Served::Settled) {
            arriving.link_lost();
        }
        let why = match served {
            _ if arriving.is_settled() => return,
            Served::Settled => return,
            Served::Replaced(newer) => {
                link = *newer;
                continue;
            }
            Served::Broke(why) => why,
        };
        tracing::warn!(why, "link lost");
        link = match next_link(arriving, relinks, options, clock) {
            Some(link) => link,
            None if arriving.is_settled() => return,
            None => return arriving.give_up(why),
        };
    }
    arriving.give_up(format!("{MAX_LINKS} links broke"));
}

/// Bytes on all links.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

/// Does what may take long, and says meanwhile, now and then, that this side lives.
fn keep_alive<T>(
    tx: &mut (impl std::io::Write + Send),
    counts: &Counts,
    options: &ReceiveOptions,
    work: impl FnOnce() -> T,
) -> T {
    let (done, over) = bounded::<()>(0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut scratch = Vec::new();
            while over.recv_timeout(options.limits.ping_every) == Err(RecvTimeoutError::Timeout) {
                match write_frame(tx, &Frame::Ping(0), &mut scratch) {
                    Ok(bytes) => counts.sent.fetch_add(bytes, Relaxed),
                    // Whoever uses the link next finds out.
                    Err(_) => return,
                };
            }
        });
        let worked = work();
        drop(done);
        worked
    })
}

type Admitted<Vm> = (Prepared<Vm>, Agreed, Geometry);

/// Checks all that an offer needs, the cheap things first.
fn admit<H: TargetHost>(
    hello: &Hello,
    host: &mut H,
    journal: &mut Journal,
    options: &ReceiveOptions,
) -> Result<Admitted<H::Vm>, Refusal> {
    options.versions.agree(hello.versions)?;
    let Intent::New(offer) = &hello.intent else {
        return Err(Refusal::Other("this handoff is not under way here".into()));
    };
    target::admit(journal.record(), hello.handoff).map_err(Refusal::Conflict)?;
    let mut prepared = host.prepare(offer)?;
    options.steps.reached(Step::Reserved);
    let agreed = agree(offer, &mut prepared)
        .ok_or_else(|| Refusal::Other("what is ready there is not what was offered".into()))
        .and_then(|agreed| take_note(journal, hello.handoff, options).map(|()| agreed));
    match agreed {
        Ok(agreed) => Ok((prepared, agreed, offer.geometry)),
        Err(refusal) => {
            prepared.vm.discard();
            Err(refusal)
        }
    }
}

/// Makes durable that the offer was taken. Only then may the source hear so: it may commit early,
/// and whatever happens here must be answered.
fn take_note(
    journal: &mut Journal,
    offered: Question,
    options: &ReceiveOptions,
) -> Result<(), Refusal> {
    let event = target::Event::Receive { offered, peer: options.peer.clone() };
    let step = target::step(journal.record(), event).map_err(|e| Refusal::Other(e.to_string()))?;
    let Some(record) = step.write else {
        return Err(Refusal::Conflict("the record there forbids it".into()));
    };
    let durable = Step::durable(Side::Target, &record);
    journal.write(record).map_err(|e| Refusal::Other(e.to_string()))?;
    options.steps.reached(durable);
    Ok(())
}

/// What is ready, in the offer's terms; `None` if it is no answer to the offer.
fn agree<Vm>(offer: &Offer, prepared: &mut Prepared<Vm>) -> Option<Agreed> {
    let mut held = prepared.bases.iter().map(|(_, base)| base.id());
    if held.next() != Some(offer.base) {
        return None;
    }
    let mut bases = 0;
    let mut offered = offer.also.iter().enumerate();
    for id in held {
        let (n, _) = offered.find(|(_, also)| **also == id)?;
        bases |= 1 << n;
    }
    let start = prepared.start.as_mut().map(StateTable::root);
    let known = match start {
        None => None,
        Some(root) => Some(u8::try_from(offer.known.iter().position(|k| *k == root)?).ok()?),
    };
    let agreed = Agreed { bases, known };
    agreed.answers(offer).then_some(agreed)
}

/// Waits for the source to come back, for as long as it makes sense in the present state, and until it
/// begins anew.
fn next_link<L: Transport, Vm: TargetVm>(
    arriving: &mut Arriving<'_, Vm>,
    relinks: &Receiver<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
) -> Option<Incoming<L>> {
    let deadline = arriving.relink_deadline(clock.now());
    let mut newer = options.newer.clone();
    while !arriving.is_settled() {
        let left = deadline.saturating_sub(clock.now());
        select! {
            recv(relinks) -> link => {
                if let Some(link) = check_relink(link.ok()?, arriving) {
                    return Some(link);
                }
            }
            recv(newer) -> offered => match offered {
                Ok(offered) => arriving.newer_offer(offered),
                // Nobody is left who could bring one.
                Err(_) => newer = never(),
            },
            default(left) => return None,
        }
    }
    None
}

/// A link that is not of this handoff is refused.
fn check_relink<L: Transport, Vm: TargetVm>(
    link: Incoming<L>,
    arriving: &Arriving<'_, Vm>,
) -> Option<Incoming<L>> {
    if link.hello.handoff == arriving.handoff() {
        return Some(link);
    }
    let busy = Refusal::Conflict("another handoff of it is under way".into());
    let _ = link.refuse(busy);
    None
}

/// Why a link is no longer served.
enum Served<L: Transport> {
    /// It is settled whether the guest runs here.
    Settled,
    /// The source made a new link.
    Replaced(Box<Incoming<L>>),
    /// It broke.
    Broke(String),
}

/// A link ended, for this reason, unless the source has made a newer one.
fn ended<L: Transport>(newer: Option<Incoming<L>>, why: String) -> Served<L> {
    newer.map_or(Served::Broke(why), |link| Served::Replaced(Box::new(link)))
}

/// Serves one link. A second thread reads it, so that pings are answered while this one is busy
/// with a disk or a machine.
fn serve<L: Transport, Vm: TargetVm>(
    link: Incoming<L>,
    arriving: &mut Arriving<'_, Vm>,
    relinks: &Receiver<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
    counts: &Counts,
) -> Served<L> {
    let Incoming { hello, tx, reader } = link;
    let version = match options.versions.agree(hello.versions) {
        Ok(version) => version,
        Err(refusal) => return Served::Broke(refusal.to_string()),
    };
    let now = clock.now();
    match hello.intent {
        Intent::Settle => {
            let verdict = answer(arriving.record(), hello.handoff);
            arriving.session.link_up_to_settle(version, verdict, now);
        }
        Intent::New(_) | Intent::Resume => arriving.session.link_up(version, now),
    }
    // In an option, so that ending here closes the link under the reading thread too.
    let tx = Mutex::new(Some(tx));
    let (stop, queued) = (AtomicBool::new(false), AtomicU64::new(0));
    let (to, heard) = unbounded();
    std::thread::scope(|scope| {
        let (tx, stop, queued) = (&tx, &stop, &queued);
        let reading = scope.spawn(move || {
            let mut scratch = Vec::new();
            // A source that keeps to the window never fills this.
            let most = options.window_bytes.saturating_add(MAX_SEGMENT_BYTES as u64);
            let pong = |frame| match frame {
                Frame::Ping(nonce) => {
                    // A link that cannot be written is noticed by the engine's own next write.
                    if let Ok(bytes) = send_on(tx, &Frame::Pong(nonce), &mut scratch) {
                        counts.sent.fetch_add(bytes, Relaxed);
                    }
                    Some(Frame::Pong(nonce))
                }
                frame => Some(frame),
            };
            read_link(reader, &to, clock, stop, &counts.received, (queued, most), pong)
        });
        let mut talk = Talk { tx, heard, queued, counts, steps: &options.steps, clock };
        let served = talk.converse(arriving, relinks, options);
        if matches!(served, Served::Settled) && !arriving.is_over_there() {
            talk.linger();
        }
        stop.store(true, Relaxed);
        drop(lock(tx).take());
        // A thread that panicked has left nothing.
        arriving.session.tore(reading.join().unwrap_or_default());
        served
    })
}

/// One link while it is served.
struct Talk<'a, Tx> {
    tx: &'a Mutex<Option<Tx>>,
    heard: Receiver<Heard>,
    queued: &'a AtomicU64,
    counts: &'a Counts,
    steps: &'a StepHook,
    clock: &'a dyn Clock,
}

impl<Tx: std::io::Write> Talk<'_, Tx> {
    fn converse<L: Transport, Vm: TargetVm>(
        &mut self,
        arriving: &mut Arriving<'_, Vm>,
        relinks: &Receiver<Incoming<L>>,
        options: &ReceiveOptions,
    ) -> Served<L> {
        let mut scratch = Vec::new();
        let mut received = 0;
        let mut newer = None;
        loop {
            let heard = self.hear(arriving);
            let broke = heard.and_then(|()| self.proceed(arriving)).err();
            while let Some(frame) = arriving.session.poll_transmit() {
                match send_on(self.tx, &frame, &mut scratch) {
                    Ok(bytes) => self.counts.sent.fetch_add(bytes, Relaxed),
                    Err(e) => return ended(newer, format!("the link broke: {e}")),
                };
                self.steps.reached(Step::sent(&frame));
            }
            if arriving.is_settled() {
                return Served::Settled;
            }
            if let Some(why) = broke {
                return ended(newer, why);
            }
            newer =
                relinks.try_iter().filter_map(|link| check_relink(link, arriving)).last().or(newer);
            // What came over this link whole need not come again.
            if newer.is_some() && self.heard.is_empty() {
                return ended(newer, String::new());
            }
            let now = self.clock.now();
            options.newer.try_iter().for_each(|offered| arriving.newer_offer(offered));
            arriving.check_time(now);
            // Part of a long frame on a slow link is a sign of life too.
            let bytes = self.counts.received.load(Relaxed);
            if std::mem::replace(&mut received, bytes) != bytes {
                arriving.session.heard(now);
            }
            if !arriving.session.tick(now) {
                return ended(newer, "nothing heard for too long".into());
            }
            let mut select = Select::new();
            select.recv(arriving.decoded());
            if arriving.has_room() {
                select.recv(&self.heard);
            }
            // Ready or not, the loop looks at everything again.
            if select.try_ready().is_ok() {
                continue;
            }
            drop(select);
            if !arriving.tidy() {
                let mut select = Select::new();
                select.recv(arriving.decoded());
                if arriving.has_room() {
                    select.recv(&self.heard);
                }
                let _ = select.ready_timeout(TICK);
            }
        }
    }

    /// Applies what is decoded, one segment at a time: the loop says in between how far it is.
    fn proceed<Vm: TargetVm>(&mut self, arriving: &mut Arriving<'_, Vm>) -> Result<(), String> {
        if let Some(bytes) = arriving.proceed().map_err(|e| e.to_string())? {
            self.queued.fetch_sub(segment_weight(bytes), Relaxed);
        }
        Ok(())
    }

    /// Takes what the source said, as long as there is room for more: nothing that can be decoded
    /// waits for what is applied meanwhile.
    fn hear<Vm: TargetVm>(&mut self, arriving: &mut Arriving<'_, Vm>) -> Result<(), String> {
        for _ in 0..MOST_HEARD {
            if !arriving.has_room() || self.heard.is_empty() {
                break;
            }
            self.hear_one(arriving)?;
        }
        Ok(())
    }

    fn hear_one<Vm: TargetVm>(&mut self, arriving: &mut Arriving<'_, Vm>) -> Result<(), String> {
        match self.heard.try_recv() {
            Ok(Ok((Frame::Pong(_), at))) => {
                // The reading thread answered a ping, or the source did.
                self.queued.fetch_sub(weight(&Frame::Pong(0)), Relaxed);
                arriving.session.heard(at);
                Ok(())
            }
            Ok(Ok((frame, _))) => {
                match frame {
                    // A segment is in memory until it is applied.
                    Frame::Segment(_) => {}
                    Frame::Rest(_) => {
                        self.queued.fetch_add(arriving.session.held_bytes(), Relaxed);
                    }
                    _ => _ = self.queued.fetch_sub(weight(&frame), Relaxed),
                }
                // Now and not when it came: a busy engine has not heard silence.
                let now = self.clock.now();
                let got = Step::got(&frame);
                arriving.session.handle(frame, now).map_err(|e| e.to_string())?;
                self.steps.reached(got);
                arriving.act();
                Ok(())
            }
            Ok(Err(e)) => Err(e.to_string()),
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => Err("the link broke".into()),
        }
    }
}

impl<Tx> Talk<'_, Tx> {
    /// Lets the source read the last word before the link is closed: closing it under data that
    /// still comes in may destroy what was said.
    fn linger(&mut self) {
        let deadline = self.clock.now() + LINGER;
        while self.clock.now() < deadline {
            match self.heard.recv_timeout(TICK) {
                Ok(Ok((frame, _))) => _ = self.queued.fetch_sub(weight(&frame), Relaxed),
                Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What is inside is replaced whole or not at all: a panic elsewhere leaves it usable.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn send_on<Tx: std::io::Write>(
    tx: &Mutex<Option<Tx>>,
    frame: &Frame,
    scratch: &mut Vec<u8>,
) -> std::io::Result<u64> {
    match lock(tx).as_mut() {
        Some(tx) => write_frame(tx, frame, scratch),
        None => Err(std::io::ErrorKind::BrokenPipe.into()),
    }
}

impl<Vm: TargetVm> Arriving<'_, Vm> {
    /// What came of it.
    fn finish(mut self, counts: &Counts) -> Result<Received<Vm>, ReceiveError> {
        match self.take_settled() {
            Settled::Runs { released } => {
                let Running { vm, record, full_hash, table, contents } = self.into_running()?;
                Ok(Received {
                    vm,
                    record,
                    released,
                    full_hash,
                    table,
                    contents,
                    bytes_received: counts.received.load(Relaxed),
                    bytes_sent: counts.sent.load(Relaxed),
                })
            }
            Settled::Failed(error) => {
                self.discard();
                Err(error)
            }
        }
    }
}
