//! A device, the RAM that it shares with its driver, and what the driver knows.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};
use vmm::{
    ThreadHook,
    devices::{
        bus::BusDevice,
        virtio::{TransportState, VirtioBackend, VirtioMmio},
    },
    memory::GuestRam,
};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of RAM, in two regions, so that buffers may cross a border.
pub const RAM_BYTES: u64 = 256 << 10;
/// Where there are no rings.
pub const DATA: u64 = 0x1_0000;

const PAGE_BYTES: usize = 4096;
const RING_STRIDE: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1800;
/// Entries of a queue that is set up by the rules.
const QUEUE_SIZE: u16 = 32;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// Flags of descriptors: another follows; the device writes.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const VERSION_1: u64 = 1 << 32;

/// How long a device may take for a single request by the rules.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of device, with what is on its other side.
pub trait Backend: Sized {
    /// Queues of the device.
    const QUEUES: u8;

    /// A new device's other side.
    fn new() -> Self;

    /// The device.
    fn device(&mut self) -> Box<dyn VirtioBackend>;

    /// The device goes to another host: this is there.
    fn move_on(&mut self) {}

    /// Something happens on the other side.
    fn happens(&mut self, number: u8, block: &[u8]);

    /// The device is paused, after whatever the driver did: checks its other side.
    fn check(&mut self) {}

    /// A request by the rules, over queues just set up.
    fn works(rig: &mut Rig<Self>);
}

/// The device and its driver.
pub struct Rig<B: Backend> {
    /// The other side.
    pub backend: B,
    device: VirtioMmio,
    ram: GuestRam,
    /// RAM as the driver wrote it.
    shadow: Vec<u8>,
    /// Waits after every kick, so that a run is the same each time.
    in_step: bool,
    available: Vec<u16>,
    used: Vec<u16>,
}

impl<B: Backend> Rig<B> {
    /// A device that runs, and a driver that has not touched it.
    pub fn new(in_step: bool) -> Self {
        let half = RAM_BYTES as usize / 2;
        let ranges = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
        let ram = GuestRam::from_ranges(&ranges).expect("a little RAM");
        let mut backend = B::new();
        let device = device(&mut backend, &ram);
        device.resume().expect("a new device");
        let (shadow, none) = (vec![0; RAM_BYTES as usize], vec![0; B::QUEUES.into()]);
        Self { backend, device, ram, shadow, in_step, available: none.clone(), used: none }
    }

    /// Reads a register.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    fn set(&mut self, register: u32, value: u32) {
        self.write(register.into(), &value.to_le_bytes());
    }

    fn get(&self, register: u32) -> u32 {
        let mut value = [0; 4];
        self.read(register.into(), &mut value);
        u32::from_le_bytes(value)
    }

    /// Writes RAM as a guest does: nothing is marked. What lies beyond its end is left out.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        let mut address = address.min(RAM_BYTES) as usize;
        let mut left = &bytes[..bytes.len().min(RAM_BYTES as usize - address)];
        while !left.is_empty() {
            let room = PAGE_BYTES - address % PAGE_BYTES;
            let (piece, rest) = left.split_at(room.min(left.len()));
            let host = self.ram.get_host_address(GuestAddress(address as u64)).expect("RAM");
            for (offset, byte) in piece.iter().enumerate() {
                // SAFETY: `host` and what follows it up to the end of its page is inside a mapping
                // that `ram` keeps alive, and `piece` ends there. Others may read and write it at
                // the same time: it is written as a guest's instructions would.
                unsafe { host.add(offset).write_volatile(*byte) };
            }
            self.shadow[address..address + piece.len()].copy_from_slice(piece);
            (address, left) = (address + piece.len(), rest);
        }
    }

    /// Reads RAM.
    pub fn peek(&self, address: u64, into: &mut [u8]) {
        self.ram.read_slice(into, GuestAddress(address)).expect("RAM");
    }

    /// Begins with a device: `features` of those on offer, and bits of `flags` for what is left out
    /// or wrong.
    pub fn start(&mut self, features: u64, flags: u8) {
        let mut offered = 0;
        for (select, shift) in [(0, 0), (1, 32)] {
            self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            offered |= u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES)) << shift;
        }
        let features = features & offered | VERSION_1;
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for queue in 0..B::QUEUES {
            if flags >> queue & 1 == 0 {
                self.set_queue_up(queue, flags & 0x80 != 0);
            }
        }
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn set_queue_up(&mut self, queue: u8, overlapping: bool) {
        let base = self.ring(queue);
        self.set(VIRTIO_MMIO_QUEUE_SEL, queue.into());
        self.set(VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into());
        let used = if overlapping { base + AVAILABLE } else { base + USED };
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, base),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, base + AVAILABLE),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            self.set(low, address as u32);
            self.set(high, 0);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn ring(&self, queue: u8) -> u64 {
        u64::from(queue % B::QUEUES) * RING_STRIDE
    }

    /// Writes a descriptor.
    pub fn descriptor(&mut self, queue: u8, number: u8, at: (u64, u32), link: (u16, u16)) {
        let ((address, len), (flags, next)) = (at, link);
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(self.ring(queue) + u64::from(number) * 16, &bytes);
    }

    /// Makes a chain available and notifies the device.
    pub fn offer(&mut self, queue: u8, head: u16) {
        let slot = self.available[usize::from(queue % B::QUEUES)] % QUEUE_SIZE;
        self.put(self.ring(queue) + AVAILABLE + 4 + u64::from(slot) * 2, &head.to_le_bytes());
        self.claim(queue, 1);
        self.kick(queue);
    }

    /// Says that so many more chains are available.
    pub fn claim(&mut self, queue: u8, chains: u16) {
        let ring = self.ring(queue);
        let available = &mut self.available[usize::from(queue % B::QUEUES)];
        *available = available.wrapping_add(chains);
        let bytes = available.to_le_bytes();
        self.put(ring + AVAILABLE + 2, &bytes);
    }

    /// Notifies a queue.
    pub fn kick(&mut self, queue: u8) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
        if self.in_step {
            self.wait();
        }
    }

    /// The length that the device says of the next chain that came back, if one did.
    fn take_used(&mut self, queue: u8) -> Option<u32> {
        let (number, ring) = (usize::from(queue), self.ring(queue));
        let mut index = [0; 2];
        self.peek(ring + USED + 2, &mut index);
        let slot = u64::from(self.used[number] % QUEUE_SIZE);
        if u16::from_le_bytes(index) == self.used[number] {
            return None;
        }
        self.used[number] = self.used[number].wrapping_add(1);
        let mut len = [0; 4];
        self.peek(ring + USED + 4 + slot * 8 + 4, &mut len);
        Some(u32::from_le_bytes(len))
    }

    /// Waits for a chain to come back; the length that the device says of it.
    pub fn wait_used(&mut self, queue: u8) -> u32 {
        let begun = Instant::now();
        loop {
            if let Some(len) = self.take_used(queue) {
                return len;
            }
            let status = self.get(VIRTIO_MMIO_STATUS);
            assert!(begun.elapsed() < PATIENCE, "queue {queue} is stuck, status {status:#x}");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Offers one request: buffers that the device reads, then those that it writes.
    pub fn ask(&mut self, queue: u8, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        let pieces =
            readable.iter().map(|at| (*at, 0)).chain(writable.iter().map(|at| (*at, WRITE)));
        let last = (readable.len() + writable.len()) as u8 - 1;
        for (number, (at, flags)) in (0..).zip(pieces) {
            let link =
                if number < last { (flags | NEXT, u16::from(number) + 1) } else { (flags, 0) };
            self.descriptor(queue, number, at, link);
        }
        self.offer(queue, 0);
    }

    /// Lets the device look at everything, and end what it has begun.
    pub fn wait(&mut self) {
        for _ in 0..2 {
            self.device.pause().expect("a device can be paused");
            self.device.resume().expect("and goes on");
        }
    }

    /// Resets the device and forgets the rings.
    pub fn reset(&mut self) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.get(VIRTIO_MMIO_STATUS), 0, "a reset is a reset");
        for queue in 0..B::QUEUES {
            self.put(self.ring(queue), &[0; RING_STRIDE as usize]);
        }
        self.available.fill(0);
        self.used.fill(0);
    }

    /// To a device on another host, which has the same RAM.
    pub fn hand_off(&mut self) {
        self.device.pause().expect("a device can be paused");
        let state = self.device.save().expect("a paused device can be saved");
        self.backend.check();
        let blob = postcard::to_allocvec(&state).expect("a state can be written");
        let state: TransportState = postcard::from_bytes(&blob).expect("and read");
        self.backend.move_on();
        let old = std::mem::replace(&mut self.device, device(&mut self.backend, &self.ram));
        drop(old);
        self.device.restore(&state).expect("what was saved can be restored");
        self.device.resume().expect("a restored device goes on");
    }

    /// Restores a state that nobody saved.
    pub fn restore(&mut self, blob: &[u8]) {
        let Ok(state) = postcard::from_bytes::<TransportState>(blob) else { return };
        self.device.pause().expect("a device can be paused");
        let _ = self.device.restore(&state);
        self.device.resume().expect("a device goes on whatever it was given");
    }

    /// Something happens on the other side.
    pub fn host(&mut self, number: u8, block: &[u8]) {
        self.backend.happens(number, block);
        if self.in_step {
            self.wait();
        }
    }

    /// Checks all that must hold; says whether the device was in use until then.
    pub fn finish(mut self) -> bool {
        let in_use = self.get(VIRTIO_MMIO_STATUS) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.hand_off();
        self.device.pause().expect("a device can be paused");
        self.backend.check();
        self.check_dirty();
        self.device.resume().expect("and goes on");
        self.reset();
        B::works(&mut self);
        in_use
    }

    /// Every page that is not as the driver wrote it is marked.
    fn check_dirty(&self) {
        let mut page = [0; PAGE_BYTES];
        for address in (0..RAM_BYTES).step_by(PAGE_BYTES) {
            self.peek(address, &mut page);
            let written = &self.shadow[address as usize..][..PAGE_BYTES];
            if page == written {
                continue;
            }
            let region = self.ram.find_region(GuestAddress(address)).expect("RAM");
            let offset = address - region.start_addr().0;
            assert!(region.bitmap().dirty_at(offset as usize), "page {address:#x} is not marked");
        }
    }
}

fn device(backend: &mut impl Backend, ram: &GuestRam) -> VirtioMmio {
    let irq = EventFd::new(libc::EFD_NONBLOCK).expect("an event descriptor");
    VirtioMmio::new(backend.device(), ram.clone(), irq, &ThreadHook::default()).expect("a device")
}
