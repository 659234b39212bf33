//! virtio-net on a TAP interface.
//!
//! No offloads: a frame is what is on the wire, and the header before it says nothing. Frames go
//! between the interface and guest RAM directly; received ones are marked dirty when they are there.
//! Nothing is ever in flight between two calls, so there is nothing to drain.
//!
//! A network cannot know that a guest has moved. [`Announcer`] tells the switches from the host's
//! side at once; a driver that offers to announce its own addresses (ARP, neighbour discovery) is
//! asked to when the device is restored.

mod announce;
mod tap;
#[cfg(test)]
mod tests;

use std::{io, net::Ipv4Addr, os::fd::RawFd};

use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR,
        VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS,
        VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
    },
};

pub use self::{
    announce::{Announcer, gratuitous_arp},
    tap::{Tap, TapError},
};
use super::{
    device::{DeviceContext, DeviceError, Progress, VirtioBackend},
    interrupt::ConfigSpace,
    queue::Chain,
    rate::{Limiter, Rate, timer_failed},
};
use crate::memory::GuestRam;

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// `struct virtio_net_hdr_v1`, before each frame.
const HEADER_BYTES: usize = 12;
/// Offset of the header's count of buffers, which is one.
const NUM_BUFFERS_OFFSET: usize = 10;
/// Offset of the status in the configuration space, behind the MAC address.
const STATUS_OFFSET: usize = 6;
/// The longest frame that is passed on: 64 KiB of payload and its Ethernet header.
const MAX_FRAME_BYTES: u64 = (64 << 10) + 18;
/// Frames, or commands, before others get their turn.
const FRAMES_PER_CALL: usize = 64;

/// The backend's own events, in the order of [`VirtioBackend::event_fds`].
const TAP_EVENT: usize = 0;
const ANNOUNCE_EVENT: usize = 1;
const RECEIVE_LIMIT_EVENT: usize = 2;
const TRANSMIT_LIMIT_EVENT: usize = 3;

/// The network device.
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    announcer: Announcer,
    /// What may pass to the guest, and from it.
    receiving: Limiter,
    sending: Limiter,
    /// Restored and not yet active: the driver is to announce itself.
    moved: bool,
}

impl Net {
    /// A network device with address `mac` on `tap`, whose guest has these addresses, as far as that
    /// is known.
    pub fn new(tap: Tap, mac: [u8; 6], addresses: &[Ipv4Addr]) -> io::Result<Self> {
        let announcer = Announcer::new(tap.clone(), mac, addresses)?;
        let (receiving, sending) = (Limiter::new(Rate::default())?, Limiter::new(Rate::default())?);
        Ok(Self { tap, mac, announcer, receiving, sending, moved: false })
    }

    /// The same, held to this rate in each direction.
    pub fn limited(self, rate: Rate) -> io::Result<Self> {
        Ok(Self { receiving: Limiter::new(rate)?, sending: Limiter::new(rate)?, ..self })
    }

    /// Something to announce this guest with, once it runs here.
    pub fn announcer(&self) -> Announcer {
        self.announcer.clone()
    }

    /// Passes frames from the interface to the driver.
    fn receive(&mut self, ctx: &mut DeviceContext<'_>) -> Result<Progress, DeviceError> {
        let Some(queue) = ctx.queues.get_mut(RX) else { return Ok(Progress::Drained) };
        for _ in 0..FRAMES_PER_CALL {
            if !self.receiving.may_pass().map_err(timer_failed)? {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = queue.pop(ctx.ram)? else { return Ok(Progress::Drained) };
            if chain.writable.len() < HEADER_BYTES as u64 {
                return Err(DeviceError::Request("a receive buffer shorter than its header"));
            }
            match self.receive_into(&chain, ctx.ram)? {
                Received::Frame(len) => {
                    self.receiving.take(u64::from(len) - HEADER_BYTES as u64);
                    queue.complete(ctx.ram, chain.head, len)?;
                }
                Received::Dropped => queue.undo_pop(),
                Received::Nothing => {
                    queue.undo_pop();
                    return Ok(Progress::Waiting);
                }
            }
        }
        Ok(Progress::Yield)
    }

    fn receive_into(&self, chain: &Chain, ram: &GuestRam) -> Result<Received, DeviceError> {
        let buffers = chain.writable.slice(0, HEADER_BYTES as u64 + MAX_FRAME_BYTES);
        let pieces = buffers.iovecs(ram)?;
        // SAFETY: the pieces are guest RAM, mapped as long as `ram` is.
        let len = match unsafe { self.tap.receive(&pieces) } {
            Ok(len) => len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Received::Nothing);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Received::Dropped);
            }
            Err(error) => {
                // An interface that is set down, say: frames are lost, as with a pulled cable.
                tracing::debug!(%error, tap = self.tap.name(), "receiving");
                return Ok(Received::Nothing);
            }
        };
        buffers.slice(0, len).mark_dirty(ram)?;
        if len > buffers.len() || len < HEADER_BYTES as u64 {
            tracing::debug!(len, room = buffers.len(), "frame does not fit the driver's buffer");
            return Ok(Received::Dropped);
        }
        // Without offloads the header is zero but for the count of buffers.
        let mut header = [0; HEADER_BYTES];
        header[NUM_BUFFERS_OFFSET] = 1;
        buffers.write_at(ram, 0, &header)?;
        Ok(Received::Frame(len as u32))
    }

    /// Passes frames from the driver to the interface.
    fn transmit(&mut self, ctx: &mut DeviceContext<'_>) -> Result<Progress, DeviceError> {
        let Some(queue) = ctx.queues.get_mut(TX) else { return Ok(Progress::Drained) };
        for _ in 0..FRAMES_PER_CALL {
            if !self.sending.may_pass().map_err(timer_failed)? {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = queue.pop(ctx.ram)? else { return Ok(Progress::Drained) };
            self.sending.take(chain.readable.len().saturating_sub(HEADER_BYTES as u64));
            self.transmit_from(&chain, ctx.ram)?;
            queue.complete(ctx.ram, chain.head, 0)?;
        }
        Ok(Progress::Yield)
    }

    /// Sends one frame. One that cannot be sent is lost, as on any network.
    fn transmit_from(&self, chain: &Chain, ram: &GuestRam) -> Result<(), DeviceError> {
        let frame = chain.readable.slice(HEADER_BYTES as u64, u64::MAX);
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES {
            tracing::debug!(len = frame.len(), "frame of a length that is not sent");
            return Ok(());
        }
        // The driver's header could only ask for offloads that it was not given: send our own.
        let mut header = [0u8; HEADER_BYTES];
        let first = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() };
        let mut pieces = vec![first];
        pieces.extend(frame.iovecs(ram)?);
        // SAFETY: the pieces are the local header and guest RAM, mapped as long as `ram` is.
        if let Err(error) = unsafe { self.tap.send(&pieces) } {
            tracing::debug!(%error, tap = self.tap.name(), "sending");
        }
        Ok(())
    }

    /// Answers the driver's commands.
    fn control(&self, ctx: &mut DeviceContext<'_>) -> Result<Progress, DeviceError> {
        let Some(queue) = ctx.queues.get_mut(CONTROL) else { return Ok(Progress::Drained) };
        for _ in 0..FRAMES_PER_CALL {
            let Some(chain) = queue.pop(ctx.ram)? else { return Ok(Progress::Drained) };
            let mut command = [0; 2];
            let got = chain.readable.read_at(ctx.ram, 0, &mut command)?;
            let announced = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];
            let status = if got == command.len() && command == announced {
                set_status(&ctx.shared.config, VIRTIO_NET_S_LINK_UP);
                VIRTIO_NET_OK
            } else {
                VIRTIO_NET_ERR
            };
            let written = chain.writable.write_at(ctx.ram, 0, &[status as u8])?;
            queue.complete(ctx.ram, chain.head, written as u32)?;
        }
        Ok(Progress::Yield)
    }
}

/// What came of trying to receive.
enum Received {
    /// A frame of this length, header included.
    Frame(u32),
    /// A frame that is lost: its buffer may be used again.
    Dropped,
    /// No frame waits.
    Nothing,
}

fn set_status(config: &ConfigSpace, status: u32) {
    config.update(STATUS_OFFSET, &(status as u16).to_le_bytes());
}

impl VirtioBackend for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut space = self.mac.to_vec();
        space.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        space
    }

    fn activate(&mut self, ctx: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        let can_announce =
            1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_STATUS;
        if std::mem::take(&mut self.moved) && ctx.features & can_announce == can_announce {
            set_status(&ctx.shared.config, VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
            ctx.shared.interrupt.config();
        }
        Ok(())
    }

    fn process(
        &mut self,
        queue: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Progress, DeviceError> {
        match queue {
            RX => self.receive(ctx),
            TX => self.transmit(ctx),
            CONTROL => self.control(ctx),
            _ => Ok(Progress::Drained),
        }
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.tap.fd(), self.announcer.fd(), self.receiving.fd(), self.sending.fd()]
    }

    fn handle_event(
        &mut self,
        event: usize,
        _ctx: &mut DeviceContext<'_>,
    ) -> Result<Option<usize>, DeviceError> {
        Ok(match event {
            TAP_EVENT => Some(RX),
            ANNOUNCE_EVENT => {
                self.announcer.due();
                None
            }
            RECEIVE_LIMIT_EVENT => {
                self.receiving.clear();
                Some(RX)
            }
            TRANSMIT_LIMIT_EVENT => {
                self.sending.clear();
                Some(TX)
            }
            _ => None,
        })
    }

    fn reset(&mut self) {
        self.moved = false;
    }

    fn save(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        // The driver has read the address long ago: it cannot change under it.
        if state != self.mac {
            return Err(format!(
                "its MAC address is {state:02x?}, this device was made with {:02x?}",
                self.mac
            ));
        }
        self.moved = true;
        Ok(())
    }
}
