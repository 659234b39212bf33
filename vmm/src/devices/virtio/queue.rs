//! A virtqueue as a backend sees it: chains of checked buffers in, completions out.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, Permissions};

use super::buffers::{Buffer, Buffers};
use crate::memory::GuestRam;

/// Why a queue cannot go on. All are the driver's fault: the device then needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings cannot be used.
    #[error("the driver's ring is not usable: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The chain has no end, or a descriptor cannot be read.
    #[error("descriptor chain {head} is broken after {descriptors} descriptors")]
    BrokenChain {
        /// First descriptor.
        head: u16,
        /// How many could be followed.
        descriptors: usize,
    },
    /// A descriptor names memory that is not RAM.
    #[error("descriptor chain {head} names {len:#x} bytes at {address:#x}, which is not all RAM")]
    NotRam {
        /// First descriptor of the chain.
        head: u16,
        /// Address named.
        address: u64,
        /// Length named.
        len: u32,
    },
    /// A buffer to read follows one to write.
    #[error("descriptor chain {head} has a device-readable buffer after a device-writable one")]
    Order {
        /// First descriptor.
        head: u16,
    },
}

/// One request: buffers that all lie in RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Names the chain when it is completed.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

/// A live queue.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// Whether completions were published since the driver was last considered for an interrupt.
    published: bool,
}

impl VirtQueue {
    pub(crate) fn new(queue: Queue) -> Self {
        Self { queue, published: false }
    }

    /// Whether the driver set this queue up.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Takes the next request, or `None` when the driver has offered no more.
    pub fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, QueueError> {
        let size = usize::from(self.queue.size());
        let Some(descriptors) = self.queue.iter(ram)?.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        let (mut count, mut complete) = (0, false);
        for descriptor in descriptors {
            let (address, len) = (descriptor.addr(), descriptor.len());
            // The queue crate bounds direct chains; an indirect table may claim more entries.
            if count == size {
                return Err(QueueError::BrokenChain { head, descriptors: count });
            }
            count += 1;
            complete = !descriptor.has_next();
            if !ram.check_range(address, len as usize, Permissions::ReadWrite) {
                return Err(QueueError::NotRam { head, address: address.0, len });
            }
            let buffer = Buffer { address, len };
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(QueueError::Order { head });
            }
        }
        // The iterator stops early, and silently, at what it cannot follow.
        if !complete {
            return Err(QueueError::BrokenChain { head, descriptors: count });
        }
        Ok(Some(chain))
    }

    /// Gives the last popped chain back: the next [`VirtQueue::pop`] returns it again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a request back to the driver, `written` bytes of its writable buffers filled.
    pub fn complete(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(ram, head, written)?;
        self.published = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub(crate) fn take_interrupt(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(std::mem::take(&mut self.published) && self.queue.needs_notification(ram)?)
    }

    /// Asks the driver not to notify.
    pub(crate) fn quiet(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(ram)?)
    }

    /// Asks the driver to notify again; says whether requests came in before it could know.
    pub(crate) fn listen(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(ram)?)
    }

    pub(crate) fn inner(&self) -> &Queue {
        &self.queue
    }

    pub(crate) fn stop(&mut self) {
        self.queue.set_ready(false);
    }
}
