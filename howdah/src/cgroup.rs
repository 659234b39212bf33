//! Limits on CPU time and memory of a VM's process, by cgroup v2.
//!
//! ```text
//! PARENT/                 HOWDAH_CGROUP, or /sys/fs/cgroup/howdah where root may make it
//!     cgroup.subtree_control   cpu memory
//!     NAME/               one VM: its process, cpu.max, memory.max
//! ```
//!
//! A process enters its group before it is confined, as it sees no cgroups then, and keeps the files
//! open that its limits are written to: a reception learns of them only from the offer. The group is
//! removed when the VM is, or when its next process comes.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    cli::Limits,
    failure::{Exit, Failure},
    home::{Home, VmName},
};

const MOUNT: &str = "/sys/fs/cgroup";
/// Names another parent: one that is delegated to this user, say.
const PARENT_VARIABLE: &str = "HOWDAH_CGROUP";
/// What must be there of a cgroup v2, and what is needed of it.
const CONTROLLERS: &str = "cgroup.controllers";
const ENABLE: &str = "cgroup.subtree_control";
const NEEDED: [&str; 2] = ["cpu", "memory"];
/// The period in which a quota of CPU time counts: the kernel's own default.
const PERIOD_US: u64 = 100_000;

/// The group of the VM that this process runs, entered.
#[derive(Debug)]
pub(crate) struct Cgroup {
    cpu_max: File,
    memory_max: File,
}

/// Why there is no group.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoCgroup {
    /// The host has none of the right kind.
    #[error(
        "{} is no cgroup v2 with the controllers cpu and memory{}",
        .path.display(),
        if .has.is_empty() { String::new() } else { format!(" (it has: {})", .has) }
    )]
    Kind {
        /// Where they were looked for.
        path: PathBuf,
        /// The controllers that there are.
        has: String,
    },
    /// Not allowed, most likely.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NoCgroup {
    let path = path.to_owned();
    move |source| NoCgroup::Io { what, path, source }
}

/// Where the groups of VMs are, and whether that was said.
fn parent() -> (PathBuf, bool) {
    match std::env::var_os(PARENT_VARIABLE) {
        Some(path) if !path.is_empty() => (path.into(), true),
        _ => (Path::new(MOUNT).join("howdah"), false),
    }
}

/// A VM's group: of several cloudlets on a host each has its own.
fn group(parent: &Path, home: &Home, vm: &VmName) -> PathBuf {
    let home = blake3::hash(home.root().as_os_str().as_encoded_bytes()).to_hex();
    parent.join(format!("{vm}-{}", &home[..8]))
}

/// Makes the parent of all groups, with the controllers that they need.
fn prepare(parent: &Path) -> Result<(), NoCgroup> {
    fs::create_dir_all(parent).map_err(failed("create", parent))?;
    if !has_all(&controllers(parent))
        // What this group may use, the one above it must have given it.
        && let Some(above) = parent.parent().filter(|above| above.join(ENABLE).exists())
    {
        enable(above)?;
    }
    let has = controllers(parent);
    if !has_all(&has) {
        return Err(NoCgroup::Kind { path: parent.to_owned(), has: has.trim().to_owned() });
    }
    enable(parent)
}

/// The controllers that a group may use.
fn controllers(group: &Path) -> String {
    fs::read_to_string(group.join(CONTROLLERS)).unwrap_or_default()
}

fn has_all(controllers: &str) -> bool {
    NEEDED.iter().all(|needed| controllers.split_whitespace().any(|one| one == *needed))
}

fn enable(group: &Path) -> Result<(), NoCgroup> {
    let path = group.join(ENABLE);
    let words = NEEDED.map(|name| format!("+{name}")).join(" ");
    write(&path, &words).map_err(failed("give groups cpu and memory in", &path))
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

impl Cgroup {
    /// Moves this process into the group of its VM.
    pub(crate) fn enter(home: &Home, vm: &VmName) -> Result<Self, NoCgroup> {
        let (parent, said) = parent();
        // Only where there is a cgroup v2 is anything made: a plain directory limits nothing.
        let root = if said { parent.as_path() } else { Path::new(MOUNT) };
        if !root.join(CONTROLLERS).exists() {
            return Err(NoCgroup::Kind { path: root.to_owned(), has: String::new() });
        }
        Self::enter_below(&parent, home, vm)
    }

    fn enter_below(parent: &Path, home: &Home, vm: &VmName) -> Result<Self, NoCgroup> {
        prepare(parent)?;
        let path = group(parent, home, vm);
        // Left by a process that is gone; its limits must not be this one's.
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("create", &path)(e));
            }
            _ => {}
        }
        let open = |name| {
            let path = path.join(name);
            OpenOptions::new().write(true).open(&path).map_err(failed("open", &path))
        };
        let cgroup = Self { cpu_max: open("cpu.max")?, memory_max: open("memory.max")? };
        let procs = path.join("cgroup.procs");
        // Zero is who writes it.
        write(&procs, "0").map_err(failed("move the VM's process by", &procs))?;
        Ok(cgroup)
    }

    /// Holds the VM to its limits, from now on.
    pub(crate) fn apply(&mut self, limits: &Limits) -> io::Result<()> {
        self.cpu_max.write_all(cpu_max(limits).as_bytes())?;
        self.memory_max.write_all(memory_max(limits).as_bytes())
    }
}

fn cpu_max(limits: &Limits) -> String {
    match limits.cpu_max {
        Some(cpus) => format!("{} {PERIOD_US}", u64::from(cpus.milli()) * PERIOD_US / 1000),
        None => format!("max {PERIOD_US}"),
    }
}

fn memory_max(limits: &Limits) -> String {
    limits.memory_max_mib.map_or("max".into(), |mib| (u64::from(mib) << 20).to_string())
}

/// Holds this process to the limits of its VM. `held` is what came of entering a group.
pub(crate) fn limit(
    held: Result<Cgroup, NoCgroup>,
    limits: &Limits,
    vm: &VmName,
) -> Result<(), Failure> {
    if !limits.need_cgroup() {
        // A group whose limits are another's would be worse than none.
        return match held {
            Ok(mut cgroup) => cgroup.apply(limits).map_err(|e| refused(vm, &e)),
            Err(_) => Ok(()),
        };
    }
    let mut cgroup = held.map_err(|e| refused(vm, &e))?;
    cgroup.apply(limits).map_err(|e| refused(vm, &e))
}

fn refused(vm: &VmName, why: &dyn std::fmt::Display) -> Failure {
    let way_out = format!(
        "run it as root on a host with cgroup v2, or name a group that is delegated to this user in \
         {PARENT_VARIABLE}; `howdah vm run {vm} --cpu-max 0 --memory-max-mib 0` does without"
    );
    let what = format!("VM {vm} cannot be held to its limits on CPU and memory");
    Failure::new(Exit::Host, what, why, way_out)
}

/// Removes the group of a VM that has no process any more.
pub(crate) fn remove(home: &Home, vm: &VmName) {
    let path = group(&parent().0, home, vm);
    match fs::remove_dir(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {e}", path.display());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a cgroup as the kernel makes them, as plain files.
    fn fake(dir: &Path, home: &Home, vm: &VmName) -> PathBuf {
        let parent = dir.join("howdah");
        let path = group(&parent, home, vm);
        fs::create_dir_all(&path).unwrap();
        for file in [CONTROLLERS, ENABLE] {
            fs::write(parent.join(file), "cpuset cpu io memory pids\n").unwrap();
        }
        for file in ["cpu.max", "memory.max", "cgroup.procs"] {
            fs::write(path.join(file), "").unwrap();
        }
        parent
    }

    #[test]
    fn a_process_enters_its_group_and_is_limited_later() {
        let dir = tempfile::tempdir().unwrap();
        let (home, vm) = (Home::new(dir.path()).unwrap(), "web".parse().unwrap());
        let parent = fake(dir.path(), &home, &vm);
        let held = Cgroup::enter_below(&parent, &home, &vm).unwrap();
        let path = group(&parent, &home, &vm);
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap();
        assert_eq!((read("cgroup.procs").as_str(), read("cpu.max").as_str()), ("0", ""));
        assert!(fs::read_to_string(parent.join(ENABLE)).unwrap().starts_with("+cpu +memory"));
        let limits =
            Limits { cpu_max: "1.5".parse().ok(), memory_max_mib: Some(600), ..Limits::default() };
        limit(Ok(held), &limits, &vm).unwrap();
        assert_eq!(read("cpu.max"), "150000 100000");
        assert_eq!(read("memory.max"), (600u64 << 20).to_string());
        assert_eq!(memory_max(&Limits::default()), "max");
    }

    #[test]
    fn limits_without_a_cgroup_are_an_error_that_says_the_way_out() {
        let vm: VmName = "web".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        let missing = || Cgroup::enter_below(&dir.path().join("none"), &home, &vm);
        limit(missing(), &Limits::default(), &vm).unwrap();
        let limits = Limits { memory_max_mib: Some(600), ..Limits::default() };
        let failure = limit(missing(), &limits, &vm).unwrap_err();
        assert_eq!(failure.exit, Exit::Host);
        let said = failure.message;
        assert!(said.contains("no cgroup v2") && said.contains("HOWDAH_CGROUP"), "{said}");
    }
}
