//! Guests in memory for both ends of a handoff.

use std::{fs::File, sync::Arc};

use guest_images::{CHUNK_SIZE, Chunk};
use handoff::{
    Bases, ChunkId, ChunkSet, Geometry, Offer, Refusal, SourceVm, Space, TargetHost, TargetVm,
    vm::{Prepared, VmError},
};
use memmap2::{MmapMut, MmapOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::contents::{self, Mix};

/// The bytes of a machine's state: a few vCPUs with their devices.
const STATE_BYTES: usize = 12 << 10;

/// Where a guest that does not change has its contents.
#[derive(Clone)]
pub(crate) enum Contents {
    /// In memory, as any guest's.
    Held(Arc<Vec<Chunk>>),
    /// Nowhere: made when they are read, so that a guest of any size takes no memory.
    Made(&'static Mix, u64),
}

impl Contents {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Held(chunks) => chunks.len() as u64,
            Self::Made(_, count) => *count,
        }
    }

    fn read(&self, n: u64, into: &mut Chunk) -> Option<()> {
        match self {
            Self::Held(chunks) => *into = *chunks.get(usize::try_from(n).ok()?)?,
            Self::Made(mix, count) => {
                (n < *count).then_some(())?;
                contents::fill(mix, n, into);
            }
        }
        Some(())
    }
}

/// A guest that changed some of its RAM before the handoff and nothing since.
#[derive(Clone)]
pub(crate) struct Still {
    geometry: Geometry,
    contents: Contents,
    /// Changed chunks are so far apart.
    stride: u64,
}

impl Still {
    /// A guest with so many chunks of RAM, in all of which the changed ones are spread.
    pub(crate) fn new(ram_chunks: u64, contents: Contents) -> Self {
        let stride = (ram_chunks / contents.len().max(1)).max(1);
        Self { geometry: Geometry { ram_chunks, disk_chunks: 0 }, contents, stride }
    }

    /// A guest that has nothing but what it changed.
    pub(crate) fn of(chunks: Arc<Vec<Chunk>>) -> Self {
        Self::new(chunks.len() as u64, Contents::Held(chunks))
    }

    /// Bytes that it changed.
    pub(crate) fn bytes(&self) -> u64 {
        self.contents.len() * CHUNK_SIZE as u64
    }
}

impl SourceVm for Still {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        Ok(0)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        let mut set = ChunkSet::new(self.geometry);
        for n in 0..self.contents.len() {
            set.insert(ChunkId { space: Space::Ram, index: n * self.stride });
        }
        Ok(set)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        Ok(ChunkSet::new(self.geometry))
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        let read = self.contents.read(id.index / self.stride, into);
        read.ok_or_else(|| format!("no chunk {id:?}").into())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(contents::chunks(contents::MEMORY, STATE_BYTES / CHUNK_SIZE).into_flattened())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Err("not asked for".into())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// A guest that arrives: RAM in a file in memory, so that it does not count as this process's own.
pub(crate) struct Memory {
    ram: MmapMut,
}

impl Memory {
    fn new(ram_chunks: u64) -> std::io::Result<Self> {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(ram_chunks * CHUNK_SIZE as u64)?;
        // SAFETY: nobody else has the file, so that it is neither cut nor written by others.
        Ok(Self { ram: unsafe { MmapOptions::new().no_reserve_swap().map_mut(&file)? } })
    }

    fn at(&mut self, id: ChunkId) -> Result<&mut Chunk, VmError> {
        let chunks = self.ram.as_chunks_mut::<CHUNK_SIZE>().0;
        let chunk = usize::try_from(id.index).ok().and_then(|index| chunks.get_mut(index));
        chunk.filter(|_| id.space == Space::Ram).ok_or_else(|| format!("no chunk {id:?}").into())
    }
}

impl TargetVm for Memory {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        *self.at(id)? = *chunk;
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.at(id)?.fill(0);
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.at(id)?;
        Ok(())
    }

    fn load_state(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Err("not asked for".into())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn discard(&mut self) {}
}

/// Takes any guest into memory.
pub(crate) struct Host(pub(crate) Bases);

impl TargetHost for Host {
    type Vm = Memory;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Memory>, Refusal> {
        let vm = Memory::new(offer.geometry.ram_chunks);
        let vm = vm.map_err(|e| Refusal::Other(e.to_string()))?;
        Ok(Prepared { vm, bases: self.0.clone(), start: None })
    }
}
