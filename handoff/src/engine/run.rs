//! One handoff from the source's side: the guest, and what the phases do with it.

use std::sync::Arc;

use super::{KeptReason, SendError, SendOptions, SendOutcome, pipe::Pipe, worker::Job};
use crate::{
    Bases, ChunkSet, Geometry, SourceVm,
    order::{RoundOrder, Sequence},
    ownership::{
        Guest, Journal, Question,
        source::{self, Event},
    },
    report::{Outcome, Report},
    stage::{Buffers, ClassifyError, Outbound, SegmentKind},
    vm::VmError,
    wire::Agreed,
};

/// After so many groups of a round's chunks it is asked what the guest called free meanwhile.
const HINTS_EVERY_GROUPS: u64 = 4;

/// The guest, and what must be undone if the handoff fails.
pub(super) struct HeldGuest<'a> {
    pub(super) vm: &'a mut dyn SourceVm,
    pub(super) tracking: bool,
    pub(super) paused: bool,
}

impl HeldGuest<'_> {
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
    pub(super) round: u32,
}

impl Run<'_> {
    pub(super) fn report(&self, outcome: Outcome, reason: Option<String>) -> Report {
        let (stats, base) = (self.outbound.stats(), self.bases.own().id().to_string());
        self.pipe.meter.report(outcome, reason, Some(stats), base)
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
            self.journal.write(record)?;
        }
        Ok(step.guest)
    }

    /// The target durably declined after the commit: the guest goes on here.
    pub(super) fn take_back(&mut self, why: String) -> Result<SendOutcome, SendError> {
        let report = self.report(Outcome::KeptHere, Some(why.clone()));
        if self.record(Event::Declined { handoff: self.handoff.handoff })? == Guest::Run {
            let restored = self.guest.restore();
            restored.map_err(|source| SendError::NotResumed { reason: why.clone(), source })?;
        }
        Ok(SendOutcome::KeptHere { reason: KeptReason::Declined(why), report })
    }

    /// Reads, classifies and gives to the pipeline every chunk of `set`, as one round.
    pub(super) fn send_round(&mut self, set: ChunkSet) -> Result<(), KeptReason> {
        self.round += 1;
        self.pipe.meter.round_begins(self.round, set.len());
        self.outbound.begin(self.round);
        let mut order = match self.options.order {
            Sequence::Random => RoundOrder::shuffled(set, rand::random()),
            Sequence::Ascending => RoundOrder::ascending(set),
        };
        let mut groups = 0u64;
        loop {
            if groups.is_multiple_of(HINTS_EVERY_GROUPS) {
                self.leave_out_free(&mut order)?;
            }
            groups += 1;
            let (ids, slots) = self.outbound.slots(&mut order).map_err(unclassified)?;
            if ids.is_empty() {
                break;
            }
            self.guest.vm.read_chunks(ids, slots).map_err(failed("reading the guest"))?;
            self.pipe.meter.chunks_done(ids.len() as u64);
            self.push_batches()?;
        }
        self.outbound.end().map_err(unclassified)?;
        self.push_batches()?;
        self.pipe.meter.round_packed(&self.outbound.stats());
        Ok(())
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
            self.pipe.push(Job::Body { round, kind, body: batch.body, chunks: batch.chunks })?;
        }
        Ok(())
    }

    pub(super) fn harvest(&mut self) -> Result<ChunkSet, KeptReason> {
        self.guest.vm.harvest().map_err(failed("asking for changed memory"))
    }
}
