//! `howdah vm`: what is not run or console.

use std::{path::Path, sync::Arc, time::Duration};

use guest_images::overlay::Overlay;
use howdah_api::Vm;
use serde::Serialize;

use crate::{
    cli::VmCommand,
    cloudlet::Cloudlet,
    commands::{base, console, logs, run, takeover},
    control::{Request, client},
    disk,
    failure::{Exit, Failure, one_line},
    home::{Home, VmDir, VmName},
    lock::Probe,
    output::{Output, bytes, table},
    partial::Partial,
    peers::name_all,
};

/// How long the export of a disk may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs a `howdah vm` command.
pub(crate) fn run(
    command: VmCommand,
    cloudlet: &Cloudlet,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let home = cloudlet.home();
    match command {
        VmCommand::Run(args) => run::run(*args, cloudlet, output, verbose),
        VmCommand::Ls => list(cloudlet, output),
        VmCommand::Inspect(vm) => inspect(&vm.name, cloudlet, output),
        VmCommand::Console(vm) => console::attach(&home.existing(&vm.name)?, output),
        VmCommand::Logs(args) => logs::show(&home.existing(&args.name)?, &args, output),
        VmCommand::Pause(vm) => {
            cloudlet.pause(&vm.name)?;
            say(output, &vm.name, "paused")
        }
        VmCommand::Resume(vm) => {
            cloudlet.resume(&vm.name)?;
            say(output, &vm.name, "running")
        }
        VmCommand::Stop { vm, force } => {
            cloudlet.stop(&vm.name, force)?;
            say(output, &vm.name, "stopped")
        }
        VmCommand::Rm(vm) => {
            cloudlet.remove(&vm.name)?;
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

fn kept(vm: &Vm) -> Option<String> {
    vm.kept_bytes.map(|kept| format!("keeps {} for its way back", bytes(kept)))
}

fn list(cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let seen = cloudlet.vms()?;
    let peers = cloudlet.peers()?;
    let known = peers.iter().map(|peer| (&peer.key, &peer.name));
    output.list(
        &seen,
        |vm| vm.name.clone(),
        |seen| {
            let rows: Vec<_> = seen
                .iter()
                .map(|vm| {
                    let config = vm.config.as_ref();
                    [
                        vm.name.clone(),
                        vm.state.name().to_owned(),
                        config.map_or("-".into(), |c| c.vcpus.to_string()),
                        config.map_or("-".into(), |c| format!("{} MiB", c.memory_mib)),
                        match (&vm.record, vm.problems.first()) {
                            (_, Some(problem)) => one_line(problem),
                            (Some(record), None) => {
                                let kept = kept(vm).map(|kept| format!("; {kept}"));
                                let owner = name_all(known.clone(), &record.ownership);
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

fn inspect(name: &VmName, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let vm = cloudlet.vm(name)?;
    // Where files of another host are would help nobody here.
    let dir = cloudlet.elsewhere().is_none().then(|| cloudlet.home().vm(name));
    output.result(&vm, |vm| {
        let mut lines = vec![format!("VM {}: {}", vm.name, vm.state.name())];
        let mut line = |key: &str, value: String| lines.push(format!("  {key:<10} {value}"));
        if let Some(record) = &vm.record {
            line("id", record.vm_id.clone());
            line("ownership", record.ownership.clone());
        }
        if let Some(kept) = kept(vm) {
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
        if let Some(dir) = &dir {
            line("files", dir.path().display().to_string());
            if vm.last_report.is_some() {
                line("report", dir.report().display().to_string());
            }
        }
        vm.problems.iter().for_each(|problem| line("problem", problem.clone()));
        lines.join("\n")
    });
    Ok(())
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
