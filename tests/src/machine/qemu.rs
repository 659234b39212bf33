//! Runs one lab host: starts QEMU, carries the command's output, and always ends QEMU.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};

use super::{
    host::{Accelerator, HostKernel},
    job::{OUT_TAG, PORT_REPORT, PORT_STDERR, PORT_STDOUT, Report},
    libraries::find_tool,
};

/// The program that runs a lab host.
const QEMU: &str = "qemu-system-x86_64";

/// How long a lab host may take to power off after its command ended.
const POWER_OFF: Duration = Duration::from_secs(20);

/// How many lines of the console explain a lab host's death.
const LAST_WORDS: usize = 8;

/// A lab host about to run.
pub(crate) struct Machine<'a> {
    /// How its instructions run.
    pub(crate) accelerator: Accelerator,
    /// Its kernel.
    pub(crate) kernel: &'a HostKernel,
    /// Its initramfs, with the job in it.
    pub(crate) initramfs: &'a Path,
    /// Its RAM.
    pub(crate) memory_mib: u32,
    /// Its CPUs.
    pub(crate) cpus: u8,
    /// When it is ended whatever it does.
    pub(crate) timeout: Duration,
    /// Read-only directories by 9p tag.
    pub(crate) shares: &'a [(String, PathBuf)],
    /// Takes what the command writes to `/out`.
    pub(crate) out: &'a Path,
    /// Takes the serial console.
    pub(crate) console: &'a Path,
}

/// What happened on one of the channels from the lab host.
enum Event {
    Report(Report),
    Garbled(String),
    ReportsEnded,
}

/// Ends QEMU when the lab is done with it, however that comes.
struct Reaper(Child);

impl Drop for Reaper {
    fn drop(&mut self) {
        // Either may fail only because QEMU has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lab host started, and then came to no end of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct HostLost(String);

/// The kernel's command line. No mitigations: they cost much in emulation and guard nothing here.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 softlockup_panic=1 \
    sysctl.kernel.hung_task_timeout_secs=60 quiet loglevel=4 mitigations=off tsc=reliable";
/// How often the console is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// A host that is not up by then never will be. Emulated ones take ten seconds; some hang before their
/// kernel's first word, with both CPUs busy.
const UP_WITHIN: Duration = Duration::from_secs(75);
/// What a kernel says, after 20 s and more, of a CPU that is lost, and after a minute of tasks that wait
/// for it.
const STUCK: [&str; 3] = ["BUG: soft lockup", "kthread starved for", "blocked for more than"];
/// What says where and why a kernel panicked.
const PANIC: [&str; 4] = ["Kernel panic", "BUG:", "Oops:", "RIP: 0010"];

impl Machine<'_> {
    /// Boots the host, runs the job, and returns the command's exit status. The command's output
    /// goes to `stdout` and `stderr` while it runs.
    pub(crate) fn run(
        &self,
        stdout: impl Write + Send + 'static,
        stderr: impl Write + Send + 'static,
    ) -> Result<i32> {
        let started = Instant::now();
        let (mut qemu, [reports, out, err]) = self.start()?;
        let (events, inbox) = channel();
        thread::spawn(move || forward_reports(reports, &events));
        let out = thread::spawn(move || copy_flushing(out, stdout));
        let err = thread::spawn(move || copy_flushing(err, stderr));
        let status = self.watch(&inbox, started);
        if status.is_ok() {
            wait_for(&mut qemu.0, POWER_OFF)?;
        }
        drop(qemu);
        for stream in [out, err] {
            // A reader that went away (`lab exec ... | head`) is not the lab's failure.
            let _ = stream.join();
        }
        status
    }

    /// Follows the reports to the command's exit status.
    fn watch(&self, inbox: &Receiver<Event>, started: Instant) -> Result<i32> {
        let mut up = false;
        loop {
            let left = self.timeout.saturating_sub(started.elapsed());
            match inbox.recv_timeout(left.min(LOOK)) {
                Ok(Event::Report(Report::Up { uptime_ms, kernel, kvm })) => {
                    up = true;
                    let after = started.elapsed().as_secs_f32();
                    eprintln!(
                        "lab: host up after {after:.1} s (its own clock: {uptime_ms} ms), kernel \
                         {kernel}, {}",
                        if kvm { "KVM works in it" } else { "WITHOUT /dev/kvm" }
                    );
                }
                Ok(Event::Report(Report::Exit { status })) => return Ok(status),
                Ok(Event::Report(Report::Failed { problem })) => {
                    bail!("the lab host cannot run the command: {problem}")
                }
                Ok(Event::Garbled(line)) => bail!("the lab host sent a garbled report: {line}"),
                Ok(Event::ReportsEnded) | Err(RecvTimeoutError::Disconnected) => {
                    let when = if up { "while the command ran" } else { "before it was up" };
                    let words = self.last_words();
                    return Err(HostLost(format!("the lab host died {when}: {words}")).into());
                }
                Err(RecvTimeoutError::Timeout) if left > LOOK => {
                    if let Some(stuck) = self.stuck() {
                        let words = self.last_words();
                        return Err(HostLost(format!(
                            "the lab host stands still: {stuck}: {words}"
                        ))
                        .into());
                    }
                    if !up && started.elapsed() > UP_WITHIN {
                        let (limit_s, words) = (UP_WITHIN.as_secs(), self.last_words());
                        return Err(HostLost(format!(
                            "the lab host was not up after {limit_s} s: {words}"
                        ))
                        .into());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let (limit_s, words) = (self.timeout.as_secs(), self.last_words());
                    let state = if up { "the command still running" } else { "not even up" };
                    return Err(HostLost(format!(
                        "the lab host was ended after {limit_s} s (--timeout-s), {state}: {words}"
                    ))
                    .into());
                }
            }
        }
    }

    fn start(&self) -> Result<(Reaper, [UnixStream; 3])> {
        let program = find_tool(QEMU).with_context(|| {
            format!("{QEMU} is not installed: install the package qemu-system-x86")
        })?;
        let mut ours = Vec::new();
        let mut theirs: Vec<OwnedFd> = Vec::new();
        for _ in 0..3 {
            let (here, there) = UnixStream::pair().context("cannot make a socket pair")?;
            ours.push(here);
            theirs.push(there.into());
        }
        let ours: [UnixStream; 3] =
            ours.try_into().map_err(|_| io::Error::other("three channels were made"))?;
        let errors = self.console.with_file_name("qemu.log");
        let log =
            File::create(&errors).with_context(|| format!("cannot make {}", errors.display()))?;
        let raw: Vec<i32> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(program);
        command.args(self.args(&raw)).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // SAFETY: between fork and exec only prctl and fcntl are called, both async-signal-safe,
        // on descriptors that stay open until spawn has returned; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // The kernel ends QEMU when the lab dies, even by SIGKILL.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                for fd in &raw {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {QEMU}"))?;
        Ok((Reaper(child), ours))
    }

    fn args(&self, channels: &[i32]) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut add = |values: &[&str]| args.extend(values.iter().map(OsString::from));
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", "lab"]);
        add(self.accelerator.qemu_args());
        add(&["-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory_mib)]);
        add(&["-kernel", &self.kernel.image.to_string_lossy()]);
        add(&["-initrd", &self.initramfs.to_string_lossy()]);
        add(&["-append", KERNEL_LINE]);
        add(&["-chardev", &format!("file,id=console,path={}", escaped(self.console))]);
        add(&["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
        for (name, fd) in [PORT_REPORT, PORT_STDOUT, PORT_STDERR].iter().zip(channels) {
            add(&["-chardev", &format!("socket,id={name},fd={fd}")]);
            add(&["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        let shares = self.shares.iter().map(|(tag, dir)| (tag.as_str(), dir.as_path(), true));
        for (tag, dir, read_only) in shares.chain([(OUT_TAG, self.out, false)]) {
            let read_only = if read_only { ",readonly=on" } else { "" };
            let path = escaped(dir);
            let model = "security_model=none,multidevs=remap";
            add(&["-fsdev", &format!("local,id=fs-{tag},path={path},{model}{read_only}")]);
            add(&["-device", &format!("virtio-9p-pci,fsdev=fs-{tag},mount_tag={tag}")]);
        }
        args
    }

    /// What its kernel says of a CPU that does nothing else any more. No scenario gets over that, and
    /// waiting for its end would take minutes.
    fn stuck(&self) -> Option<String> {
        let text = fs::read(self.console).unwrap_or_default();
        stuck_in(&String::from_utf8_lossy(&text)).map(str::to_owned)
    }

    /// The end of the console and what QEMU said, on one line: of a panic, how it began and its name.
    fn last_words(&self) -> String {
        let tail = |path: &Path| {
            let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> =
                text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            if lines.iter().any(|line| line.contains("Kernel panic")) {
                let telling = |line: &&&str| PANIC.iter().any(|words| line.contains(words));
                let mut words: Vec<&str> = lines.iter().filter(telling).copied().collect();
                let (first, last) = (2, words.len().saturating_sub(1));
                if last > first {
                    words.drain(first..last);
                }
                return words.join(" | ");
            }
            let last = lines.len().saturating_sub(LAST_WORDS);
            lines.iter().skip(last).copied().collect::<Vec<_>>().join(" | ")
        };
        let qemu = tail(&self.console.with_file_name("qemu.log"));
        let console = tail(self.console);
        let words = [qemu, console].into_iter().filter(|text| !text.is_empty());
        let words = words.collect::<Vec<_>>().join(" || ");
        // The next host's console takes this one's place.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let kept = self.console.with_file_name(format!("lost-{}.log", since.as_secs()));
        let all = if fs::copy(self.console, &kept).is_ok() { &kept } else { self.console };
        format!("{words} (all of it: {})", all.display())
    }
}

fn stuck_in(console: &str) -> Option<&str> {
    console.lines().map(str::trim).find(|line| STUCK.iter().any(|words| line.contains(words)))
}

/// QEMU's options are split at commas; a doubled one is a literal comma.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn forward_reports(channel: UnixStream, events: &Sender<Event>) {
    for line in BufReader::new(channel).lines() {
        let Ok(line) = line else { break };
        let event = serde_json::from_str(&line).map_or(Event::Garbled(line), Event::Report);
        if events.send(event).is_err() {
            return;
        }
    }
    // Fails only when nobody waits any more.
    let _ = events.send(Event::ReportsEnded);
}

/// Copies until the end, flushing after each piece; goes on reading when nobody takes the output,
/// so that the lab host is never blocked by it.
fn copy_flushing(mut from: UnixStream, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    let mut taken = true;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if taken {
            taken = to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_ok();
        }
    }
}

fn wait_for(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
            return Ok(status);
        }
        if started.elapsed() > limit {
            bail!("the lab host did not power off within {} s", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_has_lost_a_cpu_is_told_from_one_that_complains() {
        let stuck = "[ 88.6] watchdog: BUG: soft lockup - CPU#0 stuck for 45s! [exe:305]";
        let console = format!("[  8.9] kvm [179]: Unhandled WRMSR\n{stuck}\n");
        assert_eq!(stuck_in(&console), Some(stuck));
        let waits = "[605.9] INFO: task ip:517 blocked for more than 61 seconds.";
        assert_eq!(stuck_in(waits), Some(waits));
        assert_eq!(stuck_in("[ 8.9] kvm [179]: Unhandled WRMSR\n[ 9.0] EXT4-fs: mounted"), None);
    }
}
