//! Drives howdah by its command line, as a user would.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::{
    namespace::Namespace,
    net::{GUEST_MAC, TAP},
};
use crate::scenario::{Side, VmPlan};

/// The verbs of processes that hold a VM.
pub(super) const HOLDERS: [&str; 3] = ["vm-process", "receive-process", "restore-process"];
/// That of the listener.
pub(super) const LISTENER: &str = "receive";
/// Where the lab puts the product.
const HOWDAH: &str = "/usr/local/bin/howdah";
/// The port on which cloudlets receive.
pub(crate) const PORT: u16 = 7070;
/// The guest's name, and its base's.
pub(crate) const VM: &str = "guest";
const BASE: &str = "base";
/// The name of the base with memory that is made of it.
const BASE_WITH_MEMORY: &str = "base-with-memory";
/// How long any command but a handoff may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a guest may take to boot, get ready and become a base.
const BUILDS: Duration = Duration::from_secs(400);
/// How long `howdah receive` may take until it listens.
const LISTENS: Duration = Duration::from_secs(20);
/// The state of a socket that listens, in /proc/net/tcp.
const TCP_LISTEN: &str = "0A";

/// One cloudlet: a namespace and a directory.
pub(crate) struct Cloudlet {
    /// Which.
    pub(crate) side: Side,
    /// howdah's directory.
    pub(crate) home: PathBuf,
    /// Where logs of the scenario go.
    pub(crate) logs: PathBuf,
    /// Put into the environment of every command here.
    pub(crate) env: Vec<(&'static str, String)>,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit status; `None` when a signal ended it.
    pub(crate) status: Option<i32>,
    /// What it wrote to standard output.
    pub(crate) stdout: String,
    /// What it wrote to standard error.
    pub(crate) stderr: String,
}

/// A command that runs, with its output going to files.
pub(crate) struct Running {
    what: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    fn spawn(
        namespace: Namespace,
        env: &[(&'static str, String)],
        args: &[&str],
        logs: &Path,
        name: &str,
    ) -> Result<Self> {
        let (stdout, stderr) =
            (logs.join(format!("{name}.stdout")), logs.join(format!("{name}.stderr")));
        let create = |path: &Path| {
            File::create(path).with_context(|| format!("cannot make {}", path.display()))
        };
        let mut command = namespace.command(Path::new(HOWDAH))?;
        command.envs(env.iter().map(|(name, value)| (name, value)));
        command.args(args).stdin(Stdio::null()).stdout(create(&stdout)?).stderr(create(&stderr)?);
        let what = format!("howdah {}", args.join(" "));
        let child = command.spawn().with_context(|| format!("cannot run {what}"))?;
        Ok(Self { what, child, stdout, stderr })
    }

    /// Whether it has ended.
    pub(crate) fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().with_context(|| format!("{}: cannot wait", self.what))?.is_some())
    }

    /// What it has said so far on standard error.
    pub(crate) fn said(&self) -> String {
        read_text(&self.stderr)
    }

    /// The JSON lines that it has written so far to standard output.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = read_text(&self.stdout);
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self, limit: Duration) -> Result<Ended> {
        let started = Instant::now();
        while !self.ended()? {
            if started.elapsed() > limit {
                // It may end by itself in between.
                let _ = self.child.kill();
                let _ = self.child.wait();
                bail!("{} did not end within {} s: {}", self.what, limit.as_secs(), self.said());
            }
            thread::sleep(Duration::from_millis(10));
        }
        let status = self.child.wait()?.code();
        Ok(Ended { status, stdout: read_text(&self.stdout), stderr: self.said() })
    }
}

impl Ended {
    /// The last line on standard error: the product's one clear line.
    pub(crate) fn complaint(&self) -> String {
        let last = self.stderr.lines().rev().find(|line| !line.trim().is_empty());
        last.unwrap_or("(it said nothing)").trim().to_owned()
    }
}

/// A VM, as a cloudlet lists it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(crate) struct Seen {
    /// What it does.
    pub(crate) state: String,
    /// Who may run it; none while it has no record.
    #[serde(default)]
    pub(crate) record: Option<SeenRecord>,
}

/// Of an ownership record, what can be compared with another cloudlet's.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(crate) struct SeenRecord {
    /// The VM's identity, the same wherever it runs.
    pub(crate) vm_id: String,
    /// How often it has changed hands.
    pub(crate) epoch: u64,
    /// Whether it may run there.
    pub(crate) may_run: bool,
}

impl Cloudlet {
    /// One with nothing in its environment.
    pub(crate) fn new(side: Side, home: PathBuf, logs: &Path) -> Self {
        Self { side, home, logs: logs.to_owned(), env: Vec::new() }
    }

    /// Runs a command to its end; an exit status other than 0 is an error.
    pub(crate) fn howdah(&self, args: &[&str]) -> Result<Ended> {
        self.howdah_within(PATIENCE, args)
    }

    fn howdah_within(&self, limit: Duration, args: &[&str]) -> Result<Ended> {
        let name = args.iter().take(2).copied().collect::<Vec<_>>().join("-");
        let ended = self.start_howdah(args, &name)?.wait(limit)?;
        if ended.status != Some(0) {
            bail!(
                "cloudlet {}: howdah {} ended with {}: {}",
                self.side.letter(),
                args.join(" "),
                ended.status.map_or("a signal".to_owned(), |status| status.to_string()),
                ended.complaint()
            );
        }
        Ok(ended)
    }

    /// Starts a command; its output goes to files named after it.
    pub(crate) fn start_howdah(&self, args: &[&str], name: &str) -> Result<Running> {
        let home = self.home.to_string_lossy().into_owned();
        let all: Vec<&str> = ["--home", &home].into_iter().chain(args.iter().copied()).collect();
        let name = format!("{}-{name}", self.side.letter());
        Running::spawn(self.side.namespace(), &self.env, &all, &self.logs, &name)
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let args: Vec<&str> = ["--json"].into_iter().chain(args.iter().copied()).collect();
        let ended = self.howdah(&args)?;
        serde_json::from_str(&ended.stdout)
            .with_context(|| format!("howdah {} printed no JSON", args.join(" ")))
    }

    /// Learns the key of another cloudlet, and where that listens.
    pub(crate) fn meets(&self, other: &Self) -> Result<()> {
        let shown = other.json(&["identity"])?;
        let key = shown.get("key").and_then(Value::as_str).context("an identity has no key")?;
        let (name, address) = (other.side.letter(), format!("{}:{PORT}", other.side.address()));
        self.howdah(&["peer", "add", name, key, "--address", &address]).map(drop)
    }

    /// Imports the guest's base from an image directory.
    pub(crate) fn import(&self, image: &Path) -> Result<()> {
        let part = |name: &str| image.join(name).to_string_lossy().into_owned();
        let cmdline = fs::read_to_string(image.join("cmdline"))
            .with_context(|| format!("{} has no cmdline", image.display()))?;
        let (disk, kernel, initramfs) = (part("disk.raw"), part("kernel"), part("initramfs"));
        self.howdah(&[
            "base",
            "import",
            BASE,
            "--disk",
            &disk,
            "--kernel",
            &kernel,
            "--initramfs",
            &initramfs,
            "--cmdline",
            cmdline.trim(),
        ])?;
        Ok(())
    }

    /// Boots the imported base and makes one with memory of the guest when it is ready.
    pub(crate) fn build_memory(&self, plan: &VmPlan) -> Result<()> {
        let (memory, vcpus) = (plan.memory_mib.to_string(), plan.vcpus.to_string());
        let timeout_s = BUILDS.as_secs().to_string();
        let mut args =
            vec!["base", "build", "--from", BASE, "--name", BASE_WITH_MEMORY, "--memory-mib"];
        args.extend([&memory, "--vcpus", &vcpus, "--tap", TAP, "--mac", GUEST_MAC]);
        args.extend(["--timeout-s", &timeout_s]);
        if !plan.append.is_empty() {
            args.extend(["--append", &plan.append]);
        }
        self.howdah_within(BUILDS, &args)?;
        Ok(())
    }

    /// Starts the guest in the background.
    pub(crate) fn run_vm(&self, plan: &VmPlan) -> Result<()> {
        if plan.base_memory {
            // The rest of the machine is the base's.
            self.howdah(&["vm", "run", VM, "--base", BASE_WITH_MEMORY, "--tap", TAP, "--detach"])?;
            return Ok(());
        }
        let (memory, vcpus) = (plan.memory_mib.to_string(), plan.vcpus.to_string());
        let mut args = vec![
            "vm",
            "run",
            VM,
            "--base",
            BASE,
            "--memory-mib",
            &memory,
            "--vcpus",
            &vcpus,
            "--tap",
            TAP,
            "--mac",
            GUEST_MAC,
            "--detach",
        ];
        if !plan.append.is_empty() {
            args.extend(["--append", &plan.append]);
        }
        self.howdah(&args)?;
        Ok(())
    }

    /// Records what the guest changes; what howdah says of it.
    pub(crate) fn record(&self, to: &Path, for_s: u64, every_ms: u64) -> Result<Value> {
        let (file, for_text, every) =
            (to.to_string_lossy(), for_s.to_string(), every_ms.to_string());
        let mut args = vec!["--json", "trace", "record", VM, "--for-s", &for_text];
        args.extend(["--every-ms", &every, "-o", &file]);
        let ended = self.howdah_within(Duration::from_secs(for_s) + BUILDS, &args)?;
        serde_json::from_str(&ended.stdout).context("howdah trace record printed no JSON")
    }

    /// Starts `howdah receive`, and waits until it listens.
    pub(crate) fn receive(&self) -> Result<Running> {
        let listen = format!("{}:{PORT}", self.side.address());
        let args = ["--json", "receive", "--listen", &listen, "--tap", TAP];
        let mut running = self.start_howdah(&args, "receive")?;
        let started = Instant::now();
        while !self.side.namespace().within(|| listens(PORT))? {
            if running.ended()? || started.elapsed() > LISTENS {
                bail!("howdah receive does not listen on {listen}: {}", running.said().trim());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    /// States of all VMs here.
    pub(crate) fn states(&self) -> Result<Vec<String>> {
        Ok(self.seen()?.into_iter().map(|vm| vm.state).collect())
    }

    /// Its VMs: what each does, and what its record says.
    pub(crate) fn seen(&self) -> Result<Vec<Seen>> {
        let list = self.json(&["vm", "ls"])?;
        serde_json::from_value(list).context("howdah --json vm ls printed no list of VMs")
    }

    /// The report of the VM's last handoff.
    pub(crate) fn last_report(&self) -> Result<Value> {
        let vm = self.json(&["vm", "inspect", VM])?;
        vm.get("last_report").cloned().context("howdah vm inspect shows no last_report")
    }

    /// Copies howdah's own logs to the scenario's.
    pub(crate) fn keep_logs(&self) {
        let vms = fs::read_dir(self.home.join("vms")).into_iter().flatten().flatten();
        for vm in vms {
            for name in ["console.log", "vm.log", "report.json"] {
                let kept = format!("{}-{name}", self.side.letter());
                // A log that is not there was not written: nothing to keep.
                let _ = fs::copy(vm.path().join(name), self.logs.join(kept));
            }
        }
    }
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Processes of a cloudlet whose command line has one of these words.
pub(super) fn processes_of(side: Side, words: &[&str]) -> Result<Vec<i32>> {
    let mut found = side.namespace().processes()?;
    found.retain(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| words.iter().any(|one| word == one.as_bytes()))
    });
    Ok(found)
}

/// Whether somebody listens on a TCP port in the thread's namespace. A connection to try it would
/// look like a peer.
fn listens(port: u16) -> Result<bool> {
    let table = fs::read_to_string("/proc/thread-self/net/tcp").context("no TCP here")?;
    let local = format!(":{port:04X}");
    Ok(table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|address| address.ends_with(&local))
            && words.nth(1) == Some(TCP_LISTEN)
    }))
}
