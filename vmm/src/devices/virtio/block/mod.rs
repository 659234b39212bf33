//! virtio-blk over a copy-on-write disk, with io_uring.
//!
//! A request is parsed (`request`), waits while an earlier one works on the same chunks, is split
//! by where its chunks are (`plan`), and becomes operations on a ring (`ring`). When the last of
//! them ends its effects are made visible, in this order: chunk states flip, dirty bits are set, the
//! status is written, the request is published. Only then may another request touch its chunks, so
//! the guest sees some serial order of its requests per sector.
//!
//! Flushes follow the overlay's order (`flush`). A driver that did not negotiate flushing gets a
//! write-through disk: each change is made durable before it is reported.

mod dirty;
mod flush;
mod in_flight;
mod plan;
mod request;
mod ring;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::VecDeque,
    io,
    os::fd::RawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use guest_images::overlay::Overlay;
use uring::Slab;
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};

pub use uring::RingError;

pub use self::dirty::DiskDirty;
use self::{
    flush::{Ended, Flusher},
    in_flight::InFlight,
    request::Request,
    ring::{Ring, Token},
};
use super::{
    device::{DeviceContext, DeviceError, Progress, VirtioBackend},
    rate::{Limiter, Rate, timer_failed},
};
use crate::{devices::complaints::Complaints, memory::GuestRam};

/// The unit in which drivers address a disk.
pub const SECTOR_BYTES: u64 = 512;

const QUEUE_SIZE: u16 = 256;
/// Requests taken from the queue and not yet answered, at most.
const MAX_IN_FLIGHT: usize = QUEUE_SIZE as usize;
/// Operations that in-flight requests were split into, beyond which no more requests are taken.
const MAX_OPERATIONS: usize = 4096;
/// Requests taken from the queue before completions get their turn.
const REQUESTS_PER_CALL: usize = 64;

/// Buffers in a request: what fits the queue beside header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes in a buffer.
const SIZE_MAX: u32 = 64 << 10;
/// Bytes in a request, which bounds into how many operations it can be split.
const MAX_REQUEST_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Ranges in a discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// Sectors in such a range: bounds the chunk states that one request flips.
const MAX_RANGE_SECTORS: u32 = 1 << 19;
/// Sectors in 4096 bytes: the physical block, and what discards should be aligned to.
const PHYSICAL_BLOCK_SECTORS: u32 = 8;

/// The longest that in-flight requests may take to end when the device is paused.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The disk device.
pub struct Block {
    // Dropped first: waits until the kernel is done with RAM and files.
    ring: Ring,
    entries: Slab<InFlight>,
    /// Parsed, waiting for earlier requests on the same chunks; in the driver's order.
    waiting: VecDeque<Request>,
    flusher: Flusher,
    /// What may pass; none: no limit.
    limiter: Option<Limiter>,
    /// The queue was left with requests in it.
    starved: bool,
    write_through: bool,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    dirty: Arc<DiskDirty>,
    /// Requests that the host's disk failed.
    failures: Complaints,
    overlay: Arc<Overlay>,
    ram: Option<GuestRam>,
}

impl Block {
    /// A disk named `id` (its first 20 bytes count) over `overlay`.
    pub fn new(overlay: Arc<Overlay>, id: &str) -> Result<Self, RingError> {
        let mut padded = [0; VIRTIO_BLK_ID_BYTES as usize];
        padded.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self {
            ring: ring::new()?,
            entries: Slab::default(),
            waiting: VecDeque::new(),
            flusher: Flusher::default(),
            limiter: None,
            starved: false,
            write_through: true,
            id: padded,
            dirty: Arc::new(DiskDirty::new(overlay.chunks())),
            failures: Complaints::default(),
            overlay,
            ram: None,
        })
    }

    /// The same, held to this rate.
    pub fn limited(self, rate: Rate) -> io::Result<Self> {
        Ok(Self { limiter: Some(Limiter::new(rate)?), ..self })
    }

    /// Whether the rate lets another request pass now; else the limiter's timer is set.
    fn may_pass(&mut self) -> Result<bool, DeviceError> {
        self.limiter.as_mut().map_or(Ok(true), Limiter::may_pass).map_err(timer_failed)
    }

    /// Which chunks the guest changes.
    pub fn dirty(&self) -> Arc<DiskDirty> {
        self.dirty.clone()
    }

    /// Starts what can start, and answers what has ended, until nothing moves without waiting.
    fn pump(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        loop {
            self.start_waiting(ctx)?;
            let mut moved = false;
            if let Some(ended) = self.flusher.start(&self.overlay, &mut self.ring) {
                self.end_flush(ended, ctx)?;
                moved = true;
            }
            self.ring.submit().map_err(|source| DeviceError::Host {
                what: "submitting disk operations",
                source,
            })?;
            while let Some((token, result)) = self.ring.reap() {
                moved = true;
                match token {
                    Token::Request(index) => self.operation_ended(index, result.is_ok(), ctx)?,
                    Token::Flush => {
                        let ended = self.flusher.advance(&self.overlay, &mut self.ring, result);
                        if let Some(ended) = ended {
                            self.end_flush(ended, ctx)?;
                        }
                    }
                }
            }
            if !moved {
                return Ok(());
            }
        }
    }

    /// Starts waiting requests in order, up to the first that must go on waiting.
    fn start_waiting(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        while let Some(request) = self.waiting.front() {
            let locks = in_flight::Locks::of(request);
            if self.entries.iter().any(|entry| entry.locks.conflict(&locks)) {
                break;
            }
            let Some(request) = self.waiting.pop_front() else { break };
            let index = self.entries.insert(InFlight::new(&request, locks));
            self.begin(index, request, ctx.ram)?;
            self.go_on(index, ctx)?;
        }
        Ok(())
    }

    fn operation_ended(
        &mut self,
        index: usize,
        ok: bool,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<(), DeviceError> {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.failed |= !ok;
            entry.pending = entry.pending.saturating_sub(1);
        }
        self.go_on(index, ctx)
    }

    /// If a request's operations have all ended: makes their effects visible, then goes on with its
    /// next range, has it made durable, or answers it.
    fn go_on(&mut self, index: usize, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        loop {
            let Some(entry) = self.entries.get_mut(index) else { return Ok(()) };
            if entry.pending > 0 {
                return Ok(());
            }
            entry.apply(&self.overlay, &self.dirty, ctx.ram)?;
            if !self.begin_next_range(index)? {
                break;
            }
        }
        let Some(entry) = self.entries.get(index) else { return Ok(()) };
        let flush = entry.is_flush || (self.write_through && entry.is_change());
        if flush && !entry.failed {
            self.flusher.join(index);
            return Ok(());
        }
        self.answer(index, true, ctx)
    }

    fn end_flush(&mut self, ended: Ended, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        for index in ended.members {
            self.answer(index, ended.durable, ctx)?;
        }
        Ok(())
    }

    /// Writes the status and gives the request back to the driver.
    fn answer(
        &mut self,
        index: usize,
        durable: bool,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<(), DeviceError> {
        let Some(entry) = self.entries.remove(index) else { return Ok(()) };
        let ok = durable && !entry.failed;
        let status = match entry.refused {
            Some(status) => status,
            None if ok => VIRTIO_BLK_S_OK as u8,
            None => VIRTIO_BLK_S_IOERR as u8,
        };
        entry.status.write_at(ctx.ram, 0, &[status])?;
        let written = 1 + if ok { entry.filled_bytes() } else { 0 };
        if let Some(queue) = ctx.queues.first_mut() {
            queue.complete(ctx.ram, entry.head, written)?;
        }
        Ok(())
    }

    /// Requests that have no answer yet.
    fn unanswered(&self) -> usize {
        self.entries.len() + self.waiting.len()
    }
}

impl VirtioBackend for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "block"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        config_space(self.overlay.disk_bytes() / SECTOR_BYTES)
    }

    fn activate(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        self.write_through = ctx.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.ram = Some(ctx.ram.clone());
        Ok(())
    }

    fn process(
        &mut self,
        _queue: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Progress, DeviceError> {
        let mut progress = Progress::Yield;
        let mut held_back = false;
        for _ in 0..REQUESTS_PER_CALL {
            if self.unanswered() >= MAX_IN_FLIGHT || self.ring.len() >= MAX_OPERATIONS {
                progress = Progress::Waiting;
                break;
            }
            if !self.may_pass()? {
                held_back = true;
                progress = Progress::Waiting;
                break;
            }
            let chain = match ctx.queues.first_mut() {
                Some(queue) => queue.pop(ctx.ram)?,
                None => None,
            };
            let Some(chain) = chain else {
                progress = Progress::Drained;
                break;
            };
            let request = Request::parse(chain, ctx.ram, self.overlay.disk_bytes())?;
            if let Some(limiter) = &mut self.limiter {
                limiter.take(request.data.len());
            }
            self.waiting.push_back(request);
        }
        self.pump(ctx)?;
        self.starved = progress == Progress::Waiting && !held_back;
        if self.starved && self.ring.is_empty() {
            // Everything ended at once: there is no event to wait for.
            progress = Progress::Yield;
        }
        Ok(progress)
    }

    fn event_fds(&self) -> Vec<RawFd> {
        self.ring.event_fd().into_iter().chain(self.limiter.as_ref().map(Limiter::fd)).collect()
    }

    fn handle_event(
        &mut self,
        event: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Option<usize>, DeviceError> {
        if event >= self.ring.event_fd().into_iter().count() {
            self.limiter.iter().for_each(Limiter::clear);
            return Ok(Some(0));
        }
        self.ring.clear_event();
        self.pump(ctx)?;
        Ok(self.starved.then_some(0))
    }

    fn drain(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        loop {
            self.pump(ctx)?;
            let in_flight = self.unanswered();
            if in_flight == 0 {
                return Ok(());
            }
            let waiting = self.ring.wait(deadline).map_err(|source| DeviceError::Host {
                what: "waiting for disk operations",
                source,
            })?;
            if !waiting {
                return Err(DeviceError::Stuck { in_flight, waited_s: DRAIN_TIMEOUT.as_secs() });
            }
        }
    }

    fn reset(&mut self) {
        self.waiting.clear();
        let entries = &mut self.entries;
        self.ring.abandon(|token, result| {
            if let Token::Request(index) = token
                && let Some(entry) = entries.get_mut(index)
            {
                entry.failed |= result.is_err();
                entry.pending = entry.pending.saturating_sub(1);
            }
        });
        self.flusher.abandon();
        let entries = std::mem::take(&mut self.entries);
        let Some(ram) = &self.ram else { return };
        for mut entry in entries.into_values() {
            // What was not carried out wholly may have been in part: dirty, but no new states.
            entry.failed |= entry.pending > 0;
            if let Err(error) = entry.apply(&self.overlay, &self.dirty, ram) {
                tracing::error!(%error, "marking what a dropped request wrote");
            }
        }
    }
}

/// `struct virtio_blk_config`.
fn config_space(sectors: u64) -> Vec<u8> {
    let mut space = vec![0; 60];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    // Topology: physical block as a power of two of sectors, no offset, least and best I/O size.
    put(24, &[PHYSICAL_BLOCK_SECTORS.ilog2() as u8, 0]);
    put(26, &(PHYSICAL_BLOCK_SECTORS as u16).to_le_bytes());
    put(28, &PHYSICAL_BLOCK_SECTORS.to_le_bytes());
    put(34, &1u16.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &PHYSICAL_BLOCK_SECTORS.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    space
}
