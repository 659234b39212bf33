//! A device's saved state, and what can go wrong with a device.

use std::{io, time::Duration};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueState, QueueT};

use crate::memory::GuestRam;

pub(crate) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(crate) const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
pub(crate) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
pub(crate) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(crate) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
pub(crate) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// Most bytes of backend state that are taken from outside.
pub const MAX_BACKEND_STATE_BYTES: usize = 4096;

/// What can go wrong with a device as its machine sees it.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The host gave no event descriptor, epoll or thread.
    #[error("cannot set up the {device} device: {what}: {source}")]
    Setup {
        /// The device.
        device: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The backend asks for queues that virtio does not have.
    #[error("the {device} device asks for a queue of {size} entries")]
    QueueSize {
        /// The device.
        device: &'static str,
        /// The size.
        size: u16,
    },
    /// The worker did not answer.
    #[error("the {device} device did not answer within {} s: is its disk or network stuck?", waited.as_secs())]
    Timeout {
        /// The device.
        device: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The worker is gone.
    #[error("the {device} device's worker is gone: its panic was printed when it died")]
    WorkerGone {
        /// The device.
        device: &'static str,
    },
    /// In-flight requests could not be completed; the device goes on.
    #[error("the {device} device cannot be paused: {reason}")]
    Drain {
        /// The device.
        device: &'static str,
        /// Why.
        reason: String,
    },
    /// Saving or restoring a device that is running.
    #[error("the {device} device must be paused first")]
    NotPaused {
        /// The device.
        device: &'static str,
    },
    /// A saved state that this device cannot take on.
    #[error("saved state of the {device} device is refused: {reason}")]
    State {
        /// The device.
        device: &'static str,
        /// Why.
        reason: StateError,
    },
}

/// Why a saved state is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Of another device.
    #[error("it is of a device of type {found}, this one has type {expected}")]
    DeviceType {
        /// In the state.
        found: u32,
        /// Here.
        expected: u32,
    },
    /// The driver uses features that are not offered here.
    #[error("its driver uses features {0:#x} that this device does not have")]
    Features(u64),
    /// A status that the state machine cannot reach.
    #[error("device status {0:#x} cannot be")]
    Status(u32),
    /// Another number of queues.
    #[error("it has {found} queues, this device has {expected}")]
    QueueCount {
        /// In the state.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// A queue that cannot be.
    #[error("queue {index}: {reason}")]
    Queue {
        /// Which.
        index: usize,
        /// Why.
        reason: String,
    },
    /// Too much backend state.
    #[error("{0} bytes of backend state, more than {MAX_BACKEND_STATE_BYTES}")]
    BackendSize(usize),
    /// The backend refuses its part.
    #[error("{0}")]
    Backend(String),
}

/// One queue: what the driver configured and where device and driver are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) next_available: u16,
    pub(crate) next_used: u16,
}

impl SavedQueue {
    pub(crate) fn new(max_size: u16) -> Self {
        Self { size: max_size, ..Self::default() }
    }

    pub(crate) fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// A queue to work with; refused if its rings are not wholly RAM.
    pub(crate) fn build(
        &self,
        max_size: u16,
        event_idx: bool,
        ram: &GuestRam,
    ) -> Result<Queue, String> {
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .map_err(|e| e.to_string())?;
        if self.ready && !queue.is_valid(ram) {
            return Err(format!("rings are not in RAM: {self:x?}"));
        }
        Ok(queue)
    }
}

/// A device's saved state. Plain data: restoring checks all of it.
///
/// What belongs to the host stays out: files, tap names, addresses on the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(crate) device_type: u32,
    pub(crate) status: u32,
    pub(crate) driver_features: u64,
    pub(crate) device_features_sel: u32,
    pub(crate) driver_features_sel: u32,
    pub(crate) queue_sel: u32,
    pub(crate) interrupt_status: u32,
    pub(crate) config_generation: u32,
    pub(crate) queues: Vec<SavedQueue>,
    pub(crate) backend: Vec<u8>,
}

impl TransportState {
    /// Checks what can be checked without guest RAM and backend.
    pub(crate) fn check(
        &self,
        device_type: u32,
        offered: u64,
        queue_sizes: &[u16],
    ) -> Result<(), StateError> {
        if self.device_type != device_type {
            return Err(StateError::DeviceType { found: self.device_type, expected: device_type });
        }
        let missing = self.driver_features & !offered;
        // Before FEATURES_OK the driver may have written anything.
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if self.status & FEATURES_OK != 0 && (missing != 0 || !modern) {
            return Err(StateError::Features(missing));
        }
        if !status_is_reachable(self.status) {
            return Err(StateError::Status(self.status));
        }
        if self.queues.len() != queue_sizes.len() {
            let (found, expected) = (self.queues.len(), queue_sizes.len());
            return Err(StateError::QueueCount { found, expected });
        }
        if self.backend.len() > MAX_BACKEND_STATE_BYTES {
            return Err(StateError::BackendSize(self.backend.len()));
        }
        Ok(())
    }
}

/// Whether the driver can bring a device to `status`: each step needs the one before.
pub(crate) fn status_is_reachable(status: u32) -> bool {
    let steps = status & !(FAILED | NEEDS_RESET);
    [0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK]
        .iter()
        .scan(0, |sum, step| {
            *sum |= step;
            Some(*sum)
        })
        .any(|reachable| reachable == steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        for status in [0, 1, 3, 11, 15, 15 | FAILED, 15 | NEEDS_RESET, FAILED] {
            assert!(status_is_reachable(status), "{status:#x}");
        }
        for status in [2, 4, 8, 7, 16, 31, 1 << 20] {
            assert!(!status_is_reachable(status), "{status:#x}");
        }
    }
}
