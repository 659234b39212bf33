//! A guest that arrives in memory.

use guest_images::Chunk;

use crate::{
    Bases, ChunkId, Geometry, Offer, Refusal, Space, TargetHost, TargetVm,
    audit::Audit,
    base_view::own_chunk,
    vm::{Prepared, VmError},
};

/// Takes any guest whose base it holds, into memory.
#[derive(Clone, Debug)]
pub struct MemHost {
    bases: Bases,
}

impl MemHost {
    /// A host that holds these bases; guests must be of the first.
    pub fn new(bases: Bases) -> Self {
        Self { bases }
    }
}

impl TargetHost for MemHost {
    type Vm = MemTarget;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<MemTarget>, Refusal> {
        if offer.base != self.bases.own().id() {
            return Err(Refusal::UnknownBase(offer.base));
        }
        let others: Vec<_> = self.bases.iter().skip(1).map(|(_, base)| base.id()).collect();
        let bases =
            self.bases.only(|n| others.get(n).is_some_and(|other| offer.also.contains(other)));
        let vm = MemTarget::new(bases.clone(), offer.geometry);
        Ok(Prepared { vm, bases, start: None })
    }
}

/// A VM that is received into memory: it holds what differs from its base.
#[derive(Debug)]
pub struct MemTarget {
    bases: Bases,
    geometry: Geometry,
    ram: Vec<Option<Box<Chunk>>>,
    disk: Vec<Option<Box<Chunk>>>,
    state: Option<Vec<u8>>,
    running: bool,
}

impl MemTarget {
    /// A VM in its base state.
    pub fn new(bases: Bases, geometry: Geometry) -> Self {
        let empty = |chunks: u64| (0..chunks).map(|_| None).collect();
        let (ram, disk) = (empty(geometry.ram_chunks), empty(geometry.disk_chunks));
        Self { bases, geometry, ram, disk, state: None, running: false }
    }

    /// The content of a chunk; nothing if there is no such chunk.
    pub fn chunk(&self, id: ChunkId) -> Option<&Chunk> {
        match self.slots(id.space).get(usize::try_from(id.index).ok()?)? {
            Some(chunk) => Some(chunk),
            None => own_chunk(self.bases.own(), id).ok(),
        }
    }

    /// Sizes of RAM and disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Chunks that were written and not reset since.
    pub fn written(&self) -> impl Iterator<Item = ChunkId> + '_ {
        [Space::Ram, Space::Disk].into_iter().flat_map(|space| {
            let numbered = (0u64..).zip(self.slots(space));
            numbered
                .filter(|(_, chunk)| chunk.is_some())
                .map(move |(index, _)| ChunkId { space, index })
        })
    }

    /// The machine's state that it was given.
    pub fn state(&self) -> Option<&[u8]> {
        self.state.as_deref()
    }

    /// Whether the guest was started.
    pub fn is_running(&self) -> bool {
        self.running
    }

    fn slots(&self, space: Space) -> &[Option<Box<Chunk>>] {
        match space {
            Space::Ram => &self.ram,
            Space::Disk => &self.disk,
        }
    }

    fn slot(&mut self, id: ChunkId) -> Result<&mut Option<Box<Chunk>>, VmError> {
        let slots = match id.space {
            Space::Ram => &mut self.ram,
            Space::Disk => &mut self.disk,
        };
        let slot = usize::try_from(id.index).ok().and_then(|index| slots.get_mut(index));
        slot.ok_or_else(|| format!("there is no chunk {id:?}").into())
    }
}

impl TargetVm for MemTarget {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        match self.slot(id)? {
            Some(slot) => **slot = *chunk,
            empty => *empty = Some(Box::new(*chunk)),
        }
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        *self.slot(id)? = None;
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.chunk(id).ok_or_else(|| format!("there is no chunk {id:?}"))?;
        Ok(())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.state = Some(state.to_vec());
        Ok(())
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        let mut audit = Audit::default();
        for space in [Space::Ram, Space::Disk] {
            let chunks = self.geometry.space_len(space);
            for index in 0..chunks {
                if let Some(chunk) = self.chunk(ChunkId { space, index }) {
                    audit.chunk(index, chunk);
                }
            }
            audit.end_of_space(chunks);
        }
        Ok(audit.finish())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.state.is_none() {
            return Err("the machine has no state".into());
        }
        self.running = true;
        Ok(())
    }

    fn discard(&mut self) {
        self.ram.iter_mut().chain(&mut self.disk).for_each(|slot| *slot = None);
        self.state = None;
    }
}
