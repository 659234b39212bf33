//! The main loop: one event after another, so that no two commands ever meet in the machine.

use std::{path::Path, sync::atomic::AtomicBool, time::Duration};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::machine::{Cancel, HandoffEnd, Machine, Watch};
use crate::{
    control::{
        HandoffRequest, Phase, Progress, Reply, Request, Status,
        server::{Answer, Asked},
    },
    failure::{Exit, Failure, describe, guarded, one_line},
    home::{VmDir, write_json},
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

/// A handoff under way; the machine is with its thread.
struct Handoff {
    answer: Answer,
    cancel: Cancel,
    progress: Progress,
    in_doubt: Option<String>,
    stop: Vec<Answer>,
    end: bool,
    /// Why the guest ended by itself meanwhile.
    guest_ended: Option<String>,
    was_paused: bool,
}

/// One VM's main loop.
pub(crate) struct Process {
    dir: VmDir,
    state: State,
    /// Asked while the machine was on its way, with the record saying that it is ours.
    waiting: Vec<Asked>,
    events: Receiver<Event>,
    sender: Sender<Event>,
}

impl Process {
    /// The loop and the way to send it events.
    pub(crate) fn new(dir: VmDir) -> (Self, Sender<Event>) {
        let (sender, events) = unbounded();
        let process =
            Self { dir, state: State::Gone, waiting: Vec::new(), events, sender: sender.clone() };
        (process, sender)
    }

    /// Runs until the guest ends, or does not come. [`Event::Arrived`] brings the machine.
    pub(crate) fn run(mut self, coming: Coming) -> anyhow::Result<End> {
        self.state = State::Coming(coming);
        self.serve()
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
                Event::GuestFailed(why) => return Err(self.failed(why)),
                Event::Terminate => self.stop(None, true)?,
                Event::Progress(progress) => self.progress(progress),
                Event::InDoubt(why) => self.in_doubt(why),
                Event::HandoffEnded(end) => self.handoff_ended(end)?,
                Event::Arrived(Ok(machine)) => self.arrived(machine)?,
                Event::Arrived(Err(failure)) => return Err(failure.into()),
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
            Request::Pause | Request::Stop { force: false } | Request::Handoff(_)
        );
        if can_wait && self.waiting.len() < MAX_WAITING && self.is_about_to_run() {
            self.waiting.push(asked);
            return Ok(None);
        }
        let Asked { request, answer, fd } = asked;
        match request {
            Request::Status => answer.last(Reply::Status(self.status())),
            Request::Pause => self.pause(answer),
            Request::Resume => self.resume(answer),
            Request::Stop { force } => return self.stop(Some(answer), force),
            Request::Handoff(request) => self.hand_off(request, answer),
            Request::CancelHandoff => self.cancel(answer),
            Request::ExportDisk { path } => self.export(Path::new(&path), answer),
            Request::AdoptLink { .. } => match &self.state {
                State::Coming(Coming { links: Some(links), .. }) => {
                    links(Asked { request, answer, fd });
                }
                _ => answer.last(self.conflict("it is not being received")),
            },
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
            State::HandingOff(h) if h.in_doubt.is_some() => {
                "its handoff is committed, not confirmed"
            }
            State::HandingOff(_) => "it is being handed off",
            State::Coming(coming) if coming.links.is_some() => "it is being received",
            State::Coming(_) => "it is starting",
            State::Gone => "it is stopping",
        })
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

    fn export(&mut self, path: &Path, answer: Answer) {
        match &mut self.state {
            State::Paused(machine) => match machine.export_disk(path) {
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
                if let Some(answer) = answer {
                    answer.last(Reply::Done);
                }
                Err(Failure { exit: Exit::InDoubt, ..failure }.into())
            }
            State::HandingOff(mut handoff) if force => {
                handoff.cancel.cancel();
                handoff.stop.extend(answer);
                handoff.end = true;
                self.state = State::HandingOff(handoff);
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

    fn hand_off(&mut self, request: HandoffRequest, answer: Answer) {
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
            let end = guarded("handoff", || machine.hand_off(&request, &watch))
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
            progress,
            in_doubt: None,
            stop: Vec::new(),
            end: false,
            guest_ended: None,
            was_paused,
        });
    }

    fn cancel(&mut self, answer: Answer) {
        match &self.state {
            State::HandingOff(handoff) if handoff.in_doubt.is_none() => {
                handoff.cancel.cancel();
                answer.last(Reply::Done);
            }
            State::HandingOff(_) => answer.last(self.busy()),
            _ => answer.last(self.conflict("no handoff of it is under way")),
        }
    }

    fn progress(&mut self, new: Progress) -> Option<End> {
        if let State::HandingOff(handoff) = &mut self.state {
            handoff.answer.passing(Reply::Progress(new.clone()));
            handoff.progress = new;
        }
        None
    }

    fn in_doubt(&mut self, why: String) -> Option<End> {
        if let State::HandingOff(handoff) = &mut self.state {
            tracing::warn!("in doubt: {why}");
            handoff.progress.stage = "in doubt".into();
            handoff.answer.passing(Reply::Progress(handoff.progress.clone()));
            handoff.in_doubt = Some(why);
        }
        None
    }

    fn handoff_ended(&mut self, end: HandoffEnd) -> anyhow::Result<Option<End>> {
        let State::HandingOff(handoff) = std::mem::replace(&mut self.state, State::Gone) else {
            return Ok(None);
        };
        match end {
            HandoffEnd::Moved { report, keep } => {
                self.keep_report(&report);
                handoff.answer.last(Reply::Moved(report));
                handoff.stop.into_iter().for_each(|a| a.last(self.conflict("it was handed off")));
                let kept = keep.map(|keep| guarded("keeping the visit", keep).and_then(|k| k));
                if let Some(Err(failure)) = kept {
                    tracing::warn!("{failure}");
                }
                Ok(Some(End::HandedOff))
            }
            HandoffEnd::Kept { mut machine, mut failure } => {
                if let Some(why) = &handoff.guest_ended {
                    let report = failure.report.take();
                    let what = format!("VM {} was not handed off", self.dir.name());
                    let way_out = format!("`howdah vm run {}` boots it again", self.dir.name());
                    let why = format!("its guest ended meanwhile: {why}");
                    failure =
                        Failure { report, ..Failure::new(Exit::NotMoved, what, why, way_out) };
                }
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
                handoff.stop.into_iter().for_each(|answer| answer.last(Reply::Done));
                Ok(ended)
            }
            HandoffEnd::Undecided { failure } => {
                handoff.answer.last(failure.clone());
                handoff.stop.into_iter().for_each(|answer| answer.last(failure.clone()));
                Err(failure.into())
            }
        }
    }

    fn keep_report(&self, report: &serde_json::Value) {
        if let Err(e) = write_json(&self.dir.report(), report) {
            tracing::warn!("{e}");
        }
    }

    fn failed(&self, why: String) -> anyhow::Error {
        let name = self.dir.name();
        let way_out =
            format!("see {}; `howdah vm run {name}` boots it again", self.dir.vm_log().display());
        Failure::new(Exit::Failed, format!("VM {name}"), why, way_out).into()
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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;
    use crate::{home::Home, vmproc::machine::Keep};

    /// A machine that notes what is done to it; its handoff ends as `outcome` says.
    #[derive(Clone)]
    struct Fake {
        done: Arc<Mutex<Vec<&'static str>>>,
        outcome: &'static str,
    }

    impl Fake {
        fn note(&self, what: &'static str) -> anyhow::Result<()> {
            self.done.lock().unwrap().push(what);
            Ok(())
        }
    }

    impl Machine for Fake {
        fn pause(&mut self) -> anyhow::Result<()> {
            self.note("pause")
        }
        fn resume(&mut self) -> anyhow::Result<()> {
            self.note("resume")
        }
        fn stop(self: Box<Self>) -> anyhow::Result<()> {
            self.note("stop")
        }
        fn export_disk(&mut self, _: &Path) -> anyhow::Result<()> {
            self.note("export")
        }
        fn hand_off(self: Box<Self>, _: &HandoffRequest, watch: &dyn Watch) -> HandoffEnd {
            let failure = Failure::new(Exit::NotMoved, "handoff", "no", "again");
            watch.progress(Progress { round: 1, ..Progress::default() });
            match self.outcome {
                "moved" => {
                    let done = Arc::clone(&self.done);
                    let keep: Keep = Box::new(move || {
                        done.lock().unwrap().push("keep");
                        Ok(())
                    });
                    let report = serde_json::json!({"total_ms": 1});
                    HandoffEnd::Moved { report, keep: Some(keep) }
                }
                "undecided" => HandoffEnd::Undecided { failure },
                "panic" => panic!("a defect, for this test"),
                "doubt" => {
                    watch.in_doubt("silence");
                    loop {
                        std::thread::park();
                    }
                }
                _ => {
                    while !watch.cancel().load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    HandoffEnd::Kept { machine: self, failure }
                }
            }
        }
    }

    struct Bench {
        _root: tempfile::TempDir,
        events: Sender<Event>,
        done: Arc<Mutex<Vec<&'static str>>>,
        thread: std::thread::JoinHandle<anyhow::Result<End>>,
    }

    fn bench(outcome: &'static str) -> Bench {
        let root = tempfile::tempdir().unwrap();
        let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        let (process, events) = Process::new(dir);
        let done = Arc::new(Mutex::new(Vec::new()));
        let fake = Box::new(Fake { done: Arc::clone(&done), outcome });
        events.send(Event::Arrived(Ok(fake))).unwrap();
        let coming = Coming { phase: Phase::Starting, links: None, ready: Box::new(|| {}) };
        let thread = std::thread::spawn(move || process.run(coming));
        Bench { _root: root, events, done, thread }
    }

    impl Bench {
        fn send(&self, request: Request) -> Receiver<Reply> {
            let (answer, replies) = Answer::new();
            self.events.send(Event::Asked(Asked { request, fd: None, answer })).unwrap();
            replies
        }

        fn call(&self, request: Request) -> Reply {
            self.send(request).iter().last().unwrap()
        }

        fn phase(&self) -> Phase {
            match self.call(Request::Status) {
                Reply::Status(status) => status.phase,
                other => panic!("{other:?}"),
            }
        }

        fn await_phase(&self, phase: Phase) {
            static TRIES: AtomicU32 = AtomicU32::new(0);
            while self.phase() != phase {
                assert!(TRIES.fetch_add(1, Ordering::Relaxed) < 10_000);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn handoff() -> Request {
        Request::Handoff(HandoffRequest { peer: "b:1".into(), ..HandoffRequest::default() })
    }

    fn refused(reply: &Reply) -> bool {
        matches!(reply, Reply::Failed(failure) if failure.exit == Exit::Conflict)
    }

    /// A received guest runs before its process has heard the source's last word: what is asked
    /// in between is done when it has.
    #[test]
    fn commands_wait_for_a_guest_that_is_ours() {
        use handoff::ownership::{Record, VmId};
        let root = tempfile::tempdir().unwrap();
        let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        let (process, events) = Process::new(dir.clone());
        let done = Arc::new(Mutex::new(Vec::new()));
        let fake = Box::new(Fake { done: Arc::clone(&done), outcome: "moved" });
        let links: Links = Box::new(|_| {});
        let coming = Coming { phase: Phase::Receiving, links: Some(links), ready: Box::new(|| {}) };
        let thread = std::thread::spawn(move || process.run(coming));
        let bench = Bench { _root: root, events, done, thread };
        assert_eq!(bench.phase(), Phase::Receiving);
        assert!(refused(&bench.call(Request::Pause)));
        dir.journal().unwrap().write(Record::created(VmId([1; 16]))).unwrap();
        assert_eq!(bench.phase(), Phase::Running);
        let paused = bench.send(Request::Pause);
        bench.events.send(Event::Arrived(Ok(fake))).unwrap();
        assert_eq!(paused.iter().last(), Some(Reply::Done));
        assert_eq!(bench.call(Request::Stop { force: false }), Reply::Done);
        bench.thread.join().unwrap().unwrap();
    }

    #[test]
    fn commands_meet_only_states_that_allow_them() {
        let bench = bench("moved");
        assert!(refused(&bench.call(Request::Resume)));
        assert!(refused(&bench.call(Request::CancelHandoff)));
        let export = Request::ExportDisk { path: "/x".into() };
        assert!(refused(&bench.call(export.clone())));
        assert_eq!(bench.call(Request::Pause), Reply::Done);
        assert_eq!(bench.phase(), Phase::Paused);
        assert!(refused(&bench.call(Request::Pause)));
        assert_eq!(bench.call(export), Reply::Done);
        assert_eq!(bench.call(Request::Resume), Reply::Done);
        assert_eq!(bench.call(Request::Stop { force: false }), Reply::Done);
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
        assert_eq!(*bench.done.lock().unwrap(), ["pause", "export", "resume", "stop"]);
    }

    #[test]
    fn a_moved_guest_ends_the_process_and_leaves_a_report() {
        let bench = bench("moved");
        let replies: Vec<_> = bench.send(handoff()).iter().collect();
        assert!(matches!(replies.first(), Some(Reply::Progress(p)) if p.round == 1), "{replies:?}");
        assert!(matches!(replies.last(), Some(Reply::Moved(_))));
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::HandedOff);
        assert!(bench._root.path().join("vms/a/report.json").exists());
        assert_eq!(*bench.done.lock().unwrap(), ["keep"]);
    }

    #[test]
    fn a_cancelled_handoff_leaves_the_guest_as_it_was() {
        let bench = bench("kept");
        bench.call(Request::Pause);
        let replies = bench.send(handoff());
        assert_eq!(bench.phase(), Phase::HandingOff);
        assert!(refused(&bench.call(Request::Pause)));
        assert!(refused(&bench.call(handoff())));
        assert!(refused(&bench.call(Request::Stop { force: false })));
        assert_eq!(bench.call(Request::CancelHandoff), Reply::Done);
        assert!(matches!(replies.iter().last(), Some(Reply::Failed(_))));
        bench.await_phase(Phase::Paused);
        // A guest that ends by itself ends the process.
        bench.events.send(Event::GuestEnded("power off".into())).unwrap();
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
    }

    #[test]
    fn a_forced_stop_waits_for_the_handoff_to_let_go() {
        let bench = bench("kept");
        let replies = bench.send(handoff());
        assert_eq!(bench.call(Request::Stop { force: true }), Reply::Done);
        assert!(matches!(replies.iter().last(), Some(Reply::Failed(_))));
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
        assert_eq!(*bench.done.lock().unwrap(), ["stop"]);
    }

    #[test]
    fn a_guest_that_ends_during_its_handoff_is_not_called_cancelled() {
        let bench = bench("kept");
        let replies = bench.send(handoff());
        assert_eq!(bench.phase(), Phase::HandingOff);
        bench.events.send(Event::GuestEnded("power off".into())).unwrap();
        let Some(Reply::Failed(failure)) = replies.iter().last() else { panic!("no failure") };
        assert!(failure.message.contains("power off"), "{failure}");
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
    }

    #[test]
    fn doubt_is_shown_and_cannot_be_cancelled() {
        let bench = bench("doubt");
        let _replies = bench.send(handoff());
        bench.await_phase(Phase::InDoubt);
        assert!(refused(&bench.call(Request::CancelHandoff)));
        assert!(refused(&bench.call(Request::Stop { force: false })));
        assert_eq!(bench.call(Request::Stop { force: true }), Reply::Done);
        let failure = describe(&bench.thread.join().unwrap().unwrap_err());
        assert_eq!(failure.exit, Exit::InDoubt);
    }

    #[test]
    fn an_undecided_end_is_an_error_of_the_process() {
        for outcome in ["undecided", "panic"] {
            let bench = bench(outcome);
            assert!(matches!(bench.call(handoff()), Reply::Failed(_)));
            bench.thread.join().unwrap().unwrap_err();
        }
    }
}
