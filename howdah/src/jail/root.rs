//! Namespaces, and a root directory that holds what one VM needs and nothing else.
//!
//! The paths are the same inside as outside, so that messages and records stay true. What is not
//! listed does not exist: no other VM's directory, no other process, no program to run.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{chdir, chroot, pivot_root},
};

/// What may be done with a path inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Looked at.
    Read,
    /// Written too.
    Write,
    /// A device node: opened for reading and writing.
    Device,
}

impl Access {
    fn flags(self) -> MsFlags {
        let common = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        match self {
            Self::Read => common | MsFlags::MS_NODEV | MsFlags::MS_RDONLY,
            Self::Write => common | MsFlags::MS_NODEV,
            Self::Device => common,
        }
    }
}

/// A path that exists inside, if it exists outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) access: Access,
}

/// Why there is no root of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    /// Not even root may, as in most containers.
    #[error("this host does not let it have namespaces of its own")]
    NotAllowed,
    /// Something failed on the way.
    #[error("cannot {what} {path}: {source}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> RootError {
    let path = path.to_owned();
    move |source| RootError::Failed { what, path, source: source.into() }
}

/// A host that allows namespaces may still allow no mounts; so far only the namespace has changed.
fn refused_or(other: impl FnOnce(Errno) -> RootError) -> impl FnOnce(Errno) -> RootError {
    |error| match error {
        // EINVAL: the root is no mount point, as in a plain chroot.
        Errno::EPERM | Errno::EACCES | Errno::EINVAL => RootError::NotAllowed,
        error => other(error),
    }
}

const NO_PATH: Option<&Path> = None;

/// Gives this process mount, IPC and host name namespaces of its own, and a root in which only
/// `shown` is. `stage` is any directory: the new root is made there. For a process without other
/// threads. After [`RootError::NotAllowed`] files are where they were; after another error the
/// process should end.
pub(super) fn enter(shown: &[Shown], stage: &Path) -> Result<(), RootError> {
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match unshare(namespaces) {
        Ok(()) => {}
        Err(Errno::EPERM) => return Err(RootError::NotAllowed),
        Err(e) => return Err(failed("leave the namespaces of", Path::new("/"))(e)),
    }
    let root = Path::new("/");
    // Nothing that is mounted from here on is seen outside.
    mount(NO_PATH, root, NO_PATH, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NO_PATH)
        .map_err(refused_or(failed("keep mounts private below", root)))?;
    // Opened in the new namespace, before the stage hides what is below it.
    let opened: Vec<(&Shown, File)> =
        shown.iter().filter_map(|shown| open(shown).transpose()).collect::<Result<_, _>>()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("howdah"), stage, Some("tmpfs"), flags, Some("mode=0755,size=1m,nr_inodes=1024"))
        .map_err(refused_or(failed("mount a new root at", stage)))?;
    for (shown, file) in &opened {
        show(shown, file, stage)?;
    }
    change_root(stage)?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NO_PATH, root, NO_PATH, flags, NO_PATH).map_err(failed("make read-only", root))
}

/// A handle on what a path names now, links followed; `None` if it names nothing.
fn open(shown: &Shown) -> Result<Option<(&Shown, File)>, RootError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&shown.path);
    match opened {
        Ok(file) => Ok(Some((shown, file))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("open", &shown.path)(e)),
    }
}

fn show(shown: &Shown, file: &File, stage: &Path) -> Result<(), RootError> {
    let below = shown.path.strip_prefix("/").unwrap_or(&shown.path);
    let target = stage.join(below);
    let is_dir = file.metadata().map_err(failed("look at", &shown.path))?.is_dir();
    let parent = if is_dir { Some(target.as_path()) } else { target.parent() };
    if let Some(parent) = parent {
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(parent);
        made.map_err(failed("make", parent))?;
    }
    if !is_dir {
        File::create(&target).map_err(failed("make", &target))?;
    }
    let source = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    mount(Some(&source), &target, NO_PATH, MsFlags::MS_BIND, NO_PATH)
        .map_err(failed("show", &shown.path))?;
    let flags = shown.access.flags() | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    mount(NO_PATH, &target, NO_PATH, flags, NO_PATH).map_err(failed("restrict", &shown.path))
}

/// Makes `stage` the root, and forgets the old one.
fn change_root(stage: &Path) -> Result<(), RootError> {
    chdir(stage).map_err(failed("enter", stage))?;
    match pivot_root(".", ".") {
        // The old root lies on top of the new one now.
        Ok(()) => {
            umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave the root for", stage))?
        }
        // The root is the kernel's initramfs, which cannot be unmounted, only covered.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", NO_PATH, MsFlags::MS_MOVE, NO_PATH)
                .map_err(failed("put over the root", stage))?;
            chroot(".").map_err(failed("make the root", stage))?;
        }
        Err(e) => return Err(failed("make the root", stage)(e)),
    }
    chdir("/").map_err(failed("enter", Path::new("/")))
}
