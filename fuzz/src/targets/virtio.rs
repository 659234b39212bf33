//! Virtio devices: queues and registers, under a driver that does as it likes. [`crate::device`] says
//! what must hold.

use vmm::{ThreadHook, devices::virtio::VirtioMmio};

use super::{Origin, Target};
use crate::{
    device::{self, DATA, balloon::Owner, block::Disk, net::Network, op, rng::Entropy},
    input::Program,
};

const fn target(name: &'static str, run: fn(&[u8]) -> bool, seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, from: Origin::Guest, run, seeds, max_len: 16 << 10 }
}

pub(super) const BLOCK: Target = target("block", device::run::<Disk>, block_seeds);
pub(super) const NET: Target = target("net", device::run::<Network>, net_seeds);
pub(super) const BALLOON: Target = target("balloon", device::run::<Owner>, balloon_seeds);
pub(super) const RNG: Target = target("rng", device::run::<Entropy>, rng_seeds);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A program for a driver that keeps to the rules, at first.
#[derive(Clone)]
struct Driver(Program);

impl Driver {
    fn started(in_step: u8, features: u64, flags: u8) -> Self {
        Self(Program::new().u8(in_step).u8(op::START).u64(features).u8(flags))
    }

    fn ram(self, address: u64, bytes: &[u8]) -> Self {
        Self(self.0.u8(op::RAM).u32(address as u32).block(bytes))
    }

    fn piece(self, queue: u8, number: u8, at: (u64, u32), flags: u16, next: u16) -> Self {
        let descriptor = self.0.u8(op::DESCRIPTOR).u8(queue).u8(number);
        Self(descriptor.u64(at.0).u32(at.1).u16(flags).u16(next))
    }

    fn offer(self, queue: u8, head: u16) -> Self {
        Self(self.0.u8(op::OFFER).u8(queue).u16(head))
    }

    fn op(self, op: u8) -> Self {
        Self(self.0.u8(op))
    }

    fn host(self, number: u8, block: &[u8]) -> Self {
        Self(self.0.u8(op::HOST).u8(number).block(block))
    }

    fn finish(self) -> Vec<u8> {
        self.0.finish()
    }
}

/// What a driver may do to any queue, told at its queue 0.
fn hostile(begin: &Driver) -> Vec<Vec<u8>> {
    let at = (DATA, 16);
    let table = |next: u16| {
        let mut entry = DATA.to_le_bytes().to_vec();
        entry.extend(16u32.to_le_bytes());
        entry.extend((WRITE | NEXT).to_le_bytes());
        entry.extend(next.to_le_bytes());
        entry
    };
    let program = |driver: Driver| driver.op(op::WAIT).op(op::MOVE).op(op::RESET).finish();
    vec![
        // A chain that is a circle, one that is too long, one outside RAM, one in the rings.
        program(begin.clone().piece(0, 0, at, NEXT, 1).piece(0, 1, at, NEXT, 0).offer(0, 0)),
        program(begin.clone().piece(0, 0, at, NEXT, 31).offer(0, 0).offer(0, 500)),
        program(begin.clone().piece(0, 0, (u64::MAX - 8, 64), WRITE, 0).offer(0, 0)),
        program(begin.clone().piece(0, 0, (0, 0x2000), WRITE, 0).offer(0, 0)),
        program(begin.clone().piece(0, 0, (0x1000, 0xffff_ffff), 0, 0).offer(0, 0)),
        // The wrong order, an indirect table that is a circle, one in another.
        program(begin.clone().piece(0, 0, at, NEXT | WRITE, 1).piece(0, 1, at, 0, 0).offer(0, 0)),
        program(
            begin.clone().ram(DATA, &table(0)).piece(0, 0, (DATA, 16), INDIRECT, 0).offer(0, 0),
        ),
        program(begin.clone().piece(0, 0, (DATA, 17), INDIRECT | NEXT, 0).offer(0, 0)),
        // More chains than there are entries, and a queue that is changed while it is used.
        Driver(begin.clone().0.u8(op::CLAIM).u8(0).u16(40_000).u8(op::KICK).u8(0)).finish(),
        Driver(begin.clone().0.u8(op::WRITE).u8(0x44 / 4).u32(0).u8(op::KICK).u8(0)).finish(),
        Driver(begin.clone().0.u8(op::WRITE).u8(0x38 / 4).u32(7).u8(op::KICK).u8(0)).finish(),
        begin.clone().op(op::RESET).finish(),
    ]
}

/// A saved state to restore.
fn restoring(backend: Box<dyn vmm::devices::virtio::VirtioBackend>) -> Vec<u8> {
    let ram = vmm::memory::GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]);
    let irq = vmm_sys_util::eventfd::EventFd::new(0).expect("an event descriptor");
    let device = VirtioMmio::new(backend, ram.expect("a page"), irq, &ThreadHook::default());
    let device = device.expect("a device");
    let state = device.save().expect("a paused device can be saved");
    let blob = postcard::to_allocvec(&state).expect("a state can be written");
    Program::new().u8(1).u8(op::RESTORE).block(&blob).finish()
}

fn with_hostile(
    begin: &Driver,
    backend: Box<dyn vmm::devices::virtio::VirtioBackend>,
    sound: Vec<Driver>,
) -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = sound.into_iter().map(Driver::finish).collect();
    seeds.push(restoring(backend));
    seeds.extend(hostile(begin));
    seeds
}

fn block_seeds() -> Vec<Vec<u8>> {
    let begin = Driver::started(1, u64::MAX, 0);
    let request = |begin: &Driver, kind: u32, sector: u64, data: (u64, u32), flags: u16| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        begin
            .clone()
            .ram(DATA, &header)
            .piece(0, 0, (DATA, 16), NEXT, 1)
            .piece(0, 1, data, NEXT | flags, 2)
            .piece(0, 2, (DATA + 100, 1), WRITE, 0)
            .offer(0, 0)
    };
    let data = (DATA + 0x1000, 4096);
    let mut range = 3u64.to_le_bytes().to_vec();
    range.extend(20u32.to_le_bytes());
    range.extend([1, 0, 0, 0]);
    let ranged = begin.clone().ram(DATA + 0x1000, &range);
    let written = request(&begin.clone().ram(DATA + 0x1000, &[7; 4096]), 1, 5, data, 0);
    let free = Driver::started(0, u64::MAX, 0);
    let sound = vec![
        request(&begin, 0, 0, data, WRITE),
        request(&written.clone().op(op::MOVE), 0, 5, data, WRITE),
        request(&written, 1, 8, (DATA + 0x1000, 0x8000), 0).op(op::MOVE),
        request(&begin, 4, 0, (DATA + 0x1000, 0), 0),
        request(&begin, 8, 0, (DATA + 0x1000, 20), WRITE),
        request(&ranged, 11, 0, (DATA + 0x1000, 16), 0),
        request(&ranged, 13, 0, (DATA + 0x1000, 16), 0),
        request(&begin, 0, 1 << 40, data, WRITE),
        request(&free, 1, 5, data, 0).offer(0, 0).offer(0, 0).op(op::RESET),
    ];
    with_hostile(
        &begin,
        crate::device::Backend::device(&mut <Disk as device::Backend>::new()),
        sound,
    )
}

fn net_seeds() -> Vec<Vec<u8>> {
    let begin = Driver::started(1, u64::MAX, 0);
    let receiving = begin.clone().piece(0, 0, (DATA, 2000), WRITE, 0).offer(0, 0);
    let sound = vec![
        begin.clone().piece(1, 0, (DATA, 112), 0, 0).offer(1, 0).host(1, &[]),
        receiving.clone().host(0, &[7; 112]),
        begin.clone().host(0, &[7; 112]).piece(0, 0, (DATA, 2000), WRITE, 0).offer(0, 0),
        begin.clone().piece(0, 0, (DATA, 20), WRITE, 0).offer(0, 0).host(0, &[7; 1000]),
        receiving.op(op::MOVE).host(0, &[7; 112]),
        // Announce: the driver acknowledges on the control queue.
        begin
            .clone()
            .op(op::MOVE)
            .ram(DATA, &[3, 0])
            .piece(2, 0, (DATA, 2), NEXT, 1)
            .piece(2, 1, (DATA + 100, 1), WRITE, 0)
            .offer(2, 0),
    ];
    with_hostile(
        &begin,
        crate::device::Backend::device(&mut <Network as device::Backend>::new()),
        sound,
    )
}

fn balloon_seeds() -> Vec<Vec<u8>> {
    let begin = Driver::started(1, u64::MAX, 0);
    let hinting = begin.clone().host(0, &[]).ram(DATA, &2u32.to_le_bytes());
    let sound = vec![
        begin.clone().ram(DATA, &7u32.to_le_bytes()).piece(0, 0, (DATA, 4), 0, 0).offer(0, 0),
        begin.clone().piece(4, 0, (DATA, 0x8000), WRITE, 0).offer(4, 0),
        begin.clone().piece(4, 0, (DATA + 5, 0x8000), WRITE, 0).offer(4, 0).op(op::MOVE),
        begin.clone().piece(4, 0, (0x1_f000, 0x2000), WRITE, 0).offer(4, 0),
        hinting.clone().piece(3, 0, (DATA, 4), 0, 0).offer(3, 0).host(2, &[]).host(1, &[]),
        hinting.piece(3, 0, (DATA, 0x3000), WRITE, 0).offer(3, 0).host(2, &[]).op(op::MOVE),
    ];
    with_hostile(
        &begin,
        crate::device::Backend::device(&mut <Owner as device::Backend>::new()),
        sound,
    )
}

fn rng_seeds() -> Vec<Vec<u8>> {
    let begin = Driver::started(1, u64::MAX, 0);
    let sound = vec![begin.clone().piece(0, 0, (DATA, 64), WRITE, 0).offer(0, 0).op(op::MOVE)];
    with_hostile(
        &begin,
        crate::device::Backend::device(&mut <Entropy as device::Backend>::new()),
        sound,
    )
}
