//! Running a VM: creates it, or starts one that is here.

use std::{ffi::OsString, ops::RangeInclusive, process::Stdio, str::FromStr, sync::Arc};

use guest_images::{Base, overlay::Overlay};
use handoff::ownership::{Record, State, VmId};
use howdah_api as api;
use howdah_api::{VmRun, VmRunning, VmState};
use vmm::{CpuTemplate, MachineProfile};

use crate::{
    cli::{AttachArgs, Cpu, JailArgs, Limits, VmRunArgs},
    commands::base,
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmDir, VmName},
    mac::Mac,
    net::{Attachment, Networks, Place},
    offer::check_append,
    spawn, vmproc,
};

/// Guest memory unless said otherwise.
const DEFAULT_MEMORY_MIB: u64 = 512;
/// What guests can have of memory, and of CPUs.
const MEMORY_MIB: RangeInclusive<u64> = 32..=1 << 20;
const VCPUS: RangeInclusive<u8> = 1..=64;

/// Creates a VM, or checks that one that is there is what is asked for; starts nothing.
pub(crate) fn prepare(args: &VmRunArgs, home: &Home) -> Result<(), Failure> {
    create_or_check(&home.vm(&args.name), args, home)
}

/// Starts the process of a VM that was prepared, and waits until its guest runs.
pub(crate) fn launch(args: &VmRunArgs, home: &Home, verbose: u8) -> Result<VmRunning, Failure> {
    let log = home.vm(&args.name).vm_log();
    let child = spawn::start(process_arguments(home, verbose, args), Stdio::null(), &log)?;
    let started = spawn::await_ready(child, &log)?;
    Ok(running(&args.name, started))
}

/// A VM that runs, and how it came to.
pub(crate) fn running(vm: &VmName, started: Option<serde_json::Value>) -> VmRunning {
    let started = started.and_then(|details| serde_json::from_value(details).ok());
    VmRunning { vm: vm.to_string(), state: VmState::Running, started }
}

impl From<&VmRunArgs> for VmRun {
    fn from(args: &VmRunArgs) -> Self {
        Self {
            name: args.name.to_string(),
            base: args.base.clone(),
            memory_mib: args.memory_mib,
            vcpus: args.vcpus,
            tap: args.tap.clone(),
            network: args.attach.network.as_ref().map(ToString::to_string),
            address: args.attach.address.map(|address| address.to_string()),
            publish: args
                .attach
                .publish
                .as_ref()
                .map(|ports| ports.iter().map(ToString::to_string).collect()),
            mac: args.mac.map(|mac| mac.to_string()),
            append: args.append.clone(),
            cpu: args.cpu.map(String::from),
            limits: (!args.limits.is_none()).then(|| args.limits.into()),
            cold: args.cold,
            keep_free_pages: args.keep_free_pages,
            no_jail: args.jail.no_jail,
            run_as: args
                .jail
                .run_as
                .as_ref()
                .map(|user| OsString::from(user).to_string_lossy().into_owned()),
        }
    }
}

impl VmRunArgs {
    /// What a request asks for, checked as the command line checks it; `jail` is what the processes of VMs are
    /// confined by, unless it says otherwise.
    pub(crate) fn asked(run: VmRun, jail: &JailArgs) -> Result<Self, Failure> {
        let run_as = match &run.run_as {
            // Whether there is such a user, and that it is not root, the host knows.
            Some(user) => {
                Some(parsed("run_as", user).map_err(|e| Failure { exit: Exit::Host, ..e })?)
            }
            None => jail.run_as.clone(),
        };
        if run.memory_mib.is_some_and(|memory| !MEMORY_MIB.contains(&memory)) {
            return Err(wrong("memory_mib", format_args!("it is from {MEMORY_MIB:?}")));
        }
        if run.vcpus.is_some_and(|vcpus| !VCPUS.contains(&vcpus)) {
            return Err(wrong("vcpus", format_args!("it is from {VCPUS:?}")));
        }
        if run.tap.as_ref().is_some_and(|tap| !is_device_name(tap)) {
            return Err(wrong("tap", "it is no name of a network device"));
        }
        if run.tap.is_some() && run.network.is_some() {
            let why = "the guest has a TAP device already";
            return Err(Failure::new(Exit::Conflict, "network", why, "leave one of them out"));
        }
        let published = |ports: &Vec<String>| {
            ports.iter().map(|port| parsed("publish", port)).collect::<Result<_, _>>()
        };
        let attach = AttachArgs {
            network: run.network.as_deref().map(|name| parsed("network", name)).transpose()?,
            address: run.address.as_deref().map(|ip| parsed("address", ip)).transpose()?,
            publish: run.publish.as_ref().map(published).transpose()?,
        };
        let limits = match run.limits {
            Some(limits) => limits_asked(limits)?,
            None => Limits::default(),
        };
        Ok(Self {
            name: parsed("name", &run.name)?,
            base: run.base,
            memory_mib: run.memory_mib,
            vcpus: run.vcpus,
            tap: run.tap,
            attach,
            mac: run.mac.as_deref().map(|mac| parsed("mac", mac)).transpose()?,
            append: run.append,
            cpu: run.cpu.as_deref().map(|cpu| parsed("cpu", cpu)).transpose()?,
            limits,
            cold: run.cold,
            keep_free_pages: run.keep_free_pages,
            detach: true,
            jail: JailArgs { no_jail: run.no_jail || jail.no_jail, run_as },
        })
    }
}

fn limits_asked(limits: api::Limits) -> Result<Limits, Failure> {
    let api::Limits {
        cpu_max,
        memory_max_mib,
        disk_mib_per_s,
        disk_iops,
        net_mbps,
        net_frames_per_s,
    } = limits;
    Ok(Limits {
        cpu_max: cpu_max.as_deref().map(|cpus| parsed("limits.cpu_max", cpus)).transpose()?,
        memory_max_mib,
        disk_mib_per_s,
        disk_iops,
        net_mbps,
        net_frames_per_s,
    })
}

fn wrong(what: &str, why: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Usage, what, why, "correct it or leave it out")
}

fn parsed<T: FromStr<Err: std::fmt::Display>>(what: &str, text: &str) -> Result<T, Failure> {
    text.parse().map_err(|why| wrong(what, why))
}

/// As the kernel has it.
fn is_device_name(name: &str) -> bool {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.contains(odd)
}

fn process_arguments(home: &Home, verbose: u8, args: &VmRunArgs) -> Vec<OsString> {
    let mut words = vec![OsString::from("--home"), home.root().into()];
    words.extend((0..verbose).map(|_| "-v".into()));
    words.extend(["vm-process".into(), args.name.to_string().into()]);
    words.extend(args.jail.words());
    words
}

fn create_or_check(dir: &VmDir, args: &VmRunArgs, home: &Home) -> Result<(), Failure> {
    if let Some(append) = &args.append {
        check_append(append)
            .map_err(|e| Failure::new(Exit::Usage, "--append", e, "shorten or correct it"))?;
    }
    let existed = dir.path().is_dir();
    if !existed && args.base.is_none() {
        let what = format!("VM {}", args.name);
        let why = format!("there is none in {}", home.root().display());
        return Err(Failure::new(
            Exit::NotFound,
            what,
            why,
            "--base NAME creates it; `howdah base ls` lists bases",
        ));
    }
    let base = match &args.base {
        Some(base) => Some(base::store(home)?.get(base).map_err(base::store_failure)?),
        None => None,
    };
    let new =
        base.as_ref().filter(|_| !existed).map(|base| new_machine(args, base, home)).transpose()?;
    // Before anything is written, after all that can be said without it.
    vmproc::check_host()?;
    dir.create()?;
    let lock = dir.lock()?;
    match (dir.record()?, base) {
        (Some(record), base) => start_again(dir, args, &record, base.as_ref(), home),
        (None, Some(base)) => {
            let config = new.map_or_else(|| new_machine(args, &base, home), Ok)?;
            create(dir, &config, base)
        }
        (None, None) => {
            // What a creation or reception left behind that did not finish.
            let what = format!("VM {}", args.name);
            let failure = Failure::new(
                Exit::NotFound,
                what,
                "it was never finished",
                "--base NAME creates it anew",
            );
            drop(lock);
            Err(failure)
        }
    }
}

fn create(dir: &VmDir, config: &VmConfig, base: Base) -> Result<(), Failure> {
    let failed =
        |e: &dyn std::fmt::Display| Failure::plain(Exit::Failed, format!("VM {}", dir.name()), e);
    dir.remove_disk()?;
    dir.write_config(config)?;
    Overlay::create(dir.path(), Arc::new(base)).map_err(|e| failed(&e))?;
    // Last: from here on the VM exists, and is ours.
    let record = Record::created(VmId::random());
    dir.journal()?.write(record).map_err(|e| failed(&e))
}

/// The machine that the flags and the base make.
fn new_machine(args: &VmRunArgs, base: &Base, home: &Home) -> Result<VmConfig, Failure> {
    let mac = args.mac.unwrap_or_else(|| Mac::of(args.name.as_ref()));
    let config = VmConfig {
        memory_mib: args.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
        vcpus: args.vcpus.unwrap_or(1),
        mac: args.has_network().then(|| mac.to_string()),
        network: network(args, home, args.cold || base.memory_file().is_none())?,
        tap: args.tap.clone(),
        append: args.append.clone().unwrap_or_default(),
        keep_free_pages: args.keep_free_pages,
        cpu: args.cpu,
        limits: args.limits.over(Limits::default()),
        ..VmConfig::of(&base.id())
    };
    config.limits.check(config.memory_mib)?;
    let damaged = |e: &dyn std::fmt::Display| {
        Failure::plain(Exit::Corrupt, format!("machine of base {}", base.id()), e)
    };
    let Some(machine) = base.machine().map_err(|e| damaged(&e))? else { return Ok(config) };
    let profile = vmm::MachineSnapshot::decode(&machine).map_err(|e| damaged(&e))?.profile;
    // Whether it goes on or boots: what is equal to the base's memory is never sent.
    let memory_mib = profile.memory_bytes >> 20;
    config.limits.check(memory_mib)?;
    if args.memory_mib.is_some_and(|asked| asked != memory_mib) {
        return Err(contradicts("--memory-mib", &format!("{memory_mib} MiB of memory"), false));
    }
    if args.cold {
        let vcpus = args.vcpus.unwrap_or(profile.vcpus);
        return Ok(VmConfig { memory_mib, vcpus, ..config });
    }
    if args.vcpus.is_some_and(|asked| asked != profile.vcpus) {
        return Err(contradicts("--vcpus", &format!("{} vCPUs", profile.vcpus), true));
    }
    if let Some(Cpu(cpu)) = args.cpu {
        check_cpu(cpu, &profile)?;
    }
    let its_mac = profile.mac.map(|mac| Mac(mac).to_string());
    if args.mac.is_some_and(|asked| Some(asked.to_string()) != its_mac) {
        let has = its_mac.map_or("no network device".into(), |mac| format!("MAC address {mac}"));
        return Err(contradicts("--mac", &has, true));
    }
    match (args.has_network(), profile.mac) {
        (true, None) => {
            return Err(contradicts("--tap and --network", "no network device", true));
        }
        (false, Some(_)) => {
            let why = "its memory is that of a guest with a network device";
            let way_out = "name a TAP device with --tap or a network with --network, or boot without one with --cold";
            return Err(Failure::new(Exit::Usage, format!("base {}", base.id()), why, way_out));
        }
        _ => {}
    }
    if args.append.as_ref().is_some_and(|text| !text.is_empty()) {
        return Err(contradicts("--append", "a kernel that has started already", true));
    }
    Ok(VmConfig { memory_mib, vcpus: profile.vcpus, mac: its_mac, from_memory: true, ..config })
}

/// The place that the flags give a VM in a network. Only one that boots can be told its address.
fn network(args: &VmRunArgs, home: &Home, boots: bool) -> Result<Option<Attachment>, Failure> {
    let AttachArgs { network: Some(name), address, publish } = &args.attach else {
        return match &args.attach {
            AttachArgs { address: None, publish: None, .. } => Ok(None),
            _ => {
                let why = "addresses and ports are a network's";
                let way_out = "name the network with --network";
                Err(Failure::new(Exit::Usage, "--address and --publish", why, way_out))
            }
        };
    };
    let network = Networks::read(home)?.get(name)?.clone();
    let place = Place::find(home, &args.name, network)?;
    place.give(*address, boots, publish.clone().unwrap_or_default()).map(Some)
}

/// The same for a VM that is here: what is not said stays, as long as the network does.
fn network_again(
    args: &VmRunArgs,
    home: &Home,
    old: &VmConfig,
) -> Result<Option<Attachment>, Failure> {
    let mut args = args.clone();
    if let Some(old) = &old.network
        && args.attach.network.as_ref() == Some(&old.network)
    {
        args.attach.address = args.attach.address.or(old.address);
        args.attach.publish = args.attach.publish.or_else(|| Some(old.publish.clone()));
    }
    network(&args, home, !old.from_memory || args.cold)
}

/// A guest that goes on from memory has seen its CPU already.
fn check_cpu(cpu: CpuTemplate, profile: &MachineProfile) -> Result<(), Failure> {
    let more = cpu.excess(&profile.cpuid);
    if more.is_empty() {
        return Ok(());
    }
    let why = format!("its memory is that of a guest whose CPU has more: {}", more.join(", "));
    let way_out =
        format!("build the base with --cpu {}, or boot the kernel with --cold", cpu.name());
    Err(Failure::new(Exit::Usage, format!("--cpu {}", cpu.name()), why, way_out))
}

/// A flag that asks for what a base with memory is not.
fn contradicts(flag: &str, has: &str, cold: bool) -> Failure {
    let way_out =
        if cold { "leave it out, or boot the kernel with --cold" } else { "leave it out" };
    Failure::new(Exit::Usage, flag, format!("VMs of this base have {has}"), way_out)
}

/// Checks that an existing VM is here and is what the flags say. What only concerns this host, or
/// the next boot, may change.
fn start_again(
    dir: &VmDir,
    args: &VmRunArgs,
    record: &Record,
    base: Option<&Base>,
    home: &Home,
) -> Result<(), Failure> {
    let what = format!("VM {}", args.name);
    if matches!(record.state, State::Released { .. } | State::Declined { .. }) {
        let way_out =
            format!("run it where it is, or `howdah vm rm {}` to reuse the name", args.name);
        return Err(Failure::new(Exit::Conflict, what, record, way_out));
    }
    let old = dir.config()?;
    let fixed = [
        ("base", base.is_some_and(|b| b.id().to_string() != old.base)),
        ("memory", args.memory_mib.is_some_and(|m| m != old.memory_mib)),
        ("vcpus", args.vcpus.is_some_and(|v| v != old.vcpus)),
        ("mac", old.mac.is_some() && args.mac.is_some_and(|m| Some(m.to_string()) != old.mac)),
    ];
    if let Some((flag, _)) = fixed.iter().find(|(_, differs)| *differs) {
        let why = format!("it exists, with another {flag}");
        let way_out = format!("start it without the flag, or `howdah vm rm {}` first", args.name);
        return Err(Failure::new(Exit::Conflict, what, why, way_out));
    }
    if old.from_memory && !args.cold {
        if args.cpu.is_some_and(|cpu| Some(cpu) != old.cpu) {
            return Err(contradicts("--cpu", "the CPU that their memory has seen", true));
        }
        // It was never started. What its memory has cannot change.
        if args.append.as_ref().is_some_and(|text| !text.is_empty()) {
            return Err(contradicts("--append", "a kernel that has started already", true));
        }
        if args.has_network() && old.mac.is_none() {
            return Err(contradicts("--tap and --network", "no network device", true));
        }
    }
    let mut new = old.clone();
    new.from_memory &= !args.cold;
    new.keep_free_pages = args.keep_free_pages;
    if args.has_network() {
        new.tap.clone_from(&args.tap);
        new.network = network_again(args, home, &old)?;
        let mac = args.mac.unwrap_or_else(|| Mac::of(args.name.as_ref()));
        new.mac.get_or_insert_with(|| mac.to_string());
    }
    if let Some(append) = &args.append {
        new.append.clone_from(append);
    }
    new.cpu = args.cpu.or(old.cpu);
    new.limits = args.limits.over(old.limits);
    new.limits.check(new.memory_mib)?;
    if new == old { Ok(()) } else { dir.write_config(&new) }
}
