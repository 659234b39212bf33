//! A real machine: the VMM's, with its disk, its base and its ownership journal.

use std::{
    fs::File,
    path::Path,
    sync::{Arc, atomic::AtomicBool, mpsc},
    time::Duration,
};

use crossbeam_channel::Sender;
use guest_images::{Base, overlay::Overlay, store::StoreError};
use handoff::{
    SourceVm,
    ownership::Journal,
    stage::SentCache,
    tcp::MonotonicClock,
    trace::record::{RecordOptions, Recorded, record},
    vm::VmError,
};
use vmm::{AnyVm, MachineProfile, NetConfig, Running, Vm, VmConfig as Build, VmEvent, VmSource};

use super::{
    Event,
    boot::{Brought, Origin},
    farewell::Farewell,
    leaving,
    machine::{HandoffEnd, Machine, Watch},
    save,
    tap::HeldTap,
};
use crate::{
    commands::base,
    console::{Console, Sink},
    control::{HandoffRequest, RecordRequest, SaveRequest},
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmDir},
    jail,
    net::Attachment,
    offer::{MachineOffer, Setup},
};

/// A machine of this process.
pub(crate) struct KvmMachine {
    pub(crate) home: Home,
    pub(crate) dir: VmDir,
    pub(crate) source: VmSource,
    pub(crate) disk: Arc<Overlay>,
    pub(crate) base: Arc<Base>,
    pub(crate) journal: Journal,
    pub(crate) append: String,
    pub(crate) setup: Setup,
    /// Some of what came here with the guest: what the side it came from may still have.
    pub(crate) contents: Option<Arc<SentCache>>,
    /// Tells the peer of the last handoff that it came to nothing, where it has not heard so.
    pub(crate) farewell: Option<Farewell>,
}

/// Starts the VM of `dir`; its guest runs when this returns.
pub(crate) fn start(
    dir: &VmDir,
    home: &Home,
    journal: Journal,
    tap: &HeldTap,
    console: &Arc<Console>,
    events: &Sender<Event>,
) -> Result<Brought, Failure> {
    let config = dir.config()?;
    let what = format!("VM {}", dir.name());
    let base = base::store(home)?.get(&config.base).map_err(|error| match error {
        StoreError::NotFound { .. } => {
            let why = format!("its base {} is not in this cloudlet's store any more", config.base);
            let way_out = "`howdah base import` it again: the same content has the same id";
            Failure::new(Exit::NotFound, &what, why, way_out)
        }
        error => base::store_failure(error),
    })?;
    let base = Arc::new(base);
    let disk = Overlay::open(dir.path(), Arc::clone(&base))
        .map_err(|e| Failure::plain(Exit::Failed, &what, e))?;
    let disk = Arc::new(disk);
    let build = build(&config, &base, &disk, tap, console, events)?;
    let boot = |build| {
        let booted = Vm::boot(build).and_then(|vm| vm.resume().map_err(|e| e.error));
        booted.map_err(machine_failure(&what))
    };
    let (vm, origin) = if !config.from_memory {
        (boot(build)?, Origin::Kernel)
    } else if disk.changed().next().is_some() {
        // No start went on from the memory, and yet the disk is another: no guest must see both.
        tracing::warn!("the disk is no longer the base's: the guest boots");
        dir.write_config(&VmConfig { from_memory: false, ..config.clone() })?;
        (boot(build)?, Origin::Kernel)
    } else {
        (go_on(dir, &config, &base, build)?, Origin::BaseMemory)
    };
    connect_console(console, &vm);
    let setup = Setup::of(&config);
    let (home, dir, append) = (home.clone(), dir.clone(), config.append);
    let source = VmSource::new(vm);
    let (contents, farewell) = (None, None);
    let machine =
        KvmMachine { home, dir, source, disk, base, journal, append, setup, contents, farewell };
    Ok((Box::new(machine), origin))
}

/// Goes on from the base's memory. Before the first instruction of the guest it is durable that no
/// later start does: memory and disk belong together only as long as neither has changed.
fn go_on(
    dir: &VmDir,
    config: &VmConfig,
    base: &Base,
    build: Build,
) -> Result<Vm<Running>, Failure> {
    let what = format!("VM {}", dir.name());
    let damaged = |why: &dyn std::fmt::Display| {
        let way_out = "`howdah base verify` says more; --cold boots the kernel instead";
        Failure::new(Exit::Corrupt, format!("memory of base {}", base.id()), why, way_out)
    };
    let machine = base.machine().map_err(|e| damaged(&e))?;
    let machine = machine.ok_or_else(|| damaged(&"it has none"))?;
    let vm = Vm::from_base(build, &machine).map_err(machine_failure(&what))?;
    dir.write_config(&VmConfig { from_memory: false, ..config.clone() })?;
    match vm.resume() {
        Ok(vm) => {
            // Switches may know the address from another guest of this base.
            if let Err(error) = vm.announce() {
                tracing::warn!(%error, "cannot announce the guest to the network");
            }
            Ok(vm)
        }
        Err(e) => {
            // Not one instruction ran.
            dir.write_config(config)?;
            Err(machine_failure(&what)(e.error))
        }
    }
}

/// What a machine that cannot be made means.
pub(super) fn machine_failure(
    what: &dyn std::fmt::Display,
) -> impl Fn(vmm::MachineError) -> Failure {
    let what = what.to_string();
    move |error| match error {
        vmm::MachineError::Host(e) => super::boot::host_failure(&e),
        e => Failure::plain(Exit::Failed, &what, e),
    }
}

/// The kernel command line of a guest of `base`.
pub(crate) fn cmdline(base: &Base, append: &str) -> String {
    [base.manifest().cmdline.as_str(), append].join(" ").trim().to_owned()
}

/// A base's memory, for a machine to begin with.
fn base_memory(base: &Base) -> Result<Option<Arc<File>>, Failure> {
    let copy = base.memory_file().map(File::try_clone).transpose();
    let copy = copy.map_err(|e| Failure::file("open the memory of", base.dir(), &e))?;
    Ok(copy.map(Arc::new))
}

/// What the VMM needs to build the machine.
pub(crate) fn build(
    config: &VmConfig,
    base: &Base,
    disk: &Arc<Overlay>,
    tap: &HeldTap,
    console: &Arc<Console>,
    events: &Sender<Event>,
) -> Result<Build, Failure> {
    // The user's own words come last, and count.
    let words = config.network.as_ref().map(Attachment::cmdline).unwrap_or_default();
    let words = [words.as_str(), config.append.as_str()].join(" ");
    Ok(Build {
        memory_bytes: config.memory_mib << 20,
        vcpus: config.vcpus,
        kernel: base.kernel_path(),
        initramfs: base.initramfs_path(),
        cmdline: cmdline(base, words.trim()),
        base_memory: base_memory(base)?,
        disk: Some(Arc::clone(disk)),
        net: network(config, tap)?,
        cpu: config.cpu.unwrap_or_default().0,
        rates: config.limits.rates(),
        keep_free_pages: config.keep_free_pages,
        console: Box::new(Sink(Arc::clone(console))),
        events: forward(events)?,
        threads: jail::thread_hook(),
    })
}

/// The guest's network device, with its address, as far as it is known.
fn network(config: &VmConfig, tap: &HeldTap) -> Result<Option<NetConfig>, Failure> {
    let known = config.network.as_ref().and_then(|attachment| attachment.address);
    let net = tap.network(config.mac.as_deref())?;
    Ok(net.map(|net| NetConfig { addresses: known.into_iter().collect(), ..net }))
}

/// The VMM's events, as this process's.
fn forward(events: &Sender<Event>) -> Result<mpsc::Sender<VmEvent>, Failure> {
    let (sender, receiver) = mpsc::channel();
    let events = events.clone();
    let pass = move || {
        for event in receiver {
            let _ = events.send(match event {
                VmEvent::Shutdown => Event::GuestEnded("it turned itself off".into()),
                VmEvent::Reset => Event::GuestEnded("it asked to start over".into()),
                VmEvent::Fault(why) => Event::GuestFailed(why),
            });
        }
    };
    std::thread::Builder::new()
        .name("guest-events".into())
        .spawn(pass)
        .map(|_| sender)
        .map_err(|e| Failure::new(Exit::Failed, "thread", e, "raise the limit on threads"))
}

/// Typed bytes go to the machine, whoever drives it.
pub(crate) fn connect_console<S>(console: &Console, vm: &Vm<S>) {
    let serial = vm.console();
    console.set_input(Box::new(move |bytes| {
        if let Err(e) = serial.input(bytes) {
            tracing::warn!("console input: {e}");
        }
    }));
}

fn vm_error(error: VmError) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

impl Machine for KvmMachine {
    fn profile(&self) -> Result<MachineProfile, Failure> {
        match self.source.vm() {
            Some(AnyVm::Running(vm)) => Ok(vm.profile().clone()),
            Some(AnyVm::Paused(vm)) => Ok(vm.profile().clone()),
            None => {
                let what = format!("VM {}", self.dir.name());
                Err(Failure::plain(Exit::Failed, what, "the machine is gone"))
            }
        }
    }

    fn pause(&mut self) -> anyhow::Result<()> {
        self.source.pause().map_err(vm_error)
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        self.source.resume().map_err(vm_error)
    }

    fn stop(mut self: Box<Self>) -> anyhow::Result<()> {
        // Drains the devices: what the guest was told is written goes to the disk.
        self.source.pause().map_err(vm_error)?;
        Ok(self.disk.flush()?)
    }

    fn export_disk(&mut self, to: &File) -> anyhow::Result<()> {
        Ok(self.disk.write_image(to, Path::new("image of the disk"))?)
    }

    fn save(&mut self, request: &SaveRequest, to: &File) -> Result<serde_json::Value, Failure> {
        save::save(self, request, to)
    }

    fn record(
        &mut self,
        request: &RecordRequest,
        cancel: &AtomicBool,
    ) -> Result<Recorded, Failure> {
        let options = RecordOptions {
            duration: Duration::from_millis(request.for_ms),
            every: Duration::from_millis(request.every_ms),
            most_contents: usize::try_from(request.most_mib << 8).unwrap_or(usize::MAX),
        };
        let clock = MonotonicClock::default();
        record(&mut self.source, &*self.base, options, &clock, cancel).map_err(|e| {
            Failure::plain(Exit::Failed, format!("VM {} is not recorded", self.dir.name()), e)
        })
    }

    fn hand_off(self: Box<Self>, request: &HandoffRequest, watch: &dyn Watch) -> HandoffEnd {
        leaving::hand_off(self, request, watch)
    }
}

impl KvmMachine {
    /// The machine as peers and files are told of it.
    pub(super) fn offer(&self) -> Result<Vec<u8>, Failure> {
        let what = format!("VM {}", self.dir.name());
        let profile = self.profile()?;
        MachineOffer { profile, append: self.append.clone(), setup: self.setup.clone() }
            .encode()
            .map_err(|e| Failure::plain(Exit::Failed, what, e))
    }
}
