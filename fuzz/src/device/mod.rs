//! A virtio device under a driver that does as it likes.
//!
//! ```text
//! input ─> ops ─> registers, RAM, kicks, moves ─> VirtioMmio, its worker, the backend
//!                      │                                  │
//!                    shadow: RAM as the driver wrote it   dirty bitmap
//! ```
//!
//! What must hold for every device (design section 3): it can always be paused, and what it saves can be
//! restored; a page of RAM that is not as the driver wrote it is marked dirty; after a reset it serves a
//! driver that keeps to the rules.

pub mod balloon;
pub mod block;
pub mod net;
mod rig;
pub mod rng;

pub use rig::{Backend, DATA, RAM_BYTES, Rig};

use crate::input::Input;

/// What the driver does next.
pub mod op {
    /// Writes a register: number, value.
    pub const WRITE: u8 = 0;
    /// Reads a register: offset, width.
    pub const READ: u8 = 1;
    /// Writes a register with a width that it does not have: offset, width, value.
    pub const ODD: u8 = 2;
    /// Writes RAM: address, block.
    pub const RAM: u8 = 3;
    /// Negotiates and sets all queues up, but for what its features and flags say.
    pub const START: u8 = 4;
    /// Writes a descriptor: queue, number, address, length, flags, next.
    pub const DESCRIPTOR: u8 = 5;
    /// Makes a chain available: queue, head.
    pub const OFFER: u8 = 6;
    /// Claims that so many more chains are available.
    pub const CLAIM: u8 = 7;
    /// Notifies a queue.
    pub const KICK: u8 = 8;
    /// Lets the device work until it has nothing left to do.
    pub const WAIT: u8 = 9;
    /// Moves the device to another host, as a handoff does.
    pub const MOVE: u8 = 10;
    /// Restores any state: a block with it.
    pub const RESTORE: u8 = 11;
    /// Resets the device.
    pub const RESET: u8 = 12;
    /// Something happens on the other side of the device: number, block.
    pub const HOST: u8 = 13;
    /// One past the last.
    pub const END: u8 = 14;
}

/// So many ops at most: a run stays short.
const MOST_OPS: usize = 200;

/// Runs a program on a device with this backend, then checks all that must hold. Says whether the
/// device was in use at its end.
pub fn run<B: Backend>(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut rig = Rig::<B>::new(input.u8() & 1 != 0);
    for _ in 0..MOST_OPS {
        if input.is_empty() {
            break;
        }
        step(&mut rig, &mut input);
    }
    rig.finish()
}

fn step<B: Backend>(rig: &mut Rig<B>, input: &mut Input<'_>) {
    match input.u8() % op::END {
        op::WRITE => {
            let register = u64::from(input.u8()) * 4;
            rig.write(register, &input.u32().to_le_bytes());
        }
        op::READ => {
            let (offset, width) = (input.u16() % 0x200, input.below(9));
            rig.read(offset.into(), &mut [0; 8][..width.into()]);
        }
        op::ODD => {
            let (offset, width) = (input.u16() % 0x200, input.below(9));
            rig.write(offset.into(), &input.u64().to_le_bytes()[..width.into()]);
        }
        op::RAM => {
            let address = u64::from(input.u32()) % RAM_BYTES;
            rig.put(address, input.block());
        }
        op::START => {
            let (features, flags) = (input.u64(), input.u8());
            rig.start(features, flags);
        }
        op::DESCRIPTOR => {
            let (queue, number) = (input.u8(), input.u8());
            let (address, len) = (input.u64(), input.u32());
            rig.descriptor(queue, number, (address, len), (input.u16(), input.u16()));
        }
        op::OFFER => {
            let queue = input.u8();
            rig.offer(queue, input.u16());
        }
        op::CLAIM => {
            let queue = input.u8();
            rig.claim(queue, input.u16());
        }
        op::KICK => rig.kick(input.u8()),
        op::WAIT => rig.wait(),
        op::MOVE => rig.hand_off(),
        op::RESTORE => rig.restore(input.block()),
        op::RESET => rig.reset(),
        _ => {
            let number = input.u8();
            rig.host(number, input.block());
        }
    }
}
