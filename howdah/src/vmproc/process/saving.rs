//! A guest that is written to a file: paused meanwhile, on a thread of its own.

use std::fs::File;

use crossbeam_channel::bounded;

use super::{End, Event, Process, State};
use crate::{
    control::{Reply, SaveRequest, server::Answer},
    failure::{Exit, Failure, describe, guarded},
    jail::{self, Kind},
    vmproc::machine::Machine,
};

/// A save under way; the machine is with its thread.
pub(super) struct Saving {
    answer: Answer,
    was_paused: bool,
    /// Leave the guest paused when it is saved.
    hold: bool,
    /// End it whether or not it is saved: asked for since.
    pub(super) must_end: bool,
    /// Who waits for that.
    pub(super) end: Vec<Answer>,
}

/// How a save ended.
pub(crate) struct SaveEnd {
    /// The machine, unless a defect cost it.
    machine: Option<Box<dyn Machine>>,
    /// The report, or why not.
    saved: Result<serde_json::Value, Failure>,
}

impl Process {
    pub(super) fn save(&mut self, request: SaveRequest, to: File, answer: Answer) {
        let (mut machine, was_paused) = match std::mem::replace(&mut self.state, State::Gone) {
            State::Running(machine) => (machine, false),
            State::Paused(machine) => (machine, true),
            other => {
                self.state = other;
                return answer.last(self.busy());
            }
        };
        if !was_paused && let Err(e) = machine.pause() {
            self.state = State::Running(machine);
            return answer.last(describe(&e.context("pause")));
        }
        let hold = request.hold;
        let events = self.sender.clone();
        // As in a handoff: the machine follows when the thread is there.
        let (give, take) = bounded::<Box<dyn Machine>>(1);
        let work = move || {
            let Ok(mut machine) = take.recv() else { return };
            let end = guarded("save", || {
                let saved = jail::confine(Kind::Handoff).and_then(|()| machine.save(&request, &to));
                SaveEnd { machine: Some(machine), saved }
            });
            let lost = |failure| SaveEnd { machine: None, saved: Err(failure) };
            let _ = events.send(Event::SaveEnded(end.unwrap_or_else(lost)));
        };
        let saving = Saving { answer, was_paused, hold, must_end: false, end: Vec::new() };
        match std::thread::Builder::new().name("save".into()).spawn(work) {
            Ok(_) => {
                let _ = give.send(machine);
                self.state = State::Saving(saving);
            }
            Err(e) => {
                let failure = Failure::new(Exit::Failed, "save", e, "raise the limit on threads");
                self.go_on(machine, was_paused);
                saving.answer.last(failure);
            }
        }
    }

    pub(super) fn save_ended(&mut self, end: SaveEnd) -> anyhow::Result<Option<End>> {
        let State::Saving(saving) = std::mem::replace(&mut self.state, State::Gone) else {
            return Ok(None);
        };
        let Saving { answer, was_paused, hold, must_end, end: waiting } = saving;
        let Some(machine) = end.machine else {
            let failure = end.saved.err().unwrap_or_else(|| self.busy());
            answer.last(failure.clone());
            waiting.into_iter().for_each(|other| other.last(failure.clone()));
            return Err(failure.into());
        };
        // Whoever wants the file and the end has neither if there is no file.
        let hold = hold && end.saved.is_ok();
        self.go_on(machine, was_paused || hold || must_end);
        let ended = if must_end { self.stop(None, true) } else { Ok(None) };
        match (&ended, end.saved) {
            (Err(e), _) => answer.last(Failure::line(Exit::Failed, &format!("{e:#}"))),
            (Ok(_), Ok(report)) => answer.last(Reply::Saved(report)),
            (Ok(_), Err(failure)) => answer.last(failure),
        }
        waiting.into_iter().for_each(|other| other.last(Reply::Done));
        ended
    }

    fn go_on(&mut self, mut machine: Box<dyn Machine>, paused: bool) {
        self.state = match paused {
            true => State::Paused(machine),
            false => match machine.resume() {
                Ok(()) => State::Running(machine),
                Err(e) => {
                    tracing::error!("the guest stays paused: {e:#}");
                    State::Paused(machine)
                }
            },
        };
    }
}
