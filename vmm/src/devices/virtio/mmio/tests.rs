//! Tests of the register file and the worker, with the entropy device and one that misbehaves.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::devices::virtio::{
    device::{DeviceContext, DeviceError, Progress},
    rng::Rng,
    state::ACKNOWLEDGE,
    testing::{DATA, Driver, EVENT_IDX, INDIRECT, INDIRECT_FLAG, NEXT, VERSION_1, WRITE},
};

fn rng() -> Driver {
    Driver::new(Box::new(Rng::new()))
}

#[test]
fn identifies_itself() {
    let driver = rng();
    assert_eq!(driver.read32(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read32(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read32(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | INDIRECT);
    assert_eq!(driver.read32(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    driver.write32(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
}

#[test]
fn features_must_be_offered_and_modern() {
    for bad in [0, VERSION_1 | 1 << 5, VERSION_1 | 1 << 40] {
        let driver = rng();
        assert!(!driver.negotiate(bad), "{bad:#x}");
        // Without FEATURES_OK the device does not start.
        driver.write32(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(driver.status() & DRIVER_OK, 0);
    }
    assert!(rng().negotiate(VERSION_1 | EVENT_IDX));
}

#[test]
fn status_steps_come_in_order_and_stay() {
    let driver = rng();
    driver.write32(VIRTIO_MMIO_STATUS, DRIVER);
    assert_eq!(driver.status(), 0);
    driver.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    driver.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    driver.write32(VIRTIO_MMIO_STATUS, FAILED);
    assert_eq!(driver.status(), ACKNOWLEDGE | FAILED);
    driver.write32(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn gives_entropy_and_interrupts() {
    for features in [0, EVENT_IDX] {
        let mut driver = rng();
        driver.start(features);
        for round in 0..200u64 {
            let head = driver.offer(0, &[], &[(DATA, 16), (DATA + 0x1000, 16)]);
            driver.kick(0);
            // First the interrupt: a driver that looks before it comes may say that it needs none.
            assert_eq!(driver.wait_interrupt(), VIRTIO_MMIO_INT_VRING);
            assert_eq!(driver.wait_used(0), (head, 32), "round {round}");
        }
        assert_ne!(driver.get(DATA, 16), [0; 16]);
        assert_ne!(driver.get(DATA + 0x1000, 16), driver.get(DATA, 16));
    }
}

#[test]
fn follows_indirect_tables() {
    let mut driver = rng();
    driver.start(INDIRECT);
    let table = DATA + 0x4000;
    let entry = |address, flags, next| Descriptor::new(address, 8, flags, next);
    for (n, d) in [entry(DATA, WRITE | NEXT, 1), entry(DATA + 8, WRITE, 0)].iter().enumerate() {
        driver.ram.write_obj(*d, vm_memory::GuestAddress(table + 16 * n as u64)).unwrap();
    }
    driver.write_descriptor(0, 5, Descriptor::new(table, 32, INDIRECT_FLAG, 0));
    driver.offer_head(0, 5);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (5, 16));
}

use vm_memory::Bytes;

#[test]
fn broken_rings_break_the_device_until_it_is_reset() {
    type Breakage = fn(&mut Driver);
    let breakages: [(&str, Breakage); 8] = [
        ("a loop", |d| {
            d.write_descriptor(0, 0, Descriptor::new(DATA, 8, WRITE | NEXT, 0));
            d.offer_head(0, 0);
        }),
        ("next beyond the table", |d| {
            d.write_descriptor(0, 0, Descriptor::new(DATA, 8, WRITE | NEXT, 999));
            d.offer_head(0, 0);
        }),
        ("head beyond the table", |d| d.offer_head(0, 64)),
        ("address outside RAM", |d| {
            d.write_descriptor(0, 0, Descriptor::new(u64::MAX - 4, 8, WRITE, 0));
            d.offer_head(0, 0);
        }),
        ("length outside RAM", |d| {
            d.write_descriptor(0, 0, Descriptor::new(DATA, u32::MAX, WRITE, 0));
            d.offer_head(0, 0);
        }),
        ("readable after writable", |d| {
            d.write_descriptor(0, 0, Descriptor::new(DATA, 8, WRITE | NEXT, 1));
            d.write_descriptor(0, 1, Descriptor::new(DATA, 8, 0, 0));
            d.offer_head(0, 0);
        }),
        ("an indirect table of a crooked size", |d| {
            d.write_descriptor(0, 0, Descriptor::new(DATA, 17, INDIRECT_FLAG, 0));
            d.offer_head(0, 0);
        }),
        // At once: a device that has just been started looks at its queue, and would take some.
        ("more chains than the ring holds", |d| d.claim(0, 65)),
    ];
    for (what, breakage) in breakages {
        let mut driver = rng();
        driver.start(EVENT_IDX | INDIRECT);
        breakage(&mut driver);
        driver.kick(0);
        driver.wait_for(what, |d| d.status() & NEEDS_RESET != 0);
        assert_eq!(driver.wait_interrupt() & VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_CONFIG);
        // It can be paused, saved and restored all the same, and stays broken.
        let (mut driver, state) = driver.hand_off(Box::new(Rng::new()));
        assert_ne!(state.status & NEEDS_RESET, 0, "{what}");
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{what}");
        driver.reset();
        assert_eq!(driver.status(), 0, "{what}");
        driver.start(0);
        driver.offer(0, &[], &[(DATA, 16)]);
        driver.kick(0);
        driver.wait_used(0);
    }
}

#[test]
fn rings_outside_ram_break_the_device() {
    let driver = rng();
    assert!(driver.negotiate(VERSION_1));
    driver.write32(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write32(VIRTIO_MMIO_QUEUE_NUM, 64);
    driver.write32(VIRTIO_MMIO_QUEUE_USED_HIGH, 0xffff);
    driver.write32(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x1_0000);
    driver.write32(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1_1000);
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
    driver.write32(VIRTIO_MMIO_STATUS, 15);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn moves_with_its_queues() {
    let mut driver = rng();
    driver.start(EVENT_IDX);
    for _ in 0..100 {
        driver.offer(0, &[], &[(DATA, 16)]);
        driver.kick(0);
        driver.wait_used(0);
        driver.irq.read().ok();
    }
    // Requests that nobody was notified of travel in RAM, and are found on the other side.
    driver.device.pause().unwrap();
    let heads = [driver.offer(0, &[], &[(DATA, 8)]), driver.offer(0, &[], &[(DATA, 8)])];
    let (mut moved, state) = driver.hand_off(Box::new(Rng::new()));
    assert_eq!(heads, [moved.wait_used(0).0, moved.wait_used(0).0]);
    assert_eq!(moved.wait_interrupt(), VIRTIO_MMIO_INT_VRING);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<TransportState>(&bytes).unwrap(), state);
}

#[test]
fn an_unacknowledged_interrupt_is_raised_again_after_a_move() {
    let mut driver = rng();
    driver.start(0);
    driver.offer(0, &[], &[(DATA, 16)]);
    driver.kick(0);
    driver.wait_used(0);
    driver.wait_for("the interrupt", |d| d.irq.read().is_ok());
    let (moved, _) = driver.hand_off(Box::new(Rng::new()));
    assert_eq!(moved.wait_interrupt(), VIRTIO_MMIO_INT_VRING);
}

/// A driver that said that it had given up, and then that it was ready, had no live queues here and
/// was given some where it went, if they could be used at all: a guest with such a device could not be moved.
#[test]
fn a_device_that_was_given_up_is_moved_without_its_queues() {
    let driver = rng();
    assert!(driver.negotiate(VERSION_1));
    driver.write32(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write32(VIRTIO_MMIO_QUEUE_USED_HIGH, 0xffff);
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 1);
    driver.write32(VIRTIO_MMIO_STATUS, FAILED);
    driver.write32(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(driver.status(), 15 | FAILED);
    let (mut moved, _) = driver.hand_off(Box::new(Rng::new()));
    assert_eq!(moved.status(), 15 | FAILED);
    moved.reset();
    moved.start(0);
    moved.offer(0, &[], &[(DATA, 16)]);
    moved.kick(0);
    moved.wait_used(0);
}

#[test]
fn saving_needs_a_pause() {
    let driver = rng();
    assert!(matches!(driver.device.save(), Err(VirtioError::NotPaused { device: "rng" })));
}

#[test]
fn a_stopped_queue_is_left_alone() {
    let mut driver = rng();
    driver.start(0);
    driver.write32(VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write32(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read32(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.offer(0, &[], &[(DATA, 16)]);
    driver.kick(0);
    driver.device.pause().unwrap();
    assert_eq!(driver.poll_used(0), None);
    assert_eq!(driver.status(), 15);
}

/// Fails at the nth call, and counts.
struct Fragile {
    calls: Arc<AtomicUsize>,
    stuck: bool,
}

impl VirtioBackend for Fragile {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "fragile"
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn process(&mut self, _: usize, _: &mut DeviceContext<'_>) -> Result<Progress, DeviceError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Err(DeviceError::Request("whatever it is"))
    }
    fn drain(&mut self, _: &mut DeviceContext<'_>) -> Result<(), DeviceError> {
        if self.stuck {
            return Err(DeviceError::Stuck { in_flight: 1, waited_s: 0 });
        }
        Ok(())
    }
    fn reset(&mut self) {}
    fn restore(&mut self, _: &[u8]) -> Result<(), String> {
        Err("I never do".into())
    }
}

fn fragile(stuck: bool) -> (Arc<AtomicUsize>, Driver) {
    let calls = Arc::new(AtomicUsize::new(0));
    (calls.clone(), Driver::new(Box::new(Fragile { calls, stuck })))
}

#[test]
fn a_broken_device_is_not_called_again() {
    let (calls, mut driver) = fragile(false);
    driver.start(0);
    driver.wait_for("the failure", |d| d.status() & NEEDS_RESET != 0);
    (0..10).for_each(|_| driver.kick(0));
    driver.device.pause().unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn a_stuck_device_is_not_paused() {
    let (_, mut driver) = fragile(true);
    driver.device.pause().unwrap();
    driver.start(0); // Paused: the driver finds nobody, but the queues are there.
    let error = driver.device.pause().unwrap_err();
    assert!(matches!(error, VirtioError::Drain { device: "fragile", .. }), "{error}");
}

#[test]
fn foreign_states_are_refused() {
    let mut driver = rng();
    driver.start(EVENT_IDX);
    driver.device.pause().unwrap();
    let good = driver.device.save().unwrap();
    let refused = |change: fn(&mut TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        let target = rng();
        target.device.pause().unwrap();
        let error = target.device.restore(&state).unwrap_err();
        assert_eq!(target.status(), 0, "as after a reset");
        match error {
            VirtioError::State { device: "rng", reason } => reason,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(refused(|s| s.device_type = 1), StateError::DeviceType { found: 1, .. }));
    assert!(matches!(refused(|s| s.driver_features |= 2), StateError::Features(2)));
    assert!(matches!(refused(|s| s.driver_features = 0), StateError::Features(0)));
    assert!(matches!(refused(|s| s.status = 4), StateError::Status(4)));
    assert!(matches!(refused(|s| s.queues.clear()), StateError::QueueCount { found: 0, .. }));
    for change in [
        (|s| s.queues[0].size = 3) as fn(&mut TransportState),
        |s| s.queues[0].size = 128,
        |s| s.queues[0].used = u64::MAX - 3,
        |s| s.queues[0].descriptors = 1 << 40,
        |s| s.queues[0].available += 1,
    ] {
        assert!(matches!(refused(change), StateError::Queue { index: 0, .. }));
    }
    assert!(matches!(refused(|s| s.backend = vec![1]), StateError::Backend(_)));
    assert!(matches!(refused(|s| s.backend = vec![1; 5000]), StateError::BackendSize(5000)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest writes to the registers, nothing panics and a reset helps.
    #[test]
    fn any_register_access(
        accesses in prop::collection::vec(
            (0u64..0x210, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>(), any::<bool>()),
            0..80,
        ),
        status in prop::collection::vec(0u32..256, 0..8),
    ) {
        let driver = rng();
        let mut status = status.into_iter();
        for (offset, width, value, write) in accesses {
            if write {
                driver.device.write(offset, &value.to_le_bytes()[..width]);
                if let Some(status) = status.next() {
                    driver.write32(VIRTIO_MMIO_STATUS, status);
                }
            } else {
                driver.device.read(offset, &mut [0; 8][..width]);
            }
        }
        driver.write32(VIRTIO_MMIO_STATUS, 0);
        prop_assert_eq!(driver.status(), 0);
    }

    /// A saved state with random numbers in it is refused or works; nothing panics.
    #[test]
    fn any_state(
        status in prop::sample::select(vec![0u32, 1, 3, 11, 15, 79, 143, 255]),
        features in prop::sample::select(vec![0, VERSION_1, VERSION_1 | EVENT_IDX, u64::MAX]),
        size in prop::sample::select(vec![0u16, 1, 2, 16, 64, 65, 32768]),
        rings in prop::array::uniform3(0u64..(70 << 20)),
        next in prop::array::uniform2(any::<u16>()),
        ready: bool,
    ) {
        let driver = rng();
        driver.device.pause().unwrap();
        let state = TransportState {
            status,
            driver_features: features,
            queues: vec![SavedQueue {
                size,
                ready,
                descriptors: rings[0] & !0xf,
                available: rings[1] & !1,
                used: rings[2] & !3,
                next_available: next[0],
                next_used: next[1],
            }],
            ..driver.device.save().unwrap()
        };
        if driver.device.restore(&state).is_ok() {
            driver.device.resume().unwrap();
            driver.kick(0);
            driver.device.pause().unwrap();
            driver.device.save().unwrap();
        }
    }
}
