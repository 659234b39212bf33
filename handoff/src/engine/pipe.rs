//! The engine's end of the pipeline: gives work, watches what comes back, and never waits without
//! a bound.

use std::{
    sync::atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::{
    KeptReason, Limits,
    courier::{Notice, Order},
    meter::Meter,
    pipeline::{Feed, PipelineEnded},
    status::LinkStatus,
    worker::Job,
};
use crate::{
    Clock,
    ownership::Verdict,
    root::StateRoot,
    source::SourceEvent,
    wire::{Agreed, Resumed},
};

/// How often a waiting engine looks at cancellation and progress.
const TICK: Duration = Duration::from_millis(20);

/// How often an engine that waits for the link looks at it.
const DRAIN_TICK: Duration = Duration::from_millis(1);

/// A peer that lives is heard each time that it pings; so many may be late.
const PINGS_MISSED: u32 = 2;

/// What is done now and then while the link is waited for; is told whether it is broken.
pub(super) type Meanwhile<'a> = dyn FnMut(bool) -> Result<(), KeptReason> + 'a;

/// A round is harvested when what is left of the last one keeps the link busy for so long: asking
/// for what is dirty, and making the first segment of it, takes time.
const HARVEST_AHEAD: Duration = Duration::from_millis(30);
/// Before what the link is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Before {
    /// More of the same round is given to it.
    NextJob,
    /// It is asked what is dirty.
    Harvest,
    /// The guest is paused.
    Pause,
}

impl Before {
    /// How much longer than its round trip the link may have something to do then.
    fn ahead(self) -> Duration {
        match self {
            Self::NextJob | Self::Pause => Duration::ZERO,
            Self::Harvest => HARVEST_AHEAD,
        }
    }
}

/// A word of the target that the phases wait for, and when it came.
#[derive(Clone, Debug)]
pub(super) enum Word {
    Welcomed { agreed: Agreed, early: bool },
    Prepared { root: StateRoot, full_hash: Option<[u8; 32]> },
    Declined(String),
    Resumed(Resumed),
    Answer(Verdict),
}

pub(super) struct Pipe<'a> {
    pub(super) feed: Feed,
    /// One job after the other, and the next only when the link has room.
    pub(super) serial: bool,
    pub(super) orders: Sender<Order>,
    pub(super) notices: Receiver<Notice>,
    pub(super) status: &'a LinkStatus,
    pub(super) limits: &'a Limits,
    pub(super) clock: &'a dyn Clock,
    pub(super) cancel: &'a AtomicBool,
    /// When the last job was given, unless the link was waited for since.
    pub(super) gave: Option<Duration>,
    /// When segments were last applied, and how many bytes then.
    pub(super) applied: (Duration, u64),
    pub(super) meter: Meter<'a>,
}

impl Pipe<'_> {
    /// Gives a job to the pipeline, waiting while it is full.
    pub(super) fn push(&mut self, job: Job) -> Result<(), KeptReason> {
        self.push_while(job, &mut |_| Ok(()))
    }

    /// The same, and does `meanwhile` now and then, which is told whether the link is broken.
    pub(super) fn push_while(
        &mut self,
        job: Job,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), KeptReason> {
        let began = self.clock.now();
        if let (Some(gave), Job::Body { body, .. }) = (self.gave, &job) {
            self.status.ahead.supplied(began.saturating_sub(gave), body.len());
        }
        loop {
            self.check()?;
            meanwhile(self.is_broken())?;
            match self.feed.ticket(TICK) {
                Ok(true) => break,
                Ok(false) => {}
                Err(PipelineEnded) => return Err(self.pipeline_ended()),
            }
        }
        self.meter.waited(self.clock.now().saturating_sub(began));
        self.status.queued_jobs.fetch_add(1, Relaxed);
        self.feed.give(job).map_err(|PipelineEnded| self.pipeline_ended())?;
        self.gave = Some(self.clock.now());
        if self.serial {
            self.drain_while(Before::NextJob, &mut |_| Ok(()))?;
        }
        Ok(())
    }

    /// Waits until the link will run dry within its round trip; does `meanwhile` as
    /// [`Pipe::push_while`] does.
    pub(super) fn drain_while(
        &mut self,
        before: Before,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), KeptReason> {
        self.gave = None;
        loop {
            let low = self.meter.low_water_bytes(before.ahead());
            if self.backlog_bytes(before) <= low {
                return Ok(());
            }
            self.check()?;
            meanwhile(self.is_broken())?;
            std::thread::sleep(DRAIN_TICK);
        }
    }

    /// Bytes on their way to the target; the most there can be while the pipeline holds work.
    fn backlog_bytes(&self, before: Before) -> u64 {
        if self.status.queued_jobs.load(Acquire) > 0 {
            return u64::MAX;
        }
        self.status.refresh();
        let in_flight = self.status.in_flight_bytes.load(Relaxed);
        // What the link delivered waits at a target that is slower than the link.
        let unapplied = self.status.unapplied_bytes.load(Relaxed);
        let slack = match before {
            // It would be waited for with the guest paused.
            Before::Pause => 0,
            Before::NextJob | Before::Harvest => self.meter.ack_slack_bytes(),
        };
        in_flight.max(unapplied.saturating_sub(slack))
    }

    /// Fails if the user wants no more of it.
    pub(super) fn check_cancelled(&self) -> Result<(), KeptReason> {
        if self.cancel.load(Relaxed) { Err(KeptReason::Cancelled) } else { Ok(()) }
    }

    /// Looks at cancellation and at what came, and fails if the handoff cannot go on.
    pub(super) fn check(&mut self) -> Result<(), KeptReason> {
        self.check_wait()?;
        while let Ok(notice) = self.notices.try_recv() {
            // Nothing is waited for here, so a word that is no failure is none of the target's.
            if let Some(word) = self.judge(notice)?.map(|(word, _)| word) {
                return Err(KeptReason::Protocol(format!("unexpected {word:?}")));
            }
        }
        self.check_stall()
    }

    /// Looks at what ends any wait before the commit.
    fn check_wait(&mut self) -> Result<(), KeptReason> {
        self.meter.tick();
        self.check_cancelled()?;
        let limit = self.limits.relink_paused;
        match self.meter.waits_paused() {
            Some(waited) if waited >= limit => {
                let why = self.meter.outages().why().unwrap_or_default();
                let why = format!("{why}; no link for {limit:?} while the guest was paused");
                Err(KeptReason::Link(why))
            }
            _ => Ok(()),
        }
    }

    /// Whether there is no link now, as far as is known.
    pub(super) fn is_broken(&self) -> bool {
        self.meter.outages().since().is_some()
    }

    /// Waits until there is a link, and a sign of life came over it lately: the guest is not paused
    /// for one that is gone. Whether there was anything to wait for.
    pub(super) fn await_link(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<bool, KeptReason> {
        let mut waited = false;
        loop {
            self.check()?;
            meanwhile(self.is_broken())?;
            if !self.is_broken() && !self.is_silent() {
                return Ok(waited);
            }
            waited = true;
            std::thread::sleep(TICK);
        }
    }

    /// Whether nothing was heard for longer than a peer that lives is silent.
    fn is_silent(&self) -> bool {
        let rtt = Duration::from_micros(self.status.rtt_us.load(Relaxed));
        let heard = Duration::from_micros(self.status.heard_us.load(Relaxed));
        let silent = self.clock.now().saturating_sub(heard);
        silent > (self.limits.ping_every * PINGS_MISSED + rtt).min(self.limits.silence)
    }

    /// The target must go on applying while there is something to apply, and a link to hear of it.
    fn check_stall(&mut self) -> Result<(), KeptReason> {
        let now = self.clock.now();
        let applied = self.status.applied_bytes.load(Relaxed);
        let nothing_to_do = self.status.unapplied_bytes.load(Relaxed) == 0;
        if applied != self.applied.1 || nothing_to_do || self.is_broken() {
            self.applied = (now, applied);
        }
        let limit = self.limits.stall;
        if now.saturating_sub(self.applied.0) > limit {
            return Err(KeptReason::TimedOut { what: "the peer's next sign of progress", limit });
        }
        Ok(())
    }

    /// Waits for a word of the target before the commit, for `limit` after it was last seen to
    /// apply anything: what is on its way may take as long as it takes, as long as it moves.
    pub(super) fn await_word(
        &mut self,
        what: &'static str,
        limit: Duration,
    ) -> Result<(Word, Duration), KeptReason> {
        let mut moved = (self.clock.now(), self.status.applied_bytes.load(Relaxed));
        while self.clock.now() < moved.0 + limit {
            let applied = self.status.applied_bytes.load(Relaxed);
            if applied != moved.1 || self.is_broken() {
                moved = (self.clock.now(), applied);
            }
            self.check_wait()?;
            match self.notices.recv_timeout(TICK) {
                Ok(notice) => {
                    if let Some(word) = self.judge(notice)? {
                        return Ok(word);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.pipeline_ended()),
            }
        }
        Err(KeptReason::TimedOut { what, limit })
    }

    /// What a notice means before the commit.
    fn judge(&mut self, notice: Notice) -> Result<Option<(Word, Duration)>, KeptReason> {
        let (event, at) = match notice {
            Notice::Event(event, at) => (event, at),
            Notice::Lost(why) => {
                tracing::warn!(why, "link lost");
                self.meter.link_lost(why);
                return Ok(None);
            }
            Notice::Gone(why) => return Err(KeptReason::Link(why)),
            Notice::Compressor(why) => {
                return Err(KeptReason::Vm { doing: "compressing", source: why.into() });
            }
        };
        let word = match event {
            SourceEvent::Welcomed { agreed, early, .. } => {
                // The first Welcome may come over a later link than the first.
                if self.is_broken() {
                    self.meter.link_back();
                }
                Word::Welcomed { agreed, early }
            }
            SourceEvent::Relinked { applied_up_to } => {
                tracing::info!(applied_up_to, "link is back");
                self.meter.link_back();
                return Ok(None);
            }
            SourceEvent::Refused(refusal) => return Err(refusal.into()),
            SourceEvent::Aborted(why) => return Err(KeptReason::PeerAborted(why)),
            SourceEvent::Answer(verdict) => {
                let why = format!("it gave the handoff up meanwhile ({verdict:?})");
                return Err(KeptReason::PeerAborted(why));
            }
            SourceEvent::Prepared { root, full_hash } => Word::Prepared { root, full_hash },
            SourceEvent::Declined(why) => return Err(KeptReason::Declined(why)),
            SourceEvent::Resumed(_) => {
                return Err(KeptReason::Protocol("Resumed before the commit".into()));
            }
        };
        Ok(Some((word, at)))
    }

    /// Waits for the target's word on a commit, for `patience` after it was last seen to apply
    /// anything. Links that break meanwhile are made again, and Commit is said again on each. Why the
    /// waiting ends without that word: before Commit was said, anything that ends a handoff.
    pub(super) fn await_verdict(
        &mut self,
        patience: Duration,
    ) -> Result<(Word, Duration), KeptReason> {
        let mut moved = (self.clock.now(), self.status.applied_bytes.load(Relaxed));
        while self.clock.now() < moved.0 + patience {
            let applied = self.status.applied_bytes.load(Relaxed);
            if applied != moved.1 {
                moved = (self.clock.now(), applied);
            }
            self.meter.tick();
            let said = self.status.commit.said_at().is_some();
            if self.cancel.load(Relaxed) && !said {
                return Err(KeptReason::Cancelled);
            }
            let notice = match self.notices.recv_timeout(TICK) {
                Ok(notice) => notice,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Err(self.pipeline_ended()),
            };
            match notice {
                Notice::Event(SourceEvent::Resumed(resumed), at) => {
                    return Ok((Word::Resumed(resumed), at));
                }
                Notice::Event(SourceEvent::Declined(why), at) => {
                    return Ok((Word::Declined(why), at));
                }
                Notice::Event(SourceEvent::Answer(verdict), at) => {
                    return Ok((Word::Answer(verdict), at));
                }
                Notice::Gone(why) => return Err(KeptReason::Link(why)),
                // Durable or not, what else it says decides nothing once Commit was said.
                notice => match self.judge(notice) {
                    Err(reason) if !said => return Err(reason),
                    Err(reason) => {
                        tracing::warn!(%reason, "committed; waiting for the peer's word")
                    }
                    Ok(_) => {}
                },
            }
        }
        Err(KeptReason::TimedOut { what: "the peer's word on the commit", limit: patience })
    }

    fn pipeline_ended(&mut self) -> KeptReason {
        // Whoever ended has said why, unless it failed itself.
        while let Ok(notice) = self.notices.try_recv() {
            if let Err(reason) = self.judge(notice) {
                return reason;
            }
        }
        KeptReason::Link("the sending thread ended".into())
    }
}
