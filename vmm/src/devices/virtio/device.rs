//! What a kind of device must provide.

use std::{io, os::fd::RawFd};

use vm_memory::GuestMemoryError;

use super::{
    interrupt::Shared,
    queue::{QueueError, VirtQueue},
};
use crate::memory::{GuestRam, MemoryError};

/// Why a device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver's request breaks the device's rules so badly that it cannot be answered.
    #[error("request cannot be answered: {0}")]
    Request(&'static str),
    /// RAM that a chain named could not be accessed.
    #[error("access to guest memory failed: {0}")]
    Memory(#[from] GuestMemoryError),
    /// RAM could not be used as RAM.
    #[error(transparent)]
    Ram(Box<MemoryError>),
    /// The host failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// In-flight requests did not end.
    #[error("{in_flight} requests still in flight after {waited_s} s")]
    Stuck {
        /// How many.
        in_flight: usize,
        /// How long was waited.
        waited_s: u64,
    },
}

/// What a backend says of a queue it has worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left in the queue: wait for the driver's next notification.
    Drained,
    /// Work is left, and others wait: call again soon. Backends bound the work of one call.
    Yield,
    /// Work may be left, but it waits for one of the backend's own events.
    Waiting,
}

/// What a backend works with, on the worker's thread.
pub struct DeviceContext<'a> {
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// The queues, in the order of [`VirtioBackend::queue_sizes`]. Some may not be ready.
    pub queues: &'a mut [VirtQueue],
    /// The features that the driver accepted.
    pub features: u64,
    /// Interrupt and configuration space. The worker raises the interrupt for completions by itself.
    pub shared: &'a Shared,
}

/// A kind of virtio device.
///
/// Everything is called on one thread, the device's worker. An error means that the device cannot
/// go on: the worker sets NEEDS_RESET and calls nothing but [`VirtioBackend::reset`] and
/// [`VirtioBackend::drain`] until the driver has reset it.
pub trait VirtioBackend: Send {
    /// The virtio device id.
    fn device_type(&self) -> u32;

    /// A short name for threads and messages.
    fn name(&self) -> &'static str;

    /// Device-specific features on offer; those of queue and transport are added to them.
    fn features(&self) -> u64;

    /// How many queues there are, and how long each may be: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The initial configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver is ready.
    fn activate(&mut self, _ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Works on requests of one queue.
    fn process(
        &mut self,
        queue: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Progress, DeviceError>;

    /// Descriptors whose becoming readable is an event of this device. They stay valid as long as the
    /// backend lives. They are watched edge-triggered: an event is told once.
    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Event descriptor number `event` became readable. Returns a queue to work on because of it.
    fn handle_event(
        &mut self,
        _event: usize,
        _ctx: &mut DeviceContext<'_>,
    ) -> Result<Option<usize>, DeviceError> {
        Ok(None)
    }

    /// Completes everything in flight, so that the state of the device is in its queues, its disk and
    /// [`VirtioBackend::save`]. Takes no new requests.
    fn drain(&mut self, _ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Forgets everything in flight, without touching queues; returns only when neither the backend
    /// nor the kernel on its behalf will write guest RAM any more.
    fn reset(&mut self);

    /// The drained backend's state beyond its queues.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes on a state that [`VirtioBackend::save`] gave, perhaps on another machine: it is hostile.
    /// Before [`VirtioBackend::activate`].
    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        if state.is_empty() { Ok(()) } else { Err("this device has no state of its own".into()) }
    }
}
