//! A disk that becomes durable while it is written.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::Scope,
    time::{Duration, Instant},
};

use crate::vm::{DiskFlusher, VmError};

/// From the end of one flush to the begin of the next, at least: what is written in so long is all
/// that is left to flush when the guest waits. A disk that needs longer for a flush is left alone
/// for as long as that took, so that half of its time is for writing.
const FLUSH_EVERY: Duration = Duration::from_millis(100);

/// What the flushing thread is told and tells.
#[derive(Debug, Default)]
struct State {
    /// Everything up to this write is durable.
    durable: u64,
    /// Flush now, whenever the last one was.
    hurry: bool,
    /// No more flushes are wanted.
    stop: bool,
    /// The thread is done.
    ended: bool,
    /// Why it ended early.
    failed: Option<VmError>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Writes that completed.
    written: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Single fields, set whole: a panic elsewhere leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts writes to a disk, and flushes them from a thread of its own.
#[derive(Debug)]
pub(super) struct Flushing {
    shared: Arc<Shared>,
}

impl Flushing {
    /// Flushes with `flusher`, if there is one, until told to finish or dropped.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        flusher: Option<Box<dyn DiskFlusher>>,
    ) -> Self {
        // What was made for the VM is not durable yet: it counts as one write.
        let shared = Arc::new(Shared { written: AtomicU64::new(1), ..Shared::default() });
        match flusher {
            Some(flusher) => {
                let shared = Arc::clone(&shared);
                scope.spawn(move || {
                    let failed = flush_until_stopped(&shared, &*flusher).err();
                    let mut state = shared.lock();
                    (state.ended, state.failed) = (true, failed);
                    shared.changed.notify_all();
                });
            }
            None => shared.lock().ended = true,
        }
        Self { shared }
    }

    /// Something was written: call it when that has completed.
    pub(super) fn wrote(&self) {
        self.shared.written.fetch_add(1, Ordering::Release);
    }

    /// What is written now is wanted durable soon.
    pub(super) fn hurry(&self) {
        self.shared.lock().hurry = true;
        self.shared.changed.notify_all();
    }

    /// What went wrong, once.
    pub(super) fn take_failure(&self) -> Option<VmError> {
        self.shared.lock().failed.take()
    }

    /// Ends the thread, and says whether all that was written is durable.
    pub(super) fn finish(&self) -> Result<bool, VmError> {
        let mut state = self.shared.lock();
        state.stop = true;
        self.shared.changed.notify_all();
        while !state.ended {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match state.failed.take() {
            Some(e) => Err(e),
            None => Ok(state.durable == self.shared.written.load(Ordering::Acquire)),
        }
    }

    /// All that is written so far was made durable elsewhere, after [`Flushing::finish`].
    pub(super) fn all_durable(&self) {
        self.shared.lock().durable = self.shared.written.load(Ordering::Acquire);
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
    }
}

fn flush_until_stopped(shared: &Shared, flusher: &dyn DiskFlusher) -> Result<(), VmError> {
    let mut due = Instant::now();
    let mut state = shared.lock();
    while !state.stop {
        // Before the flush: what is written meanwhile may or may not be in it.
        let written = shared.written.load(Ordering::Acquire);
        let left = due.saturating_duration_since(Instant::now());
        let now = left.is_zero() || std::mem::take(&mut state.hurry);
        if state.durable == written || !now {
            let wait = if now { FLUSH_EVERY } else { left };
            let waited = shared.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        drop(state);
        let begun = Instant::now();
        flusher.flush()?;
        due = Instant::now() + begun.elapsed().max(FLUSH_EVERY);
        state = shared.lock();
        state.durable = written;
    }
    Ok(())
}
