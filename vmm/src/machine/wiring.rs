//! Which device hangs where, and how its interrupts and notifications reach KVM.

use std::{
    io::{self, Write},
    sync::Arc,
};

use guest_images::CHUNK_SIZE;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, VmConfig};
use crate::{
    devices::{
        bus::{Bus, BusDevice},
        legacy::{AcpiPower, I8042, PowerEvent, PowerSink},
        serial::Serial,
        virtio::{
            VirtioBackend, VirtioError, VirtioMmio,
            balloon::{Balloon, BalloonHandle},
            block::{Block, DiskDirty},
            mmio::QUEUE_NOTIFY_OFFSET,
            net::{Announcer, Net},
            rng::Rng,
        },
    },
    layout::{
        ACPI_PORTS, ACPI_SLEEP_CONTROL_PORT, COM1_GSI, COM1_PORT, COM1_PORTS, I8042_PORT,
        I8042_PORTS, VIRTIO_MMIO_SIZE, virtio_gsi, virtio_mmio_address,
    },
    memory::GuestRam,
    state::{DeviceStates, SlotState},
    threads::ThreadHook,
    vcpu::{RunContext, VmEvent},
};

/// Slots of the devices: fixed, so that a machine means the same everywhere.
const DISK_SLOT: usize = 0;
const NET_SLOT: usize = 1;
const RNG_SLOT: usize = 2;
const BALLOON_SLOT: usize = 3;

/// The slots that a machine with these devices uses.
pub(super) fn slots(disk: bool, net: bool) -> Vec<usize> {
    [(disk, DISK_SLOT), (net, NET_SLOT), (true, RNG_SLOT), (true, BALLOON_SLOT)]
        .into_iter()
        .filter(|(present, _)| *present)
        .map(|(_, slot)| slot)
        .collect()
}

/// Backends of a machine, before they are devices.
pub(super) struct Backends {
    slots: Vec<(usize, Box<dyn VirtioBackend>)>,
    pub(super) disk_dirty: Option<Arc<DiskDirty>>,
    announcer: Option<Announcer>,
    balloon: BalloonHandle,
}

impl Backends {
    /// Opens what the devices need of the host.
    pub(super) fn open(config: &VmConfig) -> Result<Self, MachineError> {
        let balloon = Balloon::new(config.memory_bytes / CHUNK_SIZE as u64)
            .map_err(|source| MachineError::Resource { what: "an event descriptor", source })?;
        balloon.handle().set_discard(!config.keep_free_pages);
        let mut backends = Self {
            slots: Vec::new(),
            disk_dirty: None,
            announcer: None,
            balloon: balloon.handle(),
        };
        if let Some(overlay) = &config.disk {
            let block = Block::new(overlay.clone(), "howdah").map_err(MachineError::Disk)?;
            let block = block.limited(config.rates.disk).map_err(no_timer)?;
            backends.disk_dirty = Some(block.dirty());
            backends.slots.push((DISK_SLOT, Box::new(block)));
        }
        if let Some(net) = &config.net {
            let device = Net::new(net.tap.clone(), net.mac, &net.addresses)
                .and_then(|device| device.limited(config.rates.net))
                .map_err(no_timer)?;
            backends.announcer = Some(device.announcer());
            backends.slots.push((NET_SLOT, Box::new(device)));
        }
        backends.slots.push((RNG_SLOT, Box::new(Rng::new())));
        backends.slots.push((BALLOON_SLOT, Box::new(balloon)));
        Ok(backends)
    }
}

fn no_timer(source: io::Error) -> MachineError {
    MachineError::Resource { what: "a timer", source }
}

/// A virtio device in its slot.
struct Slot {
    number: usize,
    device: Arc<VirtioMmio>,
}

/// All devices of a machine.
pub(super) struct Devices {
    serial: Arc<Serial>,
    slots: Vec<Slot>,
    announcer: Option<Announcer>,
    balloon: BalloonHandle,
}

/// Devices connected to KVM, without their state. Making them takes KVM and the host a while; what is
/// left to do does not.
pub(super) struct Board {
    slots: Vec<Slot>,
    announcer: Option<Announcer>,
    balloon: BalloonHandle,
    mmio: Bus,
    serial_line: EventFd,
    console: Box<dyn Write + Send>,
}

/// An interrupt line: what is written to it becomes an edge on `gsi`.
fn line(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| MachineError::Resource { what: "an event descriptor", source })?;
    vm.register_irqfd(&line, gsi)
        .map_err(|source| MachineError::Kvm { what: "registering an interrupt", source })?;
    Ok(line)
}

impl Slot {
    fn new(
        vm: &VmFd,
        number: usize,
        backend: Box<dyn VirtioBackend>,
        ram: &GuestRam,
        mmio: &mut Bus,
        threads: &ThreadHook,
    ) -> Result<Self, MachineError> {
        let line = line(vm, virtio_gsi(number))?;
        let device = Arc::new(VirtioMmio::new(backend, ram.clone(), line, threads)?);
        let address = virtio_mmio_address(number);
        let notify = IoEventAddress::Mmio(address + QUEUE_NOTIFY_OFFSET);
        for (fd, queue) in device.notify_fds().iter().zip(0u32..) {
            vm.register_ioevent(fd, &notify, queue).map_err(|source| MachineError::Kvm {
                what: "registering a queue notification",
                source,
            })?;
        }
        mmio.insert(address, VIRTIO_MMIO_SIZE, device.clone())?;
        Ok(Self { number, device })
    }
}

/// Who hears of the guest's wish to turn off or start over.
fn power_sink(context: &RunContext) -> PowerSink {
    let halt = context.halt.clone();
    Arc::new(move |event| {
        halt.now(match event {
            PowerEvent::PowerOff => VmEvent::Shutdown,
            PowerEvent::Reset => VmEvent::Reset,
        });
    })
}

impl Board {
    /// Makes devices and connects them to KVM. They begin paused.
    pub(super) fn new(
        vm: &VmFd,
        ram: &GuestRam,
        backends: Backends,
        console: Box<dyn Write + Send>,
        threads: &ThreadHook,
    ) -> Result<Self, MachineError> {
        let Backends { slots, announcer, balloon, .. } = backends;
        let serial_line = line(vm, COM1_GSI)?;
        let mut mmio = Bus::new();
        let slots = slots
            .into_iter()
            .map(|(number, backend)| Slot::new(vm, number, backend, ram, &mut mmio, threads))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { slots, announcer, balloon, mmio, serial_line, console })
    }

    /// Puts the devices on the buses of `context`. With a saved state they go on from there;
    /// interrupt controllers must have been restored by then.
    pub(super) fn complete(
        self,
        saved: Option<&DeviceStates>,
        context: &mut RunContext,
    ) -> Result<Devices, MachineError> {
        let Self { slots, announcer, balloon, mmio, serial_line, console } = self;
        let serial = Arc::new(match saved {
            None => Serial::new(serial_line, console),
            Some(saved) => Serial::from_state(&saved.serial, serial_line, console)?,
        });
        let power = power_sink(context);
        let mut ports = Bus::new();
        let mut put = |at: u16, count: u16, device: Arc<dyn BusDevice>| {
            ports.insert(at.into(), count.into(), device)
        };
        put(COM1_PORT, COM1_PORTS, serial.clone())?;
        put(I8042_PORT, I8042_PORTS, Arc::new(I8042::new(power.clone())))?;
        put(ACPI_SLEEP_CONTROL_PORT, ACPI_PORTS, Arc::new(AcpiPower::new(power)))?;
        (context.ports, context.mmio) = (Arc::new(ports), Arc::new(mmio));
        let devices = Devices { serial, slots, announcer, balloon };
        if let Some(saved) = saved {
            devices.restore(&saved.virtio)?;
        }
        Ok(devices)
    }
}

impl Devices {
    fn restore(&self, saved: &[SlotState]) -> Result<(), MachineError> {
        let ours: Vec<usize> = self.slots.iter().map(|slot| slot.number).collect();
        let theirs: Vec<usize> = saved.iter().map(|slot| slot.slot.into()).collect();
        if ours != theirs {
            return Err(MachineError::Slots { ours, theirs });
        }
        for (slot, saved) in self.slots.iter().zip(saved) {
            slot.device.restore(&saved.state)?;
        }
        Ok(())
    }

    /// Lets devices work. On failure none does.
    pub(super) fn resume(&self) -> Result<(), VirtioError> {
        for (at, slot) in self.slots.iter().enumerate() {
            if let Err(error) = slot.device.resume() {
                undo(self.slots.iter().take(at), VirtioMmio::pause);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Completes everything in flight and stops devices. On failure all go on.
    pub(super) fn pause(&self) -> Result<(), VirtioError> {
        for (at, slot) in self.slots.iter().enumerate() {
            if let Err(error) = slot.device.pause() {
                undo(self.slots.iter().take(at), VirtioMmio::resume);
                return Err(error);
            }
        }
        Ok(())
    }

    /// States of paused devices.
    pub(super) fn save(&self) -> Result<DeviceStates, VirtioError> {
        let virtio = self
            .slots
            .iter()
            .map(|slot| Ok(SlotState { slot: slot.number as u8, state: slot.device.save()? }))
            .collect::<Result<_, VirtioError>>()?;
        Ok(DeviceStates { serial: self.serial.state(), virtio })
    }

    /// Tells the network where the guest is now.
    pub(super) fn announce(&self) -> io::Result<()> {
        self.announcer.as_ref().map_or(Ok(()), Announcer::announce)
    }

    pub(super) fn balloon(&self) -> &BalloonHandle {
        &self.balloon
    }

    pub(super) fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }
}

/// Brings devices back to where they were; one that will not go is beyond help and says so.
fn undo<'a>(
    slots: impl Iterator<Item = &'a Slot>,
    step: impl Fn(&VirtioMmio) -> Result<(), VirtioError>,
) {
    for slot in slots {
        if let Err(error) = step(&slot.device) {
            tracing::error!(%error, slot = slot.number, "device is lost");
        }
    }
}
