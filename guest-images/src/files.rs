//! Small helpers around files: locks, bounded reads, durable directories.

use std::{
    fs::{self, File},
    io::{self, Read},
    ops::Deref,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::{Whence, lseek},
};

use crate::chunk::CHUNK_SIZE;

/// A file with an advisory lock on it, which ends with the value.
#[derive(Debug)]
pub(crate) struct Lock(Flock<File>);

impl Lock {
    /// Locks `file`. If another process holds it, the error says which.
    pub(crate) fn take(file: File, how: FlockArg) -> io::Result<Self> {
        Flock::lock(file, how).map(Self).map_err(|(file, errno)| {
            let error = io::Error::from(errno);
            if error.kind() != io::ErrorKind::WouldBlock {
                return error;
            }
            let holder = holder_of(&file).unwrap_or_else(|| "another process".to_owned());
            io::Error::new(io::ErrorKind::WouldBlock, format!("in use by {holder}"))
        })
    }

    /// Changes the kind of lock. Between the two kinds the file may be unlocked.
    pub(crate) fn change(self, how: FlockArg) -> io::Result<Self> {
        self.0.relock(how).map_err(io::Error::from)?;
        Ok(self)
    }
}

impl Deref for Lock {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

/// The process that holds a lock on `file`, for an error message: as far as the kernel tells.
fn holder_of(file: &File) -> Option<String> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let name = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
    let pid = locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(4);
        let pid = words.next()?;
        (words.next()? == name).then(|| pid.to_owned())
    })?;
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let itself = if pid == std::process::id().to_string() { ", this process" } else { "" };
    Some(format!("process {pid} ({}{itself})", comm.trim_end()))
}

/// Reads a file that must be small.
pub(crate) fn read_small(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes {
        let message = format!("longer than {limit_bytes} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(bytes)
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The first stretch of `file` from `at` on, and before `len`, that is not a hole. A file system
/// that cannot tell counts as one without holes.
pub fn data_extent(file: &File, at: u64, len: u64) -> Option<(u64, u64)> {
    if at >= len {
        return None;
    }
    let seek = |at: u64, whence| match lseek(file, at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        // Nothing but a hole from here on.
        Err(Errno::ENXIO) => Ok(None),
        Err(other) => Err(other),
    };
    let found = (|| match seek(at, Whence::SeekData)? {
        Some(start) if start < len => {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(len).min(len);
            Ok(Some((start, end)).filter(|(start, end)| start < end))
        }
        _ => Ok::<_, Errno>(None),
    })();
    found.unwrap_or(Some((at, len)))
}

/// Writes the runs of chunks that are not zero; where the others are, `file` must have a hole.
pub(crate) fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    let is_zero = |chunk: &[u8]| chunk.iter().all(|byte| *byte == 0);
    let mut chunks = bytes.chunks(CHUNK_SIZE).enumerate().peekable();
    while let Some((first, chunk)) = chunks.next() {
        if is_zero(chunk) {
            continue;
        }
        let mut end = first * CHUNK_SIZE + chunk.len();
        while let Some((_, more)) = chunks.next_if(|(_, chunk)| !is_zero(chunk)) {
            end += more.len();
        }
        let start = first * CHUNK_SIZE;
        file.write_all_at(&bytes[start..end], at + start as u64)?;
    }
    Ok(())
}
