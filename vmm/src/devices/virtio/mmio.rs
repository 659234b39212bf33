//! The virtio-mmio register file, version 2 (virtio 1.2, section 4.2).
//!
//! Registers hold what the driver configures. When the driver sets DRIVER_OK the queues move to the
//! worker, which owns them until the driver resets the device.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_mmio::{
        VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
        VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
        VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
        VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
        VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::eventfd::EventFd;

use super::{
    device::VirtioBackend,
    interrupt::{ConfigSpace, Interrupt, Shared},
    state::{
        DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, SavedQueue, StateError,
        TransportState, VirtioError, status_is_reachable,
    },
    worker::{Worker, WorkerHandle},
};
use crate::{
    devices::{bus::BusDevice, complaints::Complaints},
    memory::GuestRam,
    threads::ThreadHook,
};

/// Offset of the register that notifies a queue: KVM can be told to turn writes of a queue's index
/// to it into writes to that queue's event descriptor.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"hwdh");

/// What every device offers besides its own features.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the driver writes.
#[derive(Debug)]
struct Registers {
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<SavedQueue>,
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: queue_sizes.iter().map(|size| SavedQueue::new(*size)).collect(),
        }
    }

    fn selected(&mut self) -> Option<&mut SavedQueue> {
        self.queues.get_mut(self.queue_sel as usize)
    }
}

/// A virtio device on the MMIO bus.
///
/// It begins paused: [`VirtioMmio::resume`] lets it work. vCPUs must be stopped before
/// [`VirtioMmio::pause`] and run only after [`VirtioMmio::resume`].
pub struct VirtioMmio {
    device_type: u32,
    name: &'static str,
    offered: u64,
    queue_sizes: Vec<u16>,
    ram: GuestRam,
    shared: Arc<Shared>,
    registers: Mutex<Registers>,
    notify: Vec<EventFd>,
    worker: WorkerHandle,
    paused: AtomicBool,
}

impl VirtioMmio {
    /// A device with its worker started, confined by `threads`. `irq` is its interrupt line,
    /// edge-triggered.
    pub fn new(
        backend: Box<dyn VirtioBackend>,
        ram: GuestRam,
        irq: EventFd,
        threads: &ThreadHook,
    ) -> Result<Self, VirtioError> {
        let (device_type, name) = (backend.device_type(), backend.name());
        let queue_sizes = backend.queue_sizes().to_vec();
        if let Some(&size) = queue_sizes.iter().find(|s| !s.is_power_of_two() || **s > 1 << 15) {
            return Err(VirtioError::QueueSize { device: name, size });
        }
        let offered = backend.features() | TRANSPORT_FEATURES;
        let shared = Arc::new(Shared {
            interrupt: Interrupt::new(irq),
            config: ConfigSpace::new(backend.config()),
            needs_reset: AtomicBool::new(false),
            breakdowns: Complaints::default(),
        });
        let setup = |what| move |source| VirtioError::Setup { device: name, what, source };
        let notify = queue_sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<Vec<_>, _>>()
            .map_err(setup("making event descriptors"))?;
        let worker = Worker::start(backend, ram.clone(), shared.clone(), &notify, threads)?;
        let registers = Mutex::new(Registers::new(&queue_sizes));
        let paused = AtomicBool::new(true);
        Ok(Self {
            device_type,
            name,
            offered,
            queue_sizes,
            ram,
            shared,
            registers,
            notify,
            worker,
            paused,
        })
    }

    /// The virtio device id.
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Event descriptors that notify the queues, by index: for KVM's ioeventfd at
    /// [`QUEUE_NOTIFY_OFFSET`]. Without it, writes to the register do the same, slower.
    pub fn notify_fds(&self) -> &[EventFd] {
        &self.notify
    }

    /// Completes everything in flight and stops. On failure the device goes on.
    pub fn pause(&self) -> Result<(), VirtioError> {
        self.worker.pause()?;
        self.paused.store(true, Ordering::Release);
        Ok(())
    }

    /// Goes on. Looks at every queue once, as notifications may have been lost with the machine that
    /// was saved, and repeats an interrupt that the driver has not acknowledged.
    pub fn resume(&self) -> Result<(), VirtioError> {
        self.worker.resume()?;
        self.paused.store(false, Ordering::Release);
        self.shared.interrupt.repeat_unacknowledged();
        Ok(())
    }

    /// The paused device's state.
    pub fn save(&self) -> Result<TransportState, VirtioError> {
        self.require_paused()?;
        let registers = self.lock();
        let saved = self.worker.save()?;
        Ok(TransportState {
            device_type: self.device_type,
            status: self.status(&registers),
            driver_features: registers.driver_features,
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            queue_sel: registers.queue_sel,
            interrupt_status: self.shared.interrupt.status(),
            config_generation: self.shared.config.generation(),
            queues: saved.queues.unwrap_or_else(|| registers.queues.clone()),
            backend: saved.backend,
        })
    }

    /// Takes on a saved state. Guest RAM must be in place. On failure the device is as after a reset.
    pub fn restore(&self, state: &TransportState) -> Result<(), VirtioError> {
        self.require_paused()?;
        let mut registers = self.lock();
        self.reset(&mut registers);
        let refuse = |reason| VirtioError::State { device: self.name, reason };
        state.check(self.device_type, self.offered, &self.queue_sizes).map_err(refuse)?;
        self.worker
            .restore(state.backend.clone())?
            .map_err(|reason| refuse(StateError::Backend(reason)))?;
        *registers = Registers {
            status: state.status & !NEEDS_RESET,
            driver_features: state.driver_features,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            queue_sel: state.queue_sel,
            queues: state.queues.clone(),
        };
        let broken = state.status & NEEDS_RESET != 0;
        self.shared.needs_reset.store(broken, Ordering::Release);
        // Before the backend is activated: it may add a cause and a generation of its own.
        self.shared.interrupt.set_status(state.interrupt_status & 3);
        self.shared.config.set_generation(state.config_generation);
        // A device that waits for its reset has no use for its queues, and they may be beyond use.
        // Nor has one that its driver gave up: its queues may never have been of any use.
        if state.status & (DRIVER_OK | FAILED) == DRIVER_OK && !broken {
            self.activate(&registers).inspect_err(|_| self.reset(&mut registers))?;
        }
        Ok(())
    }

    fn require_paused(&self) -> Result<(), VirtioError> {
        if self.paused.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(VirtioError::NotPaused { device: self.name })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // Registers are plain data, valid after every single store.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, registers: &Registers) -> u32 {
        let broken = self.shared.needs_reset.load(Ordering::Acquire);
        registers.status | if broken { NEEDS_RESET } else { 0 }
    }

    /// Hands the queues to the worker.
    fn activate(&self, registers: &Registers) -> Result<(), VirtioError> {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (index, (saved, max_size)) in registers.queues.iter().zip(&self.queue_sizes).enumerate()
        {
            let queue = saved.build(*max_size, event_idx, &self.ram).map_err(|reason| {
                let reason = StateError::Queue { index, reason };
                VirtioError::State { device: self.name, reason }
            })?;
            queues.push(queue);
        }
        self.worker.activate(queues, registers.driver_features)
    }

    fn reset(&self, registers: &mut Registers) {
        *registers = Registers::new(&self.queue_sizes);
        match self.worker.reset() {
            Ok(()) => {
                self.shared.needs_reset.store(false, Ordering::Release);
                self.shared.interrupt.set_status(0);
            }
            // The worker may still write guest memory: the driver must not go on.
            Err(error) => self.break_device(&error),
        }
    }

    fn break_device(&self, error: &VirtioError) {
        self.shared.tell_breakdown(self.name, error);
        self.shared.needs_reset.store(true, Ordering::Release);
        self.shared.interrupt.config();
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        // The driver writes back what it read; NEEDS_RESET is the device's.
        let new = (value & !NEEDS_RESET) | registers.status;
        let added = new & !registers.status;
        if added & FEATURES_OK != 0 && !self.features_acceptable(registers.driver_features) {
            return;
        }
        if !status_is_reachable(new) {
            tracing::debug!(device = self.name, value, "driver skips a status step");
            return;
        }
        registers.status = new;
        if added & DRIVER_OK != 0
            && new & FAILED == 0
            && let Err(error) = self.activate(registers)
        {
            self.break_device(&error);
        }
    }

    fn features_acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn write_queue(&self, registers: &mut Registers, register: u32, value: u32) {
        // Queues are configured between FEATURES_OK and DRIVER_OK.
        let configurable = registers.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        let index = registers.queue_sel as usize;
        let max_size = self.queue_sizes.get(index).copied().unwrap_or(0);
        let live = registers.status & DRIVER_OK != 0;
        let Some(queue) = registers.selected() else { return };
        let low = |address: &mut u64| *address = (*address & !0xffff_ffff) | u64::from(value);
        let high = |address: &mut u64| *address = (*address & 0xffff_ffff) | u64::from(value) << 32;
        match register {
            VIRTIO_MMIO_QUEUE_READY if live && value == 0 && queue.ready => {
                queue.ready = false;
                if let Err(error) = self.worker.stop_queue(index) {
                    self.break_device(&error);
                }
            }
            _ if !configurable => {
                tracing::debug!(device = self.name, register, "queue written out of turn");
            }
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            // A ready queue may not be changed.
            _ if queue.ready => {}
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).unwrap_or(0);
                if size.is_power_of_two() && size <= max_size {
                    queue.size = size;
                }
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut queue.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut queue.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut queue.available),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut queue.available),
            VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut queue.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut queue.used),
            _ => {}
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        let mut registers = self.lock();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let size = self.queue_sizes.get(registers.queue_sel as usize);
                size.copied().unwrap_or(0).into()
            }
            VIRTIO_MMIO_QUEUE_READY => registers.selected().is_some_and(|q| q.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(&registers),
            VIRTIO_MMIO_CONFIG_GENERATION => self.shared.config.generation(),
            // There are no shared memory regions: length and base read as ones.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify_queue(value),
            VIRTIO_MMIO_INTERRUPT_ACK => return self.shared.interrupt.acknowledge(value),
            _ => {}
        }
        let registers = &mut *self.lock();
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_STATUS => self.write_status(registers, value),
            VIRTIO_MMIO_DRIVER_FEATURES => {
                let negotiating = registers.status & (DRIVER | FEATURES_OK) == DRIVER;
                if negotiating && registers.driver_features_sel < 2 {
                    let shift = 32 * registers.driver_features_sel;
                    registers.driver_features &= !(0xffff_ffff << shift);
                    registers.driver_features |= u64::from(value) << shift;
                }
            }
            _ => self.write_queue(registers, register, value),
        }
    }

    fn notify_queue(&self, index: u32) {
        let Some(fd) = self.notify.get(index as usize) else { return };
        if let Err(error) = fd.write(1) {
            // Only a full counter fails: then the worker has been notified already.
            tracing::debug!(%error, device = self.name, "queue notification");
        }
    }
}

/// The 32 bits of `features` that `select` names.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if offset >= config {
            return self.shared.config.read(offset - config, data);
        }
        // Registers are 32 bits wide and read only as such; others are the driver's mistake.
        match <&mut [u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset as u32).to_le_bytes()
            }
            Ok(word) => *word = [0; 4],
            Err(_) => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            // No device here has configuration that the driver may write.
            return;
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset as u32, u32::from_le_bytes(word));
        }
    }
}

#[cfg(test)]
mod tests;
