//! One handoff from the source's side: the guest, and what the phases do with it.

use std::sync::Arc;

use super::{
    KeptReason, SendError, SendOptions, SendOutcome,
    again::Again,
    meter::Dirty,
    pipe::{Before, Pipe},
    worker::Job,
};
use crate::{
    Bases, ChunkSet, Geometry, SourceVm, StateTable,
    order::{RoundOrder, Sequence},
    ownership::{
        Guest, Journal, Question,
        source::{self, Event},
    },
    policy::Objective,
    report::{Outcome, Report},
    stage::{Buffers, ClassifyError, Forecast, Outbound, SegmentKind},
    step::{Side, Step},
    vm::VmError,
    wire::Agreed,
};

/// After so many groups of a round's chunks it is asked what the guest called free meanwhile.
const HINTS_EVERY_GROUPS: u64 = 4;

/// A version of a chunk that is dirty again pays if the delta takes at most this share of the chunk's
/// own bytes: then it saves the pause at least as much as it costs in all.
const DELTA_PAYS: f64 = 0.4;

/// The guest, and what must be undone if the handoff fails.
pub(super) struct HeldGuest<'a> {
    pub(super) vm: &'a mut dyn SourceVm,
    pub(super) tracking: bool,
    pub(super) paused: bool,
    /// It is to be slowed down, and is not while the link is broken.
    pub(super) let_go: bool,
}

impl<'a> HeldGuest<'a> {
    /// A guest that runs, untouched.
    pub(super) fn new(vm: &'a mut dyn SourceVm) -> Self {
        Self { vm, tracking: false, paused: false, let_go: false }
    }
}

impl HeldGuest<'_> {
    /// The link is broken, or not: there is no use in slowing a guest down that outruns no link.
    fn link_is(&mut self, broken: bool, run_share: f64) -> Result<(), KeptReason> {
        if run_share < 1.0 && !self.paused && broken != self.let_go {
            self.let_go = broken;
            let share = if broken { 1.0 } else { run_share };
            self.vm.throttle(share).map_err(failed("changing the guest's speed"))?;
        }
        Ok(())
    }
    pub(super) fn start_tracking(&mut self) -> Result<ChunkSet, KeptReason> {
        self.tracking = true;
        self.vm.start_tracking().map_err(failed("starting to track changes"))
    }

    /// Sets the guest running again as it was before the handoff. The dirty bits that were
    /// harvested need no putting back: the next handoff starts from all that differs from base.
    pub(super) fn restore(&mut self) -> Result<(), VmError> {
        if std::mem::take(&mut self.paused) {
            self.vm.resume()?;
        }
        if std::mem::take(&mut self.tracking)
            && let Err(e) = self.vm.stop_tracking()
        {
            tracing::warn!(error = %e, "the guest runs, but its changes are still tracked");
        }
        Ok(())
    }
}

pub(super) fn failed(doing: &'static str) -> impl FnOnce(VmError) -> KeptReason {
    move |source| KeptReason::Vm { doing, source }
}

fn unclassified(source: ClassifyError) -> KeptReason {
    KeptReason::Vm { doing: "comparing with the base", source: source.into() }
}

/// The stages that work on chunks, for a target that holds nothing.
pub(super) fn outbound(
    bases: &Bases,
    geometry: Geometry,
    options: &SendOptions,
    buffers: &Buffers,
) -> Outbound {
    Outbound::new(bases.clone(), geometry, options.stages)
        .with_limits(options.pipeline.batch_limits())
        .with_buffers(buffers.clone())
}

/// One handoff from the source's side.
pub(super) struct Run<'a> {
    pub(super) guest: HeldGuest<'a>,
    pub(super) pipe: Pipe<'a>,
    pub(super) outbound: Outbound,
    pub(super) buffers: Buffers,
    pub(super) journal: &'a mut Journal,
    pub(super) options: &'a SendOptions,
    /// The VM's own base, and those that the target holds too.
    pub(super) bases: Bases,
    pub(super) handoff: Question,
    /// Whether the commit does not wait for Prepared.
    pub(super) early: bool,
    pub(super) round: u32,
    /// What is dirty again before it was sent.
    pub(super) again: Again,
    /// What the last harvest returned, and what of it the one before had returned too.
    pub(super) harvested: ChunkSet,
    pub(super) hot: ChunkSet,
    /// Of those, what the round under way leaves to the pause: no harvest returns it by itself.
    held: ChunkSet,
}

/// So many chunks tell what the rest is like: one of seven within 15 %.
const FORESEEN_CHUNKS: u64 = 192;
/// And are looked up if they are one in so many of the rest, or fewer: a look takes as long as sending does.
const LEAST_STEP: u64 = 4;

impl<'a> Run<'a> {
    pub(super) fn new(
        guest: HeldGuest<'a>,
        (pipe, outbound, buffers): (Pipe<'a>, Outbound, Buffers),
        journal: &'a mut Journal,
        options: &'a SendOptions,
        bases: Bases,
        handoff: Question,
    ) -> Self {
        let geometry = guest.vm.geometry();
        let (again, none) = (Again::new(geometry), ChunkSet::new(geometry));
        let (harvested, hot, held) = (none.clone(), none.clone(), none);
        let round = 0;
        Self {
            guest,
            pipe,
            outbound,
            buffers,
            journal,
            options,
            bases,
            handoff,
            early: false,
            round,
            again,
            harvested,
            hot,
            held,
        }
    }
}

impl Run<'_> {
    pub(super) fn report(&self, outcome: Outcome, reason: Option<String>) -> Report {
        let (stats, base) = (self.outbound.stats(), self.bases.own().id().to_string());
        self.pipe.meter.report(outcome, reason, Some(stats), base)
    }

    /// What the target holds, once nothing more is to be said of it: not a copy, which would be as
    /// large again.
    pub(super) fn take_table(&mut self) -> StateTable {
        let (bases, geometry) = (self.bases.clone(), self.guest.vm.geometry());
        let none = Outbound::new(bases, geometry, self.options.stages);
        std::mem::replace(&mut self.outbound, none).into_table()
    }

    /// Builds on what the target holds of what was offered.
    pub(super) fn agree(&mut self, agreed: Agreed) {
        // The session has checked that nothing is taken which was not offered.
        let known = agreed.known.and_then(|n| self.options.known.get(usize::from(n)));
        self.bases = self.bases.only(|n| agreed.holds(n));
        let geometry = self.guest.vm.geometry();
        let mut outbound = outbound(&self.bases, geometry, self.options, &self.buffers);
        if let Some(table) = known {
            outbound = outbound.with_start(table.clone());
            if let Some(contents) = &self.options.contents {
                outbound = outbound.with_received(Arc::clone(contents));
            }
        }
        self.outbound = outbound;
    }

    /// Writes what an event makes of the ownership record.
    pub(super) fn record(&mut self, event: Event) -> Result<Guest, SendError> {
        let record = self.journal.record().ok_or(SendError::NoRecord)?;
        let step = source::step(record, event)?;
        if let Some(record) = step.write {
            let durable = Step::durable(Side::Source, &record);
            self.journal.write(record)?;
            self.options.steps.reached(durable);
        }
        Ok(step.guest)
    }

    /// Nobody was ever told of the commit: the guest goes on here, once that is durable.
    pub(super) fn withdraw(&mut self, reason: KeptReason) -> Result<SendOutcome, SendError> {
        let report = self.report(Outcome::KeptHere, Some(reason.to_string()));
        if self.record(Event::NeverSaid)? == Guest::Run {
            let restored = self.guest.restore();
            restored
                .map_err(|source| SendError::NotResumed { reason: reason.to_string(), source })?;
            self.options.steps.reached(Step::RunsOn);
        }
        Ok(SendOutcome::KeptHere { reason, report, untold: None })
    }

    /// The target durably declined after the commit: the guest goes on here.
    pub(super) fn take_back(&mut self, why: String) -> Result<SendOutcome, SendError> {
        let report = self.report(Outcome::KeptHere, Some(why.clone()));
        if self.record(Event::Declined { handoff: self.handoff.handoff })? == Guest::Run {
            let restored = self.guest.restore();
            restored.map_err(|source| SendError::NotResumed { reason: why.clone(), source })?;
            self.options.steps.reached(Step::RunsOn);
        }
        Ok(SendOutcome::KeptHere { reason: KeptReason::Declined(why), report, untold: None })
    }

    /// Reads, classifies and gives to the pipeline every chunk of `set`, as one round, but for what
    /// need not be sent in it. Returns what is left of a round that had to be broken off.
    pub(super) fn send_round(&mut self, set: ChunkSet) -> Result<Option<ChunkSet>, KeptReason> {
        self.round += 1;
        self.pipe.meter.round_begins(self.round, set.len());
        match self.guest.paused {
            true => self.outbound.begin(self.round),
            false => self.outbound.begin_small(self.round),
        }
        let mut hot = self.again.waiting(&set);
        hot.union(&self.hot);
        let mut order = RoundOrder::hot_last(set, &hot, self.options.order);
        self.hold_hot(&mut order);
        let mut groups = 0u64;
        let broken_off = loop {
            if groups.is_multiple_of(HINTS_EVERY_GROUPS) {
                self.leave_out_free(&mut order)?;
            }
            groups += 1;
            // A round in which nothing has to be sent gives nothing to the pipeline.
            self.pipe.check()?;
            if self.leave_out_dirty(&mut order)? {
                break true;
            }
            let (ids, slots) = self.outbound.slots(&mut order).map_err(unclassified)?;
            if ids.is_empty() {
                break false;
            }
            self.guest.vm.read_chunks(ids, slots).map_err(failed("reading the guest"))?;
            self.again.sends(ids);
            self.pipe.meter.chunks_done(ids.len() as u64);
            self.push_batches()?;
        };
        self.outbound.end().map_err(unclassified)?;
        self.push_batches()?;
        self.pipe.meter.round_packed(&self.outbound.stats());
        Ok(broken_off.then(|| order.into_rest()))
    }

    /// Leaves to the pause what was dirty in two harvests in a row, where sending a version of it now
    /// would save the pause nothing.
    fn hold_hot(&mut self, order: &mut RoundOrder) {
        if !self.guest.paused && !self.versions_pay() {
            let left_out = order.leave_out(&self.hot);
            self.pipe.meter.left_out(left_out);
            self.held.union(&self.hot);
        }
    }

    /// Looks now and then at what is dirty again, and leaves it to the next round. Whether the round
    /// must end here.
    fn leave_out_dirty(&mut self, order: &mut RoundOrder) -> Result<bool, KeptReason> {
        let began = self.pipe.clock.now();
        if self.guest.paused || !self.again.is_due(began) {
            return Ok(false);
        }
        let dirty = self.guest.vm.peek_dirty().map_err(failed("looking at changed memory"))?;
        self.pipe.meter.dirtied(dirty.len());
        let left_out = self.again.leave_out(order, &dirty, self.versions_pay());
        if self.options.order == Sequence::Random {
            order.put_off(&dirty);
        }
        self.pipe.meter.left_out(left_out);
        self.again.looked(began, self.pipe.clock.now());
        Ok(self.pipe.meter.must_break_off(order.remaining() + dirty.len()))
    }

    /// Whether a version of a hot chunk is worth its bytes: it makes the pause shorter by what the
    /// delta against it is smaller, and everything longer by what that delta takes.
    fn versions_pay(&self) -> bool {
        let most = match self.options.policy.objective {
            Objective::Downtime(_) => 1.0,
            Objective::Total | Objective::Deadline(_) => DELTA_PAYS,
        };
        let share = self.outbound.repeats().cost_share(self.pipe.meter.codec_ratio());
        share.is_none_or(|share| share <= most)
    }

    /// What the guest called free meanwhile need not be sent. A paused guest calls nothing free.
    fn leave_out_free(&mut self, order: &mut RoundOrder) -> Result<(), KeptReason> {
        if self.options.stages.free && !self.guest.paused {
            let free = self.guest.vm.take_free_hints().map_err(failed("asking for free memory"))?;
            let left_out = order.leave_out(&free);
            self.pipe.meter.left_out(left_out);
        }
        Ok(())
    }

    /// Gives to the pipeline what is complete.
    fn push_batches(&mut self) -> Result<(), KeptReason> {
        while let Some(batch) = self.outbound.poll() {
            let (round, kind) = (self.round, SegmentKind::Chunks);
            let job = Job::Body { round, kind, body: batch.body, chunks: batch.chunks };
            let (guest, share) = (&mut self.guest, self.pipe.meter.run_share());
            self.pipe.push_while(job, &mut |broken| guest.link_is(broken, share))?;
        }
        Ok(())
    }

    /// Waits until the link will run dry within its round trip.
    pub(super) fn drain(&mut self, before: Before) -> Result<(), KeptReason> {
        let (guest, share) = (&mut self.guest, self.pipe.meter.run_share());
        self.pipe.drain_while(before, &mut |broken| guest.link_is(broken, share))
    }

    /// Waits until there is a link that lives; whether there was anything to wait for.
    pub(super) fn await_link(&mut self) -> Result<bool, KeptReason> {
        let (guest, share) = (&mut self.guest, self.pipe.meter.run_share());
        self.pipe.await_link(&mut |broken| guest.link_is(broken, share))
    }

    /// For what share of the time the guest may run in the next round, with `dirty` left to send; none
    /// if it is to be paused now.
    pub(super) fn next_round(
        &mut self,
        dirty: &ChunkSet,
        broken_off: bool,
    ) -> Result<Option<f64>, KeptReason> {
        let held = if self.versions_pay() { 0 } else { self.hot.len() };
        let chunk_bytes = self.foresee(dirty)?;
        let unsent = self.again.unsent(dirty);
        let dirty = Dirty { chunks: dirty.len(), unsent, held, chunk_bytes };
        Ok(self.pipe.meter.next_round(dirty, broken_off))
    }

    /// Bytes on the link for each of these chunks, by a look at some of them; none where there are few, of
    /// which what the last round took tells enough.
    fn foresee(&mut self, dirty: &ChunkSet) -> Result<Option<f64>, KeptReason> {
        let every = dirty.len() / FORESEEN_CHUNKS;
        if every < LEAST_STEP {
            return Ok(None);
        }
        let mut forecast = Forecast::default();
        let mut some = dirty.iter().step_by(usize::try_from(every).unwrap_or(usize::MAX));
        loop {
            let (ids, slots) = self.outbound.slots(&mut some).map_err(unclassified)?;
            if ids.is_empty() {
                break;
            }
            self.guest.vm.read_chunks(ids, slots).map_err(failed("reading the guest"))?;
            self.outbound.foresee(&mut forecast).map_err(unclassified)?;
        }
        let ratio = self.pipe.meter.codec_ratio();
        let chunk_bytes = forecast.bytes_per_chunk(self.outbound.repeats(), ratio);
        tracing::debug!(?forecast, ratio, ?chunk_bytes, "looked at some of what is left");
        Ok(chunk_bytes)
    }

    pub(super) fn harvest(&mut self) -> Result<ChunkSet, KeptReason> {
        self.guest.vm.harvest().map_err(failed("asking for changed memory"))
    }

    /// Harvests at the end of a round, and notes what is dirty again and again.
    pub(super) fn harvest_round(&mut self) -> Result<ChunkSet, KeptReason> {
        let mut set = self.harvest()?;
        let mut hot = ChunkSet::new(set.geometry());
        for id in set.iter().filter(|id| self.harvested.contains(*id)) {
            hot.insert(id);
        }
        self.pipe.meter.harvested(set.len(), hot.len());
        // A round that left them out is over soon, and that they were not written in it says little.
        hot.union(&self.held);
        (self.harvested, self.hot) = (set.clone(), hot);
        let none = ChunkSet::new(set.geometry());
        set.union(&std::mem::replace(&mut self.held, none));
        Ok(set)
    }

    /// Slows the guest down, or not, as the policy wants it.
    pub(super) fn throttle(&mut self, run_share: f64) -> Result<(), KeptReason> {
        if self.pipe.meter.run_share() != run_share {
            self.guest.let_go = false;
            let can =
                self.guest.vm.throttle(run_share).map_err(failed("slowing the guest down"))?;
            self.pipe.meter.throttled(if can { run_share } else { 1.0 }, can);
            tracing::info!(run_share, can, "the guest outruns the link");
        }
        Ok(())
    }
}
