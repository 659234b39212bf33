//! The driver's side of a device, for tests: a guest kernel's virtio-mmio driver in small.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    device::VirtioBackend,
    mmio::VirtioMmio,
    state::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, TransportState},
};
use crate::{devices::bus::BusDevice, memory::GuestRam, threads::ThreadHook};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// Where tests put their data; rings are below.
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const RAM_BYTES: usize = 64 << 20;

const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn ram() -> GuestRam {
    // Two regions, so that buffers may cross a border.
    let half = RAM_BYTES / 2;
    GuestRam::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

#[derive(Clone)]
struct Ring {
    index: u16,
    size: u16,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
}

impl Ring {
    fn new(index: u16, size: u16) -> Self {
        let free = (0..size).rev().collect();
        let chains = vec![Vec::new(); size.into()];
        Self { index, size, next_available: 0, next_used: 0, free, chains }
    }

    fn base(&self) -> u64 {
        RINGS + u64::from(self.index) * RING_STRIDE
    }
    fn descriptors(&self) -> u64 {
        self.base()
    }
    fn available(&self) -> u64 {
        self.base() + 0x4000
    }
    fn used(&self) -> u64 {
        self.base() + 0x8000
    }
}

/// What a driver holds; it survives the device's move, as guest RAM does.
#[derive(Clone)]
pub(crate) struct Rings(Vec<Ring>);

pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) device: Arc<VirtioMmio>,
    pub(crate) irq: EventFd,
    rings: Rings,
}

impl Driver {
    /// A device that runs, and a driver that has not touched it.
    pub(crate) fn new(backend: Box<dyn VirtioBackend>) -> Self {
        let sizes: Vec<u16> = backend.queue_sizes().to_vec();
        let rings = (0..).zip(&sizes).map(|(index, size)| Ring::new(index, *size)).collect();
        let driver = Self::attach(backend, ram(), Rings(rings));
        driver.device.resume().unwrap();
        driver
    }

    /// A paused device under RAM and rings that exist.
    pub(crate) fn attach(backend: Box<dyn VirtioBackend>, ram: GuestRam, rings: Rings) -> Self {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = irq.try_clone().unwrap();
        let device =
            Arc::new(VirtioMmio::new(backend, ram.clone(), line, &ThreadHook::default()).unwrap());
        Self { ram, device, irq, rings }
    }

    /// Pauses and saves the device and moves it to another backend over the same RAM.
    pub(crate) fn hand_off(self, to: Box<dyn VirtioBackend>) -> (Self, TransportState) {
        self.device.pause().unwrap();
        let state = self.device.save().unwrap();
        let moved = Self::attach(to, self.ram.clone(), self.rings.clone());
        drop(self);
        moved.device.restore(&state).unwrap();
        moved.device.resume().unwrap();
        (moved, state)
    }

    pub(crate) fn read32(&self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write32(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.read32(VIRTIO_MMIO_DEVICE_FEATURES);
        self.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        u64::from(low) | u64::from(self.read32(VIRTIO_MMIO_DEVICE_FEATURES)) << 32
    }

    /// Negotiates; says whether the device accepted.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write32(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read32(VIRTIO_MMIO_STATUS) & FEATURES_OK != 0
    }

    pub(crate) fn configure_queues(&self) {
        for ring in &self.rings.0 {
            self.write32(VIRTIO_MMIO_QUEUE_SEL, ring.index.into());
            assert_eq!(self.read32(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(ring.size));
            self.write32(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
            for (low, high, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, ring.descriptors()),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, ring.available()),
                (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, ring.used()),
            ] {
                self.write32(low, address as u32);
                self.write32(high, (address >> 32) as u32);
            }
            self.write32(VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(self.read32(VIRTIO_MMIO_QUEUE_READY), 1);
        }
    }

    /// Brings the device up.
    pub(crate) fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | VERSION_1));
        self.configure_queues();
        self.write32(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        // What the queues hold may break the device at once.
        assert_eq!(self.status() & !NEEDS_RESET, 15);
    }

    /// Resets the device and forgets all rings.
    pub(crate) fn reset(&mut self) {
        self.write32(VIRTIO_MMIO_STATUS, 0);
        for ring in &mut self.rings.0 {
            *ring = Ring::new(ring.index, ring.size);
            self.ram.write_slice(&[0; 0xc000], GuestAddress(ring.base())).unwrap();
        }
    }

    pub(crate) fn status(&self) -> u32 {
        self.read32(VIRTIO_MMIO_STATUS)
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let table = GuestAddress(self.rings.0[queue].descriptors());
        let address = table.unchecked_add(u64::from(index) * 16);
        self.ram.write_obj(descriptor, address).unwrap();
    }

    /// Makes a chain available without notifying.
    pub(crate) fn offer_head(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings.0[queue];
        let slot = ring.available() + 4 + u64::from(ring.next_available % ring.size) * 2;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        ring.next_available = ring.next_available.wrapping_add(1);
        let index = GuestAddress(ring.available() + 2);
        self.ram.store(ring.next_available, index, std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Says that so many more chains are available, all at once.
    pub(crate) fn claim(&mut self, queue: usize, chains: u16) {
        let ring = &mut self.rings.0[queue];
        ring.next_available = ring.next_available.wrapping_add(chains);
        let index = GuestAddress(ring.available() + 2);
        self.ram.store(ring.next_available, index, std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Offers a chain of (address, length) pieces and returns its head.
    pub(crate) fn offer(
        &mut self,
        queue: usize,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> u16 {
        let pieces: Vec<(u64, u32, u16)> = readable
            .iter()
            .map(|(a, l)| (*a, *l, 0))
            .chain(writable.iter().map(|(a, l)| (*a, *l, WRITE)))
            .collect();
        let ring = &mut self.rings.0[queue];
        let indexes: Vec<u16> = pieces.iter().map(|_| ring.free.pop().unwrap()).collect();
        let head = indexes[0];
        ring.chains[usize::from(head)] = indexes.clone();
        for (n, (address, len, flags)) in pieces.iter().enumerate() {
            let next = indexes.get(n + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let descriptor = Descriptor::new(*address, *len, flags, next.unwrap_or(0));
            self.write_descriptor(queue, indexes[n], descriptor);
        }
        self.offer_head(queue, head);
        head
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.write32(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// The next completion, if there is one: head and length.
    pub(crate) fn poll_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings.0[queue];
        let index = GuestAddress(ring.used() + 2);
        let device: u16 = self.ram.load(index, std::sync::atomic::Ordering::Acquire).unwrap();
        if device == ring.next_used {
            return None;
        }
        let slot = ring.used() + 4 + u64::from(ring.next_used % ring.size) * 8;
        let head: u32 = self.ram.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.ram.read_obj(GuestAddress(slot + 4)).unwrap();
        ring.next_used = ring.next_used.wrapping_add(1);
        let freed = std::mem::take(&mut ring.chains[head as usize]);
        ring.free.extend(freed);
        // With EVENT_IDX: an interrupt for the very next completion.
        let used_event = GuestAddress(ring.available() + 4 + u64::from(ring.size) * 2);
        self.ram.write_obj(ring.next_used, used_event).unwrap();
        Some((head as u16, len))
    }

    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let begun = Instant::now();
        loop {
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            assert!(begun.elapsed() < PATIENCE, "no completion; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits until `done`.
    pub(crate) fn wait_for(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "waiting for {what}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits for an interrupt and acknowledges its causes.
    pub(crate) fn wait_interrupt(&self) -> u32 {
        self.wait_for("an interrupt", |d| d.irq.read().is_ok());
        let causes = self.read32(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write32(VIRTIO_MMIO_INTERRUPT_ACK, causes);
        causes
    }
}
