//! Making a machine: a new one that boots, or one that goes on from a saved state.

use std::{
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};

use guest_images::CHUNK_SIZE;
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;

use super::{
    Core, MachineError, Moved, Paused, Vm, VmConfig,
    wiring::{self, Backends, Board},
};
use crate::{
    boot::{self, BootSource},
    cpuid,
    dirty::{Disk, KvmLog, Tracker},
    host::{Host, HostCheck},
    layout::{HIMEM_START, KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS},
    memory::{self, GuestRam},
    pagemap,
    profile::{HostProfile, MachineProfile},
    state::{DeviceStates, VmState},
    threads::ThreadHook,
    vcpu::{RunContext, Vcpu, VmEvent},
};

/// KVM's part of a machine: made first, the same for both ways.
struct Bare {
    host: Host,
    vm: Arc<VmFd>,
    vcpus: Vec<Vcpu>,
    log: KvmLog,
    ram: GuestRam,
    profile: MachineProfile,
}

/// What of the host a machine uses.
struct Parts {
    board: Board,
    disk: Option<Disk>,
    events: Sender<VmEvent>,
    threads: ThreadHook,
}

impl Parts {
    fn open(config: VmConfig, bare: &Bare) -> Result<Self, MachineError> {
        // The balloon's thread asks which pages are the guest's own.
        pagemap::open();
        let backends = Backends::open(&config)?;
        let VmConfig { disk, console, events, threads, .. } = config;
        let disk =
            disk.zip(backends.disk_dirty.clone()).map(|(overlay, dirty)| Disk { overlay, dirty });
        let board = Board::new(&bare.vm, &bare.ram, backends, console, &threads)?;
        Ok(Self { board, disk, events, threads })
    }
}

pub(super) fn boot(config: VmConfig) -> Result<Vm<Paused>, MachineError> {
    let host = HostCheck::run()?;
    let mac = config.net.as_ref().map(|net| net.mac);
    let profile = HostProfile::of(&host)?.new_machine(
        config.cpu,
        config.vcpus,
        config.memory_bytes,
        config.disk.is_some(),
        mac,
    )?;
    let ram = memory::map(config.base_memory.as_deref(), config.memory_bytes)?;
    if config.base_memory.is_some() {
        // What a boot loader writes it writes into zeros. Kernels clear the rest themselves.
        for index in 0..HIMEM_START / CHUNK_SIZE as u64 {
            memory::write_chunk(&ram, index, &[0; CHUNK_SIZE])?;
        }
    }
    let source = BootSource {
        kernel: &config.kernel,
        initramfs: config.initramfs.as_deref(),
        cmdline: &config.cmdline,
    };
    let slots = wiring::slots(config.disk.is_some(), config.net.is_some());
    let boot_cpu = boot::load(&ram, source, config.vcpus, &slots)?;
    let bare = Bare::new(host, ram, profile)?;
    let xcr0 = cpuid::xcr0(&bare.profile.cpuid);
    for vcpu in &bare.vcpus {
        boot::setup_vcpu(&vcpu.fd, xcr0).map_err(kvm("initial vCPU state"))?;
    }
    if let Some(first) = bare.vcpus.first() {
        boot_cpu.apply(&first.fd).map_err(kvm("initial vCPU registers"))?;
    }
    let parts = Parts::open(config, &bare)?;
    bare.complete(parts, None)
}

/// A machine that only lacks its state: all that can be refused, and all that takes time, has been
/// done while the guest still runs elsewhere.
pub(crate) struct Prepared {
    // First, so that devices go before what they are connected to.
    parts: Parts,
    bare: Bare,
}

impl Prepared {
    pub(crate) fn new(
        config: VmConfig,
        profile: MachineProfile,
        ram: GuestRam,
    ) -> Result<Self, MachineError> {
        check_config(&config, &profile)?;
        memory::check(&ram, profile.memory_bytes)?;
        let host = HostCheck::run()?;
        profile.check_compatible(&HostProfile::of(&host)?)?;
        let bare = Bare::new(host, ram, profile)?;
        Ok(Self { parts: Parts::open(config, &bare)?, bare })
    }

    /// Gives it its state. The guest stood still for so long at most, if that is known.
    pub(crate) fn restore(
        self,
        state: &[u8],
        at_most: Option<Duration>,
    ) -> Result<Vm<Paused>, MachineError> {
        let began = Instant::now();
        let Self { bare, parts } = self;
        let state = VmState::decode(state, &bare.profile)?;
        state.restore(&bare.host, &bare.vm, &bare.vcpus, at_most)?;
        let mut vm = bare.complete(parts, Some(&state.devices))?;
        vm.core.moved.restored = Some(began.elapsed());
        Ok(vm)
    }
}

/// Whether the configuration makes the machine that the profile describes.
fn check_config(config: &VmConfig, profile: &MachineProfile) -> Result<(), MachineError> {
    let mismatch = |what, profile: &dyn std::fmt::Debug, config: &dyn std::fmt::Debug| {
        let (profile, config) = (format!("{profile:?}"), format!("{config:?}"));
        Err(MachineError::Mismatch { what, profile, config })
    };
    if config.vcpus != profile.vcpus {
        return mismatch("a vCPU count", &profile.vcpus, &config.vcpus);
    }
    if config.memory_bytes != profile.memory_bytes {
        return mismatch("memory", &profile.memory_bytes, &config.memory_bytes);
    }
    if config.disk.is_some() != profile.disk {
        return mismatch("a disk", &profile.disk, &config.disk.is_some());
    }
    let mac = config.net.as_ref().map(|net| net.mac);
    if mac != profile.mac {
        return mismatch("a network address", &profile.mac, &mac);
    }
    Ok(())
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

impl Bare {
    fn new(host: Host, ram: GuestRam, profile: MachineProfile) -> Result<Self, MachineError> {
        let vm = host.kvm().create_vm().map_err(kvm("creating a VM"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP_ADDRESS).map_err(kvm("identity map"))?;
        vm.set_tss_address(KVM_TSS_ADDRESS).map_err(kvm("task state segment"))?;
        // The irqchip before vCPUs: each gets its LAPIC when it is made.
        vm.create_irq_chip().map_err(kvm("creating the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(kvm("creating the timer"))?;
        let vm = Arc::new(vm);
        let log = KvmLog::new(vm.clone(), &ram)?;
        let vcpus =
            (0..profile.vcpus).map(|id| new_vcpu(&vm, id, &profile)).collect::<Result<_, _>>()?;
        Ok(Self { host, vm, vcpus, log, ram, profile })
    }

    fn complete(
        self,
        parts: Parts,
        saved: Option<&DeviceStates>,
    ) -> Result<Vm<Paused>, MachineError> {
        let Parts { board, disk, events, threads } = parts;
        let mut context = RunContext::new(events, threads);
        let devices = board.complete(saved, &mut context)?;
        let overlay = disk.as_ref().map(|disk| disk.overlay.clone());
        let tracker = Tracker::new(self.log, self.ram.clone(), disk);
        let core = Core {
            devices,
            context,
            tracker,
            profile: self.profile,
            disk: overlay,
            vm: self.vm,
            host: self.host,
            ram: self.ram,
            moved: Moved::default(),
        };
        Ok(Vm { state: Paused { vcpus: self.vcpus }, core: Box::new(core) })
    }
}

fn new_vcpu(vm: &VmFd, id: u8, profile: &MachineProfile) -> Result<Vcpu, MachineError> {
    let fd = vm.create_vcpu(id.into()).map_err(kvm("creating a vCPU"))?;
    let table = CpuId::from_entries(&cpuid::for_vcpu(&profile.cpuid, id))
        .map_err(|_| kvm("CPUID")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    fd.set_cpuid2(&table).map_err(kvm("CPUID"))?;
    Ok(Vcpu { id, fd })
}
