//! What the process gives up: its user, its capabilities, its limits.

use std::{
    ffi::OsString,
    fmt, fs, io,
    os::unix::fs::{MetadataExt, lchown},
    path::Path,
    str::FromStr,
};

use caps::{CapSet, Capability};
use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
    },
    unistd::{Gid, Group, Uid, User, geteuid, setgid, setgroups, setuid},
};

/// Descriptors that a VM's process may have open: its disk and devices, its users, its links.
const MAX_OPEN_FILES: u64 = 1024;
/// What a user needs to be in, on most hosts, to open it.
const KVM: &str = "/dev/kvm";

/// Who the VM's process becomes when root starts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunAs {
    said: String,
    uid: Uid,
    gid: Gid,
}

impl FromStr for RunAs {
    type Err = String;

    /// `USER`, `USER:GROUP`, by names or numbers.
    fn from_str(said: &str) -> Result<Self, String> {
        let (user, group) = match said.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (said, None),
        };
        let known = match user.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(user),
        };
        let known = known.map_err(|e| format!("user {user}: {e}"))?;
        let uid = match (&known, user.parse()) {
            (Some(user), _) => user.uid,
            (None, Ok(uid)) => Uid::from_raw(uid),
            (None, Err(_)) => return Err(format!("there is no user {user}")),
        };
        let gid = match (group, &known) {
            (Some(group), _) => gid_of(group)?,
            (None, Some(user)) => user.gid,
            (None, None) => return Err(format!("user {user} has no name: say {user}:GROUP")),
        };
        if uid.is_root() {
            return Err("root is who it is not to be".into());
        }
        Ok(Self { said: said.to_owned(), uid, gid })
    }
}

fn gid_of(group: &str) -> Result<Gid, String> {
    if let Ok(gid) = group.parse() {
        return Ok(Gid::from_raw(gid));
    }
    match Group::from_name(group) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("there is no group {group}")),
        Err(e) => Err(format!("group {group}: {e}")),
    }
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.said)
    }
}

impl From<&RunAs> for OsString {
    fn from(run_as: &RunAs) -> Self {
        // In numbers: whoever reads them may not have the same names.
        format!("{}:{}", run_as.uid, run_as.gid).into()
    }
}

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegeError {
    /// Capabilities.
    #[error("cannot drop capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The user.
    #[error("cannot become user {user}: {source}")]
    User {
        /// As asked for.
        user: RunAs,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else is asked to become another user.
    #[error("cannot become user {0}: only root can")]
    NotRoot(RunAs),
    /// The VM's directory.
    #[error("cannot give {path} to user {uid}: {source}")]
    Owner {
        /// The directory.
        path: String,
        /// To whom.
        uid: Uid,
        /// Why not.
        source: io::Error,
    },
    /// A limit.
    #[error("cannot {what}: {source}")]
    Limit {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: nix::Error,
    },
}

/// Whether root runs this.
pub(super) fn is_root() -> bool {
    geteuid().is_root()
}

/// No core files, which would hold the guest's memory, and no more descriptors than are needed.
pub(super) fn set_limits() -> Result<(), PrivilegeError> {
    let failed = |what| move |source| PrivilegeError::Limit { what, source };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("forbid core files"))?;
    let what = "limit open files";
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed(what))?;
    let most = hard.min(MAX_OPEN_FILES);
    setrlimit(Resource::RLIMIT_NOFILE, most, most).map_err(failed(what))
}

/// Makes sure that the VM's directory belongs to whom the process will be: root without its
/// capabilities may no longer do as it likes with what is somebody else's.
pub(super) fn own(dir: &Path, run_as: Option<&RunAs>) -> Result<(), PrivilegeError> {
    let (uid, gid) = run_as.map_or((geteuid(), None), |user| (user.uid, Some(user.gid)));
    give(dir, uid, gid).map_err(|source| {
        let path = dir.display().to_string();
        PrivilegeError::Owner { path, uid, source }
    })
}

fn give(path: &Path, uid: Uid, gid: Option<Gid>) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    if found.uid() != uid.as_raw() {
        lchown(path, Some(uid.as_raw()), gid.map(Gid::as_raw))?;
    }
    if found.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), uid, gid)?;
        }
    }
    Ok(())
}

/// Becomes another user, in no group but its own and the one that may use KVM.
pub(super) fn become_user(run_as: &RunAs) -> Result<(), PrivilegeError> {
    if !is_root() {
        return Err(PrivilegeError::NotRoot(run_as.clone()));
    }
    let changed = || -> io::Result<()> {
        let kvm: Vec<Gid> =
            fs::metadata(KVM).map(|kvm| Gid::from_raw(kvm.gid())).into_iter().collect();
        setgroups(&kvm)?;
        setgid(run_as.gid)?;
        setuid(run_as.uid)?;
        // The kernel takes a process that changed its user for one with secrets of root, and shuts its
        // /proc/self to itself; the page tables there tell what the guest changed.
        Ok(prctl::set_dumpable(true)?)
    };
    changed().map_err(|source| PrivilegeError::User { user: run_as.clone(), source })
}

/// Gives up all capabilities that a started program could have. Before the user is changed: it takes
/// one that goes with root. Whoever does not have that one starts no programs with others either, as
/// there are no new privileges.
pub(super) fn bound_capabilities() -> Result<(), PrivilegeError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    Ok(())
}

/// Gives up all capabilities that it has, for good.
pub(super) fn drop_capabilities() -> Result<(), PrivilegeError> {
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Effective)?;
    Ok(caps::clear(None, CapSet::Permitted)?)
}

/// No program that this process may still start has more rights than it has itself.
pub(super) fn no_new_privileges() -> Result<(), PrivilegeError> {
    let what = "set no_new_privs";
    prctl::set_no_new_privs().map_err(|source| PrivilegeError::Limit { what, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_name_and_number() {
        let numbers: RunAs = "12345:54321".parse().unwrap();
        assert_eq!((numbers.uid.as_raw(), numbers.gid.as_raw()), (12345, 54321));
        assert_eq!(OsString::from(&numbers), "12345:54321");
        let nobody: RunAs = "nobody".parse().unwrap();
        assert_eq!(
            OsString::from(&nobody).to_str().unwrap().parse::<RunAs>().unwrap().uid,
            nobody.uid
        );
        for bad in
            ["", "root", "0:0", "no-such-user-here", "nobody:no-such-group", "4000000001", "a:b:c"]
        {
            assert!(bad.parse::<RunAs>().is_err(), "{bad}");
        }
    }
}
