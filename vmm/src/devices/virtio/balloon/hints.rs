//! Free page hints: pages that were free when the guest named them, under a command of the host.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use guest_images::CHUNK_SIZE;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    devices::virtio::buffers::Buffers,
    memory::{self, GuestRam},
    pagemap,
};

const CHUNK: u64 = CHUNK_SIZE as u64;

/// VIRTIO_BALLOON_CMD_ID_STOP: no command is in force.
pub(super) const CMD_STOP: u32 = 0;
/// VIRTIO_BALLOON_CMD_ID_DONE: the last command is over, the guest may use what it named.
pub(super) const CMD_DONE: u32 = 1;
/// The first command that is not reserved.
const FIRST_COMMAND: u32 = 2;

/// What the driver should do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Nothing: no command was given yet.
    #[default]
    Stop,
    /// Name free pages under this number, and keep them.
    Command(u32),
    /// Take named pages back.
    Done,
}

#[derive(Debug, Default)]
struct State {
    wanted: Wanted,
    /// The last command given, 0 before the first. Numbers are not used again.
    last_command: u32,
    /// What the driver negotiated.
    hints: bool,
    reports: bool,
    /// The driver has nothing more to name under the command in force.
    complete: bool,
    /// Chunks named and not yet taken, one bit each; empty while no command is in force.
    hinted: Vec<u64>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    wake: EventFd,
    ram_chunks: u64,
}

/// Hints of free pages, as the machine's owner sees them.
///
/// A hint is weaker than a report. The driver does not wait, so it may take a page back and write
/// to it before anybody here has looked at the hint. What the specification gives is this: the
/// content of a hinted page is free to be anything **if the page was not written since the command
/// was given**. So whoever uses hints turns the dirty log on for **every** page, also for those that
/// it has not read yet, then calls [`FreeHints::start`], keeps every chunk that a harvest names from
/// then on, and may leave out or discard only `hinted - written`, as long as the command is in
/// force. The guest cannot use hinted pages as it likes until [`FreeHints::stop`].
#[derive(Clone, Debug)]
pub struct FreeHints(Arc<Inner>);

impl FreeHints {
    pub(super) fn new(ram_chunks: u64) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { state: Mutex::default(), wake, ram_chunks })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain data, valid after every single store.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Only a full counter fails: then the worker has been woken already.
        let _ = self.0.wake.write(1);
    }

    /// Whether the guest's driver can give hints.
    pub fn offered(&self) -> bool {
        self.lock().hints
    }

    /// Whether hints can tell what reports do not: the driver gives the one and not the other.
    ///
    /// A guest that reports has already given back what hints would name; and to name a page Linux
    /// allocates it, which by default (`init_on_alloc`) writes zeros to all of free memory.
    pub fn worthwhile(&self) -> bool {
        let state = self.lock();
        state.hints && !state.reports
    }

    /// Gives a new command; what was hinted under an older one is forgotten. `false` if the driver
    /// does not give hints.
    pub fn start(&self) -> bool {
        let mut state = self.lock();
        if !state.hints {
            return false;
        }
        state.last_command = state.last_command.wrapping_add(1).max(FIRST_COMMAND);
        state.wanted = Wanted::Command(state.last_command);
        state.complete = false;
        state.hinted = vec![0; self.0.ram_chunks.div_ceil(64) as usize];
        drop(state);
        self.wake();
        true
    }

    /// Takes the RAM chunks hinted since the last call, under the command in force: disjoint
    /// ranges, ascending.
    pub fn take(&self) -> Vec<Range<u64>> {
        let mut state = self.lock();
        let ranges = pagemap::runs(&state.hinted);
        state.hinted.fill(0);
        ranges
    }

    /// Whether the driver has said that it has nothing more to hint under the command in force.
    pub fn is_complete(&self) -> bool {
        self.lock().complete
    }

    /// Ends the command: the guest may use its pages again, and nothing hinted may be discarded any
    /// more. Does nothing if no command is in force.
    pub fn stop(&self) {
        let mut state = self.lock();
        if matches!(state.wanted, Wanted::Command(_)) {
            state.wanted = Wanted::Done;
            state.hinted = Vec::new();
            drop(state);
            self.wake();
        }
    }

    pub(super) fn wanted(&self) -> Wanted {
        self.lock().wanted
    }

    pub(super) fn last_command(&self) -> u32 {
        self.lock().last_command
    }

    pub(super) fn driver_is_ready(&self, hints: bool, reports: bool) {
        let mut state = self.lock();
        (state.hints, state.reports) = (hints, reports);
    }

    pub(super) fn driver_is_gone(&self) {
        let mut state = self.lock();
        // The number stays: a driver that starts over must not see one again that it has seen.
        *state = State { last_command: state.last_command, ..State::default() };
    }

    /// Goes on from a saved state. A command that was in force there is over: the machine it was
    /// given for has arrived.
    pub(super) fn restore(&self, last_command: u32) {
        let wanted = if last_command == CMD_STOP { Wanted::Stop } else { Wanted::Done };
        *self.lock() = State { last_command, wanted, ..State::default() };
    }

    /// The driver has no more to say under `command`.
    pub(super) fn no_more(&self, command: u32) {
        let mut state = self.lock();
        if state.wanted == Wanted::Command(command) {
            state.complete = true;
        }
    }

    /// Notes pages that the driver named under `command`. Only whole chunks count; those named under
    /// another command than the one in force do not.
    pub(super) fn add(&self, command: u32, ram: &GuestRam, pages: &Buffers) {
        let mut state = self.lock();
        if state.wanted != Wanted::Command(command) {
            return;
        }
        for piece in pages.whole_pages() {
            let Some(first) = memory::chunk_at(ram, GuestAddress(piece.start)) else { continue };
            // The piece is all RAM, so it does not reach over the device window.
            for chunk in first..first + (piece.end - piece.start) / CHUNK {
                if let Some(word) = state.hinted.get_mut((chunk / 64) as usize) {
                    *word |= 1 << (chunk % 64);
                }
            }
        }
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }

    pub(super) fn clear_event(&self) {
        // An empty counter means that there was nothing.
        let _ = self.0.wake.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_never_reserved_ones() {
        let hints = FreeHints::new(64).unwrap();
        assert!(!hints.start(), "no driver");
        hints.driver_is_ready(true, false);
        for (last, next) in [(0, 2), (2, 3), (u32::MAX, 2)] {
            hints.restore(last);
            hints.driver_is_ready(true, false);
            assert!(hints.start());
            assert_eq!(hints.wanted(), Wanted::Command(next));
        }
    }
}
