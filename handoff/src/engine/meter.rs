//! What the source's driver measures: for the policy, for the live line and for the report.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use guest_images::CHUNK_SIZE;

use super::{
    SendOptions,
    cutover::CutoverTimes,
    outage::Outages,
    pace::{Pace, Reading},
    series::Series,
    status::LinkStatus,
    worker::WorkerStats,
};
use crate::{
    Clock,
    adapt::Adapter,
    ownership::Question,
    policy::{self, CutOverPolicy, CutOverReason, Decision, DirtyCurve, Measurements, Objective},
    report::{
        Downtime, Outcome, Phase, Progress, Report, Round, Sample, class_shares, millis,
        stage_shares,
    },
    stage::{Class, Stage, Stats, thread_cpu_ns},
    target::{ACK_AFTER, ACK_BYTES},
    wire::Resumed,
};

/// What is dirty after a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirty {
    pub(super) chunks: u64,
    /// Of which the target has no version.
    pub(super) unsent: u64,
    /// Which another round would leave to the pause.
    pub(super) held: u64,
    /// What each takes on the link, if that was looked at.
    pub(super) chunk_bytes: Option<f64>,
}

/// How often the live line is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// What a cutover costs whatever is dirty, besides its durable records (pause, save, load, resume), if
/// the VM cannot tell.
const MACHINE_COST: Duration = Duration::from_millis(30);
/// Records that are made durable while the guest waits, one after the other: with an early commit the
/// target's ownership only, else also its Prepared, and the commit here.
const fn durable_records(early: bool) -> u32 {
    if early { 1 } else { 3 }
}
/// Round trips that the guest waits for: the last segment there, and, without an early commit,
/// Prepared back and Commit there.
const fn round_trips(early: bool) -> f64 {
    if early { 0.5 } else { 1.5 }
}
/// What one takes, until one was measured.
const DURABLE_COST: Duration = Duration::from_millis(10);
/// How much may be on its way where the transport does not measure it: 50 ms at 10 Mbps.
const LOW_WATER_BYTES: u64 = 64 << 10;
/// Less is not worth waiting for.
const LEAST_WATER_BYTES: u64 = 16 << 10;
/// More is not worth having under way, however fast the link.
const MOST_WATER_BYTES: u64 = 4 << 20;
/// The state of a machine with a few vCPUs, compressed.
const STATE_LINK_BYTES: u64 = 4 << 10;

/// CPU time of the thread that drives the handoff.
fn own_cpu() -> Duration {
    Duration::from_nanos(thread_cpu_ns())
}

pub(super) struct Meter<'a> {
    clock: &'a dyn Clock,
    status: &'a LinkStatus,
    worker: &'a WorkerStats,
    adapter: &'a Adapter,
    options: &'a SendOptions,
    progress: &'a mut dyn FnMut(&Progress),
    started: Duration,
    told_at: Option<Duration>,
    line: Progress,
    rounds: Vec<Round>,
    round_began: Duration,
    round_is_open: bool,
    series: Series,
    outages: Outages,
    /// For how long in all there had been no link when the round began.
    outage_before: Duration,
    pace: Pace,
    /// Chunks looked at and sent, and the time for which the engine waited to get rid of them.
    looked_at: u64,
    sent: u64,
    waited: Duration,
    durable: Duration,
    machine: Duration,
    last_sent: Duration,
    cutover: CutoverTimes,
    report: Report,
    predicted: Option<Duration>,
    curve: DirtyCurve,
    /// When what was dirty was last taken.
    taken_at: Duration,
    /// The share of the time for which the guest runs, and whether less can be asked for.
    run_share: f64,
    can_throttle: bool,
    /// Whether the commit does not wait for Prepared.
    early: bool,
}

impl<'a> Meter<'a> {
    pub(super) fn new(
        handoff: Question,
        options: &'a SendOptions,
        progress: &'a mut dyn FnMut(&Progress),
        (status, worker, adapter): (&'a LinkStatus, &'a WorkerStats, &'a Adapter),
        clock: &'a dyn Clock,
    ) -> Self {
        let started = clock.now();
        let report = Report {
            handoff: handoff.handoff.to_string(),
            vm: options.vm_name.clone(),
            peer: options.peer.clone(),
            epoch: handoff.epoch.0,
            ..Report::default()
        };
        Self {
            clock,
            status,
            worker,
            adapter,
            options,
            progress,
            started,
            told_at: None,
            line: Progress::default(),
            rounds: Vec::new(),
            round_began: started,
            round_is_open: false,
            series: Series::new(started),
            outages: Outages::default(),
            outage_before: Duration::ZERO,
            pace: Pace::default(),
            looked_at: 0,
            sent: 0,
            waited: Duration::ZERO,
            durable: DURABLE_COST,
            machine: MACHINE_COST,
            last_sent: started,
            cutover: CutoverTimes::default(),
            report,
            predicted: None,
            curve: DirtyCurve::default(),
            taken_at: started,
            run_share: 1.0,
            can_throttle: true,
            early: false,
        }
    }

    /// Time passes: takes a sample and tells the live line now and then.
    pub(super) fn tick(&mut self) {
        let now = self.clock.now();
        if self.series.is_due(now) {
            self.series.take(now, self.sample(now));
        }
        if self.told_at.is_some_and(|at| now.saturating_sub(at) < PROGRESS_EVERY) {
            return;
        }
        self.told_at = Some(now);
        self.tell();
    }

    fn sample(&self, now: Duration) -> Sample {
        let status = self.status;
        Sample {
            at_ms: self.since_start_ms(now),
            sent_bytes: status.bytes_sent.load(Relaxed),
            delivered_bytes: status.delivered_bytes.load(Relaxed),
            in_flight_bytes: status.in_flight_bytes.load(Relaxed),
            remaining_chunks: self.line.remaining_chunks,
        }
    }

    /// A moment as reports have it.
    fn since_start_ms(&self, at: Duration) -> f64 {
        millis(at.saturating_sub(self.started))
    }

    fn tell(&mut self) {
        self.line.sent_bytes = self.status.bytes_sent.load(Relaxed);
        self.line.rate_bytes_per_s = self.link_rate().unwrap_or(0.0) as u64;
        self.line.predicted_downtime_ms = self.predicted.map(millis);
        (self.progress)(&self.line);
    }

    fn enter(&mut self, phase: Phase) {
        self.line.phase = phase;
        self.tell();
    }

    /// The link was lost.
    pub(super) fn link_lost(&mut self, why: String) {
        self.outages.lost(self.clock.now(), why);
        self.enter(Phase::Relinking);
    }

    /// There is a link again.
    pub(super) fn link_back(&mut self) {
        self.outages.back(self.clock.now(), self.started);
        let paused = self.cutover.pausing.is_some();
        self.enter(if paused { Phase::Cutover } else { Phase::Rounds });
    }

    /// The times without a link.
    pub(super) fn outages(&self) -> &Outages {
        &self.outages
    }

    /// For how long the guest has been paused without a link.
    pub(super) fn waits_paused(&self) -> Option<Duration> {
        let since = self.outages.since()?.max(self.cutover.pausing?);
        Some(self.clock.now().saturating_sub(since))
    }

    /// An ownership record was made durable here, which took so long.
    pub(super) fn durable_took(&mut self, took: Duration) {
        self.durable = took;
    }

    /// What a cutover costs the machine, if that is known.
    pub(super) fn machine_costs(&mut self, cost: Option<Duration>) {
        self.machine = cost.unwrap_or(self.machine);
    }

    /// What had changed in the guest was found.
    pub(super) fn tracking(&mut self) {
        self.taken_at = self.clock.now();
        self.report.tracking_ms = millis(self.clock.now().saturating_sub(self.started));
    }

    /// The target is ready, and the commit will be early or not.
    pub(super) fn welcomed(&mut self, early: bool) {
        self.early = early;
        self.report.setup_ms = millis(self.clock.now().saturating_sub(self.started));
    }

    pub(super) fn round_begins(&mut self, number: u32, chunks: u64) {
        let now = self.clock.now();
        // The last round but one of a cutover is not waited for.
        if self.round_is_open {
            self.round_ends();
        }
        self.round_is_open = true;
        self.round_began = now;
        self.outage_before = self.outages.total(now);
        self.pace.begins(self.reading());
        let began_ms = self.since_start_ms(now);
        self.rounds.push(Round { number, began_ms, chunks, ..Round::default() });
        self.line.round = number;
        self.line.remaining_chunks = chunks;
        if self.cutover.pausing.is_none() {
            self.enter(Phase::Rounds);
        }
    }

    /// So many chunks of the round need not be looked at.
    pub(super) fn left_out(&mut self, chunks: u64) {
        if let Some(round) = self.rounds.last_mut() {
            round.left_out += chunks;
        }
        self.line.remaining_chunks = self.line.remaining_chunks.saturating_sub(chunks);
    }

    pub(super) fn chunks_done(&mut self, chunks: u64) {
        self.looked_at += chunks;
        self.line.remaining_chunks = self.line.remaining_chunks.saturating_sub(chunks);
    }

    /// The engine waited so long for the pipeline.
    pub(super) fn waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// The round's chunks were all given to the pipeline; `stats` are those of all rounds so far.
    pub(super) fn round_packed(&mut self, stats: &Stats) {
        let held = stats[Class::Unchanged].chunks + stats[Class::Known].chunks;
        self.sent = stats.chunks().saturating_sub(held);
        self.pace.packed(self.clock.now(), own_cpu());
    }

    /// Everything of the round was given to the link, and taken but for a little.
    pub(super) fn round_ends(&mut self) {
        self.round_ended(self.clock.now());
    }

    fn round_ended(&mut self, now: Duration) {
        self.round_is_open = false;
        self.pace.ends(self.reading());
        if let Some(round) = self.rounds.last_mut() {
            round.duration_ms = millis(now.saturating_sub(self.round_began));
            round.outage_ms = millis(self.outages.total(now).saturating_sub(self.outage_before));
            round.bytes = self.worker.round_bytes(round.number);
        }
        self.last_sent = now;
    }

    fn reading(&self) -> Reading {
        Reading {
            now: self.clock.now(),
            cpu: own_cpu(),
            looked_at: self.looked_at,
            sent: self.sent,
            segment_bytes: self.worker.seal.get().bytes_out,
            waited: self.waited,
            delivered_bytes: self.status.delivered_bytes.load(Relaxed),
            busy: Duration::from_micros(self.status.busy_us.load(Relaxed)),
            delivery_bytes_per_s: self.status.delivery_bytes_per_s.load(Relaxed),
            rtt: self.rtt(),
        }
    }

    /// How many bytes of segments may have arrived and not be acknowledged although the target keeps
    /// up: acknowledgements are few.
    pub(super) fn ack_slack_bytes(&self) -> u64 {
        let rate = self.pace.link_bytes_per_s(self.reading()).unwrap_or(0.0);
        ACK_BYTES + (rate * (self.rtt() + ACK_AFTER).as_secs_f64()) as u64
    }

    /// How many bytes may be on their way when the next round is asked for, or the guest is paused:
    /// what the link holds by itself, and what it takes in the time `ahead`.
    pub(super) fn low_water_bytes(&self, ahead: Duration) -> u64 {
        match self.pace.link_bytes_per_s(self.reading()) {
            None => LOW_WATER_BYTES,
            Some(rate) => {
                let bytes = rate * (self.rtt() + ahead).as_secs_f64();
                (bytes as u64).clamp(LEAST_WATER_BYTES, MOST_WATER_BYTES)
            }
        }
    }

    /// So many chunks are dirty now. None says nothing: not every VM can tell.
    pub(super) fn dirtied(&mut self, chunks: u64) {
        if chunks > 0 {
            let since = self.clock.now().saturating_sub(self.taken_at);
            self.curve.saw(since.as_secs_f64() * self.run_share, chunks);
        }
    }

    /// A round's harvest gave so many chunks, so many of which the one before had given too.
    pub(super) fn harvested(&mut self, chunks: u64, again: u64) {
        let now = self.clock.now();
        let since = now.saturating_sub(self.taken_at).as_secs_f64();
        self.curve.saw(since * self.run_share, chunks);
        self.curve.again(again);
        self.curve.taken();
        self.taken_at = now;
    }

    pub(super) fn run_share(&self) -> f64 {
        self.run_share
    }

    /// The guest runs for this share of the time from now on.
    pub(super) fn throttled(&mut self, run_share: f64, can: bool) {
        self.run_share = run_share;
        self.can_throttle = can;
    }

    /// Whether the round under way, with so many chunks left, must end now.
    pub(super) fn must_break_off(&self, left: u64) -> bool {
        match self.options.policy.objective {
            Objective::Deadline(_) => {
                let link_bytes_per_chunk = self.pace.bytes_per_chunk_so_far(self.reading());
                let measured = Measurements { link_bytes_per_chunk, ..self.measurements(left) };
                self.options.policy.must_break_off(&measured)
            }
            Objective::Total | Objective::Downtime(_) => false,
        }
    }

    /// What compression left of each byte so far; 0 before the first body.
    pub(super) fn codec_ratio(&self) -> f64 {
        let compressed = self.worker.compress.get();
        match compressed.bytes_in {
            0 => 0.0,
            bytes_in => compressed.bytes_out as f64 / bytes_in as f64,
        }
    }

    /// Bytes on the link for each of `dirty` chunks, `unsent` of which the target has no version of:
    /// those go in full, as many of them as a later round found to be news.
    fn bytes_per_chunk(&self, dirty: u64, unsent: u64) -> f64 {
        let again = self.pace.bytes_per_dirty_chunk();
        let full = self.codec_ratio() * CHUNK_SIZE as f64 * self.pace.news_share();
        if full <= again {
            return again;
        }
        let share = unsent.min(dirty) as f64 / dirty.max(1) as f64;
        again + (full - again) * share
    }

    /// For what share of the time the guest may run in the next round; none if the policy says to
    /// pause it now, with so much left, or the last round had to be broken off for that.
    pub(super) fn next_round(&mut self, dirty: Dirty, broken_off: bool) -> Option<f64> {
        let Dirty { chunks: dirty, unsent, held, chunk_bytes } = dirty;
        if let Some(round) = self.rounds.last_mut() {
            round.dirty_after = dirty;
        }
        let link_bytes_per_chunk =
            chunk_bytes.unwrap_or_else(|| self.bytes_per_chunk(dirty, unsent));
        let measured =
            Measurements { link_bytes_per_chunk, held_chunks: held, ..self.measurements(dirty) };
        let policy = &self.options.policy;
        let mut decision = match policy.throttle && !self.can_throttle {
            true => CutOverPolicy { throttle: false, ..policy.clone() }.decide(&measured),
            false => policy.decide(&measured),
        };
        if let (true, Decision::NextRound { predicted_downtime, .. }) = (broken_off, decision) {
            decision = Decision::CutOver { reason: CutOverReason::Deadline, predicted_downtime };
        }
        tracing::debug!(?measured, ?decision, "round done");
        match decision {
            Decision::NextRound { predicted_downtime, run_share } => {
                self.predicted = predicted_downtime;
                Some(run_share)
            }
            Decision::CutOver { reason, predicted_downtime } => {
                self.predicted = predicted_downtime;
                self.cutover.because = reason.to_string();
                None
            }
        }
    }

    fn measurements(&self, dirty: u64) -> Measurements {
        let now = self.clock.now();
        // What a guest changes while there is no link says nothing of whether rounds pay.
        let got_nowhere = |round: &&Round| {
            round.outage_ms == 0.0 && policy::stalled(round.chunks, round.dirty_after)
        };
        let stalled_rounds = self.rounds.iter().rev().take_while(got_nowhere).count();
        // Where the transport measures, the guest is not paused before the link has room.
        let measured = self.pace.link_bytes_per_s(self.reading()).is_some();
        let queued = if measured { 0 } else { self.status.unapplied_bytes.load(Relaxed) };
        Measurements {
            rounds: u32::try_from(self.rounds.len()).unwrap_or(u32::MAX),
            elapsed: now.saturating_sub(self.started),
            remaining_chunks: dirty,
            held_chunks: 0,
            stalled_rounds: u32::try_from(stalled_rounds).unwrap_or(u32::MAX),
            dirtied: self.curve.clone(),
            run_share: self.run_share,
            link_bytes_per_chunk: self.pace.bytes_per_dirty_chunk(),
            link_bytes_per_s: self.link_rate().unwrap_or(0.0),
            stage_chunks_per_s: self.pace.chunks_per_s(),
            paused_stage_chunks_per_s: self.pace.paused_chunks_per_s(),
            queued_bytes: queued,
            rtt: self.rtt(),
            round_trips: round_trips(self.early),
            fixed: self.machine + self.durable * durable_records(self.early),
            state_link_bytes: STATE_LINK_BYTES,
        }
    }

    /// Bytes a second that the link takes: by its own measure, else over the rounds so far.
    fn link_rate(&self) -> Option<f64> {
        if let Some(rate) = self.pace.link_bytes_per_s(self.reading()) {
            return Some(rate);
        }
        let (mut bytes, mut seconds) = (0.0, 0.0);
        for round in &self.rounds {
            bytes += round.bytes as f64;
            seconds += (round.duration_ms - round.outage_ms) / 1e3;
        }
        if seconds <= 0.0 || bytes <= 0.0 {
            let since = self.clock.now().saturating_sub(self.started).as_secs_f64();
            let sent = self.status.bytes_sent.load(Relaxed);
            return (since > 0.0 && sent > 0).then(|| sent as f64 / since);
        }
        Some(bytes / seconds)
    }

    /// The round trip without queues: what is sent while the guest waits finds none.
    fn rtt(&self) -> Duration {
        Duration::from_micros(self.status.rtt_min_us.load(Relaxed))
    }

    pub(super) fn pausing(&mut self) {
        self.cutover.pausing = Some(self.clock.now());
        self.worker.guest_waits.store(true, Relaxed);
        self.status.ahead.open();
        self.enter(Phase::Cutover);
    }

    pub(super) fn paused(&mut self) {
        self.cutover.paused = Some(self.clock.now());
    }

    /// The last chunks were given to the pipeline, before the state.
    pub(super) fn final_round_packed(&mut self, chunks: u64) {
        self.cutover.final_round = Some(self.clock.now());
        self.cutover.final_chunks = chunks;
    }

    /// State and all were given to the pipeline.
    pub(super) fn state_packed(&mut self, bytes: usize, full_hash: Option<[u8; 32]>) {
        self.cutover.state = Some(self.clock.now());
        self.cutover.state_bytes = bytes as u64;
        self.report.full_hash = full_hash.map(hex::encode);
    }

    pub(super) fn prepared(&mut self) {
        self.cutover.prepared = Some(self.clock.now());
        self.round_ends();
    }

    pub(super) fn committed(&mut self) {
        self.enter(Phase::Committing);
    }

    pub(super) fn resumed(&mut self, at: Duration, resumed: &Resumed) {
        if self.early {
            // Behind the last segment.
            let said = self.status.commit.said_at().unwrap_or(at);
            self.cutover.prepared = Some(said);
            self.round_ended(said);
        }
        self.cutover.resumed = Some(at);
        self.cutover.peer = Some(*resumed);
    }

    /// The report as of now.
    pub(super) fn report(
        &self,
        outcome: Outcome,
        reason: Option<String>,
        stats: Option<Stats>,
        base: String,
    ) -> Report {
        let now = self.clock.now();
        let mut stats = stats.unwrap_or_default();
        stats[Stage::Compress] = self.worker.compress.get();
        stats[Stage::Seal] = self.worker.seal.get();
        let status = self.status;
        let (sent, received) =
            (status.bytes_sent.load(Relaxed), status.bytes_received.load(Relaxed));
        let downtime = self.downtime();
        let outage = self.outages.total(now);
        let moving = self.last_sent.saturating_sub(self.started).saturating_sub(outage);
        let moving = moving.as_secs_f64();
        let rate = self.link_rate();
        Report {
            base,
            outcome,
            reason,
            total_ms: millis(now.saturating_sub(self.started)),
            downtime_ms: downtime.map(|d| d.estimate_ms),
            downtime,
            bytes_on_link: sent + received,
            bytes_sent: sent,
            bytes_received: received,
            links: u32::try_from(status.links.load(Relaxed)).unwrap_or(u32::MAX),
            outages: self.outages.listed(now, self.started),
            outage_ms: millis(outage),
            link_rate_bytes_per_s: rate,
            utilisation: rate
                .filter(|rate| *rate * moving > 0.0)
                .map(|rate| (sent as f64 / (rate * moving)).min(1.0)),
            rounds: self.rounds.clone(),
            samples: self.series.samples().iter().copied().chain([self.sample(now)]).collect(),
            classes: class_shares(&stats),
            stages: stage_shares(&stats),
            adaptation: Some(self.adapter.record()),
            cutover: self.cutover.shares(self.started, self.early),
            ..self.report.clone()
        }
    }

    fn downtime(&self) -> Option<Downtime> {
        let until = self.cutover.resumed?.saturating_sub(self.cutover.pausing?);
        Some(Downtime::measured(until, self.rtt(), self.predicted))
    }
}
