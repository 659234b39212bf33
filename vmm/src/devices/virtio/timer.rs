//! A timer that a device's worker waits for beside its queues.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    time::Duration,
};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A descriptor that becomes readable when a time has passed. Made by the thread that builds the
/// device, set by any.
#[derive(Debug)]
pub(super) struct Timer(TimerFd);

impl Timer {
    /// A timer that is not set.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Becomes readable once, when this time has passed; what was set before is forgotten.
    pub(super) fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would turn it off.
        let after = Expiration::OneShot(after.max(Duration::from_nanos(1)).into());
        Ok(self.0.set(after, TimerSetTimeFlags::empty())?)
    }

    /// Whether the time has passed; told once.
    pub(super) fn take(&self) -> bool {
        let mut expirations = [0; 8];
        nix::unistd::read(self.0.as_fd(), &mut expirations).is_ok()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
