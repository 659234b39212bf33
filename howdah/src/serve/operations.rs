//! What takes longer than a request may: begun, looked at, waited for and cancelled by id.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use handoff::ownership::VmId;
use howdah_api::{Event, HandoffProgress, Kind, Operation, Progress, State};
use howdah_status::Tally;
use serde_json::Value;
use tokio::sync::broadcast;

use super::answer::problem_of;
use crate::failure::{Exit, Failure, guarded};

/// Operations that run at once; threads, mostly asleep.
const MAX_RUNNING: usize = 64;
/// Operations that are over and can still be looked at.
const MAX_OVER: usize = 256;
/// How often is told how an operation goes on.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// How a running operation is given up.
type Cancel = Arc<dyn Fn() -> Result<(), Failure> + Send + Sync>;

/// What an operation is about.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) kind: Kind,
    /// The VM or base.
    pub(crate) subject: String,
    /// The peer, if there is one.
    pub(crate) peer: Option<String>,
}

/// All operations that run, and the latest that are over.
#[derive(Clone, Debug)]
pub(crate) struct Operations {
    /// Newest last.
    entries: Arc<Mutex<VecDeque<Entry>>>,
    events: broadcast::Sender<Event>,
    tally: Arc<Mutex<Tally>>,
}

struct Entry {
    operation: Operation,
    cancel: Option<Cancel>,
    cancelled: Arc<AtomicBool>,
    told: Instant,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.operation.fmt(f)
    }
}

/// An operation as it is seen by whoever does it.
pub(crate) struct Work {
    id: String,
    operations: Operations,
    cancelled: Arc<AtomicBool>,
}

impl Work {
    /// How much is done.
    pub(crate) fn progress(&self, progress: Progress) {
        self.operations.update(&self.id, |operation| operation.progress = progress);
    }

    /// How a handoff goes on.
    pub(crate) fn handoff(&self, now: HandoffProgress) {
        self.operations.update(&self.id, |operation| {
            operation.progress = Progress {
                done_bytes: now.sent_bytes,
                total_bytes: now.sent_bytes.saturating_add(now.remaining_bytes),
                rate_bytes_per_s: now.rate_bytes_per_s,
            };
            operation.handoff = Some(now);
        });
    }

    /// Whether it is to be given up.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The same for what looks by itself: becomes true when it is to be given up.
    pub(crate) fn cancelled(&self) -> &AtomicBool {
        &self.cancelled
    }
}

impl Operations {
    pub(super) fn new(events: broadcast::Sender<Event>) -> Self {
        Self { entries: Arc::default(), events, tally: Arc::default() }
    }

    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `work` on a thread of its own. It looks at [`Work::is_cancelled`] now and then; where
    /// somebody else must be told, `cancel` does.
    pub(crate) fn begin(
        &self,
        about: About,
        cancel: Option<Cancel>,
        work: impl FnOnce(&Work) -> Result<Value, Failure> + Send + 'static,
    ) -> Result<Operation, Failure> {
        let id = VmId::random().to_string();
        let cancelled = Arc::<AtomicBool>::default();
        let operation = self.enter(&id, about, cancel, Arc::clone(&cancelled))?;
        let doing = Work { id: id.clone(), operations: self.clone(), cancelled };
        let run = move || {
            let done = guarded("operation", || work(&doing)).and_then(|done| done);
            doing.operations.end(&doing.id, done, doing.is_cancelled());
        };
        let thread = std::thread::Builder::new().name("operation".into()).spawn(run);
        if let Err(e) = thread {
            let failure = Failure::new(Exit::Failed, "operation", e, "raise the limit on threads");
            self.end(&id, Err(failure.clone()), false);
            return Err(failure);
        }
        Ok(operation)
    }

    fn enter(
        &self,
        id: &str,
        about: About,
        cancel: Option<Cancel>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Operation, Failure> {
        let mut entries = self.entries();
        let running = entries.iter().filter(|entry| !entry.operation.state.is_over()).count();
        if running >= MAX_RUNNING {
            let why = format!("{MAX_RUNNING} run already");
            let way_out = "wait until one is over, or cancel one";
            return Err(Failure::new(Exit::Conflict, "operation", why, way_out));
        }
        while entries.len() - running > MAX_OVER {
            let Some(at) = entries.iter().position(|entry| entry.operation.state.is_over()) else {
                break;
            };
            entries.remove(at);
        }
        let About { kind, subject, peer } = about;
        let operation = Operation {
            id: id.to_owned(),
            kind,
            subject,
            peer,
            state: State::Running,
            progress: Progress::default(),
            handoff: None,
            started_at_ms: now_ms(),
            ended_at_ms: None,
            result: None,
            error: None,
        };
        let told = Instant::now();
        let entry = Entry { operation: operation.clone(), cancel, cancelled, told };
        entries.push_back(entry);
        drop(entries);
        self.tell(operation.clone());
        Ok(operation)
    }

    fn update(&self, id: &str, change: impl FnOnce(&mut Operation)) {
        let mut entries = self.entries();
        let Some(entry) = entries.iter_mut().find(|entry| entry.operation.id == id) else { return };
        change(&mut entry.operation);
        if entry.told.elapsed() < TELL_EVERY {
            return;
        }
        entry.told = Instant::now();
        let operation = entry.operation.clone();
        drop(entries);
        self.tell(operation);
    }

    fn end(&self, id: &str, done: Result<Value, Failure>, cancelled: bool) {
        let mut entries = self.entries();
        let Some(entry) = entries.iter_mut().find(|entry| entry.operation.id == id) else { return };
        let operation = &mut entry.operation;
        operation.ended_at_ms = Some(now_ms());
        operation.handoff = None;
        match done {
            Ok(result) => {
                operation.state = State::Done;
                operation.result = Some(result).filter(|result| !result.is_null());
            }
            Err(failure) => {
                let at_word = cancelled || failure.exit == Exit::Cancelled;
                operation.state = if at_word { State::Cancelled } else { State::Failed };
                operation.error = Some(problem_of(&failure));
            }
        }
        entry.cancel = None;
        let operation = operation.clone();
        drop(entries);
        self.tell(operation);
    }

    fn tell(&self, operation: Operation) {
        self.pass_on(Event::Operation { operation: Box::new(operation) });
    }

    /// Counts an event, and tells whoever follows.
    pub(super) fn pass_on(&self, event: Event) {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).see(&event);
        // Nobody may be following.
        let _ = self.events.send(event);
    }

    /// What has happened since the daemon started.
    pub(super) fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every operation that is known, the latest first.
    pub(crate) fn list(&self) -> Vec<Operation> {
        self.entries().iter().rev().map(|entry| entry.operation.clone()).collect()
    }

    /// One operation.
    pub(crate) fn get(&self, id: &str) -> Result<Operation, Failure> {
        let entries = self.entries();
        let found = entries.iter().find(|entry| entry.operation.id == id);
        found.map(|entry| entry.operation.clone()).ok_or_else(|| unknown(id))
    }

    /// Gives an operation up. One that is over stays as it is: it can be asked for again and again.
    pub(crate) fn cancel(&self, id: &str) -> Result<(), Failure> {
        let entries = self.entries();
        let found = entries.iter().find(|entry| entry.operation.id == id);
        let entry = found.ok_or_else(|| unknown(id))?;
        if entry.operation.state.is_over() {
            return Ok(());
        }
        let (cancel, cancelled) = (entry.cancel.clone(), Arc::clone(&entry.cancelled));
        drop(entries);
        // Who does it may ask; and who is to be told may refuse: what is committed is not undone.
        cancel.map_or(Ok(()), |cancel| cancel())?;
        cancelled.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn unknown(id: &str) -> Failure {
    let why = "there is none of that id, or it was over long ago";
    let what = format!("operation {id}");
    Failure::new(Exit::NotFound, what, why, "GET /v1/operations lists those that are known")
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
