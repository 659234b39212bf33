//! The process of a VM as a jail (ADR 0022).
//!
//! A guest's devices, a peer's frames and files of a store are worked on in the VM's own process. If one
//! of them finds a defect here, what it then holds is a process that can do little more than run
//! this VM:
//!
//! ```text
//! started by anyone   no core files, few descriptors      privileges
//!                     no capabilities, no_new_privs       privileges
//!                     system calls by kind of thread      calls, filter, trap
//! started by root     mount, IPC, host name namespaces    root
//!                     a root with this VM only            root
//!                     another user, if one is named       privileges
//! ```
//!
//! What needs more than that is done first: a TAP device is opened and the VM's directory locked before
//! [`enter`]. Files elsewhere are opened by the command that names them, and passed.
//!
//! Goals: containment; a host without one of these means is told of and runs all the same, but for the
//! filters of system calls. Non-goals: network namespaces (links are made from here), limits on CPU and
//! memory (cgroups are the operator's).

mod calls;
mod filter;
mod privileges;
mod root;
#[cfg(test)]
mod tests;
mod trap;

use std::{fmt, fs, path::Path};

pub(crate) use calls::Kind;
pub(crate) use privileges::RunAs;
use root::{Access, RootError, Shown};
use vmm::{ThreadHook, ThreadKind};

use crate::{
    cli::JailArgs,
    failure::{Exit, Failure},
    home::{Home, VmDir},
};

/// Of the host's files, those that are looked at: KVM, memory, names of peers.
const OF_THE_HOST: [(&str, Access); 8] = [
    ("/dev/kvm", Access::Device),
    ("/dev/null", Access::Device),
    ("/proc/self", Access::Read),
    ("/proc/meminfo", Access::Read),
    ("/proc/cpuinfo", Access::Read),
    ("/etc/hosts", Access::Read),
    ("/etc/resolv.conf", Access::Read),
    ("/etc/nsswitch.conf", Access::Read),
];

/// Confines this process to the VM of `dir`. For a process that has no other threads yet. On
/// failure the process should end: it may be confined in part.
pub(crate) fn enter(args: &JailArgs, dir: &VmDir, home: &Home) -> Result<(), Failure> {
    if args.no_jail {
        tracing::warn!("not confined, as asked for with --no-jail");
        return Ok(());
    }
    alone()?;
    privileges::set_limits().map_err(failure)?;
    let mut own_root = "the host's root";
    if privileges::is_root() {
        privileges::own(dir.path(), args.run_as.as_ref()).map_err(failure)?;
        match root::enter(&shown(dir, home), dir.path()) {
            Ok(()) => own_root = "a root of its own",
            Err(why @ RootError::NotAllowed) => {
                tracing::warn!("jail: {why}: it keeps {own_root}");
            }
            Err(e) => return Err(failure(e)),
        }
    }
    privileges::bound_capabilities().map_err(failure)?;
    if let Some(user) = &args.run_as {
        privileges::become_user(user).map_err(failure)?;
    }
    privileges::drop_capabilities().map_err(failure)?;
    privileges::no_new_privileges().map_err(failure)?;
    filter::confine_process().map_err(failure)?;
    tracing::info!("confined: filters of system calls, no capabilities, {own_root}");
    Ok(())
}

/// Holds this thread, and those that it starts, to what the process of a VM may do; for a command
/// that runs a guest on the way to something else.
pub(crate) fn enter_with_filters_only(args: &JailArgs) -> Result<(), Failure> {
    if args.no_jail {
        return Ok(());
    }
    privileges::set_limits().map_err(failure)?;
    filter::confine_process().map_err(failure)
}

/// Narrows what this thread, and those that it starts, may do to what its kind needs.
pub(crate) fn confine(kind: Kind) -> Result<(), Failure> {
    filter::confine_thread(kind).map_err(failure)
}

/// Confines the threads of a machine.
pub(crate) fn thread_hook() -> ThreadHook {
    ThreadHook::new(|kind| {
        let kind = match kind {
            ThreadKind::Vcpu => Kind::Vcpu,
            ThreadKind::Device => Kind::Device,
        };
        filter::confine_thread(kind).map_err(std::io::Error::other)
    })
}

/// What exists inside.
fn shown(dir: &VmDir, home: &Home) -> Vec<Shown> {
    let shown = |path: &Path, access| Shown { path: path.to_owned(), access };
    let mut all: Vec<Shown> =
        OF_THE_HOST.iter().map(|(path, access)| shown(Path::new(path), *access)).collect();
    // Not this cloudlet's key: a command that needs the process to speak for it passes it.
    all.push(shown(&home.store(), Access::Read));
    all.push(shown(dir.path(), Access::Write));
    all
}

/// A thread that exists already would stay outside.
fn alone() -> Result<(), Failure> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads == 1 {
        return Ok(());
    }
    let why = format!("{threads} threads run already: a defect of this program");
    Err(failure(why))
}

fn failure(why: impl fmt::Display) -> Failure {
    let way_out = "mend that, or run the VM unconfined with --no-jail";
    Failure::new(Exit::Host, "the VM's process cannot be confined", why, way_out)
}
