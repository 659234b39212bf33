//! `howdah vm`: what is not run or console.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use guest_images::overlay::Overlay;
use handoff::ownership::{Record, State};
use serde::Serialize;

use crate::{
    cgroup,
    cli::VmCommand,
    commands::{base, console, logs, run, takeover},
    control::{Request, Status, client},
    disk,
    failure::{Exit, Failure, one_line},
    home::{Home, VmConfig, VmDir, VmName, read_json},
    lock::Probe,
    output::{Output, bytes, table},
    partial::Partial,
    peers::BookFile,
    visit,
};

/// How long a guest may take to stop its vCPUs and drain its devices.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stop may take: it flushes the disk.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a process may take to end after it said that it stopped.
const EXIT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long after it said that the guest moved: it writes what it keeps.
pub(crate) const KEEP_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the export of a disk may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs a `howdah vm` command.
pub(crate) fn run(
    command: VmCommand,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    match command {
        VmCommand::Run(args) => run::run(args, home, output, verbose),
        VmCommand::Ls => list(home, output),
        VmCommand::Inspect(vm) => inspect(&home.existing(&vm.name)?, output),
        VmCommand::Console(vm) => console::attach(&home.existing(&vm.name)?, output),
        VmCommand::Logs(args) => logs::show(&home.existing(&args.name)?, &args, output),
        VmCommand::Pause(vm) => {
            let dir = home.existing(&vm.name)?;
            client::call(&dir, Request::Pause, PAUSE_TIMEOUT)?;
            say(output, &vm.name, "paused")
        }
        VmCommand::Resume(vm) => {
            let dir = home.existing(&vm.name)?;
            client::call(&dir, Request::Resume, PAUSE_TIMEOUT)?;
            say(output, &vm.name, "running")
        }
        VmCommand::Stop { vm, force } => {
            stop(&home.existing(&vm.name)?, force)?;
            say(output, &vm.name, "stopped")
        }
        VmCommand::Rm(vm) => {
            remove(&home.existing(&vm.name)?)?;
            cgroup::remove(home, &vm.name);
            say(output, &vm.name, "removed")
        }
        VmCommand::ExportDisk { vm, file } => {
            export(&home.existing(&vm.name)?, &file, home, output)
        }
        VmCommand::Takeover { vm, reason } => {
            takeover::take(&home.existing(&vm.name)?, &reason)?;
            say(output, &vm.name, "taken over")
        }
    }
}

#[derive(Serialize)]
struct Said<'a> {
    vm: &'a VmName,
    state: &'static str,
}

/// The result of a command that changes one VM's state.
pub(crate) fn say(output: Output, vm: &VmName, state: &'static str) -> anyhow::Result<()> {
    output.done(&Said { vm, state }, |said| format!("VM {} {}", said.vm, said.state));
    Ok(())
}

/// All that is known of a VM.
#[derive(Serialize)]
struct Seen {
    name: VmName,
    /// What the process does, or what the record allows.
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<RecordSeen>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<VmConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_report: Option<serde_json::Value>,
    /// What is kept of a VM that was handed off, for its way back.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<String>,
}

impl Seen {
    fn kept(&self) -> Option<String> {
        self.kept_bytes.map(|kept| format!("keeps {} for its way back", bytes(kept)))
    }
}

#[derive(Serialize)]
struct RecordSeen {
    vm_id: String,
    epoch: u64,
    ownership: String,
    may_run: bool,
}

impl From<&Record> for RecordSeen {
    fn from(record: &Record) -> Self {
        Self {
            vm_id: record.vm.to_string(),
            epoch: record.epoch.0,
            // A peer's words may be in it.
            ownership: one_line(&record.to_string()),
            may_run: record.may_run(),
        }
    }
}

/// Looks at a VM without disturbing it. Damage is shown, not stumbled over.
fn look(dir: &VmDir) -> Seen {
    let mut problems = Vec::new();
    let mut alive = matches!(dir.probe(), Ok(Probe::Held { .. }));
    let process = match alive.then(|| client::status(dir)) {
        Some(Ok(status)) => Some(status),
        // It may have ended since.
        Some(Err(failure)) if matches!(dir.probe(), Ok(Probe::Held { .. })) => {
            problems.push(failure.message);
            None
        }
        _ => {
            alive = false;
            None
        }
    };
    let mut noted = |failure: Failure| problems.push(failure.message);
    let record = dir.record().map_err(&mut noted).ok().flatten();
    let config = record.as_ref().and_then(|_| dir.config().map_err(&mut noted).ok());
    let state = match (&process, &record) {
        (Some(status), _) => status.phase.name(),
        (None, _) if alive => "not answering",
        (None, None) if problems.is_empty() => "unfinished",
        (None, None) => "damaged",
        (None, Some(record)) => match record.state {
            State::Owner(_) => "stopped",
            State::HandingOff { .. } => "interrupted",
            State::Committed { .. } => "in-doubt",
            State::Released { .. } => "handed-off",
            State::Receiving { .. } => "interrupted",
            State::Prepared { .. } => "prepared",
            State::Declined { .. } => "declined",
        },
    };
    let last_report = read_json(&dir.report()).ok();
    Seen {
        name: dir.name().clone(),
        state: state.to_owned(),
        process,
        record: record.as_ref().map(RecordSeen::from),
        config,
        last_report,
        kept_bytes: Some(visit::kept_bytes(dir)).filter(|kept| *kept > 0),
        problems,
    }
}

fn list(home: &Home, output: Output) -> anyhow::Result<()> {
    let seen: Vec<Seen> =
        home.vms()?.iter().map(|dir| Seen { last_report: None, ..look(dir) }).collect();
    let book = BookFile::of(home).read()?;
    output.list(
        &seen,
        |vm| vm.name.clone(),
        |seen| {
            let rows: Vec<_> = seen
                .iter()
                .map(|vm| {
                    let config = vm.config.as_ref();
                    [
                        vm.name.to_string(),
                        vm.state.clone(),
                        config.map_or("-".into(), |c| c.vcpus.to_string()),
                        config.map_or("-".into(), |c| format!("{} MiB", c.memory_mib)),
                        match (&vm.record, vm.problems.first()) {
                            (_, Some(problem)) => one_line(problem),
                            (Some(record), None) => {
                                let kept = vm.kept().map(|kept| format!("; {kept}"));
                                let owner = book.name_all(&record.ownership);
                                format!("{owner}{}", kept.unwrap_or_default())
                            }
                            (None, None) if vm.process.is_some() => "nobody's yet".into(),
                            (None, None) => "nobody's: may be removed".into(),
                        },
                    ]
                })
                .collect();
            if rows.is_empty() {
                return "no VMs; `howdah vm run NAME --base BASE` makes one".into();
            }
            table(["NAME", "STATE", "VCPUS", "MEMORY", "OWNERSHIP"], &rows)
        },
    );
    Ok(())
}

fn inspect(dir: &VmDir, output: Output) -> anyhow::Result<()> {
    output.result(&look(dir), |vm| {
        let mut lines = vec![format!("VM {}: {}", vm.name, vm.state)];
        let mut line = |key: &str, value: String| lines.push(format!("  {key:<10} {value}"));
        if let Some(record) = &vm.record {
            line("id", record.vm_id.clone());
            line("ownership", record.ownership.clone());
        }
        if let Some(kept) = vm.kept() {
            line("visit", kept);
        }
        if let Some(config) = &vm.config {
            line("base", config.base.clone());
            line("machine", format!("{} vCPUs, {} MiB", config.vcpus, config.memory_mib));
            let net = config.mac.as_ref().map(|mac| {
                format!("{mac} on {}", config.tap.as_deref().unwrap_or("no TAP device here"))
            });
            line("network", net.unwrap_or_else(|| "none".into()));
        }
        if let Some(process) = &vm.process {
            line("process", process.pid.to_string());
            if let Some(p) = &process.progress {
                line(
                    "handoff",
                    format!(
                        "to {}: {}, round {}, {} bytes sent",
                        p.peer, p.stage, p.round, p.sent_bytes
                    ),
                );
            }
        }
        line("files", dir.path().display().to_string());
        if vm.last_report.is_some() {
            line("report", dir.report().display().to_string());
        }
        vm.problems.iter().for_each(|problem| line("problem", problem.clone()));
        lines.join("\n")
    });
    Ok(())
}

fn stop(dir: &VmDir, force: bool) -> anyhow::Result<()> {
    client::call(dir, Request::Stop { force }, STOP_TIMEOUT)?;
    await_exit(dir, EXIT_TIMEOUT)?;
    Ok(())
}

/// Waits until the VM's process is gone: its last answer comes before it ends, and the next command
/// shall find it gone.
pub(crate) fn await_exit(dir: &VmDir, limit: Duration) -> Result<(), Failure> {
    let since = Instant::now();
    while dir.probe()? != Probe::Free {
        if since.elapsed() > limit {
            let what = format!("VM {}", dir.name());
            let why = format!("it stopped, but its process has not ended after {limit:?}");
            let way_out = format!("see {}", dir.vm_log().display());
            return Err(Failure::new(Exit::Failed, what, why, way_out));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn remove(dir: &VmDir) -> anyhow::Result<()> {
    let lock = dir.lock()?;
    let name = dir.name();
    let undecided = match dir.record()?.map(|record| (record.to_string(), record.state)) {
        Some((
            text,
            State::Committed { .. }
            | State::Receiving { .. }
            | State::Prepared { .. }
            | State::HandingOff { .. },
        )) => Some(text),
        _ => None,
    };
    if let Some(why) = undecided {
        let way_out = format!(
            "`howdah recover {name}` settles it with the peer, `howdah vm takeover {name}` without"
        );
        return Err(Failure::new(Exit::Conflict, format!("VM {name}"), why, way_out).into());
    }
    Ok(dir.remove(lock)?)
}

fn export(dir: &VmDir, file: &Path, home: &Home, output: Output) -> anyhow::Result<()> {
    let file = std::path::absolute(file).map_err(|e| Failure::file("write", file, &e))?;
    if matches!(dir.probe()?, Probe::Held { .. }) {
        let path = file.to_str().ok_or_else(|| {
            Failure::new(Exit::Usage, file.display(), "not a UTF-8 path", "choose another")
        })?;
        let written = Partial::beside(&file)?;
        let request = Request::ExportDisk { path: path.to_owned() };
        client::fill(dir, request, written.file(), EXPORT_TIMEOUT)?;
        written.finish(&file)?;
    } else {
        let _lock = dir.lock()?;
        let config = dir.config()?;
        let base = Arc::new(base::store(home)?.get(&config.base).map_err(base::store_failure)?);
        let overlay = Overlay::open(dir.path(), base)
            .map_err(|e| Failure::plain(Exit::Corrupt, format!("disk of VM {}", dir.name()), e))?;
        disk::export(&overlay, &file)?;
    }
    #[derive(Serialize)]
    struct Exported<'a> {
        vm: &'a VmName,
        file: &'a Path,
    }
    output.done(&Exported { vm: dir.name(), file: &file }, |e| {
        format!("disk of VM {} is in {}", e.vm, e.file.display())
    });
    Ok(())
}
