//! The machine, as type-states.
//!
//! ```text
//!   boot ────┐            resume
//!            ├─> Paused ──────────> Running
//!   restore ─┘      ^                  │
//!                   └──────────────────┘
//!                          pause
//! ```
//!
//! A [`Vm<Paused>`] has no thread that could change it, so only it can be saved. A failed transition
//! gives the machine back in the state it was in.

mod build;
mod contents;
mod snapshot;
#[cfg(test)]
mod tests;
mod wiring;

use std::{
    fs::File,
    io::{self, Write},
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};

use ::handoff::{ChunkId, ChunkSet, Geometry, Space, audit::Audit, vm::LEAST_RUN_SHARE};
use guest_images::{
    CHUNK_SIZE, Chunk,
    overlay::{Overlay, OverlayError},
};
use kvm_ioctls::VmFd;

use crate::{
    boot::BootError,
    devices::{
        bus::BusError,
        serial::{Serial, SerialError},
        virtio::{
            VirtioError,
            balloon::{BalloonHandle, FreeHints},
            block::RingError,
            net::Tap,
            rate::Rate,
        },
    },
    dirty::{DirtyError, Disk, KvmLog, Tracker},
    host::{Host, HostError},
    memory::{self, GuestRam, MemoryError},
    profile::{Incompatible, MachineProfile, ProfileError},
    state::{StateError, VmState},
    template::CpuTemplate,
    threads::ThreadHook,
    throttle::Throttle,
    vcpu::{Gate, RunContext, Vcpu, VcpuThread, VmEvent},
};
pub(crate) use build::Prepared;
pub use snapshot::MachineSnapshot;
use wiring::Devices;

/// The network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// An open TAP device of the host.
    pub tap: Tap,
    /// The guest's address.
    pub mac: [u8; 6],
    /// Its IPv4 addresses, as far as they are known here: announced where the guest goes on.
    pub addresses: Vec<Ipv4Addr>,
}

/// What of a machine's devices may pass in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// The disk, reads and writes together.
    pub disk: Rate,
    /// The network, in each direction.
    pub net: Rate,
}

/// What a machine is made of, and what of the host it uses.
pub struct VmConfig {
    /// Bytes of RAM: a multiple of 4096.
    pub memory_bytes: u64,
    /// How many vCPUs.
    pub vcpus: u8,
    /// Which CPU they are. Counts only when the machine boots: then it is fixed.
    pub cpu: CpuTemplate,
    /// bzImage or ELF kernel. Read only when the machine boots.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// The memory of the guest's base: RAM begins as a private map of it. `None`: as zeros.
    pub base_memory: Option<Arc<File>>,
    /// The disk.
    pub disk: Option<Arc<Overlay>>,
    /// The network device.
    pub net: Option<NetConfig>,
    /// What the disk and the network may pass on.
    pub rates: Rates,
    /// Reports of free pages are acknowledged, and their memory is kept: to measure what giving it
    /// back is worth.
    pub keep_free_pages: bool,
    /// Where the serial console's output goes. Written to on vCPU threads: should not block.
    pub console: Box<dyn Write + Send>,
    /// Who is told when the guest ends.
    pub events: Sender<VmEvent>,
    /// Confines the machine's threads.
    pub threads: ThreadHook,
}

impl std::fmt::Debug for VmConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmConfig")
            .field("memory_bytes", &self.memory_bytes)
            .field("vcpus", &self.vcpus)
            .field("cpu", &self.cpu)
            .field("kernel", &self.kernel)
            .field("initramfs", &self.initramfs)
            .field("cmdline", &self.cmdline)
            .field("base_memory", &self.base_memory.is_some())
            .field("disk", &self.disk.is_some())
            .field("net", &self.net)
            .field("rates", &self.rates)
            .field("keep_free_pages", &self.keep_free_pages)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host cannot run machines.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The host has no more of something.
    #[error("the host gives no {what}: {source}")]
    Resource {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// KVM refused.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// The guest cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The profile cannot be.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The host cannot carry the machine.
    #[error("this host cannot run the machine: {0}")]
    Incompatible(#[from] Incompatible),
    /// Configuration and profile disagree.
    #[error("the machine has {what} of {profile}, the configuration says {config}")]
    Mismatch {
        /// What.
        what: &'static str,
        /// In the profile.
        profile: String,
        /// In the configuration.
        config: String,
    },
    /// Saving or restoring.
    #[error(transparent)]
    State(#[from] StateError),
    /// Dirty tracking.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// The disk device cannot be made.
    #[error("cannot set up the disk: {0}")]
    Disk(#[source] RingError),
    /// The network cannot be told where the guest is.
    #[error("cannot announce the guest on its TAP device: {0}")]
    Announce(#[source] io::Error),
    /// The disk cannot be read or written.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The console.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// Two devices in one place: a mistake in the layout.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The state has devices in other slots.
    #[error("the state has devices in slots {theirs:?}, this machine in {ours:?}")]
    Slots {
        /// Of this machine.
        ours: Vec<usize>,
        /// In the state.
        theirs: Vec<usize>,
    },
    /// A machine is to go on from a base, and the base's memory is not given.
    #[error("the base has a machine to go on from and no memory: import it again")]
    NoBaseMemory,
    /// A memory file cannot be written.
    #[error("cannot write the guest's memory to a file: {0}")]
    WriteMemory(#[source] io::Error),
    /// There is no disk.
    #[error("disk chunk {0} of a machine without a disk")]
    NoDisk(u64),
    /// The guest has ended.
    #[error("the guest has turned itself off or crashed: there is nothing left to move")]
    Halted,
}

/// A transition that failed, with the machine as it was before.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct TransitionError<S: std::fmt::Debug> {
    /// The machine.
    pub vm: Box<Vm<S>>,
    /// What went wrong.
    #[source]
    pub error: MachineError,
}

/// No thread of the machine runs.
#[derive(Debug)]
pub struct Paused {
    vcpus: Vec<Vcpu>,
}

/// Every vCPU has its thread, every device its worker.
#[derive(Debug)]
pub struct Running {
    threads: Vec<VcpuThread>,
    /// While the guest is slowed down. Signals the threads, so it goes before they are joined.
    throttle: Option<Throttle>,
}

impl Running {
    fn stop(&mut self) -> Vec<Vcpu> {
        self.throttle = None;
        self.threads.iter().for_each(VcpuThread::request_stop);
        std::mem::take(&mut self.threads).into_iter().map(VcpuThread::join).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a machine has in either state. Fields are dropped in order: devices before the memory they
/// write to.
struct Core {
    devices: Devices,
    context: RunContext,
    tracker: Tracker<KvmLog, Disk>,
    profile: MachineProfile,
    disk: Option<Arc<Overlay>>,
    vm: Arc<VmFd>,
    host: Host,
    ram: GuestRam,
    moved: Moved,
}

/// How long it took here to take a state on, and to run: none before it did.
#[derive(Clone, Copy, Debug, Default)]
struct Moved {
    restored: Option<Duration>,
    resumed: Option<Duration>,
}

/// A virtual machine.
pub struct Vm<S> {
    // First, so that vCPUs stop before anything they use goes.
    state: S,
    core: Box<Core>,
}

impl<S: std::fmt::Debug> std::fmt::Debug for Vm<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Vm<Paused> {
    /// Makes a machine and loads its kernel. It has not run yet.
    pub fn boot(config: VmConfig) -> Result<Self, MachineError> {
        build::boot(config)
    }

    /// Makes a machine that goes on from `state`. `ram` and the disk must hold all that they held
    /// when it was saved; the profile is the one that was announced.
    pub fn restore(
        config: VmConfig,
        profile: MachineProfile,
        ram: GuestRam,
        state: &[u8],
    ) -> Result<Self, MachineError> {
        Prepared::new(config, profile, ram)?.restore(state, None)
    }

    /// Makes a machine that goes on from its base: `machine` is what [`Vm::machine`] gave when the
    /// base was made, `config.base_memory` what [`Vm::write_memory`] wrote, and the disk is that of
    /// the base. Time has passed for the guest as it does in a handoff: its clocks say what they
    /// would say had it run all the while.
    pub fn from_base(config: VmConfig, machine: &[u8]) -> Result<Self, MachineError> {
        let MachineSnapshot { profile, state } = MachineSnapshot::decode(machine)?;
        let Some(base) = &config.base_memory else { return Err(MachineError::NoBaseMemory) };
        let ram = memory::map_base(base, profile.memory_bytes)?;
        Self::restore(config, profile, ram, &state)
    }

    /// The machine but for RAM and disk, with all that [`Vm::from_base`] needs to make it again.
    pub fn machine(&mut self) -> Result<Vec<u8>, MachineError> {
        let state = self.save()?;
        Ok(MachineSnapshot { profile: self.core.profile.clone(), state }.encode()?)
    }

    /// Writes RAM into a new, empty file, as a base holds it: chunk by chunk, without the hole below
    /// 4 GiB, and with holes where RAM is zero. Returns how many chunks are not zero.
    pub fn write_memory(&self, file: &File) -> Result<u64, MachineError> {
        snapshot::write_memory(&self.core.ram, file)
    }

    /// Lets the guest run.
    pub fn resume(self) -> Result<Vm<Running>, TransitionError<Paused>> {
        let began = Instant::now();
        let Self { state: Paused { vcpus }, mut core } = self;
        for vcpu in &vcpus {
            // Tells the guest's watchdog that time was lost. EINVAL: the guest has no kvmclock (yet).
            if let Err(error) = vcpu.fd.kvmclock_ctrl()
                && error.errno() != libc::EINVAL
            {
                tracing::warn!(%error, vcpu = vcpu.id, "cannot announce the pause to the guest");
            }
        }
        // Threads first, at their gate: what may fail has then succeeded before a device or a vCPU
        // does anything that another machine could see.
        let starting = match Starting::new(vcpus, &core.context) {
            Ok(starting) => starting,
            Err((vcpus, source)) => {
                let error = MachineError::Resource { what: "thread for a vCPU", source };
                return Err(failed(core, Paused { vcpus }, error));
            }
        };
        if let Err(error) = core.devices.resume() {
            return Err(failed(core, Paused { vcpus: starting.call_off() }, error.into()));
        }
        let state = starting.go();
        core.moved.resumed = Some(began.elapsed());
        Ok(Vm { state, core })
    }

    /// The machine's state but for RAM and disk. Devices may have written to RAM while they drained:
    /// harvest once more afterwards.
    pub fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        if self.is_halted() {
            return Err(MachineError::Halted);
        }
        let core = &self.core;
        let devices = core.devices.save()?;
        let profile = core.profile.clone();
        let state = VmState::save(&core.host, &core.vm, &self.state.vcpus, profile, devices)?;
        Ok(state.encode()?)
    }

    /// Gives back to the host what the guest called free ([`Vm::take_free_hints`]) and has not
    /// written since: harvest afterwards.
    pub fn discard_free(&mut self) -> Result<(), MachineError> {
        Ok(self.core.tracker.discard_free()?)
    }

    /// BLAKE3 over all RAM, then all of the disk: for audits.
    pub fn full_hash(&self) -> Result<[u8; 32], MachineError> {
        full_hash(&self.core.ram, self.core.disk.as_deref())
    }
}

impl Vm<Running> {
    /// Stops vCPUs, then drains devices. When it returns nothing of the guest can change.
    pub fn pause(mut self) -> Result<Vm<Paused>, TransitionError<Running>> {
        let vcpus = self.state.stop();
        let core = self.core;
        let Err(error) = core.devices.pause() else {
            return Ok(Vm { state: Paused { vcpus }, core });
        };
        // The guest goes on, as if it had never been asked.
        let running = match Starting::new(vcpus, &core.context) {
            Ok(starting) => starting.go(),
            Err((_, source)) => {
                let fault = format!("vCPUs cannot be started again: {source}");
                core.context.halt.now(VmEvent::Fault(fault));
                Running { threads: Vec::new(), throttle: None }
            }
        };
        Err(failed(core, running, error.into()))
    }
}

impl Vm<Running> {
    /// Lets the guest's vCPUs run for this share of the time, from now until it is paused or
    /// asked for more; 1.0 is full speed.
    pub fn throttle(&mut self, run_share: f64) -> Result<(), MachineError> {
        self.state.throttle = None;
        if run_share >= 1.0 {
            return Ok(());
        }
        let share = run_share.max(LEAST_RUN_SHARE);
        let threads: Vec<_> = self.state.threads.iter().map(VcpuThread::kick_handle).collect();
        // SAFETY: `Running` drops its throttle, which ends that thread, before it joins a vCPU's.
        let kick = move || threads.iter().for_each(|thread| unsafe { thread.kick() });
        let brake = Arc::clone(&self.core.context.brake);
        let started = Throttle::start(brake, share, kick).map_err(|source| {
            MachineError::Resource { what: "thread that slows the guest down", source }
        })?;
        self.state.throttle = Some(started);
        Ok(())
    }
}

/// The hash of a paused guest. Does not touch what certainly is zero: touched, pages without a base
/// would count as written in the next handoff. Chunks of zeros are told by their absence, so that an
/// audit takes as long as the guest is full.
pub(crate) fn full_hash(ram: &GuestRam, disk: Option<&Overlay>) -> Result<[u8; 32], MachineError> {
    let mut audit = Audit::default();
    let mut chunk = [0; CHUNK_SIZE];
    contents::for_each(ram, &mut chunk, |index, chunk| {
        audit.chunk(index, chunk);
        Ok(())
    })?;
    audit.end_of_space(memory::chunk_count(ram));
    if let Some(disk) = disk {
        for index in 0..disk.chunks() {
            disk.read_chunk(index, &mut chunk)?;
            audit.chunk(index, &chunk);
        }
        audit.end_of_space(disk.chunks());
    }
    Ok(audit.finish())
}

fn failed<S: std::fmt::Debug>(
    core: Box<Core>,
    state: S,
    error: MachineError,
) -> TransitionError<S> {
    TransitionError { vm: Box::new(Vm { state, core }), error }
}

/// vCPUs whose threads exist and wait.
struct Starting {
    threads: Vec<VcpuThread>,
    gate: Arc<Gate>,
}

impl Starting {
    /// A thread for each vCPU, or none.
    fn new(vcpus: Vec<Vcpu>, context: &RunContext) -> Result<Self, (Vec<Vcpu>, io::Error)> {
        let gate = Arc::new(Gate::default());
        let mut starting = Self { threads: Vec::with_capacity(vcpus.len()), gate };
        let mut left = vcpus.into_iter();
        while let Some(vcpu) = left.next() {
            match VcpuThread::start(vcpu, context.clone(), Arc::clone(&starting.gate)) {
                Ok(thread) => starting.threads.push(thread),
                Err((vcpu, error)) => {
                    let mut vcpus = starting.call_off();
                    vcpus.push(vcpu);
                    vcpus.extend(left);
                    return Err((vcpus, error));
                }
            }
        }
        Ok(starting)
    }

    /// Lets the guest run. Cannot fail.
    fn go(self) -> Running {
        self.gate.open();
        Running { threads: self.threads, throttle: None }
    }

    /// Takes the vCPUs back: not one of their instructions ran.
    fn call_off(self) -> Vec<Vcpu> {
        self.gate.call_off();
        self.threads.into_iter().map(VcpuThread::join).collect()
    }
}

impl<S> Vm<S> {
    /// What a move of this machine between hosts like this one costs besides its RAM and disk, by
    /// what taking it on cost here. Pausing and saving undo, call by call, what restoring and resuming
    /// do, and are taken to last as long. None for a machine that was booted here.
    pub fn cutover_cost(&self) -> Option<Duration> {
        let Moved { restored, resumed } = self.core.moved;
        Some(2 * (restored? + resumed?))
    }

    /// What the machine is.
    pub fn profile(&self) -> &MachineProfile {
        &self.core.profile
    }

    /// How many chunks RAM and disk have.
    pub fn geometry(&self) -> Geometry {
        self.core.tracker.geometry()
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.core.ram
    }

    /// The disk.
    pub fn disk(&self) -> Option<&Arc<Overlay>> {
        self.core.disk.as_ref()
    }

    /// Whether the guest has turned itself off or crashed. An event has told how.
    pub fn is_halted(&self) -> bool {
        self.core.context.halt.is_halted()
    }

    /// Types at the serial console; returns how many bytes it took.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, MachineError> {
        Ok(self.core.devices.serial().input(bytes)?)
    }

    /// The serial console, to type at while others drive the machine.
    pub fn console(&self) -> Arc<Serial> {
        Arc::clone(self.core.devices.serial())
    }

    /// Copies one chunk's present content. If it is changed after that, a later harvest tells.
    pub fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), MachineError> {
        match (id.space, &self.core.disk) {
            (Space::Ram, _) => memory::read_chunk(&self.core.ram, id.index, into)?,
            (Space::Disk, Some(disk)) => disk.read_chunk(id.index, into)?,
            (Space::Disk, None) => return Err(MachineError::NoDisk(id.index)),
        }
        Ok(())
    }

    /// Starts dirty tracking and returns everything that may differ from the base: its memory (or
    /// zero) and its disk.
    pub fn start_tracking(&mut self) -> Result<ChunkSet, MachineError> {
        Ok(self.core.tracker.start()?)
    }

    /// Takes everything that changed since it was last taken. Copy it afterwards.
    pub fn harvest(&mut self) -> Result<ChunkSet, MachineError> {
        Ok(self.core.tracker.harvest()?)
    }

    /// What [`Vm::harvest`] would take now, without taking it.
    pub fn peek_dirty(&mut self) -> Result<ChunkSet, MachineError> {
        Ok(self.core.tracker.peek()?)
    }

    /// Ends dirty tracking, and a round of hinting with it: hints mean nothing without the log.
    pub fn stop_tracking(&mut self) -> Result<(), MachineError> {
        self.end_free_hints();
        Ok(self.core.tracker.stop()?)
    }

    /// Chunks that the guest called free since this was last asked and that were not written since it
    /// was first asked; the first call asks, if that is worthwhile. They need not be sent: one that
    /// the guest writes again comes with a later harvest, the others are discarded by
    /// [`Vm::discard_free`] and come with the harvest after that.
    pub fn take_free_hints(&mut self) -> Result<ChunkSet, MachineError> {
        let hints = self.free_hints();
        if self.core.tracker.is_asking() {
            return Ok(self.core.tracker.add_free(&hints.take())?);
        }
        // In this order: what is written after the guest was asked must be seen.
        if hints.worthwhile() && self.core.tracker.begin_free() {
            hints.start();
        }
        Ok(ChunkSet::new(self.geometry()))
    }

    /// Ends a round of hinting, if there is one: the guest may use the pages again that it named.
    pub fn end_free_hints(&self) {
        self.free_hints().stop();
    }

    /// Hints of free pages, to ask for them and take them while others drive the machine.
    pub fn free_hints(&self) -> FreeHints {
        self.core.devices.balloon().hints().clone()
    }

    /// What the guest has said of its free memory.
    pub fn balloon(&self) -> &BalloonHandle {
        self.core.devices.balloon()
    }

    /// Tells the network where the guest is now.
    pub fn announce(&self) -> Result<(), MachineError> {
        self.core.devices.announce().map_err(MachineError::Announce)
    }
}
