//! What the engine's thread, which commits, and the courier, which says so, know together: whether
//! Commit was ever said.
//!
//! The engine makes its commit durable while the last segments are on their way, and the courier may
//! say it from then on. Until it does the engine may take it back: that nobody was told is then certain,
//! because one of the two comes first.

use std::{
    sync::atomic::{
        AtomicU8, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use super::worker::micros;

const SHUT: u8 = 0;
const OPEN: u8 = 1;
const SAID: u8 = 2;
const WITHDRAWN: u8 = 3;

/// Lets Commit pass once it is durable, and never after it was withdrawn.
#[derive(Debug, Default)]
pub(super) struct CommitGate {
    state: AtomicU8,
    said_at_us: AtomicU64,
}

impl CommitGate {
    /// The commit is durable: it may be said.
    pub(super) fn open(&self) {
        let _ = self.state.compare_exchange(SHUT, OPEN, SeqCst, SeqCst);
    }

    /// Whether Commit may be said now; from then on it counts as said.
    pub(super) fn pass(&self, now: Duration) -> bool {
        let passed = self.state.compare_exchange(OPEN, SAID, SeqCst, SeqCst).is_ok();
        if passed {
            self.said_at_us.store(micros(now), Relaxed);
        }
        passed
    }

    /// Shuts it for good, unless Commit was said. `true`: nobody was told, and nobody will be.
    pub(super) fn withdraw(&self) -> bool {
        let shut = |state| (state != SAID).then_some(WITHDRAWN);
        self.state.fetch_update(SeqCst, SeqCst, shut).is_ok()
    }

    /// When Commit was first said, if it was.
    pub(super) fn said_at(&self) -> Option<Duration> {
        let said = self.state.load(SeqCst) == SAID;
        said.then(|| Duration::from_micros(self.said_at_us.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn nothing_passes_before_it_is_durable_or_after_it_was_withdrawn() {
        let gate = CommitGate::default();
        let now = Duration::from_micros(7);
        assert!(!gate.pass(now));
        gate.open();
        assert_eq!(gate.said_at(), None);
        assert!(gate.pass(now) && !gate.pass(now));
        assert_eq!(gate.said_at(), Some(now));
        assert!(!gate.withdraw());

        let gate = CommitGate::default();
        assert!(gate.withdraw());
        gate.open();
        assert!(!gate.pass(now));
        assert_eq!(gate.said_at(), None);
    }

    #[test]
    fn of_both_at_once_one_wins() {
        for _ in 0..500 {
            let gate = CommitGate::default();
            gate.open();
            let (said, withdrawn) = thread::scope(|scope| {
                let said = scope.spawn(|| gate.pass(Duration::ZERO));
                (gate.withdraw(), said.join().unwrap())
            });
            assert_ne!(said, withdrawn);
        }
    }
}
