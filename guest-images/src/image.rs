//! Images as they come, of disks and of containers: what is in them, read only, without trust.
//!
//! ```text
//! file ─► qcow2? ─► Qcow2 ─┐                     ┌─► /boot: kernel, initrd, command line
//!         raw ─────────────┴─► ReadAt ─► partitions ─► ext4 ─┘
//!         oci ─► layers ─► tar ─► tree ─► mkfs ──► raw, with an ext4 file system
//! ```
//!
//! Every number in an image is somebody else's: sizes are checked before room is made for them, offsets
//! before they are read, and what is not understood is refused with a reason. Nothing here panics.

pub mod boot;
pub mod mkfs;
pub mod oci;
pub mod partitions;
pub mod qcow2;
mod tar;

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes with a length, read from anywhere in them.
pub trait ReadAt {
    /// How many there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads exactly as many as there is room for, from `offset` on. Beyond the end is an error of kind
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: File,
    bytes: u64,
}

impl Raw {
    /// Of this file, as long as it is now.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }
}

impl ReadAt for Raw {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

impl ReadAt for &[u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let rest = usize::try_from(offset).ok().and_then(|from| self.get(from..));
        let bytes = rest.and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A little-endian number in bytes; zero beyond their end, which whoever asks has ruled out.
fn le(bytes: &[u8], at: usize, count: usize) -> u64 {
    let bytes = at.checked_add(count).and_then(|end| bytes.get(at..end)).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A big-endian number in bytes, likewise.
fn be(bytes: &[u8], at: usize, count: usize) -> u64 {
    let bytes = at.checked_add(count).and_then(|end| bytes.get(at..end)).unwrap_or_default();
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
