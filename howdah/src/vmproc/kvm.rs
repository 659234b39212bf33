//! A real machine: the VMM's, with its disk, its base and its ownership journal.

use std::{
    fs::File,
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use crossbeam_channel::Sender;
use guest_images::{Base, overlay::Overlay};
use handoff::{
    BaseView, SourceVm,
    engine::{self, KeptReason, Limits, Recovery, SendError, SendOptions, SendOutcome},
    ownership::Journal,
    policy::CutOverPolicy,
    tcp::{MonotonicClock, TcpConnect},
    vm::VmError,
};
use vmm::{AnyVm, NetConfig, Running, Vm, VmConfig as Build, VmEvent, VmSource};

use super::{
    Event,
    machine::{HandoffEnd, Machine, Watch},
};
use crate::{
    commands::base,
    console::{Console, Sink},
    control::HandoffRequest,
    disk,
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmDir},
    mac::Mac,
    offer::MachineOffer,
};

/// How long to wait before a peer that did not confirm a commit is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// A machine of this process.
pub(crate) struct KvmMachine {
    pub(crate) dir: VmDir,
    pub(crate) source: VmSource,
    pub(crate) disk: Arc<Overlay>,
    pub(crate) base: Arc<Base>,
    pub(crate) journal: Journal,
    pub(crate) append: String,
}

/// Starts the VM of `dir`; its guest runs when this returns. Says too whether it went on from the
/// base's memory.
pub(crate) fn start(
    dir: &VmDir,
    home: &Home,
    journal: Journal,
    console: &Arc<Console>,
    events: &Sender<Event>,
) -> Result<(Box<dyn Machine>, bool), Failure> {
    let config = dir.config()?;
    let base = base::store(home)?.get(&config.base).map_err(base::store_failure)?;
    let base = Arc::new(base);
    let what = format!("VM {}", dir.name());
    let disk = Overlay::open(dir.path(), Arc::clone(&base))
        .map_err(|e| Failure::plain(Exit::Failed, &what, e))?;
    let disk = Arc::new(disk);
    let build = build(&config, &base, &disk, console, events)?;
    let failed = machine_failure(&what);
    let vm = if !config.from_memory {
        Vm::boot(build).and_then(|vm| vm.resume().map_err(|e| e.error)).map_err(failed)?
    } else if disk.changed().next().is_some() {
        // No start went on from the memory, and yet the disk is another: no guest must see both.
        tracing::warn!("the disk is no longer the base's: the guest boots");
        dir.write_config(&VmConfig { from_memory: false, ..config.clone() })?;
        Vm::boot(build).and_then(|vm| vm.resume().map_err(|e| e.error)).map_err(failed)?
    } else {
        go_on(dir, &config, &base, build)?
    };
    connect_console(console, &vm);
    let (dir, append) = (dir.clone(), config.append);
    let machine = KvmMachine { dir, source: VmSource::new(vm), disk, base, journal, append };
    Ok((Box::new(machine), config.from_memory))
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
    console: &Arc<Console>,
    events: &Sender<Event>,
) -> Result<Build, Failure> {
    Ok(Build {
        memory_bytes: config.memory_mib << 20,
        vcpus: config.vcpus,
        kernel: base.kernel_path(),
        initramfs: base.initramfs_path(),
        cmdline: cmdline(base, &config.append),
        base_memory: base_memory(base)?,
        disk: Some(Arc::clone(disk)),
        net: net(config)?,
        console: Box::new(Sink(Arc::clone(console))),
        events: forward(events)?,
    })
}

fn net(config: &VmConfig) -> Result<Option<NetConfig>, Failure> {
    let Some(mac) = &config.mac else { return Ok(None) };
    let mac: Mac =
        mac.parse().map_err(|e| Failure::new(Exit::Corrupt, "config.json", e, "correct it"))?;
    let what = "network of the VM";
    let way_out = "name one with --tap (`ip tuntap add NAME mode tap` makes one)";
    let Some(tap) = &config.tap else {
        let why = "it has a network device, and no TAP device of this host is named for it";
        return Err(Failure::new(Exit::Host, what, why, way_out));
    };
    // Opening a TAP device that is not there would make one, joined to nothing.
    if nix::net::if_::if_nametoindex(tap.as_str()).is_err() {
        let why = format!("this host has no network device {tap}");
        return Err(Failure::new(Exit::Host, what, why, way_out));
    }
    Ok(Some(NetConfig { tap: tap.clone(), mac: mac.0 }))
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

    fn export_disk(&mut self, to: &Path) -> anyhow::Result<()> {
        Ok(disk::export(&self.disk, to)?)
    }

    fn hand_off(mut self: Box<Self>, request: &HandoffRequest, watch: &dyn Watch) -> HandoffEnd {
        let options = match self.options(request) {
            Ok(options) => options,
            Err(failure) => return HandoffEnd::Kept { machine: self, failure },
        };
        let base: Arc<dyn BaseView> = self.base.clone();
        let mut connect = TcpConnect::new(&request.peer);
        let peer = request.peer.clone();
        let sent = engine::send(
            &mut self.source,
            base.into(),
            &mut connect,
            &mut self.journal,
            &options,
            &MonotonicClock::default(),
            &mut |progress| watch.progress(super::progress::of(&peer, progress)),
            watch.cancel(),
        );
        match sent {
            Ok(SendOutcome::Moved { report, .. }) => HandoffEnd::Moved { report: as_json(&report) },
            Ok(SendOutcome::KeptHere { reason, report }) => {
                let failure = Failure { report: Some(as_json(&report)), ..self.kept(&reason) };
                HandoffEnd::Kept { machine: self, failure }
            }
            Ok(SendOutcome::InDoubt { report }) => {
                self.settle(&mut connect, &request.peer, as_json(&report), watch)
            }
            Err(e @ (SendError::NotHere(_) | SendError::NoRecord)) => {
                let failure = Failure::plain(Exit::Conflict, format!("VM {}", self.dir.name()), e);
                HandoffEnd::Kept { machine: self, failure }
            }
            Err(e) => HandoffEnd::Undecided {
                failure: Failure::plain(Exit::Failed, format!("VM {}", self.dir.name()), e),
            },
        }
    }
}

impl KvmMachine {
    fn options(&self, request: &HandoffRequest) -> Result<SendOptions, Failure> {
        let what = format!("VM {}", self.dir.name());
        let profile = match self.source.vm() {
            Some(AnyVm::Running(vm)) => vm.profile().clone(),
            Some(AnyVm::Paused(vm)) => vm.profile().clone(),
            None => return Err(Failure::plain(Exit::Failed, what, "the machine is gone")),
        };
        let machine = MachineOffer { profile, append: self.append.clone() }
            .encode()
            .map_err(|e| Failure::plain(Exit::Failed, what, e))?;
        let mut options = SendOptions::new(self.dir.name().to_string(), &request.peer, machine);
        options.audit = request.audit;
        if let Some(downtime_ms) = request.downtime_ms {
            options.policy = CutOverPolicy::with_downtime(Duration::from_millis(downtime_ms));
        }
        Ok(options)
    }

    fn kept(&self, reason: &KeptReason) -> Failure {
        let what = format!("VM {} was not handed off and goes on here", self.dir.name());
        let exit = match reason {
            KeptReason::Cancelled => Exit::Cancelled,
            _ => Exit::NotMoved,
        };
        match reason {
            KeptReason::Link(_) => {
                let way_out =
                    "check that `howdah receive` listens there and the network in between";
                Failure::new(exit, what, reason, way_out)
            }
            _ => Failure::plain(exit, what, reason),
        }
    }

    /// Asks until it is known where the guest runs. Bounded by the user, who may end the process:
    /// the record is durable, and the next start asks again.
    fn settle(
        mut self: Box<Self>,
        connect: &mut TcpConnect,
        peer: &str,
        report: serde_json::Value,
        watch: &dyn Watch,
    ) -> HandoffEnd {
        let what = format!("VM {}", self.dir.name());
        let mut why = format!("{peer} has not confirmed that it runs the guest");
        loop {
            watch.in_doubt(&why);
            let settled = engine::send_resume(
                &mut self.source,
                &mut self.journal,
                self.dir.name().as_ref(),
                connect,
                &Limits::default(),
                &MonotonicClock::default(),
            );
            match settled {
                Ok(Recovery::Gone { .. }) => return HandoffEnd::Moved { report },
                Ok(Recovery::MayRun) => {
                    let why = format!("{peer} declined after the commit; the guest goes on here");
                    let failure = Failure::plain(Exit::NotMoved, what, why);
                    let failure = Failure { report: Some(report), ..failure };
                    return HandoffEnd::Kept { machine: self, failure };
                }
                Ok(Recovery::InDoubt { reason, .. }) => why = reason,
                Ok(Recovery::NeverHere { reason }) => {
                    let failure = Failure::plain(Exit::Failed, what, reason);
                    return HandoffEnd::Undecided { failure };
                }
                Err(e) => {
                    let failure = Failure::plain(Exit::Failed, what, e);
                    return HandoffEnd::Undecided { failure };
                }
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }
}

fn as_json<T: serde::Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).unwrap_or_default()
}
