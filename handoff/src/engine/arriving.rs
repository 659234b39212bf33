//! A guest on its way in: applies what came, and carries out what the ownership machine decides.

use std::{thread::Scope, time::Duration};

use crossbeam_channel::Receiver;

use super::{
    Limits, MAX_MACHINE_STATE_BYTES, ReceiveError, ReceiveOptions, TABLES_BYTES,
    decode::{Decoded, Decoders, Undecodable},
    landing::Landing,
    worker::micros,
};
use crate::{
    Clock, Geometry, StateTable,
    ownership::{
        Guest, Journal, Question, Record, State, Step, Verdict,
        target::{self, Event, Say},
    },
    root::StateRoot,
    stage::{OpenError, Resolver, SegmentKind, SentCache},
    step::{Side, Step as HandoffStep},
    target::{ASK_AFTER, TargetEvent, TargetSession},
    vm::{Prepared, TargetVm},
    wire::{Prepare, Resumed},
};

/// After so many segments the tables are counted: they cannot have grown by more than 3 MiB.
const COUNT_EVERY: u32 = 8;
/// So many groups of chunks are hashed before it is looked again whether anything came: a fraction
/// of a millisecond.
const TIDY_GROUPS: usize = 64;

/// How it ended.
#[derive(Debug)]
pub(super) enum Settled {
    /// The guest runs here.
    Runs {
        /// Whether the source said that it let go.
        released: bool,
    },
    /// It does not, and will not from this handoff.
    Failed(ReceiveError),
}

/// A guest that runs, and what is known of it.
pub(super) struct Running<Vm> {
    pub(super) vm: Vm,
    pub(super) record: Record,
    pub(super) full_hash: Option<[u8; 32]>,
    pub(super) table: StateTable,
    pub(super) contents: SentCache,
}

pub(super) struct Arriving<'a, Vm> {
    pub(super) session: TargetSession,
    vm: Landing<Vm>,
    running: bool,
    decoders: Decoders,
    resolver: Resolver,
    /// Segments until it is counted again how much memory the tables take.
    until_counted: u32,
    state: Vec<u8>,
    /// Everything was sent; what came is still to be applied.
    all_sent: Option<Prepare>,
    /// Everything came and was verified, ahead of a Commit that has not come: since when, and which
    /// root it has.
    verified: Option<(Duration, StateRoot)>,
    /// The source committed early; what it sent is not verified yet.
    committed: bool,
    journal: &'a mut Journal,
    /// There was no record of this VM before its offer.
    fresh: bool,
    handoff: Question,
    options: &'a ReceiveOptions,
    audit: bool,
    full_hash: Option<[u8; 32]>,
    clock: &'a dyn Clock,
    prepare_us: u64,
    /// When Prepared was said, or when the guest began to run.
    since: Duration,
    settled: Option<Settled>,
    over_there: bool,
}

impl<'a, Vm: TargetVm> Arriving<'a, Vm> {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new<'scope>(
        scope: &'scope Scope<'scope, '_>,
        prepared: Prepared<Vm>,
        geometry: Geometry,
        session: TargetSession,
        journal: &'a mut Journal,
        options: &'a ReceiveOptions,
        audit: bool,
        clock: &'a dyn Clock,
    ) -> Self {
        let handoff = session.handoff();
        let Prepared { vm, bases, start } = prepared;
        let mut resolver = Resolver::new(bases, geometry).keeping(options.contents_bytes);
        if let Some(table) = start {
            resolver = resolver.with_start(table);
        }
        Self {
            session,
            vm: Landing::new(scope, vm),
            running: false,
            decoders: Decoders::start(scope, options.workers, resolver.inspector()),
            resolver,
            until_counted: COUNT_EVERY,
            state: Vec::new(),
            all_sent: None,
            verified: None,
            committed: false,
            journal,
            fresh: false,
            handoff,
            options,
            audit,
            full_hash: None,
            clock,
            prepare_us: 0,
            since: clock.now(),
            settled: None,
            over_there: false,
        }
    }

    /// The same, of a VM of which there was no record before its offer.
    pub(super) fn fresh(self, fresh: bool) -> Self {
        Self { fresh, ..self }
    }

    pub(super) fn handoff(&self) -> Question {
        self.handoff
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.journal.record()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled.is_some()
    }

    fn limits(&self) -> &'a Limits {
        &self.options.limits
    }

    /// Acts on everything that the session took from the last frame.
    pub(super) fn act(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                TargetEvent::Segment(segment) => self.decoders.push(segment),
                TargetEvent::Prepare(prepare) => {
                    // What was written last is flushed while the rest is looked at.
                    self.vm.hurry();
                    self.all_sent = Some(prepare);
                }
                // Said twice, or answered late: the guest runs already.
                TargetEvent::Commit | TargetEvent::Answer(_) if self.running => {}
                TargetEvent::Commit | TargetEvent::Answer(Verdict::Committed) => self.committed(),
                TargetEvent::CommitLost => {
                    self.decline("the source has lost what it had not sent yet".into());
                }
                TargetEvent::Answer(verdict) => self.take_note(Event::Answer(verdict), "asked"),
                TargetEvent::Aborted(why) => self.aborted(why),
                TargetEvent::Released => {
                    self.take_note(Event::Released(self.handoff), "released");
                    if self.running {
                        self.settle(Settled::Runs { released: true });
                    }
                }
            }
        }
    }

    fn settle(&mut self, settled: Settled) {
        self.settled.get_or_insert(settled);
    }

    /// Whether one more frame can be taken from the link.
    pub(super) fn has_room(&self) -> bool {
        self.decoders.has_room()
    }

    /// Becomes ready when there is something for [`Arriving::proceed`], perhaps.
    pub(super) fn decoded(&self) -> &Receiver<(u64, Result<Decoded, Undecodable>)> {
        self.decoders.done()
    }

    /// Applies the segment whose turn it is, if it is decoded, and goes on to the end once all were
    /// applied. Returns the bytes of the segment; an error if the link is to be given up.
    pub(super) fn proceed(&mut self) -> Result<Option<u64>, OpenError> {
        let applied = match self.decoders.next() {
            Some(outcome) => Some(self.take(outcome)?),
            None => None,
        };
        if self.decoders.is_empty()
            && !self.is_settled()
            && let Some(prepare) = self.all_sent.take()
        {
            self.prepare(&prepare);
        }
        Ok(applied)
    }

    /// The link is gone. What came whole is applied, so that it need not come again, and if that
    /// was all, the link is not missed.
    pub(super) fn link_lost(&mut self) {
        let mut whole = true;
        while !self.is_settled()
            && whole
            && let Some(outcome) = self.decoders.wait()
        {
            whole = self.take(outcome).is_ok();
        }
        self.decoders.forget();
        if let Some(prepare) = self.all_sent.take()
            && whole
            && !self.is_settled()
        {
            self.prepare(&prepare);
        }
        self.say_prepared();
        self.committed = false;
        self.session.link_down();
    }

    fn take(&mut self, outcome: Result<Decoded, Undecodable>) -> Result<u64, OpenError> {
        let decoded = match outcome {
            Ok(decoded) => decoded,
            Err(Undecodable::Link(e)) => {
                // What it would have completed is not whole, even if nothing else is at hand now.
                // The source says it again behind what it sends again.
                self.all_sent = None;
                return Err(e);
            }
            Err(Undecodable::Content(why)) => {
                self.decline(why);
                return Ok(0);
            }
        };
        let mark = decoded.mark;
        let applied = matches!(decoded.kind, SegmentKind::Chunks)
            .then_some(HandoffStep::RoundApplied(mark.round));
        match self.apply(decoded) {
            Ok(()) => {
                self.session.applied(&mark, self.clock.now());
                if self.decoders.is_empty() {
                    self.session.caught_up();
                }
                self.options.steps.reached(applied);
            }
            Err(why) => self.decline(why),
        }
        Ok(mark.bytes)
    }

    fn apply(&mut self, decoded: Decoded) -> Result<(), String> {
        let Decoded { mark, kind, content } = decoded;
        match kind {
            SegmentKind::Chunks => {
                self.resolver
                    .apply_inspected(&mut self.vm, &content)
                    .map_err(|e| format!("segment {}: {e}", mark.seq))?;
                self.stay_in_bounds();
            }
            SegmentKind::MachineState => {
                let piece = content.body();
                if self.state.len() + piece.len() > MAX_MACHINE_STATE_BYTES {
                    return Err(format!(
                        "the machine's state is larger than {MAX_MACHINE_STATE_BYTES} bytes"
                    ));
                }
                self.state.extend_from_slice(piece);
                // The guest is paused: no chunk comes after this.
                self.vm.hurry();
            }
        }
        self.decoders.reuse(content);
        Ok(())
    }

    /// What is kept for the way back gives way to what is needed on this one.
    fn stay_in_bounds(&mut self) {
        self.until_counted -= 1;
        if self.until_counted == 0 {
            self.until_counted = COUNT_EVERY;
            self.resolver.keep_at_most(TABLES_BYTES.saturating_sub(self.resolver.table_bytes()));
        }
    }

    /// Everything came: makes sure of it, and makes it durable. If the source has committed, the guest
    /// runs; if it is about to, that is waited for a little; else Prepared is said.
    fn prepare(&mut self, prepare: &Prepare) {
        let start = self.clock.now();
        if let Err(why) = self.verify(prepare) {
            return self.decline(why);
        }
        self.options.steps.reached(HandoffStep::Verified);
        let now = self.clock.now();
        self.prepare_us = micros(now.saturating_sub(start));
        self.verified = Some((now, prepare.root));
        if self.committed {
            self.commit(Event::CommitVerified(self.handoff));
        } else if !prepare.early {
            self.say_prepared();
        }
    }

    /// What was verified is to outlast a source that says no more: Prepared, durable, then said.
    fn say_prepared(&mut self) {
        let Some((_, root)) = self.verified.take().filter(|_| !self.is_settled()) else { return };
        let start = self.clock.now();
        match self.step(Event::Prepare { offered: self.handoff, root }) {
            Ok(Step { say: Some(Say::Prepared(..)), .. }) => {
                let now = self.clock.now();
                self.prepare_us += micros(now.saturating_sub(start));
                self.since = now;
                self.session.prepared(root, self.full_hash, now);
            }
            Ok(_) => self.decline("the record here forbids it".into()),
            Err(why) => self.decline(why),
        }
    }

    /// The source committed: the guest runs as soon as it is verified.
    fn committed(&mut self) {
        if self.verified.is_some() {
            self.commit(Event::CommitVerified(self.handoff));
        } else if self.session.is_prepared() {
            self.commit(Event::Commit(self.handoff));
        } else {
            self.committed = true;
        }
    }

    fn verify(&mut self, prepare: &Prepare) -> Result<(), String> {
        let root = self.resolver.root();
        if root != prepare.root {
            return Err(format!(
                "RAM and disk here have root {root}, the source says {}",
                prepare.root
            ));
        }
        if self.audit {
            let hash = self.vm.full_hash().map_err(|e| format!("hashing the guest: {e}"))?;
            if prepare.full_hash != Some(hash) {
                return Err("RAM and disk here do not hash to what the source says".into());
            }
            self.full_hash = Some(hash);
        }
        // Before the source commits: a state that cannot be loaded must not cost it the guest.
        // And before the flush under way is waited for: it needs nothing of this thread.
        let state = std::mem::take(&mut self.state);
        self.vm
            .load_state(&state)
            .map_err(|e| format!("the machine's state cannot be loaded here: {e}"))?;
        self.vm.make_disk_durable().map_err(|e| format!("the disk could not be made durable: {e}"))
    }

    /// The source committed: the ownership on disk, then the guest, then the word.
    fn commit(&mut self, event: Event) {
        let start = self.clock.now();
        self.verified = None;
        match self.step(event) {
            Ok(Step { guest: Guest::Run, .. }) => {}
            Ok(_) => return,
            // Whether the ownership is on disk is not known. If a refusal can be written over it,
            // it is known again; if not, nothing is said, and a restart finds out from the disk.
            Err(why) => return self.decline(why),
        }
        let durable = self.clock.now();
        if let Err(e) = self.vm.resume() {
            // Nothing was said yet, so the source still holds the guest.
            let reason = format!("the guest could not be started: {e}");
            match self.step(Event::NeverRan { reason: reason.clone() }) {
                Ok(_) => {
                    self.session.declined(&reason);
                    self.settle(Settled::Failed(ReceiveError::Declined(reason)));
                }
                Err(_) => self.settle(Settled::Failed(ReceiveError::NotStarted(e))),
            }
            return;
        }
        self.running = true;
        self.options.steps.reached(HandoffStep::Running);
        let now = self.clock.now();
        self.since = now;
        self.session.resumed(Resumed {
            handoff: self.handoff,
            prepare_us: self.prepare_us,
            commit_us: micros(durable.saturating_sub(start)),
            resume_us: micros(now.saturating_sub(durable)),
        });
    }

    /// The source gave up, durably: it waits for no answer.
    fn aborted(&mut self, why: String) {
        if self.running {
            return;
        }
        self.over_there = true;
        // A VM that was never here leaves nothing.
        let receiving = self.record().is_some_and(|r| matches!(r.state, State::Receiving { .. }));
        if self.fresh && receiving && self.journal.forget().is_ok() {
            return self.settle(Settled::Failed(ReceiveError::Aborted(why)));
        }
        if let Err(e) = self.step(Event::Aborted(self.handoff)) {
            tracing::warn!(error = e, "the ownership record could not be written");
        }
        self.settle(Settled::Failed(ReceiveError::Aborted(why)));
    }

    /// The source has said elsewhere that it begins anew. What is owned already, and what this is not
    /// newer than, stays as it is.
    pub(super) fn newer_offer(&mut self, offered: Question) {
        if !self.is_settled() {
            self.take_note(Event::Newer(offered), "superseded");
            self.over_there = self.is_settled();
        }
    }

    /// Whether the source has ended it: then nobody waits for a word on its links any more, but perhaps
    /// for their end, which tells that this was heard.
    pub(super) fn is_over_there(&self) -> bool {
        self.over_there
    }

    /// Carries out an event that starts nothing; what it makes of a prepared copy is final.
    fn take_note(&mut self, event: Event, why: &str) {
        match self.step(event) {
            Ok(Step { guest: Guest::Drop, say, .. }) => {
                let why = match say {
                    Some(Say::Declined(_, reason)) => reason,
                    _ => why.to_owned(),
                };
                self.session.declined(&why);
                self.settle(Settled::Failed(ReceiveError::Declined(why)));
            }
            Ok(_) => {}
            Err(e) => tracing::warn!(error = e, "the ownership record could not be written"),
        }
    }

    /// This side will not run the guest: durable, then said. After a failed write the last try
    /// counts: what cannot be written is not said.
    fn decline(&mut self, why: String) {
        tracing::warn!(why, "declining");
        let event = Event::Decline { offered: self.handoff, reason: why.clone() };
        match self.step(event) {
            Ok(_) => {
                self.session.declined(&why);
                self.settle(Settled::Failed(ReceiveError::Declined(why)));
            }
            Err(e) => {
                let why = format!("{why}; and that could not be recorded: {e}");
                self.settle(Settled::Failed(ReceiveError::Link(why)));
            }
        }
    }

    /// Feeds the ownership machine and writes what it asks for.
    fn step(&mut self, event: Event) -> Result<Step<Say>, String> {
        let step = target::step(self.journal.record(), event).map_err(|e| e.to_string())?;
        if let Some(record) = &step.write {
            self.journal.write(record.clone()).map_err(|e| e.to_string())?;
            self.options.steps.reached(HandoffStep::durable(Side::Target, record));
        }
        Ok(step)
    }

    /// How long it makes sense to wait for a link.
    pub(super) fn relink_deadline(&self, now: Duration) -> Duration {
        let limits = self.limits();
        if self.running {
            self.since + limits.release
        } else if self.session.is_prepared() {
            self.since + limits.hold_prepared
        } else {
            now + limits.relink_grace
        }
    }

    /// Nothing is to be applied at the moment: some of what was is hashed, so that little is left to
    /// do while the guest waits. Whether there is more of it.
    pub(super) fn tidy(&mut self) -> bool {
        !self.session.is_past_receiving() && self.resolver.tidy(TIDY_GROUPS)
    }

    /// Waits that have a bound although the link works.
    pub(super) fn check_time(&mut self, now: Duration) {
        if !self.session.is_past_receiving()
            && let Some(e) = self.vm.take_failure()
        {
            return self.decline(format!("the disk could not be made durable: {e}"));
        }
        let limits = self.limits();
        if self.running && now.saturating_sub(self.since) >= limits.release {
            self.settle(Settled::Runs { released: false });
        } else if self.verified.is_some_and(|(at, _)| now.saturating_sub(at) >= ASK_AFTER) {
            self.say_prepared();
        } else if self.session.is_prepared()
            && now.saturating_sub(self.since) >= limits.hold_prepared
        {
            self.decline(format!("no word from the source for {:?}", limits.hold_prepared));
        }
    }

    /// No link will come back.
    pub(super) fn give_up(&mut self, why: String) {
        if self.running {
            self.settle(Settled::Runs { released: false });
        } else if self.session.is_prepared() {
            self.decline(format!("the source did not come back: {why}"));
        } else {
            // It may have committed early, and is owed an answer when it asks.
            let reason = format!("the source did not come back: {why}");
            if let Err(e) = self.step(Event::Decline { offered: self.handoff, reason }) {
                tracing::warn!(error = e, "the next start declines: the record cannot be written");
            }
            self.settle(Settled::Failed(ReceiveError::Link(why)));
        }
    }

    pub(super) fn take_settled(&mut self) -> Settled {
        let nothing = || Settled::Failed(ReceiveError::Link("it ended unsettled".into()));
        self.settled.take().unwrap_or_else(nothing)
    }

    pub(super) fn discard(&mut self) {
        if !self.running {
            self.vm.discard();
        }
    }

    pub(super) fn into_running(self) -> Result<Running<Vm>, ReceiveError> {
        let record = self.journal.record().cloned();
        let missing = || ReceiveError::Link("the guest runs without an ownership record".into());
        let (table, contents) = self.resolver.into_parts();
        Ok(Running {
            vm: self.vm.into_inner(),
            record: record.ok_or_else(missing)?,
            full_hash: self.full_hash,
            table,
            contents,
        })
    }
}
