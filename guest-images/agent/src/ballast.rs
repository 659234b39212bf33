//! A file of random bytes that can be deleted, and its blocks given up, while somebody watches what
//! that costs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

/// Beyond this size a wish is refused.
pub(crate) const MAX_FILE_MIB: u32 = 1 << 20;
const MIB: usize = 1 << 20;

/// Why the file cannot be had, or its blocks not be given up.
#[derive(Debug, Error)]
pub(crate) enum BallastError {
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot delete {}: {source}", path.display())]
    Delete { path: PathBuf, source: io::Error },
    #[error("cannot trim the file system of {}: {source}", path.display())]
    Trim { path: PathBuf, source: io::Error },
}

/// The file, there or not.
pub(crate) struct Ballast {
    path: PathBuf,
    /// Two commands at once would mix their bytes.
    turn: Mutex<()>,
}

impl Ballast {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { path: dir.join("ballast"), turn: Mutex::new(()) }
    }

    /// Writes so much, synced; 0 deletes it, synced too.
    pub(crate) fn set(&self, mib: u32) -> Result<(), BallastError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if mib > 0 {
            let failed = |source| BallastError::Write { path: self.path.clone(), source };
            return self.write(mib).map_err(failed);
        }
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(BallastError::Delete { path: self.path.clone(), source })
            }
            _ => {
                // Deleted blocks are free, and may be trimmed, only once the journal says so.
                nix::unistd::sync();
                Ok(())
            }
        }
    }

    fn write(&self, mib: u32) -> io::Result<()> {
        let mut file = File::create(&self.path)?;
        let mut state = u64::from(mib);
        let mut piece = vec![0; MIB];
        for _ in 0..mib {
            for word in piece.chunks_exact_mut(8) {
                state = crate::ram::mix(state);
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&piece)?;
        }
        file.sync_all()
    }

    /// Tells the disk which blocks of the file system hold nothing; returns how many bytes.
    pub(crate) fn trim(&self) -> Result<u64, BallastError> {
        let failed = |source| BallastError::Trim { path: self.path.clone(), source };
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let dir = File::open(dir).map_err(failed)?;
        let mut range = Range { start: 0, length: u64::MAX, least_bytes: 0 };
        // SAFETY: the descriptor is open and the argument is a live struct fstrim_range, which is
        // what FITRIM reads and writes.
        let trimmed = unsafe { fitrim(dir.as_raw_fd(), &raw mut range) };
        trimmed.map_err(|errno| failed(errno.into()))?;
        Ok(range.length)
    }
}

/// The kernel's `struct fstrim_range`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    least_bytes: u64,
}

nix::ioctl_readwrite!(fitrim, b'X', 121, Range);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::new(dir.path());
        ballast.set(2).unwrap();
        let bytes = fs::read(&ballast.path).unwrap();
        assert_eq!(bytes.len(), 2 * MIB);
        assert_ne!(bytes[..MIB], bytes[MIB..], "no piece is like another");
        ballast.set(0).unwrap();
        assert!(!ballast.path.exists());
        ballast.set(0).unwrap();
    }

    #[test]
    fn what_cannot_be_done_says_where() {
        let ballast = Ballast::new(Path::new("/proc/no-such-dir"));
        let error = ballast.set(1).unwrap_err().to_string();
        assert!(error.contains("/proc/no-such-dir/ballast"), "{error}");
        assert!(Ballast::new(Path::new("/proc")).trim().is_err());
    }
}
