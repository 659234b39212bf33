//! A guest that is recorded while it runs: the machine is with a thread meanwhile, and comes back
//! before the trace is written.

use std::fs::File;

use crossbeam_channel::bounded;
use handoff::trace::{
    file,
    record::{Ended, Recorded},
};

use super::{End, Event, Process, State};
use crate::{
    control::{RecordRequest, Reply, server::Answer},
    failure::{Exit, Failure, guarded},
    jail::{self, Kind},
    vmproc::machine::{Cancel, Machine},
};

/// Stretches of time in what is said of a trace.
const WINDOWS: u32 = 10;

/// A recording under way; the machine is with its thread, and so is the way to answer.
pub(super) struct Recording {
    cancel: Cancel,
    /// End the guest when its machine is back.
    pub(super) must_end: bool,
    /// Who waits for that.
    pub(super) end: Vec<Answer>,
}

impl Recording {
    /// Ends it with what it has.
    pub(super) fn end_early(&self) {
        self.cancel.cancel();
    }
}

impl Process {
    pub(super) fn record(&mut self, request: RecordRequest, to: File, answer: Answer) {
        let machine = match std::mem::replace(&mut self.state, State::Gone) {
            State::Running(machine) => machine,
            other => {
                self.state = other;
                return answer.last(self.busy());
            }
        };
        let cancel = Cancel::default();
        let (flag, events, asked) = (cancel.clone(), self.sender.clone(), answer.clone());
        // As in a handoff: the machine follows when the thread is there.
        let (give, take) = bounded::<Box<dyn Machine>>(1);
        let work = move || {
            let Ok(mut machine) = take.recv() else { return };
            let recorded = guarded("recording", || {
                let confined = jail::confine(Kind::Handoff);
                let recorded = confined.and_then(|()| machine.record(&request, flag.flag()));
                (machine, recorded)
            });
            let (machine, recorded) = match recorded {
                Ok((machine, recorded)) => (Some(machine), recorded),
                Err(failure) => (None, Err(failure)),
            };
            // The guest is free again while the trace is compressed.
            let _ = events.send(Event::RecordEnded(machine));
            match recorded.and_then(|recorded| write(&recorded, &to, &request.path)) {
                Ok(said) => asked.last(Reply::Recorded(said)),
                Err(failure) => asked.last(failure),
            }
        };
        match std::thread::Builder::new().name("record".into()).spawn(work) {
            Ok(_) => {
                let _ = give.send(machine);
                let recording = Recording { cancel, must_end: false, end: Vec::new() };
                self.state = State::Recording(recording);
            }
            Err(e) => {
                self.state = State::Running(machine);
                answer.last(Failure::new(
                    Exit::Failed,
                    "recording",
                    e,
                    "raise the limit on threads",
                ));
            }
        }
    }

    pub(super) fn end_recording(&mut self, answer: Answer) {
        match &self.state {
            State::Recording(recording) => {
                recording.end_early();
                answer.last(Reply::Done);
            }
            _ => answer.last(self.conflict("it is not being recorded")),
        }
    }

    pub(super) fn record_ended(
        &mut self,
        machine: Option<Box<dyn Machine>>,
    ) -> anyhow::Result<Option<End>> {
        let State::Recording(recording) = std::mem::replace(&mut self.state, State::Gone) else {
            return Ok(None);
        };
        let Some(machine) = machine else {
            let why = "a defect ended its recording, and the guest with it";
            let failure = self.conflict(why);
            recording.end.into_iter().for_each(|other| other.last(failure.clone()));
            return Err(Failure { exit: Exit::Failed, ..failure }.into());
        };
        self.state = State::Running(machine);
        if recording.must_end {
            let ended = self.stop(None, true);
            recording.end.into_iter().for_each(|other| other.last(Reply::Done));
            return ended;
        }
        self.go_through_waiting()
    }
}

fn write(recorded: &Recorded, to: &File, name: &str) -> Result<serde_json::Value, Failure> {
    let Recorded { trace, ended } = recorded;
    let out = std::io::BufWriter::new(to);
    let bytes = file::write(trace, out)
        .map_err(|e| Failure::plain(Exit::Failed, format!("write {name}"), e))?;
    let mut said = serde_json::to_value(trace.summary(WINDOWS)).unwrap_or_default();
    if let Some(fields) = said.as_object_mut() {
        let ended = match ended {
            Ended::InTime => "in time",
            Ended::Cancelled => "early",
            Ended::Full => "full",
        };
        fields.insert("ended".into(), ended.into());
        fields.insert("bytes".into(), bytes.into());
    }
    Ok(said)
}
