//! A guest on its way to a peer: the machine is with a thread of its own until it is decided where
//! the guest runs.

use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Sender, bounded};

use super::{End, Event, Process, State};
use crate::{
    control::{HandoffRequest, Progress, Reply, server::Answer},
    failure::{Exit, Failure, guarded},
    home::write_json,
    jail::{self, Kind},
    vmproc::machine::{Cancel, HandoffEnd, Machine, Watch},
};

/// A handoff under way; the machine is with its thread.
pub(super) struct Handoff {
    pub(super) answer: Answer,
    pub(super) cancel: Cancel,
    /// Those who gave it up, and wait to hear whether that was in time.
    pub(super) cancelled: Vec<Answer>,
    pub(super) progress: Progress,
    pub(super) in_doubt: Option<String>,
    pub(super) stop: Vec<Answer>,
    pub(super) end: bool,
    /// Why the guest ended by itself meanwhile.
    pub(super) guest_ended: Option<String>,
    was_paused: bool,
}

impl Process {
    pub(super) fn hand_off(&mut self, request: HandoffRequest, answer: Answer) {
        let (machine, was_paused) = match std::mem::replace(&mut self.state, State::Gone) {
            State::Running(machine) => (machine, false),
            State::Paused(machine) => (machine, true),
            other => {
                self.state = other;
                return answer.last(self.busy());
            }
        };
        let cancel = Cancel::default();
        let watch = ToEvents { cancel: cancel.clone(), events: self.sender.clone() };
        let progress = Progress { peer: request.peer.clone(), ..Progress::default() };
        // The machine follows when the thread is there: one that cannot be started must not take
        // the guest with it.
        let (give, take) = bounded::<Box<dyn Machine>>(1);
        let work = move || {
            let Ok(machine) = take.recv() else { return };
            let end = guarded("handoff", || match jail::confine(Kind::Handoff) {
                Ok(()) => machine.hand_off(&request, &watch),
                Err(failure) => HandoffEnd::Kept { machine, failure },
            })
            .unwrap_or_else(|failure| HandoffEnd::Undecided { failure });
            let _ = watch.events.send(Event::HandoffEnded(end));
        };
        if let Err(e) = std::thread::Builder::new().name("handoff".into()).spawn(work) {
            self.state = if was_paused { State::Paused(machine) } else { State::Running(machine) };
            return answer.last(Failure::new(
                Exit::NotMoved,
                "handoff",
                e,
                "raise the limit on threads",
            ));
        }
        let _ = give.send(machine);
        self.state = State::HandingOff(Handoff {
            answer,
            cancel,
            cancelled: Vec::new(),
            progress,
            in_doubt: None,
            stop: Vec::new(),
            end: false,
            guest_ended: None,
            was_paused,
        });
    }

    pub(super) fn cancel(&mut self, answer: Answer) {
        match &mut self.state {
            State::HandingOff(handoff) if handoff.in_doubt.is_none() => {
                handoff.cancel.cancel();
                handoff.cancelled.push(answer);
            }
            State::HandingOff(_) => answer.last(self.busy()),
            _ => answer.last(self.conflict("no handoff of it is under way")),
        }
    }

    pub(super) fn progress(&mut self, new: Progress) -> Option<End> {
        if let State::HandingOff(handoff) = &mut self.state {
            handoff.answer.passing(Reply::Progress(new.clone()));
            handoff.progress = new;
        }
        None
    }

    pub(super) fn in_doubt(&mut self, why: String) -> anyhow::Result<Option<End>> {
        let late = self.conflict("it is committed already, and the peer has not confirmed");
        let mut must_end = false;
        if let State::HandingOff(handoff) = &mut self.state {
            tracing::warn!("in doubt: {why}");
            handoff.cancelled.drain(..).for_each(|a| a.last(late.clone()));
            handoff.progress.stage = "in doubt".into();
            handoff.answer.passing(Reply::Progress(handoff.progress.clone()));
            handoff.in_doubt = Some(why);
            must_end = handoff.end;
        }
        // Told to end before it came to this: the next start asks the peer instead.
        if must_end { self.stop(None, true) } else { Ok(None) }
    }

    pub(super) fn handoff_ended(&mut self, end: HandoffEnd) -> anyhow::Result<Option<End>> {
        let State::HandingOff(handoff) = std::mem::replace(&mut self.state, State::Gone) else {
            return Ok(None);
        };
        match end {
            HandoffEnd::Moved { report, keep } => {
                self.keep_report(&report);
                handoff.answer.last(Reply::Moved(report));
                let late = self.conflict("it was handed off");
                let asked = handoff.stop.into_iter().chain(handoff.cancelled);
                asked.for_each(|answer| answer.last(late.clone()));
                let kept = keep.map(|keep| guarded("keeping the visit", keep).and_then(|k| k));
                if let Some(Err(failure)) = kept {
                    tracing::warn!("{failure}");
                }
                Ok(Some(End::HandedOff))
            }
            HandoffEnd::Kept { mut machine, failure } => {
                let failure = self.why_it_ends(&handoff, failure);
                if let Some(report) = &failure.report {
                    self.keep_report(report);
                }
                handoff.answer.last(failure);
                self.state = if handoff.was_paused && machine.pause().is_ok() {
                    State::Paused(machine)
                } else {
                    State::Running(machine)
                };
                let mut ended = None;
                if handoff.end {
                    ended = self.stop(None, true)?;
                }
                let asked = handoff.stop.into_iter().chain(handoff.cancelled);
                asked.for_each(|answer| answer.last(Reply::Done));
                Ok(ended)
            }
            HandoffEnd::Undecided { failure } => {
                handoff.answer.last(failure.clone());
                let asked = handoff.stop.into_iter().chain(handoff.cancelled);
                asked.for_each(|answer| answer.last(failure.clone()));
                Err(failure.into())
            }
        }
    }

    /// Why the guest was not handed off, where that is not that the handoff was cancelled but what
    /// cancelled it; and where the guest is then.
    fn why_it_ends(&self, handoff: &Handoff, failure: Failure) -> Failure {
        let why = match &handoff.guest_ended {
            Some(why) => format!("its guest ended meanwhile: {why}"),
            None if handoff.end && failure.exit == Exit::Cancelled => {
                "its process was told to end, and stops the guest here".into()
            }
            None => return failure,
        };
        let what = format!("VM {} was not handed off", self.dir.name());
        let way_out = format!("`howdah vm run {}` boots it again", self.dir.name());
        let report = failure.report;
        Failure { report, ..Failure::new(Exit::NotMoved, what, why, way_out) }
    }

    fn keep_report(&self, report: &serde_json::Value) {
        if let Err(e) = write_json(&self.dir.report(), report) {
            tracing::warn!("{e}");
        }
    }
}

/// A handoff's thread tells the main loop.
struct ToEvents {
    cancel: Cancel,
    events: Sender<Event>,
}

impl Watch for ToEvents {
    fn cancel(&self) -> &AtomicBool {
        self.cancel.flag()
    }

    fn progress(&self, progress: Progress) {
        let _ = self.events.send(Event::Progress(progress));
    }

    fn in_doubt(&self, why: &str) {
        let _ = self.events.send(Event::InDoubt(why.to_owned()));
    }
}
