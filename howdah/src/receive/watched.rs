//! A VM that comes in, on a disk that others use too.

use std::path::PathBuf;

use guest_images::Chunk;
use handoff::{
    ChunkId, TargetVm,
    vm::{DiskFlusher, VmError},
};
use vmm::IncomingVm;

use super::room::{self, Reserved};

/// After so many chunks it is looked at how much room is left: 16 MiB.
const LOOK_EVERY_CHUNKS: usize = 4096;

/// The file system of the VMs is about to be full.
#[derive(Debug, thiserror::Error)]
#[error(
    "the file system of {} has {free_bytes} bytes left, and {min_free_bytes} must stay free there \
     (--min-free-mib): make room", .path.display()
)]
struct Full {
    path: PathBuf,
    free_bytes: u64,
    min_free_bytes: u64,
}

/// Looks now and then at the room on the disk. The source's guest writes on while it is sent, and
/// so do the guests that run here: what was enough when the offer came may not be enough later. Then
/// this one is declined, which costs nobody anything, before the guests that run here meet a full
/// disk, which costs them their writes.
pub(crate) struct Watched {
    vm: IncomingVm,
    path: PathBuf,
    min_free_bytes: u64,
    /// Until the guest is here.
    reserved: Reserved,
    until_look: usize,
}

impl Watched {
    /// A VM whose disk is at `path`.
    pub(super) fn new(
        vm: IncomingVm,
        path: PathBuf,
        min_free_bytes: u64,
        reserved: Reserved,
    ) -> Self {
        Self { vm, path, min_free_bytes, reserved, until_look: LOOK_EVERY_CHUNKS }
    }

    /// The VM.
    pub(crate) fn into_inner(self) -> IncomingVm {
        self.vm
    }

    fn count(&mut self, written: usize) -> Result<(), VmError> {
        self.until_look = self.until_look.saturating_sub(written);
        if self.until_look == 0 {
            self.until_look = LOOK_EVERY_CHUNKS;
            self.reserved.refresh();
            self.look()?;
        }
        Ok(())
    }

    fn look(&self) -> Result<(), VmError> {
        let free_bytes = room::free_disk_bytes(&self.path)?;
        if free_bytes >= self.min_free_bytes {
            return Ok(());
        }
        let Self { path, min_free_bytes, .. } = self;
        Err(Full { path: path.clone(), free_bytes, min_free_bytes: *min_free_bytes }.into())
    }
}

impl TargetVm for Watched {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        self.vm.write_chunk(id, chunk)?;
        self.count(1)
    }

    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        self.vm.write_chunks(chunks)?;
        self.count(chunks.len())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.vm.reset_chunk(id)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    /// The last look: everything was written, and nothing was promised yet.
    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.look()?;
        self.vm.load_state(state)
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        self.vm.make_disk_durable()
    }

    fn disk_flusher(&mut self) -> Option<Box<dyn DiskFlusher>> {
        self.vm.disk_flusher()
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.vm.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn discard(&mut self) {
        self.vm.discard();
    }
}
