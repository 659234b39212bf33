//! The source's driver.

use std::{panic::resume_unwind, sync::atomic::AtomicBool, thread, time::Duration};

use crossbeam_channel::unbounded;

use super::{
    CommitMode, KeptReason, Limits, MAX_MACHINE_STATE_BYTES, SendError, SendOptions, SendOutcome,
    courier::{Courier, Order},
    farewell::Owed,
    meter::Meter,
    pipe::{Before, Pipe, Word},
    pipeline::Pipeline,
    run::{HeldGuest, Run, failed, outbound},
    status::LinkStatus,
    worker::{Job, Shared, WorkerStats},
};
use crate::{
    Bases, ChunkSet, Clock, Connect, Offer, SourceVm,
    adapt::{AdaptOptions, Adapter},
    ownership::{
        HandoffId, Journal, Question, Verdict,
        source::{self, Event},
    },
    report::{Outcome, Progress, Report},
    root::{StateRoot, StateTable},
    source::SourceSession,
    stage::{BatchLimits, Sealer, SegmentKind, pack::MAX_BATCH_BYTES},
    step::Step,
    vm::{MAX_ALSO, MAX_KNOWN},
    wire::{Hello, Intent, Resumed},
};

/// A small last round goes out in so many batches, ...
const LAST_ROUND_PIECES: u64 = 4;
/// ... but a batch of fewer chunks costs more by itself than it saves.
const LEAST_PIECE_CHUNKS: usize = 32;

/// Hands the guest off to the peer that `connect` reaches.
///
/// **Paused on success, resumed on failure**: [`SendOutcome::Moved`] and
/// [`SendOutcome::InDoubt`] leave the guest paused, [`SendOutcome::KeptHere`] leaves it running.
/// `bases` are the VM's own and others held here, which are offered. `cancel` is looked at until the
/// commit; after it the handoff can only go forward.
#[allow(clippy::too_many_arguments)]
pub fn send<C: Connect + Send>(
    vm: &mut dyn SourceVm,
    bases: Bases,
    connect: &mut C,
    journal: &mut Journal,
    options: &SendOptions,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(&Progress),
    cancel: &AtomicBool,
) -> Result<SendOutcome, SendError> {
    let record = journal.record().ok_or(SendError::NoRecord)?;
    let id = HandoffId::random();
    // What the target logs too. An error's level, so that it is there whatever else is logged.
    let span = tracing::error_span!("handoff", trace = %id, side = "source");
    let _entered = span.enter();
    let begin = Event::Begin { handoff: id, peer: options.peer.clone() };
    let before = clock.now();
    if let Some(record) = source::step(record, begin)?.write {
        journal.write(record)?;
        options.steps.reached(Step::BegunDurable);
    }
    let durable_took = clock.now().saturating_sub(before);
    let record = journal.record().ok_or(SendError::NoRecord)?;
    let handoff = source::question(record)?.ok_or(SendError::NoRecord)?;
    tracing::info!(vm = options.vm_name, peer = options.peer, epoch = %handoff.epoch, "begun");

    let mut guest = HeldGuest::new(vm);
    let (status, worker) = (LinkStatus::default(), WorkerStats::default());
    let base_id = bases.own().id().to_string();
    let adapter = Adapter::new(AdaptOptions::new(options.pipeline.choice, clock.now()));
    let mut meter = Meter::new(handoff, options, progress, (&status, &worker, &adapter), clock);
    meter.durable_took(durable_took);
    meter.machine_costs(guest.vm.cutover_cost());
    let hello = match hello(&mut guest, &bases, handoff, options) {
        Ok(hello) => hello,
        Err(reason) => {
            let told = meter.report(Outcome::KeptHere, Some(reason.to_string()), None, base_id);
            return keep(&mut guest, journal, options, reason, told);
        }
    };
    thread::scope(|scope| {
        let buffers = options.pipeline.buffers();
        let sealer = Sealer::new(&handoff.handoff.0);
        let (feed, pipeline, outlet) = Pipeline::new(&options.pipeline, sealer, buffers.clone());
        let (orders, orders_rx) = unbounded();
        let (notices, notices_rx) = unbounded();
        let (status, worker, limits) = (&status, &worker, &options.limits);
        let with = Shared { adapter: &adapter, ahead: &status.ahead, stats: worker, clock };
        pipeline.start(scope, &notices, with);
        let session = SourceSession::new(hello, limits.silence, limits.ping_every)
            .with_buffers(buffers.clone())
            .committing_early(options.commit == CommitMode::Early);
        let courier = Courier {
            session,
            connect,
            outlet,
            orders: orders_rx,
            notices,
            status,
            limits,
            steps: &options.steps,
            under_way: None,
            clock,
            over: false,
            exhausted: false,
            submitted_bytes: 0,
            welcomed: false,
            misses: 0,
            owed: Owed::default(),
            aborted: false,
        };
        let within = span.clone();
        let courier = scope.spawn(move || within.in_scope(|| courier.run()));
        let applied = (clock.now(), 0);
        let notices = notices_rx;
        let serial = options.pipeline.serial;
        let pipe = Pipe {
            feed,
            serial,
            orders,
            notices,
            status,
            limits,
            clock,
            cancel,
            gave: None,
            applied,
            meter,
        };
        let outbound = outbound(&bases, guest.vm.geometry(), options, &buffers);
        let mut run = Run::new(guest, (pipe, outbound, buffers), journal, options, bases, handoff);
        let walked = walk(&mut run);
        // Nothing waits for the link any more: workers that did can end.
        run.pipe.status.ahead.open();
        let outcome = match walked {
            Ok(settled) => settle(&mut run, settled),
            Err(reason) => {
                let words = reason.to_string();
                let report = run.report(Outcome::KeptHere, Some(words.clone()));
                let kept = keep(&mut run.guest, run.journal, run.options, reason, report);
                // After what was decided is durable; a courier that has ended needs no order.
                let _ = run.pipe.orders.send(Order::Abort(words));
                kept
            }
        };
        // It was told to end, and does so within the time of its last words.
        let left = courier.join().unwrap_or_else(|panicked| resume_unwind(panicked));
        outcome.map(|outcome| outcome.leaving(left))
    })
}

/// The phases in order. **Paused on success, resumed on failure**: an error is a failure before
/// the commit, and [`keep`] sets the guest running again whatever phase it comes from.
fn walk(run: &mut Run<'_>) -> Result<Settled, KeptReason> {
    let changed = run.guest.start_tracking()?; //          meanwhile the target gets ready
    run.pipe.meter.tracking();
    let negotiated = Negotiated::await_welcome(run)?; //   the target has reserved all it needs
    let live = negotiated.live_rounds(changed)?; //        the guest runs; little is left to send
    let paused = live.pause()?; //                         nothing of the guest changes any more
    let sent = paused.last_round()?; //                    everything is on its way, state included
    let committed = match sent.run.early {
        true => sent.commit()?, //                         durable; said behind the last segment
        false => sent.await_prepared()?.commit()?, //      the target holds it all, verified
    };
    Ok(committed.await_verdict()) //                       only its word, or never having said
}

/// How a committed handoff was settled.
enum Settled {
    /// The target runs the guest.
    Moved,
    /// The target durably declined.
    Declined(String),
    /// The target was never told of the commit, and never will be.
    Withdrawn(KeptReason),
    /// Nobody said.
    InDoubt,
}

fn hello(
    guest: &mut HeldGuest<'_>,
    bases: &Bases,
    handoff: Question,
    options: &SendOptions,
) -> Result<Hello, KeptReason> {
    let changed = guest.vm.changed_disk_chunks().map_err(failed("counting what is on the disk"))?;
    let also = bases
        .iter()
        .skip(1)
        .map(|(_, base)| base.id())
        .filter(|_| options.stages.other_bases)
        .take(MAX_ALSO);
    let known = options.known.iter().filter(|_| options.stages.known).take(MAX_KNOWN);
    let offer = Offer {
        vm_name: options.vm_name.clone(),
        base: bases.own().id(),
        also: also.collect(),
        known: known.map(StateTable::current_root).collect(),
        geometry: guest.vm.geometry(),
        changed_disk_chunks: changed,
        machine: options.machine.clone(),
    };
    let (versions, audit) = (options.versions, options.audit);
    let vm_name = options.vm_name.clone();
    Ok(Hello { versions, handoff, vm_name, intent: Intent::New(offer), audit })
}

/// The handoff failed before the commit: the guest goes on here.
fn keep(
    guest: &mut HeldGuest<'_>,
    journal: &mut Journal,
    options: &SendOptions,
    reason: KeptReason,
    report: Report,
) -> Result<SendOutcome, SendError> {
    let record = journal.record().ok_or(SendError::NoRecord)?;
    let mut aborted = source::step(record, Event::Abort)?.write;
    // A commit that could not be written may be on the disk all the same: a restart would say it.
    if journal.is_doubtful() {
        aborted.take().map_or(Ok(()), |record| journal.write(record))?;
        options.steps.reached(Step::KeptDurable);
    }
    // Else the record allows the guest to run already, so that it need not wait for the disk.
    guest
        .restore()
        .map_err(|source| SendError::NotResumed { reason: reason.to_string(), source })?;
    options.steps.reached(Step::RunsOn);
    if let Some(record) = aborted {
        // Not fatal: the record still says that the guest may run here, and asking the target
        // after a crash settles the rest.
        match journal.write(record) {
            Ok(()) => options.steps.reached(Step::KeptDurable),
            Err(e) => {
                tracing::warn!(error = %e, "the guest runs, but the end of the handoff is not on disk");
            }
        }
    }
    Ok(SendOutcome::KeptHere { reason, report, untold: None })
}

/// After the commit: what was decided is written, then said, then done.
fn settle(run: &mut Run<'_>, settled: Settled) -> Result<SendOutcome, SendError> {
    let order = match &settled {
        Settled::Moved => Order::Release,
        Settled::Declined(why) => Order::Abort(why.clone()),
        Settled::Withdrawn(reason) => Order::Abort(reason.to_string()),
        Settled::InDoubt => Order::Leave,
    };
    let handoff = run.handoff.handoff;
    let outcome = match settled {
        Settled::Moved => {
            run.record(Event::Resumed { handoff, epoch: run.handoff.epoch }).map(|_| {
                let report = run.report(Outcome::Moved, None);
                SendOutcome::Moved { report, table: run.take_table() }
            })
        }
        Settled::Declined(why) => run.take_back(why),
        Settled::Withdrawn(reason) => run.withdraw(reason),
        Settled::InDoubt => {
            let why = Some("the peer did not confirm in time".to_owned());
            Ok(SendOutcome::InDoubt { report: run.report(Outcome::InDoubt, why) })
        }
    };
    // What could not be written must not be said.
    let order = if outcome.is_ok() { order } else { Order::Leave };
    let _ = run.pipe.orders.send(order);
    outcome
}

/// The target took the offer.
struct Negotiated<'r, 'a>(&'r mut Run<'a>);

impl<'r, 'a> Negotiated<'r, 'a> {
    fn await_welcome(run: &'r mut Run<'a>) -> Result<Self, KeptReason> {
        let Limits { connect, greeting, ready, .. } = run.options.limits;
        let limit = connect + greeting + ready;
        match run.pipe.await_word("the peer's answer", limit)? {
            (Word::Welcomed { agreed, early }, _) => {
                run.early = early;
                run.pipe.meter.welcomed(early);
                run.agree(agreed);
                Ok(Self(run))
            }
            (word, _) => Err(KeptReason::Protocol(format!("{word:?} instead of Welcome"))),
        }
    }

    /// Sends round after round while the guest runs, until the policy says to pause it.
    fn live_rounds(self, changed: ChunkSet) -> Result<Live<'r, 'a>, KeptReason> {
        let run = self.0;
        let mut set = changed;
        // Where the target begins in another state than base, what went back to base differs too.
        run.outbound.table().iter().for_each(|(id, _)| _ = set.insert(id));
        loop {
            let rest = run.send_round(set)?;
            // Of what does not change any more, nothing is hashed again while the guest waits.
            run.outbound.root();
            run.drain(Before::Harvest)?;
            run.pipe.meter.round_ends();
            set = run.harvest_round()?;
            let broken_off = rest.is_some();
            rest.iter().for_each(|rest| set.union(rest));
            let Some(share) = run.next_round(&set, broken_off)? else {
                // What is still queued would be waited for with the guest paused; and so would a link.
                run.drain(Before::Pause)?;
                if !run.await_link()? {
                    return Ok(Live { run, left: set });
                }
                // Meanwhile the guest ran on: what it changed is no last round any more.
                set.union(&run.harvest_round()?);
                continue;
            };
            run.throttle(share)?;
        }
    }
}

/// The guest runs, and `left` is what to send once it does not.
struct Live<'r, 'a> {
    run: &'r mut Run<'a>,
    left: ChunkSet,
}

impl<'r, 'a> Live<'r, 'a> {
    fn pause(self) -> Result<Paused<'r, 'a>, KeptReason> {
        let Self { run, mut left } = self;
        // Set before, so that a pause which fails half way is undone too.
        run.guest.paused = true;
        run.pipe.meter.pausing();
        run.guest.vm.pause().map_err(failed("pausing the guest"))?;
        run.pipe.meter.paused();
        run.options.steps.reached(Step::Paused);
        left.union(&run.harvest()?);
        Ok(Paused { run, left })
    }
}

/// Nothing of the guest changes any more.
struct Paused<'r, 'a> {
    run: &'r mut Run<'a>,
    left: ChunkSet,
}

impl<'r, 'a> Paused<'r, 'a> {
    /// Sends what is left. The machine's state is saved while the chunks are on their way.
    fn last_round(self) -> Result<Sent<'r, 'a>, KeptReason> {
        let Self { run, left } = self;
        let mut chunks = left.len();
        run.outbound.set_limits(pieces_of(chunks, run.options.pipeline.batch_limits()));
        run.send_round(left)?;
        run.pipe.meter.final_round_packed(chunks);
        let state = run.guest.vm.save_state().map_err(failed("saving the machine's state"))?;
        if state.len() > MAX_MACHINE_STATE_BYTES {
            let why = format!("{} bytes, at most {MAX_MACHINE_STATE_BYTES}", state.len());
            return Err(KeptReason::Vm { doing: "saving the machine's state", source: why.into() });
        }
        run.options.steps.reached(Step::StateSaved);
        // Saving may have written to guest memory.
        let touched = run.harvest()?;
        if !touched.is_empty() {
            chunks += touched.len();
            run.send_round(touched)?;
            run.pipe.meter.final_round_packed(chunks);
        }
        for piece in state.chunks(MAX_BATCH_BYTES) {
            let (round, kind) = (run.round, SegmentKind::MachineState);
            run.pipe.push(Job::Body { round, kind, body: piece.to_vec(), chunks: 0 })?;
        }
        let full_hash = match run.options.audit {
            true => Some(run.guest.vm.full_hash().map_err(failed("hashing the guest"))?),
            false => None,
        };
        run.pipe.meter.state_packed(state.len(), full_hash);
        let root = run.outbound.root();
        // Right behind the last segment: a round trip is saved.
        run.pipe.push(Job::Prepare(root, full_hash))?;
        Ok(Sent { run, root, full_hash })
    }
}

/// Limits that cut a last round of so many chunks into a few batches, if it is small: while one is
/// classified, another is compressed, a third is on the link and a fourth is applied. Of a large
/// round there are enough batches anyway.
fn pieces_of(chunks: u64, full: BatchLimits) -> BatchLimits {
    let piece = usize::try_from(chunks.div_ceil(LAST_ROUND_PIECES)).unwrap_or(usize::MAX);
    let piece = piece.max(LEAST_PIECE_CHUNKS);
    BatchLimits { data_chunks: full.data_chunks.min(piece), chunks: full.chunks.min(piece) }
}

/// Everything is on its way.
struct Sent<'r, 'a> {
    run: &'r mut Run<'a>,
    root: StateRoot,
    full_hash: Option<[u8; 32]>,
}

impl<'r, 'a> Sent<'r, 'a> {
    /// Commits while the last segments drain. The target took the offer durably: it will answer.
    fn commit(self) -> Result<Committed<'r, 'a>, KeptReason> {
        Committed::commit(self.run, Event::CommitEarly { root: self.root })
    }

    fn await_prepared(self) -> Result<Prepared<'r, 'a>, KeptReason> {
        let Self { run, root, full_hash } = self;
        let limit = run.options.limits.prepare;
        match run.pipe.await_word("the peer's verification", limit)? {
            (Word::Prepared { root: theirs, full_hash: hash }, _) if hash == full_hash => {
                run.pipe.meter.prepared();
                Ok(Prepared { run, root, theirs })
            }
            (Word::Prepared { full_hash: theirs, .. }, _) => {
                let why = format!("its RAM and disk hash to {theirs:x?}, here {full_hash:x?}");
                Err(KeptReason::Protocol(why))
            }
            (word, _) => Err(KeptReason::Protocol(format!("{word:?} instead of Prepared"))),
        }
    }
}

/// The target holds everything, verified.
struct Prepared<'r, 'a> {
    run: &'r mut Run<'a>,
    root: StateRoot,
    theirs: StateRoot,
}

impl<'r, 'a> Prepared<'r, 'a> {
    fn commit(self) -> Result<Committed<'r, 'a>, KeptReason> {
        let Self { run, root: ours, theirs } = self;
        let event = Event::Prepared { handoff: run.handoff.handoff, theirs, ours };
        Committed::commit(run, event)
    }
}

/// The epoch is the target's, durably. Only its durable word leads back, or never having told it.
struct Committed<'r, 'a>(&'r mut Run<'a>);

impl<'r, 'a> Committed<'r, 'a> {
    fn commit(run: &'r mut Run<'a>, event: Event) -> Result<Self, KeptReason> {
        // The last moment at which giving up costs nothing.
        run.pipe.check_cancelled()?;
        run.record(event).map_err(|e| match e {
            SendError::NotHere(e) => KeptReason::Ownership(e),
            SendError::Journal(e) => KeptReason::Journal(e),
            other => KeptReason::Protocol(other.to_string()),
        })?;
        run.pipe.meter.committed();
        run.pipe.status.commit.open();
        // Should the courier have ended, its last notice says why.
        let _ = run.pipe.orders.send(Order::Commit);
        Ok(Self(run))
    }

    fn await_verdict(self) -> Settled {
        let run = self.0;
        let limits = run.pipe.limits;
        let verification = if run.early { limits.prepare } else { Duration::ZERO };
        loop {
            let (word, at) = match run.pipe.await_verdict(limits.commit + verification) {
                Ok(word) => word,
                Err(reason) if run.pipe.status.commit.withdraw() => {
                    return Settled::Withdrawn(reason);
                }
                // Said while this side decided to cancel: too late.
                Err(KeptReason::Cancelled) => continue,
                Err(reason) => {
                    tracing::warn!(%reason, "committed, and the peer has not confirmed");
                    return Settled::InDoubt;
                }
            };
            match word {
                Word::Resumed(resumed) => {
                    run.pipe.meter.resumed(at, &resumed);
                    return Settled::Moved;
                }
                Word::Answer(Verdict::Owner | Verdict::Superseded { .. }) => {
                    run.pipe.meter.resumed(at, &Resumed::untimed(run.handoff));
                    return Settled::Moved;
                }
                Word::Declined(why) | Word::Answer(Verdict::Declined { reason: why }) => {
                    return Settled::Declined(why);
                }
                // It answers from its record alone, and never heard of the commit.
                Word::Answer(verdict) if run.pipe.status.commit.withdraw() => {
                    let why = format!("it gave the handoff up meanwhile ({verdict:?})");
                    return Settled::Withdrawn(KeptReason::PeerAborted(why));
                }
                // Not settled there, or nothing known: Commit is said again on the next link.
                Word::Answer(_) | Word::Welcomed { .. } | Word::Prepared { .. } => {}
            }
        }
    }
}
