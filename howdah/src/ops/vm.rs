//! VMs: looking at them, and what is done with one by one request.

use std::time::{Duration, Instant};

use handoff::ownership::{Record, State};
use howdah_api as api;
use howdah_api::{Vm, VmState};

use crate::{
    cgroup,
    cli::Limits,
    control::{self, Phase, Request, Status, client},
    failure::{Exit, Failure, one_line},
    home::{Home, VmConfig, VmDir, read_json},
    lock::Probe,
    net::{self, Attachment},
    visit,
};

/// How long a guest may take to stop its vCPUs and drain its devices.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stop may take: it flushes the disk.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long after it said that the guest moved: it writes what it keeps.
pub(crate) const KEEP_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a process may take to end after it said that it stopped.
const EXIT_TIMEOUT: Duration = Duration::from_secs(20);

impl From<Phase> for VmState {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Running => Self::Running,
            Phase::Paused => Self::Paused,
            Phase::Saving => Self::Saving,
            Phase::Recording => Self::Recording,
            Phase::HandingOff => Self::HandingOff,
            Phase::InDoubt => Self::InDoubt,
            Phase::Receiving => Self::Receiving,
            Phase::Stopping => Self::Stopping,
        }
    }
}

impl From<control::Progress> for api::HandoffProgress {
    fn from(progress: control::Progress) -> Self {
        let control::Progress {
            peer,
            stage,
            round,
            sent_bytes,
            remaining_bytes,
            rate_bytes_per_s,
            predicted_downtime_ms,
        } = progress;
        Self {
            peer,
            stage,
            round,
            sent_bytes,
            remaining_bytes,
            rate_bytes_per_s,
            predicted_downtime_ms,
        }
    }
}

impl From<api::HandoffProgress> for control::Progress {
    fn from(progress: api::HandoffProgress) -> Self {
        let api::HandoffProgress {
            peer,
            stage,
            round,
            sent_bytes,
            remaining_bytes,
            rate_bytes_per_s,
            predicted_downtime_ms,
        } = progress;
        Self {
            peer,
            stage,
            round,
            sent_bytes,
            remaining_bytes,
            rate_bytes_per_s,
            predicted_downtime_ms,
        }
    }
}

impl From<Status> for api::Process {
    fn from(status: Status) -> Self {
        let Status { pid, phase, ownership, epoch, progress } = status;
        Self { pid, phase: phase.into(), ownership, epoch, progress: progress.map(Into::into) }
    }
}

impl From<VmConfig> for api::VmConfig {
    fn from(config: VmConfig) -> Self {
        let VmConfig {
            version,
            base,
            memory_mib,
            vcpus,
            tap,
            mac,
            append,
            cpu,
            network,
            limits,
            from_memory,
            keep_free_pages,
        } = config;
        Self {
            version,
            base,
            memory_mib,
            vcpus,
            tap,
            mac,
            append,
            cpu: cpu.map(String::from),
            network: network.map(Into::into),
            limits: (!limits.is_none()).then(|| limits.into()),
            from_memory,
            keep_free_pages,
        }
    }
}

impl From<Attachment> for api::Attachment {
    fn from(attachment: Attachment) -> Self {
        let Attachment { network, subnet, address, publish } = attachment;
        Self {
            network: network.to_string(),
            subnet: subnet.to_string(),
            address: address.map(|address| address.to_string()),
            publish: publish.iter().map(ToString::to_string).collect(),
        }
    }
}

impl From<Limits> for api::Limits {
    fn from(limits: Limits) -> Self {
        let Limits {
            cpu_max,
            memory_max_mib,
            disk_mib_per_s,
            disk_iops,
            net_mbps,
            net_frames_per_s,
        } = limits;
        Self {
            cpu_max: cpu_max.map(|cpus| cpus.to_string()),
            memory_max_mib,
            disk_mib_per_s,
            disk_iops,
            net_mbps,
            net_frames_per_s,
        }
    }
}

fn record_seen(record: &Record) -> api::Record {
    api::Record {
        vm_id: record.vm.to_string(),
        epoch: record.epoch.0,
        // A peer's words may be in it.
        ownership: one_line(&record.to_string()),
        may_run: record.may_run(),
    }
}

/// Every VM, without its last report.
pub(crate) fn list(home: &Home) -> Result<Vec<Vm>, Failure> {
    Ok(home.vms()?.iter().map(|dir| Vm { last_report: None, ..look(dir) }).collect())
}

/// Looks at a VM without disturbing it. Damage is shown, not stumbled over.
pub(crate) fn look(dir: &VmDir) -> Vm {
    let mut problems = Vec::new();
    let mut alive = matches!(dir.probe(), Ok(Probe::Held { .. }));
    let process = match alive.then(|| client::status(dir)) {
        Some(Ok(status)) => Some(api::Process::from(status)),
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
        (Some(process), _) => process.phase,
        (None, _) if alive => VmState::NotAnswering,
        (None, None) if problems.is_empty() => VmState::Unfinished,
        (None, None) => VmState::Damaged,
        (None, Some(record)) => match record.state {
            State::Owner(_) => VmState::Stopped,
            State::HandingOff { .. } => VmState::Interrupted,
            State::Committed { .. } => VmState::InDoubt,
            State::Released { .. } => VmState::HandedOff,
            State::Receiving { .. } => VmState::Interrupted,
            State::Prepared { .. } => VmState::Prepared,
            State::Declined { .. } => VmState::Declined,
        },
    };
    Vm {
        name: dir.name().to_string(),
        state,
        process,
        record: record.as_ref().map(record_seen),
        config: config.map(Into::into),
        last_report: read_json(&dir.report()).ok(),
        kept_bytes: Some(visit::kept_bytes(dir)).filter(|kept| *kept > 0),
        problems,
    }
}

/// Stops the vCPUs of a running VM. Of one that is paused already nothing changes.
pub(crate) fn pause(dir: &VmDir) -> Result<(), Failure> {
    client::call(dir, Request::Pause, PAUSE_TIMEOUT)
}

/// Lets a paused VM go on.
pub(crate) fn resume(dir: &VmDir) -> Result<(), Failure> {
    client::call(dir, Request::Resume, PAUSE_TIMEOUT)
}

/// Flushes the disk and ends the VM; with `force` even while it is being handed off.
pub(crate) fn stop(dir: &VmDir, force: bool) -> Result<(), Failure> {
    client::call(dir, Request::Stop { force }, STOP_TIMEOUT)?;
    await_exit(dir, EXIT_TIMEOUT)
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

/// Removes a stopped VM with its disk, unless it is undecided who owns it.
pub(crate) fn remove(dir: &VmDir, home: &Home) -> Result<(), Failure> {
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
        return Err(Failure::new(Exit::Conflict, format!("VM {name}"), why, way_out));
    }
    dir.remove(lock)?;
    cgroup::remove(home, name);
    refresh_network(home);
    Ok(())
}

/// Brings published ports, and ways to guests that moved, to what VMs are now. What was done is done: a host that cannot is told of.
pub(crate) fn refresh_network(home: &Home) {
    if let Err(failure) = net::refresh(home) {
        tracing::warn!("{failure}");
    }
}
