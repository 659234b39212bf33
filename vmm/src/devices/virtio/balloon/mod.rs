//! virtio-balloon: the guest says which of its pages are free (virtio 1.2, section 5.5).
//!
//! Stale content of free pages must not be sent, and needs no memory. Two ways lead there:
//!
//! - **Reporting**: the driver takes free pages out of its allocator, names them and waits. The
//!   device discards them (`discard`) and only then gives the buffers back, so a page that the
//!   guest has taken again is never touched: it cannot take one before the buffer is used.
//! - **Hints** (`hints`): at the device's command the driver names free pages without waiting.
//!   Nothing is discarded here: only whoever knows what was written since may do that.
//!
//! The balloon's own purpose is not served: its target size is zero. Buffers of the inflate and
//! deflate queues are given back, the statistics queue is left alone. Page poisoning is not offered:
//! a guest kernel that initialises or poisons pages when it frees them then does not report, and
//! its free pages are uniform anyway (ADR 0011).

mod discard;
mod hints;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

pub use self::hints::FreeHints;
use self::hints::{CMD_STOP, Wanted};
use super::{
    device::{DeviceContext, DeviceError, Progress, VirtioBackend},
    queue::VirtQueue,
};
use crate::memory::{self, GuestRam};

/// VIRTIO_BALLOON_F_STATS_VQ. Never asked for statistics; offered because drivers number queues
/// differently when it is not (see [`Roles`]).
const F_STATS_VQ: u32 = 1;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
const F_FREE_PAGE_HINT: u32 = 3;
/// VIRTIO_BALLOON_F_REPORTING.
const F_REPORTING: u32 = 5;

/// Entries of each queue: a report of Linux has 32.
const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 5;
/// Requests answered before others get their turn.
const REQUESTS_PER_CALL: usize = 32;
/// Bytes discarded before others get their turn: discarding takes time in proportion.
const DISCARD_BYTES_PER_CALL: u64 = 256 << 20;

/// `struct virtio_balloon_config`: num_pages, actual, free_page_hint_cmd_id, poison_val.
const CONFIG_BYTES: usize = 16;
/// Where free_page_hint_cmd_id is.
const HINT_COMMAND_OFFSET: usize = 8;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Inflate or deflate.
    Balloon,
    Statistics,
    Hints,
    Reports,
}

/// The role of each queue.
///
/// The specification numbers queues by what they are for. Linux, up to the versions in use, numbers
/// those that it uses: one whose feature was not negotiated is not counted. Both come to the same
/// when all features up to the last in use were negotiated. Otherwise a queue that is ready
/// although its feature was not negotiated gives the second way of counting away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Roles([Option<Role>; QUEUES]);

impl Roles {
    fn new(features: u64, ready: impl Fn(usize) -> bool) -> Self {
        let optional = [
            (Role::Statistics, F_STATS_VQ),
            (Role::Hints, F_FREE_PAGE_HINT),
            (Role::Reports, F_REPORTING),
        ];
        let all = [Some(Role::Balloon), Some(Role::Balloon)]
            .into_iter()
            .chain(optional.map(|(role, feature)| (features & 1 << feature != 0).then_some(role)));
        let mut roles = [None; QUEUES];
        roles.iter_mut().zip(all.clone()).for_each(|(to, role)| *to = role);
        if roles.iter().enumerate().any(|(at, role)| role.is_none() && ready(at)) {
            roles = [None; QUEUES];
            roles.iter_mut().zip(all.flatten()).for_each(|(to, role)| *to = Some(role));
        }
        Self(roles)
    }

    fn of(&self, queue: usize) -> Option<Role> {
        self.0.get(queue).copied().flatten()
    }
}

/// What the balloon has done, and whether it should.
#[derive(Debug)]
struct Counters {
    reported_bytes: AtomicU64,
    discarded_bytes: AtomicU64,
    discard: AtomicBool,
}

/// The machine owner's end of a balloon.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    hints: FreeHints,
    counters: Arc<Counters>,
}

impl BalloonHandle {
    /// Hints of free pages.
    pub fn hints(&self) -> &FreeHints {
        &self.hints
    }

    /// Whether reported pages are discarded from now on. Without it, reports are acknowledged and
    /// nothing is done: to measure what it is worth.
    pub fn set_discard(&self, discard: bool) {
        self.counters.discard.store(discard, Ordering::Relaxed);
    }

    /// Bytes that the guest has reported free here, so far.
    pub fn reported_bytes(&self) -> u64 {
        self.counters.reported_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of those that were given back to the host.
    pub fn discarded_bytes(&self) -> u64 {
        self.counters.discarded_bytes.load(Ordering::Relaxed)
    }
}

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    handle: BalloonHandle,
    roles: Roles,
    /// The command under which the driver names pages now.
    hinting: u32,
    /// What the configuration space says.
    told: u32,
}

impl Balloon {
    /// A balloon of target size zero, for a guest with `ram_chunks` of RAM.
    pub fn new(ram_chunks: u64) -> io::Result<Self> {
        let counters = Counters {
            reported_bytes: AtomicU64::new(0),
            discarded_bytes: AtomicU64::new(0),
            discard: AtomicBool::new(true),
        };
        let handle =
            BalloonHandle { hints: FreeHints::new(ram_chunks)?, counters: Arc::new(counters) };
        Ok(Self { handle, roles: Roles([None; QUEUES]), hinting: CMD_STOP, told: CMD_STOP })
    }

    /// The machine owner's end.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    /// Tells the driver which command is in force, if it has not been told.
    fn tell(&mut self, ctx: &DeviceContext<'_>) {
        let wanted = self.handle.hints.wanted().command();
        if wanted != self.told {
            self.told = wanted;
            ctx.shared.config.update(HINT_COMMAND_OFFSET, &wanted.to_le_bytes());
            ctx.shared.interrupt.config();
        }
    }

    /// Gives buffers back unread.
    fn acknowledge(queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, DeviceError> {
        for _ in 0..REQUESTS_PER_CALL {
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            queue.complete(ram, chain.head, 0)?;
        }
        Ok(Progress::Yield)
    }

    /// Discards reported pages, then gives them back.
    fn reports(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, DeviceError> {
        let counters = &self.handle.counters;
        let (mut requests, mut bytes) = (0, 0);
        while requests < REQUESTS_PER_CALL && bytes < DISCARD_BYTES_PER_CALL {
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            // Bounds the work of one request. No page can be free twice.
            if chain.writable.len() > memory::size_bytes(ram) {
                return Err(DeviceError::Request("more free pages than there is RAM"));
            }
            counters.reported_bytes.fetch_add(chain.writable.len(), Ordering::Relaxed);
            if counters.discard.load(Ordering::Relaxed) {
                let discarded = discard::discard(ram, &chain.writable)
                    .map_err(|error| DeviceError::Ram(Box::new(error)))?;
                counters.discarded_bytes.fetch_add(discarded, Ordering::Relaxed);
            }
            queue.complete(ram, chain.head, 0)?;
            requests += 1;
            bytes += chain.writable.len();
        }
        Ok(Progress::Yield)
    }

    /// Notes hinted pages. A readable buffer names the command that what follows belongs to.
    fn hints(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, DeviceError> {
        for _ in 0..REQUESTS_PER_CALL {
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            if !chain.readable.is_empty() {
                let mut command = [0; 4];
                let len = chain.readable.read_at(ram, 0, &mut command)?;
                let named = u32::from_le_bytes(command);
                let previous = std::mem::replace(
                    &mut self.hinting,
                    if len == command.len() { named } else { CMD_STOP },
                );
                if self.hinting == CMD_STOP {
                    self.handle.hints.no_more(previous);
                }
            }
            if chain.writable.len() > memory::size_bytes(ram) {
                return Err(DeviceError::Request("more free pages than there is RAM"));
            }
            self.handle.hints.add(self.hinting, ram, &chain.writable);
            queue.complete(ram, chain.head, 0)?;
        }
        Ok(Progress::Yield)
    }
}

impl VirtioBackend for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn features(&self) -> u64 {
        1 << F_STATS_VQ | 1 << F_FREE_PAGE_HINT | 1 << F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> Vec<u8> {
        vec![0; CONFIG_BYTES]
    }

    fn activate(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        let queues = &ctx.queues;
        self.roles = Roles::new(ctx.features, |at| queues.get(at).is_some_and(VirtQueue::is_ready));
        let has = |feature: u32| ctx.features & 1 << feature != 0;
        self.handle.hints.driver_is_ready(has(F_FREE_PAGE_HINT), has(F_REPORTING));
        self.tell(ctx);
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(queue) = ctx.queues.get_mut(index) else { return Ok(Progress::Drained) };
        match self.roles.of(index) {
            Some(Role::Balloon) => Self::acknowledge(queue, ctx.ram),
            Some(Role::Hints) => self.hints(queue, ctx.ram),
            Some(Role::Reports) => self.reports(queue, ctx.ram),
            // The driver's one buffer waits there for a question that is never asked.
            Some(Role::Statistics) | None => Ok(Progress::Waiting),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.handle.hints.event_fd()]
    }

    fn handle_event(
        &mut self,
        _event: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Option<usize>, DeviceError> {
        self.handle.hints.clear_event();
        self.tell(ctx);
        Ok(None)
    }

    fn reset(&mut self) {
        self.hinting = CMD_STOP;
        self.handle.hints.driver_is_gone();
    }

    fn save(&self) -> Vec<u8> {
        self.handle.hints.last_command().to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        let last = <[u8; 4]>::try_from(state)
            .map_err(|_| format!("{} bytes where the last hint command is 4", state.len()))?;
        self.handle.hints.restore(u32::from_le_bytes(last));
        self.hinting = CMD_STOP;
        Ok(())
    }
}

impl Wanted {
    /// As the configuration space has it.
    fn command(self) -> u32 {
        match self {
            Self::Stop => CMD_STOP,
            Self::Command(id) => id,
            Self::Done => hints::CMD_DONE,
        }
    }
}
