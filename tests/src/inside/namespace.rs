//! Work done in another network namespace.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

/// Where `ip netns add` keeps its namespaces.
const NETNS_DIR: &str = "/run/netns";

/// A network namespace by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Namespace(pub(crate) &'static str);

impl Namespace {
    /// The file that stands for it.
    pub(crate) fn path(self) -> PathBuf {
        Path::new(NETNS_DIR).join(self.0)
    }

    /// Runs `work` on a thread of its own that is in the namespace.
    pub(crate) fn within<T: Send>(self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter the namespace {}", self.0))?;
                work()
            });
            thread.join().map_err(|_| anyhow!("a thread in {} panicked", self.0))?
        })
    }

    /// A command that will run in the namespace.
    pub(crate) fn command(self, program: &Path) -> Result<Command> {
        use std::os::unix::process::CommandExt;
        let file = self.open()?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns is called, a plain system call, on a descriptor
        // that the closure owns.
        unsafe {
            command
                .pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
        }
        Ok(command)
    }

    /// Processes in the namespace.
    pub(crate) fn processes(self) -> Result<Vec<i32>> {
        use std::os::unix::fs::MetadataExt;
        let own = self.open()?.metadata()?.ino();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").context("cannot read /proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
            // A process that ended meanwhile has no namespace any more.
            let namespace = std::fs::metadata(format!("/proc/{pid}/ns/net"));
            if namespace.is_ok_and(|meta| meta.ino() == own) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    fn open(self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("there is no namespace {}", path.display()))
    }
}
