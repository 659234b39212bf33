//! A paused machine as the parts of a base: its memory as a file, the rest as one blob.

use std::{fs::File, os::unix::fs::FileExt};

use guest_images::CHUNK_SIZE;
use serde::{Deserialize, Serialize};

use super::{MachineError, contents};
use crate::{
    codec::Format,
    memory::{self, GuestRam},
    profile::{MachineProfile, ProfileError},
};

const FORMAT: Format =
    Format { what: "machine of a base", magic: b"HWDHBASE", version: 1, max_bytes: 9 << 20 };

/// A paused machine but for RAM and disk, with its profile: what a base keeps beside its memory.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineSnapshot {
    /// What the machine is. A guest of the base is this machine: the configuration must agree.
    pub profile: MachineProfile,
    /// Its state, as [`super::Vm::save`] gave it.
    pub state: Vec<u8>,
}

/// As it is stored: each part with its own magic number and version.
#[derive(Serialize, Deserialize)]
struct Stored {
    profile: Vec<u8>,
    state: Vec<u8>,
}

impl MachineSnapshot {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, ProfileError> {
        let stored = Stored { profile: self.profile.encode()?, state: self.state.clone() };
        Ok(FORMAT.encode(&stored)?)
    }

    /// From the bytes that a base holds. The state is looked at only when it is restored.
    pub fn decode(blob: &[u8]) -> Result<Self, ProfileError> {
        let Stored { profile, state } = FORMAT.decode(blob)?;
        Ok(Self { profile: MachineProfile::decode(&profile)?, state })
    }
}

/// Writes what of RAM is not zero to the places it has in a base's memory file.
pub(super) fn write_memory(ram: &GuestRam, file: &File) -> Result<u64, MachineError> {
    file.set_len(memory::size_bytes(ram)).map_err(MachineError::WriteMemory)?;
    let mut chunk = [0; CHUNK_SIZE];
    let mut written = 0;
    contents::for_each(ram, &mut chunk, |index, chunk| {
        written += 1;
        file.write_all_at(chunk, index * CHUNK_SIZE as u64).map_err(MachineError::WriteMemory)
    })?;
    Ok(written)
}
