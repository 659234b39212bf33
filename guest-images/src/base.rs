//! One base: manifest, disk, kernel, initramfs and the chunk index over them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The identity of a base: BLAKE3 of its canonical manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BaseId(pub [u8; 32]);

impl fmt::Display for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BaseId({})", hex::encode(&self.0[..6]))
    }
}

impl FromStr for BaseId {
    type Err = hex::FromHexError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut id = [0; 32];
        hex::decode_to_slice(s, &mut id)?;
        Ok(Self(id))
    }
}

/// A part of a base whose chunks both ends hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Part {
    /// The disk image.
    Disk = 0,
    /// The kernel image as it is loaded.
    Kernel = 1,
    /// The initramfs.
    Initramfs = 2,
}

/// Where a chunk's content can be found in a base. Named on the wire instead of a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The part that holds it.
    pub part: Part,
    /// The chunk's number in that part. A part's last chunk is padded with zeros.
    pub index: u64,
}

/// An open base.
#[derive(Debug)]
pub struct Base {}
