//! What worker and registers share: the interrupt, the configuration space, the error flag.

use std::sync::{
    PoisonError, RwLock,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::complaints::Complaints;

/// The interrupt line and its status register.
///
/// The line is edge-triggered: every cause raises it anew. The driver acknowledges a cause before it
/// looks at the queues, so a cause that comes in between is not lost.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    pub(crate) fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// Tells the driver that requests were completed.
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that configuration or status changed.
    pub fn config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, cause: u32) {
        // Release: the driver that sees the cause sees the used ring too.
        self.status.fetch_or(cause, Ordering::Release);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.line.write(1) {
            // The counter can only be full when nobody reads: there is no interrupt controller.
            tracing::error!(%error, "cannot raise a virtio interrupt");
        }
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(crate) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::Release);
    }

    /// Raises the line again for causes that the driver has not acknowledged.
    ///
    /// KVM delivers an irqfd's event some time after it was written: a machine saved in between
    /// holds the cause in the status register but not in its interrupt controller.
    pub(crate) fn repeat_unacknowledged(&self) {
        if self.status() != 0 {
            self.trigger();
        }
    }
}

/// The device-specific configuration space, read-only to the driver.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: RwLock<Vec<u8>>,
    generation: AtomicU32,
}

impl ConfigSpace {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes), generation: AtomicU32::new(0) }
    }

    /// Copies from `offset` on; what lies beyond the space reads as zero.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let tail = usize::try_from(offset).ok().and_then(|o| bytes.get(o..)).unwrap_or_default();
        into.iter_mut().zip(tail).for_each(|(to, from)| *to = *from);
    }

    /// Replaces bytes at `offset`, inside the space, and counts a new generation.
    pub fn update(&self, offset: usize, with: &[u8]) {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        bytes.iter_mut().skip(offset).zip(with).for_each(|(to, from)| *to = *from);
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }
}

/// What worker and registers share.
#[derive(Debug)]
pub struct Shared {
    /// The interrupt.
    pub interrupt: Interrupt,
    /// The configuration space.
    pub config: ConfigSpace,
    /// Set when the device met something it cannot go on from.
    pub(crate) needs_reset: AtomicBool,
    /// How often the driver brought that about.
    pub(crate) breakdowns: Complaints,
}

impl Shared {
    /// Says why the device needs a reset, unless the driver makes it need one all the time.
    pub(crate) fn tell_breakdown(&self, device: &str, error: &dyn std::error::Error) {
        if let Some(times) = self.breakdowns.due() {
            tracing::error!(%error, device, times, "device needs a reset");
        }
    }
}
