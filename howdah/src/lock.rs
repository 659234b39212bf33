//! One process per VM: a lock that lives exactly as long as the process that took it.
//!
//! The truth about "is it running" is this lock, never a pid file or a socket: the kernel drops
//! it however the process dies. Open-file-description locks, because they belong to the open file
//! (not to whatever else this process opens), and because looking at one does not take it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

/// A VM taken by this process.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// What a look at a lock found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// No process has the VM.
    Free,
    /// A process has it, this one if it said so.
    Held {
        /// Its pid, unless it had no time to write it yet.
        pid: Option<i32>,
    },
}

impl Lock {
    /// Takes the lock at `path`, creating the file; `None` if another process has it.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        // The directory may have been removed between open and lock: then this is a lock on nothing.
        let named = std::fs::metadata(path)?;
        if (named.dev(), named.ino()) != (file.metadata()?.dev(), file.metadata()?.ino()) {
            return Ok(None);
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Some(Self { _file: file }))
    }

    /// Looks whether a process has the lock.
    pub(crate) fn probe(path: &Path) -> io::Result<Probe> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Probe::Free),
            Err(e) => return Err(e),
        };
        let mut lock = whole_file();
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if i32::from(lock.l_type) == libc::F_UNLCK {
            return Ok(Probe::Free);
        }
        let mut text = String::new();
        (&mut file).take(32).read_to_string(&mut text)?;
        Ok(Probe::Held { pid: text.trim().parse().ok() })
    }
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_and_probing_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert_eq!(Lock::probe(&path).unwrap(), Probe::Free);
        let held = Lock::take(&path).unwrap().unwrap();
        assert!(Lock::take(&path).unwrap().is_none());
        let me = i32::try_from(std::process::id()).ok();
        assert_eq!(Lock::probe(&path).unwrap(), Probe::Held { pid: me });
        drop(held);
        // The pid is still in the file: it alone proves nothing.
        assert_eq!(Lock::probe(&path).unwrap(), Probe::Free);
        assert!(Lock::take(&path).unwrap().is_some());
    }
}
