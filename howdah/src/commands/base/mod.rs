//! `howdah base`: import, build, list, push, pull, verify, remove.

mod build;
mod disk;
mod oci;
mod sync;

use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    time::Duration,
};

use guest_images::{
    BaseId, Part,
    base::{MACHINE_FILE, MANIFEST_FILE},
    manifest::Manifest,
    store::{ImportSpec, MemorySpec, Progress, Store, StoreError},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::{
    cli::{BaseCommand, BaseImportArgs},
    cloudlet::{Cloudlet, follow},
    failure::{Exit, Failure},
    home::Home,
    ops,
    output::{Output, bytes, table},
    peers::Peer,
};

/// What boots a disk without partitions, with a kernel that was given.
const DEFAULT_CMDLINE: &str = "console=ttyS0 root=/dev/vda rw";
/// No manifest is larger.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;
/// No machine of a base is larger.
const MAX_MACHINE_BYTES: u64 = 64 << 20;

/// Runs a `howdah base` command.
pub(crate) fn run(command: BaseCommand, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let home = cloudlet.home();
    match command {
        BaseCommand::Import(args) => {
            let staging = Staging::new(home)?;
            let spec = if let Some(dir) = &args.from {
                spec_from(args.name, dir)?
            } else if args.oci.is_some() {
                oci::spec(args, &staging, output)?
            } else {
                spec_of(args, &staging, output)?
            };
            import(&spec, home, output)
        }
        BaseCommand::Build(args) => build::run(args, home, output),
        BaseCommand::Ls => list(cloudlet, output),
        BaseCommand::Push(args) => sync::push(&args, cloudlet, output),
        BaseCommand::Pull(args) => sync::pull(&args, cloudlet, output),
        BaseCommand::Verify { name, heal } => verify(&name, heal.as_deref(), cloudlet, output),
        BaseCommand::Gc(args) => sync::gc(&args, cloudlet, output),
        BaseCommand::Rm { name } => remove(&name, cloudlet, output),
    }
}

/// Opens the store of a home.
pub(crate) fn store(home: &Home) -> Result<Store, Failure> {
    Store::open(&home.store()).map_err(|e| Failure::plain(Exit::Failed, "store", e))
}

/// Whether VMs of a base may go from or to a peer.
pub(crate) fn allowed(home: &Home, peer: &Peer, id: BaseId) -> bool {
    peer.allows_base(id, |name| Some(store(home).ok()?.get(name).ok()?.id()))
}

fn spec_of(args: BaseImportArgs, staging: &Staging, output: Output) -> Result<ImportSpec, Failure> {
    let BaseImportArgs { name, disk, kernel, initramfs, cmdline, memory, machine, .. } = args;
    let memory = match memory.zip(machine) {
        Some((ram, machine)) => Some(MemorySpec { ram, machine: read_machine(&machine)? }),
        None => None,
    };
    // Required where there is no --from.
    let given = disk.unwrap_or_default();
    let disk = disk::raw(&given, staging, output)?;
    let Some(kernel) = kernel else {
        let found = disk::boot(&given, &disk, staging)?;
        output.note(&format!("it boots with {}: {}", found.found, found.cmdline));
        let cmdline = cmdline.unwrap_or(found.cmdline);
        let (kernel, initramfs) = (found.kernel, found.initramfs);
        return Ok(ImportSpec { name, disk, kernel, initramfs, cmdline, memory });
    };
    let cmdline = cmdline.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned());
    Ok(ImportSpec { name, disk, kernel, initramfs, cmdline, memory })
}

/// The parts of a base as a store keeps them.
fn spec_from(name: String, dir: &Path) -> Result<ImportSpec, Failure> {
    let path = dir.join(MANIFEST_FILE);
    let json = read_bounded(&path, MAX_MANIFEST_BYTES)?;
    let manifest =
        Manifest::parse(&json).map_err(|e| Failure::plain(Exit::Corrupt, path.display(), e))?;
    let part = |part: Part| dir.join(part.file_name());
    let memory = match manifest.memory {
        Some(_) => {
            let machine = read_machine(&dir.join(MACHINE_FILE))?;
            Some(MemorySpec { ram: part(Part::Memory), machine })
        }
        None => None,
    };
    Ok(ImportSpec {
        name,
        disk: part(Part::Disk),
        kernel: part(Part::Kernel),
        initramfs: manifest.initramfs.map(|_| part(Part::Initramfs)),
        cmdline: manifest.cmdline,
        memory,
    })
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, Failure> {
    use std::io::Read;
    let failed = |e: std::io::Error| Failure::file("read", path, &e);
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn read_machine(path: &Path) -> Result<Vec<u8>, Failure> {
    let machine = read_bounded(path, MAX_MACHINE_BYTES)?;
    let checked = vmm::MachineSnapshot::decode(&machine);
    checked.map_err(|e| Failure::plain(Exit::Corrupt, path.display(), e))?;
    Ok(machine)
}

#[derive(Serialize)]
struct Imported {
    name: String,
    id: String,
}

fn import(spec: &ImportSpec, home: &Home, output: Output) -> anyhow::Result<()> {
    let id = with_bar(output, "importing", |progress| {
        store(home)?.import(spec, progress).map_err(store_failure)
    })?;
    let imported = Imported { name: spec.name.clone(), id: id.to_string() };
    output.done(&imported, |i| format!("base {} is {}", i.name, i.id));
    Ok(())
}

fn list(cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let lines = cloudlet.bases()?;
    output.list(
        &lines,
        |line| line.names.first().unwrap_or(&line.id).clone(),
        |lines| {
            let rows: Vec<_> = lines
                .iter()
                .map(|line| {
                    let state = match (&line.error, line.disk_bytes) {
                        (Some(error), _) => crate::failure::one_line(error),
                        (None, disk) => disk.map(bytes).unwrap_or_default(),
                    };
                    let names =
                        if line.names.is_empty() { "-".into() } else { line.names.join(",") };
                    let memory = line.memory_bytes.map_or("-".into(), bytes);
                    [names, line.id.chars().take(16).collect(), memory, state]
                })
                .collect();
            if rows.is_empty() {
                return "no bases; `howdah base import` or `howdah base build` makes one".into();
            }
            table(["NAME", "ID", "MEMORY", "DISK"], &rows)
        },
    );
    Ok(())
}

#[derive(Serialize)]
struct Named {
    id: String,
}

fn verify(
    name: &str,
    heal: Option<&str>,
    cloudlet: &Cloudlet,
    output: Output,
) -> anyhow::Result<()> {
    let verified = with_bar(output, "verifying", |progress| {
        let Some(daemon) = cloudlet.daemon() else {
            return Ok(ops::base::verify(name, cloudlet.home(), progress)?.to_string());
        };
        let verified = follow(daemon, daemon.verify_base(name)?, |operation| {
            let howdah_api::Progress { done_bytes, total_bytes, .. } = operation.progress;
            progress(Progress { part: Part::Disk, done_bytes, total_bytes });
        })?;
        Ok(verified["id"].as_str().unwrap_or_default().to_owned())
    });
    let id = match (verified, heal) {
        (Err(damage), Some(peer)) if damage.exit == Exit::Corrupt => {
            return sync::heal(name, &damage, peer, cloudlet, output);
        }
        (verified, _) => verified?,
    };
    output.done(&Named { id }, |v| format!("base {} is whole", v.id));
    Ok(())
}

fn remove(name: &str, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let id = cloudlet.remove_base(name)?;
    output.done(&Named { id }, |v| format!("removed base {}", v.id));
    Ok(())
}

/// Whatever a store says names the thing and the way out itself.
pub(crate) fn store_failure(error: StoreError) -> Failure {
    let exit = match &error {
        StoreError::NotFound { .. } => Exit::NotFound,
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Exit::NotFound
        }
        StoreError::Name { .. } | StoreError::Ambiguous { .. } | StoreError::NotAFile { .. } => {
            Exit::Usage
        }
        StoreError::InUse { .. } | StoreError::Changed { .. } => Exit::Conflict,
        StoreError::Io { .. } => Exit::Failed,
        _ => Exit::Corrupt,
    };
    Failure::line(exit, &error.to_string())
}

/// Shows progress on a terminal, nothing elsewhere.
fn with_bar<T>(
    output: Output,
    what: &'static str,
    work: impl FnOnce(&mut dyn FnMut(Progress)) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let shown = !output.is_json() && !output.is_quiet() && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let done = work(&mut |progress| {
        bar.set_message(format!("{what} {}", progress.part));
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    });
    bar.finish_and_clear();
    done
}

/// A directory for what is made on the way, removed whatever comes.
struct Staging(PathBuf);

impl Staging {
    fn new(home: &Home) -> Result<Self, Failure> {
        // In the home, because images are large and /tmp may be memory.
        let path = home.root().join(format!("build.{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|e| Failure::file("create", &path, &e))?;
        Ok(Self(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
