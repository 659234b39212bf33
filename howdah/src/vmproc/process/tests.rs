//! Commands meet a machine that only notes what is done to it.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use handoff::trace::{
    TraceBuilder, file,
    record::{Ended, Recorded},
};

use super::*;
use crate::{
    control::{HandoffRequest, RecordRequest, SaveRequest},
    home::Home,
    vmproc::machine::{Keep, Watch},
};

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
    fn profile(&self) -> Result<vmm::MachineProfile, Failure> {
        Err(Failure::new(Exit::Failed, "the fake", "it has no machine", "use a real one"))
    }
    fn pause(&mut self) -> anyhow::Result<()> {
        self.note("pause")
    }
    fn resume(&mut self) -> anyhow::Result<()> {
        self.note("resume")
    }
    fn stop(self: Box<Self>) -> anyhow::Result<()> {
        self.note("stop")
    }
    fn export_disk(&mut self, _: &File) -> anyhow::Result<()> {
        self.note("export")
    }
    fn save(&mut self, request: &SaveRequest, _: &File) -> Result<serde_json::Value, Failure> {
        self.note("save").unwrap();
        match request.path.as_str() {
            "/full" => Err(Failure::new(Exit::Failed, "/full", "no room", "make some")),
            "/panic" => panic!("a defect, for this test"),
            _ => Ok(serde_json::json!({"bytes": 1})),
        }
    }
    fn record(
        &mut self,
        request: &RecordRequest,
        cancel: &AtomicBool,
    ) -> Result<Recorded, Failure> {
        self.note("record").unwrap();
        if request.for_ms == 0 {
            panic!("a defect, for this test");
        }
        while !cancel.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let geometry = handoff::Geometry { ram_chunks: 4, disk_chunks: 0 };
        let trace = TraceBuilder::new(geometry, [0; 4], 1).finish(Duration::from_secs(1));
        Ok(Recorded { trace, ended: Ended::Cancelled })
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
            "doubt" | "late-doubt" => {
                while self.outcome == "late-doubt" && !watch.cancel().load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
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
        self.send_with(request, Some(tempfile::tempfile().unwrap()))
    }

    /// Sends a request with a file that the process may write.
    fn send_with(&self, request: Request, file: Option<File>) -> Receiver<Reply> {
        let (answer, replies) = Answer::new();
        let fd = file.map(OwnedFd::from);
        self.events.send(Event::Asked(Asked { request, fd, answer })).unwrap();
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
    let request = HandoffRequest { peer: "b:1".into(), ..HandoffRequest::default() };
    Request::Handoff(Box::new(request))
}

fn refused(reply: &Reply) -> bool {
    matches!(reply, Reply::Failed(failure) if failure.exit == Exit::Conflict)
}

fn save(path: &str, hold: bool) -> Request {
    Request::Save(SaveRequest { path: path.into(), hold, ..SaveRequest::default() })
}

#[test]
fn a_guest_is_paused_while_it_is_saved_and_then_goes_on() {
    let bench = bench("kept");
    assert!(matches!(bench.call(save("/file", false)), Reply::Saved(_)));
    assert_eq!(bench.phase(), Phase::Running);
    assert!(matches!(bench.call(save("/full", true)), Reply::Failed(_)));
    assert_eq!(bench.phase(), Phase::Running);
    assert_eq!(bench.call(Request::Pause), Reply::Done);
    assert!(matches!(bench.call(save("/file", false)), Reply::Saved(_)));
    assert_eq!(bench.phase(), Phase::Paused);
    assert_eq!(bench.call(Request::Resume), Reply::Done);
    // Whoever saves it and wants it to end does not want what it would do in between.
    assert!(matches!(bench.call(save("/file", true)), Reply::Saved(_)));
    assert_eq!(bench.phase(), Phase::Paused);
    let unpassed = bench.send_with(save("/file", true), None).iter().last();
    assert!(matches!(unpassed, Some(Reply::Failed(_))), "{unpassed:?}");
    assert_eq!(bench.call(Request::Stop { force: false }), Reply::Done);
    assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
    let done = bench.done.lock().unwrap();
    let once = ["pause", "save", "resume", "pause", "save", "resume", "pause", "save"];
    assert_eq!(*done, [&once[..], &["resume", "pause", "save", "stop"]].concat());
}

#[test]
fn a_save_that_panics_is_an_error_of_the_process() {
    let bench = bench("kept");
    assert!(matches!(bench.call(save("/panic", false)), Reply::Failed(_)));
    bench.thread.join().unwrap().unwrap_err();
}

fn record(for_ms: u64) -> Request {
    let path = "trace".into();
    Request::Record(RecordRequest { path, for_ms, every_ms: 1, most_mib: 1 })
}

/// What is asked of a guest that is recorded ends the recording, and is done then.
#[test]
fn a_recording_gives_way() {
    let bench = bench("kept");
    let written = tempfile::NamedTempFile::new().unwrap();
    let recorded = bench.send_with(record(1), Some(written.reopen().unwrap()));
    bench.await_phase(Phase::Recording);
    assert!(refused(&bench.call(record(1))), "one at a time");
    assert_eq!(bench.call(Request::EndRecording), Reply::Done);
    let Some(Reply::Recorded(said)) = recorded.iter().last() else { panic!("not recorded") };
    assert_eq!(said["ended"], "early");
    let bytes = std::fs::read(written.path()).unwrap();
    assert_eq!(file::read(&bytes[..]).unwrap().duration(), Duration::from_secs(1));
    bench.await_phase(Phase::Running);
    assert!(refused(&bench.call(Request::EndRecording)));
    let recorded = bench.send(record(1));
    bench.await_phase(Phase::Recording);
    assert_eq!(bench.call(Request::Pause), Reply::Done);
    assert!(matches!(recorded.iter().last(), Some(Reply::Recorded(_))));
    assert_eq!(bench.phase(), Phase::Paused);
    assert!(refused(&bench.call(record(1))), "it does not run");
    assert_eq!(bench.call(Request::Resume), Reply::Done);
    let third = bench.send(record(1));
    bench.await_phase(Phase::Recording);
    assert_eq!(bench.call(Request::Stop { force: true }), Reply::Done);
    assert!(matches!(third.iter().last(), Some(Reply::Recorded(_))));
    assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
    let done = bench.done.lock().unwrap();
    assert_eq!(*done, ["record", "record", "pause", "resume", "record", "stop"]);
}

#[test]
fn a_recording_that_panics_is_an_error_of_the_process() {
    let bench = bench("kept");
    assert!(matches!(bench.call(record(0)), Reply::Failed(_)));
    bench.thread.join().unwrap().unwrap_err();
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

/// A reception whose guest runs here already, and whose source has not said its last word.
fn arriving() -> (Bench, Box<Fake>) {
    use handoff::ownership::{Record, VmId};
    let root = tempfile::tempdir().unwrap();
    let dir = Home::new(root.path()).unwrap().vm(&"a".parse().unwrap());
    dir.create().unwrap();
    dir.journal().unwrap().write(Record::created(VmId([1; 16]))).unwrap();
    let (process, events) = Process::new(dir);
    let done = Arc::new(Mutex::new(Vec::new()));
    let fake = Box::new(Fake { done: Arc::clone(&done), outcome: "kept" });
    let links: Links = Box::new(|_| {});
    let coming = Coming { phase: Phase::Receiving, links: Some(links), ready: Box::new(|| {}) };
    let thread = std::thread::spawn(move || process.run(coming));
    (Bench { _root: root, events, done, thread }, fake)
}

/// Once it did not: the process ended at once and left a disk that was never flushed.
#[test]
fn a_guest_that_just_arrived_is_stopped_and_not_dropped() {
    for gone in [Event::Terminate, Event::GuestEnded("power off".into())] {
        let (bench, fake) = arriving();
        bench.events.send(gone).unwrap();
        let stopped = bench.send(Request::Stop { force: true });
        assert_eq!(bench.phase(), Phase::Running);
        bench.events.send(Event::Arrived(Ok(fake))).unwrap();
        assert_eq!(stopped.iter().last(), Some(Reply::Done));
        assert_eq!(bench.thread.join().unwrap().unwrap(), End::Stopped);
        assert_eq!(*bench.done.lock().unwrap(), ["stop"]);
    }
}

#[test]
fn a_reception_that_fails_tells_who_waits_for_its_end() {
    let (bench, _) = arriving();
    let stopped = bench.send(Request::Stop { force: true });
    let failure = Failure::new(Exit::Failed, "x", "y", "z");
    bench.events.send(Event::Arrived(Err(failure.clone()))).unwrap();
    assert_eq!(stopped.iter().last(), Some(Reply::Failed(failure)));
    bench.thread.join().unwrap().unwrap_err();
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

/// Told to end before it was in doubt, it once went on asking for ever.
#[test]
fn a_process_that_was_told_to_end_does_not_stay_for_a_doubt() {
    let bench = bench("late-doubt");
    let replies = bench.send(handoff());
    assert_eq!(bench.phase(), Phase::HandingOff);
    bench.events.send(Event::Terminate).unwrap();
    let failure = describe(&bench.thread.join().unwrap().unwrap_err());
    assert_eq!(failure.exit, Exit::InDoubt);
    assert!(matches!(replies.iter().last(), Some(Reply::Failed(_))));
}

/// The peer hears that the handoff is over, and the disk is flushed, before the process fails.
#[test]
fn a_machine_that_fails_during_its_handoff_ends_when_that_is_decided() {
    let bench = bench("kept");
    let replies = bench.send(handoff());
    assert_eq!(bench.phase(), Phase::HandingOff);
    bench.events.send(Event::GuestFailed("KVM_RUN: EFAULT".into())).unwrap();
    let Some(Reply::Failed(failure)) = replies.iter().last() else { panic!("no failure") };
    assert!(failure.message.contains("EFAULT"), "{failure}");
    let failure = describe(&bench.thread.join().unwrap().unwrap_err());
    assert!(failure.message.contains("EFAULT"), "{failure}");
    assert_eq!(*bench.done.lock().unwrap(), ["stop"]);
}

#[test]
fn an_undecided_end_is_an_error_of_the_process() {
    for outcome in ["undecided", "panic"] {
        let bench = bench(outcome);
        assert!(matches!(bench.call(handoff()), Reply::Failed(_)));
        bench.thread.join().unwrap().unwrap_err();
    }
}
