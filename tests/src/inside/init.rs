//! The lab host's first process: mounts, modules, shares; then the job's command; then power off.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid, sync},
};

use super::copy::copy_tree;
use crate::machine::job::{
    JOB_PATH, Job, OUT_TAG, PORT_REPORT, PORT_STDERR, PORT_STDOUT, Report, Share,
};

/// How long the virtio-serial ports may take to appear.
const PORTS_APPEAR: Duration = Duration::from_secs(10);

/// Options of a 9p mount: large messages, since each is an exit from the virtual machine.
const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=512000";

/// Runs as the lab host's first process. Never returns: the machine powers off.
pub(crate) fn main() -> ! {
    if let Err(error) = serve() {
        // The console is all there is when even the report port is missing.
        eprintln!("lab host: {error:#}");
    }
    sync();
    let error = reboot(RebootMode::RB_POWER_OFF).err();
    eprintln!("lab host: cannot power off: {error:?}");
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

fn serve() -> Result<()> {
    mount_system()?;
    let job = fs::read(JOB_PATH).with_context(|| format!("cannot read {JOB_PATH}"))?;
    let job: Job = serde_json::from_slice(&job).context("the job is malformed")?;
    for module in &job.modules {
        load_module(module)?;
    }
    for module in &job.optional_modules {
        if Path::new("/dev/kvm").exists() {
            break;
        }
        // Made for another CPU: the next one may fit.
        let _ = load_module(module);
    }
    hold_kvm();
    let mut reports = open_port(PORT_REPORT)?;
    let report = match prepare_and_run(&job, &mut reports) {
        Ok(status) => Report::Exit { status },
        Err(error) => Report::Failed { problem: format!("{error:#}") },
    };
    sync();
    send(&mut reports, &report)
}

/// Keeps one VM with one vCPU open as long as the lab host lives.
///
/// KVM patches the kernel's code when the first VM or local APIC comes and when the last one goes.
/// Under QEMU's emulation with several CPUs, a CPU may go on for ever with the code of a half-done
/// patch: the lab host then spins in its breakpoint handler. While this VM is there, no VM that a
/// scenario makes is the first or the last.
fn hold_kvm() {
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xae60;
    const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
    let Ok(kvm) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else { return };
    // SAFETY: the three calls take a number, not a pointer, and make new descriptors.
    let made = unsafe {
        let vm = libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0);
        libc::ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0 && libc::ioctl(vm, KVM_CREATE_VCPU, 0) >= 0
    };
    if !made {
        eprintln!("lab host: cannot hold a VM open: {}", std::io::Error::last_os_error());
    }
}

fn prepare_and_run(job: &Job, reports: &mut File) -> Result<i32> {
    install_busybox()?;
    fs::write("/proc/sys/kernel/hostname", "lab").context("cannot set the host name")?;
    link_up("lo")?;
    mount_9p(OUT_TAG, Path::new("/out"), MsFlags::empty())?;
    for share in &job.shares {
        bring_share(share)?;
    }
    let uptime = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let kernel = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let up = Report::Up {
        uptime_ms: Duration::from(uptime).as_millis() as u64,
        kernel,
        kvm: Path::new("/dev/kvm").exists(),
    };
    send(reports, &up)?;
    run(job)
}

fn send(reports: &mut File, report: &Report) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    reports.write_all(&line).context("cannot report to the lab")
}

fn mount_system() -> Result<()> {
    let none = MsFlags::empty();
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // The root is a tmpfs limited to half of RAM: images of guests need more.
    mount_at("none", "/", "", MsFlags::MS_REMOUNT, Some("size=90%"))?;
    mount_at("dev", "/dev", "devtmpfs", none, None)?;
    mount_at("proc", "/proc", "proc", none, None)?;
    mount_at("sys", "/sys", "sysfs", none, None)?;
    mount_at("run", "/run", "tmpfs", quiet, Some("mode=755,size=90%"))?;
    mount_at("debug", "/sys/kernel/debug", "debugfs", none, None)?;
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
    }
    mount_at("pts", "/dev/pts", "devpts", none, None)?;
    mount_at("shm", "/dev/shm", "tmpfs", quiet, Some("size=90%"))
}

fn mount_at(what: &str, at: &str, kind: &str, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(what), at, Some(kind), flags, data)
        .with_context(|| format!("cannot mount {kind} at {at}"))
}

fn mount_9p(tag: &str, at: &Path, flags: MsFlags) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("cannot make {}", at.display()))?;
    mount(Some(tag), at, Some("9p"), flags, Some(NINE_P))
        .with_context(|| format!("cannot mount the share {tag} at {}", at.display()))
}

fn bring_share(share: &Share) -> Result<()> {
    let at = Path::new(&share.at);
    if !share.copy {
        return mount_9p(&share.tag, at, MsFlags::MS_RDONLY);
    }
    let staging = PathBuf::from("/run/lab").join(&share.tag);
    mount_9p(&share.tag, &staging, MsFlags::MS_RDONLY)?;
    copy_tree(&staging, at)?;
    nix::mount::umount(&staging).with_context(|| format!("cannot unmount {}", staging.display()))
}

/// Loads a module file; one that is already there is no error.
fn load_module(path: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
    match nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("cannot load {path}")),
    }
}

/// Links to busybox for all commands that are not there as such.
fn install_busybox() -> Result<()> {
    let list = Command::new("/bin/busybox").arg("--list").output().context("cannot run busybox")?;
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        let taken = ["/usr/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(applet).exists());
        if !taken {
            let link = Path::new("/bin").join(applet);
            std::os::unix::fs::symlink("busybox", &link)
                .with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    Ok(())
}

fn link_up(name: &str) -> Result<()> {
    let status = Command::new("/usr/sbin/ip")
        .args(["link", "set", name, "up"])
        .status()
        .context("cannot run ip")?;
    if !status.success() {
        bail!("cannot bring the interface {name} up");
    }
    Ok(())
}

/// Opens the virtio-serial port of this name as soon as it is there.
fn open_port(name: &str) -> Result<File> {
    let started = Instant::now();
    loop {
        if let Some(device) = find_port(name)? {
            return OpenOptions::new()
                .write(true)
                .open(&device)
                .with_context(|| format!("cannot open {}", device.display()));
        }
        if started.elapsed() > PORTS_APPEAR {
            bail!("there is no virtio-serial port {name}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn find_port(name: &str) -> Result<Option<PathBuf>> {
    let ports = Path::new("/sys/class/virtio-ports");
    for entry in fs::read_dir(ports).with_context(|| format!("cannot read {}", ports.display()))? {
        let entry = entry?;
        // A port's name comes a little after the port.
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if found.trim() == name && device.exists() {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Runs the command and reaps every orphan until it has ended.
fn run(job: &Job) -> Result<i32> {
    let [program, args @ ..] = job.command.as_slice() else { bail!("the command is empty") };
    let (stdout, stderr) = (open_port(PORT_STDOUT)?, open_port(PORT_STDERR)?);
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("TERM", "dumb")
        .env("RUST_BACKTRACE", "1")
        .envs(job.env.iter().map(|(key, value)| (key, value)))
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    let child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let child = Pid::from_raw(child.id() as i32);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, status)) if pid == child => return Ok(status),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(128 + signal as i32);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for the command"),
        }
    }
}
