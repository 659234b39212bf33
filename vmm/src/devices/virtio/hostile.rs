//! Devices under a guest that means harm: registers poked in any order, rings that loop, overlap and
//! point anywhere, all of it changed while it is used. Whatever it does, nothing here panics, every
//! answer comes in bounded time, the machine can be paused and moved, and a reset helps.

use std::{
    any::Any,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::{
    VirtioBackend,
    balloon::{Balloon, BalloonHandle},
    block,
    net::Net,
    queue::VirtQueue,
    rng::Rng as Entropy,
    testing::{DATA, Driver, RAM_BYTES, ram},
};
use crate::devices::bus::BusDevice;

/// Whatever a guest did, the device answers its machine within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// A device to be attacked: makes backends over the same disk or network, pokes it from the host's
/// side, and uses it as a well-behaved driver would.
struct Victim {
    make: Box<dyn FnMut() -> Box<dyn VirtioBackend>>,
    host: Box<dyn FnMut()>,
    works: fn(&mut Driver),
    _keeps: Box<dyn Any>,
}

fn entropy() -> Victim {
    Victim {
        make: Box::new(|| Box::new(Entropy::new())),
        host: Box::new(|| {}),
        works: |driver| {
            let head = driver.offer(0, &[], &[(DATA, 16)]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0), (head, 16));
        },
        _keeps: Box::new(()),
    }
}

fn disk() -> Victim {
    let (dir, overlay) = block::tests::fresh();
    Victim {
        make: Box::new(move || Box::new(block::Block::new(overlay.clone(), "victim").unwrap())),
        host: Box::new(|| {}),
        works: |driver| {
            driver.put(DATA, &[0; 16]);
            let head = driver.offer(0, &[(DATA, 16)], &[(DATA + 0x1000, 512), (DATA + 0x2000, 1)]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0), (head, 513));
            assert_eq!(driver.get(DATA + 0x2000, 1), [0]);
        },
        _keeps: Box::new(dir),
    }
}

fn network() -> Victim {
    let far = Arc::new(Mutex::new(None::<UnixDatagram>));
    let (made, sends) = (far.clone(), far.clone());
    Victim {
        make: Box::new(move || {
            let (host, guest) = UnixDatagram::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            host.set_nonblocking(true).unwrap();
            *made.lock().unwrap() = Some(host);
            let tap = super::net::Tap::from_file(OwnedFd::from(guest).into());
            Box::new(Net::new(tap, [2, 0, 0, 0, 0, 1], &[]).unwrap())
        }),
        host: Box::new(move || {
            if let Some(host) = &*sends.lock().unwrap() {
                // A full socket loses frames, as a network does.
                let _ = host.send(&[7; 100]);
                while host.recv(&mut [0; 2000]).is_ok() {}
            }
        }),
        works: |driver| {
            let head = driver.offer(1, &[(DATA, 80)], &[]);
            driver.kick(1);
            assert_eq!(driver.wait_used(1), (head, 0));
        },
        _keeps: Box::new(far),
    }
}

fn balloon() -> Victim {
    let handle = Arc::new(Mutex::new(None::<BalloonHandle>));
    let (made, asks) = (handle.clone(), handle.clone());
    Victim {
        make: Box::new(move || {
            let balloon = Balloon::new(RAM_BYTES as u64 / 4096).unwrap();
            *made.lock().unwrap() = Some(balloon.handle());
            Box::new(balloon)
        }),
        host: Box::new(move || {
            if let Some(handle) = &*asks.lock().unwrap() {
                handle.hints().start();
                handle.hints().take();
                handle.hints().stop();
            }
        }),
        works: |driver| {
            let head = driver.offer(0, &[(DATA, 64)], &[]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0), (head, 0));
        },
        _keeps: Box::new(handle),
    }
}

/// What a guest, or its host, does next.
#[derive(Clone, Debug)]
enum Poke {
    /// Brings the device up as drivers do.
    Start {
        features: u64,
    },
    Write {
        offset: u32,
        width: usize,
        value: u64,
    },
    Read {
        offset: u32,
        width: usize,
    },
    /// Writes a descriptor into a table: of a queue, or an indirect one in the data.
    Descriptor {
        queue: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// Puts a head into the ring of available chains.
    Offer {
        queue: usize,
        slot: u16,
        head: u16,
    },
    /// Says how many chains are available.
    Claim {
        queue: usize,
        index: u16,
    },
    /// The begin of a request: of a disk, a network frame, a command, whatever it is taken for.
    Header {
        at: u64,
        kind: u32,
        sector: u64,
    },
    Kick {
        queue: usize,
    },
    Reset,
    PauseAndResume,
    /// To another machine.
    Move,
    Host,
}

const QUEUES: usize = 5;
const RING_AREA: u64 = 0x1_0000;

/// Where a hostile driver points to: rings, data, borders of RAM, nowhere.
fn address() -> impl Strategy<Value = u64> {
    let end = RAM_BYTES as u64;
    prop_oneof![
        6 => (0u64..8).prop_map(|n| DATA + n * 0x800),
        2 => (0..QUEUES as u64 * RING_AREA).prop_map(|at| RING_AREA + at),
        1 => prop::sample::select(vec![0, end / 2 - 8, end / 2, end - 1, end, end + 4096]),
        1 => prop::sample::select(vec![u64::MAX, u64::MAX - 4095, 1 << 63, 1 << 52]),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![0, 1, 12, 16, 32, 512, 4096, 0x1_0000]),
        1 => prop::sample::select(vec![RAM_BYTES as u32, u32::MAX, 1 << 31]),
        1 => any::<u32>(),
    ]
}

/// What makes a difference to a device: registers that it has, in the widths that it wants, most of
/// the time.
fn register() -> impl Strategy<Value = (u32, usize)> {
    let known = vec![
        VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_NOTIFY,
        VIRTIO_MMIO_INTERRUPT_ACK,
        VIRTIO_MMIO_STATUS,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ];
    prop_oneof![
        8 => prop::sample::select(known).prop_map(|register| (register, 4)),
        1 => (0u32..0x220, prop::sample::select(vec![1usize, 2, 4, 8])),
    ]
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![0u64, 1, 2, 3, 4, 8, 11, 15, 64, 128, 143, 256]),
        1 => (0..QUEUES as u64 * RING_AREA).prop_map(|at| RING_AREA + at),
        1 => any::<u64>(),
    ]
}

fn poke() -> impl Strategy<Value = Poke> {
    let queue = 0..QUEUES;
    let index = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    let features = prop::sample::select(vec![0, 1 << 28, 1 << 29, 3 << 28, u64::MAX >> 32]);
    prop_oneof![
        2 => features.prop_map(|features| Poke::Start { features }),
        4 => (register(), value())
            .prop_map(|((offset, width), value)| Poke::Write { offset, width, value }),
        1 => register().prop_map(|(offset, width)| Poke::Read { offset, width }),
        12 => (queue.clone(), index.clone(), address(), len(), 0u16..8, index.clone()).prop_map(
            |(queue, index, address, len, flags, next)| Poke::Descriptor {
                queue, index, address, len, flags, next
            }
        ),
        8 => (queue.clone(), 0u16..16, index.clone())
            .prop_map(|(queue, slot, head)| Poke::Offer { queue, slot, head }),
        8 => (queue.clone(), prop_oneof![4 => 0u16..16, 1 => any::<u16>()])
            .prop_map(|(queue, index)| Poke::Claim { queue, index }),
        3 => ((0u64..8).prop_map(|n| DATA + n * 0x800), 0u32..15, value())
            .prop_map(|(at, kind, sector)| Poke::Header { at, kind, sector }),
        8 => queue.prop_map(|queue| Poke::Kick { queue }),
        1 => Just(Poke::Reset),
        1 => Just(Poke::PauseAndResume),
        1 => Just(Poke::Move),
        2 => Just(Poke::Host),
    ]
}

fn ring(queue: usize) -> u64 {
    RING_AREA * (1 + queue as u64)
}

/// Writes guest RAM as only a guest may: at any time, without telling.
fn scribble(driver: &Driver, poke: &Poke) {
    match *poke {
        Poke::Descriptor { queue, index, address, len, flags, next } => {
            let entry = Descriptor::new(address, len, flags, next);
            // Past the driver's data lies the indirect table that pieces of data may name.
            for table in [ring(queue), DATA] {
                let at = table + u64::from(index % 0x400) * 16;
                driver.ram.write_obj(entry, GuestAddress(at)).unwrap();
            }
        }
        Poke::Offer { queue, slot, head } => {
            let at = ring(queue) + 0x4000 + 4 + u64::from(slot) * 2;
            driver.ram.write_obj(head, GuestAddress(at)).unwrap();
        }
        Poke::Claim { queue, index } => {
            let at = GuestAddress(ring(queue) + 0x4000 + 2);
            driver.ram.store(index, at, Ordering::Release).unwrap();
        }
        Poke::Header { at, kind, sector } => {
            driver.ram.write_obj(kind, GuestAddress(at)).unwrap();
            driver.ram.write_obj(sector, GuestAddress(at + 8)).unwrap();
        }
        _ => {}
    }
}

fn carry_out(mut driver: Driver, victim: &mut Victim, poke: Poke) -> Driver {
    match poke {
        Poke::Start { features } => {
            driver.reset();
            let offered = driver.offered();
            driver.start(features & offered);
        }
        Poke::Write { offset, width, value } => {
            driver.device.write(offset.into(), &value.to_le_bytes()[..width]);
        }
        Poke::Read { offset, width } => driver.device.read(offset.into(), &mut [0; 8][..width]),
        Poke::Kick { queue } => driver.kick(queue),
        Poke::Reset => driver.write32(VIRTIO_MMIO_STATUS, 0),
        Poke::PauseAndResume => {
            driver.device.pause().unwrap();
            driver.device.resume().unwrap();
        }
        // A guest must not be able to make itself immovable.
        Poke::Move => (driver, _) = driver.hand_off((victim.make)()),
        Poke::Host => (victim.host)(),
        other => scribble(&driver, &other),
    }
    driver
}

fn attack(mut victim: Victim, script: Vec<Poke>) {
    let began = Instant::now();
    let mut driver = Driver::new((victim.make)());
    for poke in script {
        driver = carry_out(driver, &mut victim, poke);
    }
    recovers(driver, &victim);
    assert!(began.elapsed() < PATIENCE, "it took {:?}", began.elapsed());
}

/// After all that: it is paused when asked, and works after a reset.
fn recovers(mut driver: Driver, victim: &Victim) {
    driver.device.pause().unwrap();
    driver.device.save().unwrap();
    driver.device.resume().unwrap();
    driver.reset();
    assert_eq!(driver.status(), 0);
    driver.start(0);
    (victim.works)(&mut driver);
}

fn script() -> impl Strategy<Value = Vec<Poke>> {
    prop::collection::vec(poke(), 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_time: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn any_driver_of_the_entropy_device(script in script()) {
        attack(entropy(), script);
    }

    #[test]
    fn any_driver_of_the_disk(script in script()) {
        attack(disk(), script);
    }

    #[test]
    fn any_driver_of_the_network(script in script()) {
        attack(network(), script);
    }

    #[test]
    fn any_driver_of_the_balloon(script in script()) {
        attack(balloon(), script);
    }
}

/// Everything at once: a guest with two CPUs, of which one rewrites the rings that the device is
/// reading, and the other pokes the registers.
fn race(mut victim: Victim, seed: u64) {
    const TIME: Duration = Duration::from_millis(250);
    let driver = Driver::new((victim.make)());
    let (memory, over) = (driver.ram.clone(), AtomicBool::new(false));
    let mut pokes = SmallRng::seed_from_u64(seed);
    let mut driver = Some(driver);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = SmallRng::seed_from_u64(!seed);
            while !over.load(Ordering::Relaxed) {
                let queue = random.random_range(0..3);
                let at = ring(queue) + [0, 0x4000, 0x8000][random.random_range(0..3)];
                let at = GuestAddress(at + random.random_range(0..64u64) * 2);
                // Mostly small numbers: they are heads, flags, lengths and indexes that mean something.
                let value: u16 = match random.random_range(0..4) {
                    0 => random.random(),
                    _ => random.random_range(0..16),
                };
                memory.write_obj(value, at).unwrap();
            }
        });
        let began = Instant::now();
        while began.elapsed() < TIME {
            let mut now = driver.take().unwrap();
            let poke = match pokes.random_range(0..60) {
                0 => Poke::Start { features: u64::MAX >> 32 },
                1 => Poke::Reset,
                2 => Poke::PauseAndResume,
                3 => Poke::Write { offset: VIRTIO_MMIO_QUEUE_READY, width: 4, value: 0 },
                4 => Poke::Host,
                _ => Poke::Kick { queue: pokes.random_range(0..3) },
            };
            if let Poke::Start { features } = poke {
                // Not `Driver::start`, which expects what it wrote to stay.
                now.write32(VIRTIO_MMIO_STATUS, 0);
                let offered = now.offered();
                assert!(now.negotiate(features & offered | 1 << 32));
                now.configure_queues();
                now.write32(VIRTIO_MMIO_STATUS, 15);
            } else {
                now = carry_out(now, &mut victim, poke);
            }
            driver = Some(now);
        }
        over.store(true, Ordering::Relaxed);
    });
    let began = Instant::now();
    recovers(driver.unwrap(), &victim);
    assert!(began.elapsed() < PATIENCE, "seed {seed}: it took {:?}", began.elapsed());
}

#[test]
fn rings_change_while_they_are_used() {
    for seed in 0..3 {
        for victim in [entropy(), disk(), network(), balloon()] {
            race(victim, seed);
        }
    }
}

/// Every order of the writes that matter, five deep.
#[test]
fn registers_in_every_order() {
    let writes = [
        (VIRTIO_MMIO_STATUS, 1),
        (VIRTIO_MMIO_STATUS, 3),
        (VIRTIO_MMIO_STATUS, 11),
        (VIRTIO_MMIO_STATUS, 15),
        (VIRTIO_MMIO_STATUS, 0x80),
        (VIRTIO_MMIO_STATUS, 0),
        (VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (VIRTIO_MMIO_QUEUE_READY, 1),
        (VIRTIO_MMIO_QUEUE_READY, 0),
    ];
    let driver = Driver::new(Box::new(Entropy::new()));
    driver.write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    let mut order = [0; 5];
    loop {
        driver.write32(VIRTIO_MMIO_STATUS, 0);
        // Version 1 is feature 32.
        driver.write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        for &at in &order {
            let (register, value) = writes[at];
            driver.write32(register, value);
            let status = driver.status();
            assert!(super::state::status_is_reachable(status), "{status:#x} after {order:?}");
            let live = status & 4 != 0;
            assert!(!live || status & 8 != 0, "runs without features, after {order:?}");
        }
        let Some(at) = order.iter().rposition(|&n| n + 1 < writes.len()) else { break };
        order[at] += 1;
        order[at + 1..].fill(0);
    }
    recovers(driver, &entropy());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Whatever the rings hold, each chain is in RAM, and is no longer than the queue.
    #[test]
    fn chains_are_in_ram_and_bounded(
        entries in prop::collection::vec((address(), len(), 0u16..8, 0u16..20), 16),
        indirect in prop::collection::vec((address(), len(), 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..20, 16),
        available in prop_oneof![8 => 0u16..17, 1 => any::<u16>()],
    ) {
        const SIZE: u16 = 16;
        let ram = ram();
        for (table, entries) in [(ring(0), entries), (DATA, indirect)] {
            for (n, (address, len, flags, next)) in (0u64..).zip(entries) {
                let entry = Descriptor::new(address, len, flags, next);
                ram.write_obj(entry, GuestAddress(table + n * 16)).unwrap();
            }
        }
        for (n, head) in (0u64..).zip(heads) {
            ram.write_obj(head, GuestAddress(ring(0) + 0x4004 + n * 2)).unwrap();
        }
        ram.write_obj(available, GuestAddress(ring(0) + 0x4002)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(ring(0) as u32), Some(0));
        queue.set_avail_ring_address(Some(ring(0) as u32 + 0x4000), Some(0));
        queue.set_used_ring_address(Some(ring(0) as u32 + 0x8000), Some(0));
        queue.set_ready(true);
        prop_assert!(queue.is_valid(&ram));
        let mut queue = VirtQueue::new(queue);
        let mut chains = 0;
        while let Ok(Some(chain)) = queue.pop(&ram) {
            chains += 1;
            prop_assert!(chains <= SIZE, "more chains than the queue holds");
            let pieces: Vec<_> =
                [&chain.readable, &chain.writable].iter().flat_map(|b| b.iovecs(&ram).unwrap()).collect();
            // One that crosses a border of regions is two.
            prop_assert!(pieces.len() <= 2 * usize::from(SIZE));
            let bytes: usize = pieces.iter().map(|piece| piece.iov_len).sum();
            prop_assert_eq!(bytes as u64, chain.readable.len() + chain.writable.len());
            chain.writable.mark_dirty(&ram).unwrap();
            if queue.complete(&ram, chain.head, 1).is_err() {
                // A head beyond the table.
                break;
            }
        }
        prop_assert!(ram.check_range(GuestAddress(0), RAM_BYTES, Permissions::ReadWrite));
    }
}
