//! The main loop: one event after another, so that no two commands ever meet in the machine.

mod handing_off;
mod recording;
mod saving;
#[cfg(test)]
mod tests;

use std::{fs::File, os::fd::OwnedFd, time::Duration};

use crossbeam_channel::{Receiver, Sender, unbounded};

use handing_off::Handoff;
use recording::Recording;
pub(crate) use saving::SaveEnd;
use saving::Saving;

use super::machine::{HandoffEnd, Machine};
use crate::{
    control::{
        Phase, Progress, Reply, Request, Status,
        server::{Answer, Asked},
    },
    failure::{Exit, Failure, describe, one_line},
    home::VmDir,
};

/// Commands that wait for a machine that is as good as there.
const MAX_WAITING: usize = 16;
/// How often an idle loop looks around; nothing depends on it.
const IDLE: Duration = Duration::from_secs(3600);

/// What the process reacts to.
pub(crate) enum Event {
    /// A command.
    Asked(Asked),
    /// The guest ended by itself: it powered off or rebooted.
    GuestEnded(String),
    /// The machine cannot go on.
    GuestFailed(String),
    /// The user, or the system, wants the process to end.
    Terminate,
    /// A handoff goes on.
    Progress(Progress),
    /// A handoff is committed and not confirmed.
    InDoubt(String),
    /// A handoff is over.
    HandoffEnded(HandoffEnd),
    /// The guest is saved, or is not.
    SaveEnded(SaveEnd),
    /// The guest is recorded, or is not, and the machine is here again.
    RecordEnded(Option<Box<dyn Machine>>),
    /// The guest that was started or received runs here, or will not.
    Arrived(Result<Box<dyn Machine>, Failure>),
}

/// How the process ended.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    /// The guest was stopped, or stopped itself; its disk is flushed.
    Stopped,
    /// A peer runs the guest.
    HandedOff,
}

/// Takes the links of a reception.
pub(crate) type Links = Box<dyn Fn(Asked) + Send>;

enum State {
    Running(Box<dyn Machine>),
    Paused(Box<dyn Machine>),
    HandingOff(Handoff),
    Saving(Saving),
    Recording(Recording),
    Coming(Coming),
    /// Between two states, and after the last.
    Gone,
}

/// A machine that another thread builds or receives.
pub(crate) struct Coming {
    /// [`Phase::Starting`] or [`Phase::Receiving`].
    pub(crate) phase: Phase,
    /// Takes later links of a reception.
    pub(crate) links: Option<Links>,
    /// Called when the guest runs.
    pub(crate) ready: Box<dyn FnOnce() + Send>,
}

/// One VM's main loop.
pub(crate) struct Process {
    dir: VmDir,
    state: State,
    /// Asked while the machine was on its way, with the record saying that it is ours.
    waiting: Vec<Asked>,
    /// The guest runs here already, and is to end as soon as its machine is this loop's; who waits
    /// for that.
    end_on_arrival: Option<Vec<Answer>>,
    /// Why the machine cannot go on. The process ends with it, once it is decided who has the guest.
    fault: Option<String>,
    events: Receiver<Event>,
    sender: Sender<Event>,
}

impl Process {
    /// The loop and the way to send it events.
    pub(crate) fn new(dir: VmDir) -> (Self, Sender<Event>) {
        let (sender, events) = unbounded();
        let process = Self {
            dir,
            state: State::Gone,
            waiting: Vec::new(),
            end_on_arrival: None,
            fault: None,
            events,
            sender: sender.clone(),
        };
        (process, sender)
    }

    /// Runs until the guest ends, or does not come. [`Event::Arrived`] brings the machine.
    pub(crate) fn run(mut self, coming: Coming) -> anyhow::Result<End> {
        self.state = State::Coming(coming);
        let end = self.serve()?;
        match self.fault.take() {
            Some(why) if end == End::Stopped => Err(self.failed(why)),
            _ => Ok(end),
        }
    }

    fn serve(&mut self) -> anyhow::Result<End> {
        loop {
            let Ok(event) = self.events.recv_timeout(IDLE) else { continue };
            let end = match event {
                Event::Asked(asked) => self.asked(asked)?,
                Event::GuestEnded(why) => {
                    tracing::warn!("the guest ended: {why}");
                    self.guest_ended(why)?
                }
                Event::GuestFailed(why) => {
                    tracing::error!("the machine cannot go on: {why}");
                    self.fault = Some(why.clone());
                    self.guest_ended(why)?
                }
                Event::Terminate => self.stop(None, true)?,
                Event::Progress(progress) => self.progress(progress),
                Event::InDoubt(why) => self.in_doubt(why)?,
                Event::HandoffEnded(end) => self.handoff_ended(end)?,
                Event::SaveEnded(end) => self.save_ended(end)?,
                Event::RecordEnded(machine) => self.record_ended(machine)?,
                Event::Arrived(Ok(machine)) => self.arrived(machine)?,
                Event::Arrived(Err(failure)) => {
                    let waiting = self.end_on_arrival.take().into_iter().flatten();
                    waiting.for_each(|answer| answer.last(failure.clone()));
                    return Err(failure.into());
                }
            };
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    fn arrived(&mut self, machine: Box<dyn Machine>) -> anyhow::Result<Option<End>> {
        if let State::Coming(coming) = std::mem::replace(&mut self.state, State::Running(machine)) {
            (coming.ready)();
        }
        if let Some(waiting) = self.end_on_arrival.take() {
            let ended = self.stop(None, true);
            waiting.into_iter().for_each(|answer| answer.last(said(&ended)));
            return ended;
        }
        self.go_through_waiting()
    }

    fn go_through_waiting(&mut self) -> anyhow::Result<Option<End>> {
        for asked in std::mem::take(&mut self.waiting) {
            if let Some(end) = self.asked(asked)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Whether the guest is ours already, and only its machine is not: a reception that waits for
    /// the source's last word, or a start. What is asked meanwhile can wait for it.
    fn is_about_to_run(&self) -> bool {
        matches!(self.state, State::Coming(_)) && self.may_run()
    }

    fn may_run(&self) -> bool {
        matches!(self.dir.record(), Ok(Some(record)) if record.may_run())
    }

    fn asked(&mut self, asked: Asked) -> anyhow::Result<Option<End>> {
        let can_wait = matches!(
            asked.request,
            Request::Pause
                | Request::Stop { force: false }
                | Request::Handoff(_)
                | Request::Save(_)
        );
        if can_wait && self.waiting.len() < MAX_WAITING {
            // A recording is nothing to wait for: it ends with what it has.
            if let State::Recording(recording) = &self.state {
                recording.end_early();
            }
            if self.is_about_to_run() || matches!(self.state, State::Recording(_)) {
                self.waiting.push(asked);
                return Ok(None);
            }
        }
        let Asked { request, answer, fd } = asked;
        match request {
            Request::Status => answer.last(Reply::Status(self.status())),
            Request::Describe => self.describe(answer),
            Request::Pause => self.pause(answer),
            Request::Resume => self.resume(answer),
            Request::Stop { force } => return self.stop(Some(answer), force),
            Request::Handoff(request) => self.hand_off(*request, answer),
            Request::CancelHandoff => self.cancel(answer),
            Request::Save(request) => match passed(fd) {
                Ok(to) => self.save(request, to, answer),
                Err(failure) => answer.last(failure),
            },
            Request::Record(request) => match passed(fd) {
                Ok(to) => self.record(request, to, answer),
                Err(failure) => answer.last(failure),
            },
            Request::EndRecording => self.end_recording(answer),
            Request::ExportDisk { .. } => match passed(fd) {
                Ok(to) => self.export(&to, answer),
                Err(failure) => answer.last(failure),
            },
            Request::Expects { .. } | Request::Newer { .. } | Request::AdoptLink(_) => {
                match &self.state {
                    State::Coming(Coming { links: Some(links), .. }) => {
                        links(Asked { request, answer, fd });
                    }
                    _ => answer.last(self.conflict("it is not being received")),
                }
            }
            // The server serves it without asking here.
            Request::Console => answer.last(Reply::Done),
        }
        Ok(None)
    }

    fn status(&self) -> Status {
        let record = self.dir.record();
        let (phase, progress) = match &self.state {
            State::Running(_) => (Phase::Running, None),
            State::Paused(_) => (Phase::Paused, None),
            State::Saving(_) => (Phase::Saving, None),
            State::Recording(_) => (Phase::Recording, None),
            State::HandingOff(h) if h.in_doubt.is_some() => (Phase::InDoubt, Some(&h.progress)),
            State::HandingOff(h) => (Phase::HandingOff, Some(&h.progress)),
            // The guest runs; only the source's last word is awaited.
            State::Coming(coming) if coming.links.is_some() && self.may_run() => {
                (Phase::Running, None)
            }
            State::Coming(coming) => (coming.phase, None),
            State::Gone => (Phase::Stopping, None),
        };
        Status {
            pid: std::process::id(),
            phase,
            ownership: match &record {
                Ok(Some(record)) => one_line(&record.to_string()),
                Ok(None) => "nobody's yet".into(),
                Err(failure) => failure.to_string(),
            },
            epoch: record.ok().flatten().map_or(0, |record| record.epoch.0),
            progress: progress.cloned(),
        }
    }

    fn conflict(&self, why: &str) -> Failure {
        let name = self.dir.name();
        let way_out = format!("`howdah vm inspect {name}` shows how it stands");
        Failure::new(Exit::Conflict, format!("VM {name}"), why, way_out)
    }

    /// Why a command that needs the machine cannot have it.
    fn busy(&self) -> Failure {
        self.conflict(match &self.state {
            State::Running(_) => "it is running",
            State::Paused(_) => "it is paused",
            State::Saving(_) => "it is being saved",
            State::Recording(_) => "it is being recorded",
            State::HandingOff(h) if h.in_doubt.is_some() => {
                "its handoff is committed, not confirmed"
            }
            State::HandingOff(_) => "it is being handed off",
            State::Coming(coming) if coming.links.is_some() => "it is being received",
            State::Coming(_) => "it is starting",
            State::Gone => "it is stopping",
        })
    }

    fn describe(&self, answer: Answer) {
        let (State::Running(machine) | State::Paused(machine)) = &self.state else {
            return answer.last(self.busy());
        };
        let name = self.dir.name();
        let encoded = machine.profile().and_then(|profile| {
            let encoded = profile.encode();
            encoded.map_err(|e| Failure::plain(Exit::Failed, format!("VM {name}"), e))
        });
        match encoded {
            Ok(blob) => answer.last(Reply::Machine(hex::encode(blob))),
            Err(failure) => answer.last(failure),
        }
    }

    fn pause(&mut self, answer: Answer) {
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Running(mut machine) => match machine.pause() {
                Ok(()) => {
                    self.state = State::Paused(machine);
                    answer.last(Reply::Done);
                }
                Err(e) => {
                    self.state = State::Running(machine);
                    answer.last(describe(&e.context("pause")));
                }
            },
            other => {
                self.state = other;
                answer.last(self.busy());
            }
        }
    }

    fn resume(&mut self, answer: Answer) {
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Paused(mut machine) => match machine.resume() {
                Ok(()) => {
                    self.state = State::Running(machine);
                    answer.last(Reply::Done);
                }
                Err(e) => {
                    self.state = State::Paused(machine);
                    answer.last(describe(&e.context("resume")));
                }
            },
            other => {
                self.state = other;
                answer.last(self.busy());
            }
        }
    }

    fn export(&mut self, to: &File, answer: Answer) {
        match &mut self.state {
            State::Paused(machine) => match machine.export_disk(to) {
                Ok(()) => answer.last(Reply::Done),
                Err(e) => answer.last(describe(&e)),
            },
            State::Running(_) => {
                let name = self.dir.name();
                answer.last(Failure::new(
                    Exit::Conflict,
                    format!("disk of VM {name}"),
                    "the guest is running and may be writing",
                    format!("`howdah vm pause {name}` first"),
                ));
            }
            _ => answer.last(self.busy()),
        }
    }

    fn guest_ended(&mut self, why: String) -> anyhow::Result<Option<End>> {
        if let State::HandingOff(handoff) = &mut self.state {
            handoff.guest_ended = Some(why);
        }
        self.stop(None, true)
    }

    /// Ends the guest, now or when the handoff under way is decided.
    fn stop(&mut self, answer: Option<Answer>, force: bool) -> anyhow::Result<Option<End>> {
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Running(machine) | State::Paused(machine) => {
                let stopped = machine.stop();
                if let Some(answer) = answer {
                    match &stopped {
                        Ok(()) => answer.last(Reply::Done),
                        Err(e) => answer.last(Failure::line(Exit::Failed, &format!("{e:#}"))),
                    }
                }
                stopped.map(|()| Some(End::Stopped))
            }
            State::HandingOff(handoff) if handoff.in_doubt.is_some() && force => {
                // The record is durable: `howdah vm run` goes on asking the peer.
                let failure = self.conflict("ended while its handoff is committed, not confirmed");
                handoff.answer.last(failure.clone());
                handoff.stop.into_iter().chain(answer).for_each(|a| a.last(Reply::Done));
                Err(Failure { exit: Exit::InDoubt, ..failure }.into())
            }
            State::HandingOff(mut handoff) if force => {
                handoff.cancel.cancel();
                handoff.stop.extend(answer);
                handoff.end = true;
                self.state = State::HandingOff(handoff);
                Ok(None)
            }
            State::Saving(mut saving) if force => {
                // It goes on by itself to a file that is whole, or to none.
                saving.end.extend(answer);
                saving.must_end = true;
                self.state = State::Saving(saving);
                Ok(None)
            }
            State::Recording(mut recording) if force => {
                recording.end_early();
                recording.end.extend(answer);
                recording.must_end = true;
                self.state = State::Recording(recording);
                Ok(None)
            }
            State::Coming(coming) if force && coming.links.is_some() && self.may_run() => {
                // The guest runs here already: to end now would be a power cut for it. The source's
                // last word is awaited for a few seconds at most.
                self.state = State::Coming(coming);
                self.end_on_arrival.get_or_insert_default().extend(answer);
                Ok(None)
            }
            State::Coming(_) if force => {
                // Safe at any instant: what is decided is on disk, what is not never happened.
                if let Some(answer) = answer {
                    answer.last(Reply::Done);
                }
                let name = self.dir.name();
                let what = format!("VM {name}");
                Err(Failure::new(Exit::Cancelled, what, "ended before it ran", "start again")
                    .into())
            }
            other => {
                self.state = other;
                if let Some(answer) = answer {
                    answer.last(self.busy());
                }
                Ok(None)
            }
        }
    }

    fn failed(&self, why: String) -> anyhow::Error {
        let name = self.dir.name();
        let way_out =
            format!("see {}; `howdah vm run {name}` boots it again", self.dir.vm_log().display());
        Failure::new(Exit::Failed, format!("VM {name}"), why, way_out).into()
    }
}

/// The file that a client passed to be written.
fn passed(fd: Option<OwnedFd>) -> Result<File, Failure> {
    fd.map(File::from).ok_or_else(|| {
        let way_out = "use the howdah that started this VM";
        Failure::new(Exit::Usage, "control", "no file came along to write", way_out)
    })
}

/// What those are told who wait for the guest's end.
fn said(ended: &anyhow::Result<Option<End>>) -> Reply {
    match ended {
        Ok(_) => Reply::Done,
        Err(e) => Failure::line(Exit::Failed, &format!("{e:#}")).into(),
    }
}
