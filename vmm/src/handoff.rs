//! A machine as the handoff engine sees it: one that leaves, and one that arrives.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ::handoff::{
    ChunkId, ChunkSet, Geometry, SourceVm, Space, TargetVm,
    vm::{DiskFlusher, VmError},
};
use guest_images::{
    Chunk,
    overlay::{ChunkIo, Means, Overlay},
};

use crate::{
    machine::{MachineError, Paused, Prepared, Running, Vm, VmConfig, full_hash},
    memory::{self, GuestRam},
    profile::MachineProfile,
};

/// A call that comes out of turn: the engine's mistake, not the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutOfTurn {
    /// It needs a machine that is paused.
    #[error("the machine must be paused for this")]
    NotPaused,
    /// It needs a machine that has its state.
    #[error("the machine's state has not been loaded yet")]
    NotLoaded,
    /// The state has been loaded already.
    #[error("the machine's state has been loaded already")]
    Loaded,
    /// The machine has been given up.
    #[error("the machine is gone: it was discarded, or a step that cannot be repeated failed")]
    Gone,
}

/// A machine in either state.
#[derive(Debug)]
pub enum AnyVm {
    /// It runs.
    Running(Vm<Running>),
    /// It does not.
    Paused(Vm<Paused>),
}

/// Calls the same method on a machine in either state.
macro_rules! either {
    ($vm:expr, $name:ident => $call:expr) => {
        match $vm {
            AnyVm::Running($name) => $call,
            AnyVm::Paused($name) => $call,
        }
    };
}

/// A machine that leaves. Until it is taken back with [`VmSource::into_vm`] it belongs to the engine.
#[derive(Debug)]
pub struct VmSource {
    /// `None` only while a transition consumes it.
    vm: Option<AnyVm>,
    geometry: Geometry,
    /// Reads the disk, from when it is first needed.
    disk: Option<ChunkIo>,
}

impl VmSource {
    /// A running machine to be sent away.
    pub fn new(vm: Vm<Running>) -> Self {
        Self { geometry: vm.geometry(), vm: Some(AnyVm::Running(vm)), disk: None }
    }

    /// A machine that is paused already.
    pub fn from_paused(vm: Vm<Paused>) -> Self {
        Self { geometry: vm.geometry(), vm: Some(AnyVm::Paused(vm)), disk: None }
    }

    /// Gives the machine back, as it is.
    pub fn into_vm(self) -> Option<AnyVm> {
        self.vm
    }

    /// The machine, as it is.
    pub fn vm(&self) -> Option<&AnyVm> {
        self.vm.as_ref()
    }

    fn get(&mut self) -> Result<&mut AnyVm, OutOfTurn> {
        self.vm.as_mut().ok_or(OutOfTurn::Gone)
    }

    /// Reads chunks of the disk, many at a time. `ids` are all of the disk.
    fn read_disk(&mut self, ids: &[ChunkId], into: &mut [Chunk]) -> Result<(), VmError> {
        if self.disk.is_none() {
            let disk = either!(self.get()?, vm => vm.disk().cloned());
            let first = ids.first().map_or(0, |id| id.index);
            self.disk = Some(ChunkIo::new(disk.ok_or(MachineError::NoDisk(first))?));
        }
        let indices: Vec<u64> = ids.iter().map(|id| id.index).collect();
        match &mut self.disk {
            Some(disk) => Ok(disk.read(&indices, into)?),
            None => Ok(()),
        }
    }

    fn paused(&mut self) -> Result<&mut Vm<Paused>, OutOfTurn> {
        match self.get()? {
            AnyVm::Paused(vm) => Ok(vm),
            AnyVm::Running(_) => Err(OutOfTurn::NotPaused),
        }
    }
}

impl SourceVm for VmSource {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        Ok(either!(self.get()?, vm => vm.disk().map_or(0, |disk| disk.changed().count() as u64)))
    }

    fn cutover_cost(&self) -> Option<Duration> {
        either!(self.vm.as_ref()?, vm => vm.cutover_cost())
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        Ok(either!(self.get()?, vm => vm.start_tracking())?)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        Ok(either!(self.get()?, vm => vm.harvest())?)
    }

    fn throttle(&mut self, run_share: f64) -> Result<bool, VmError> {
        if let AnyVm::Running(vm) = self.get()? {
            vm.throttle(run_share)?;
        }
        Ok(true)
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        self.throttle(1.0)?;
        Ok(either!(self.get()?, vm => vm.stop_tracking())?)
    }

    fn take_free_hints(&mut self) -> Result<ChunkSet, VmError> {
        Ok(either!(self.get()?, vm => vm.take_free_hints())?)
    }

    fn peek_dirty(&mut self) -> Result<ChunkSet, VmError> {
        Ok(either!(self.get()?, vm => vm.peek_dirty())?)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        Ok(either!(self.get()?, vm => vm.read_chunk(id, into))?)
    }

    fn read_chunks(&mut self, ids: &[ChunkId], into: &mut [Chunk]) -> Result<(), VmError> {
        let mut into = into;
        for stretch in ids.chunk_by(|one, next| one.space == next.space) {
            let (now, later) = into.split_at_mut(stretch.len().min(into.len()));
            into = later;
            if stretch.first().is_some_and(|id| id.space == Space::Disk) {
                self.read_disk(stretch, now)?;
                continue;
            }
            for (id, into) in stretch.iter().zip(now) {
                self.read_chunk(*id, into)?;
            }
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let running = match self.vm.take() {
            Some(AnyVm::Running(vm)) => vm,
            other => {
                let paused = other.is_some();
                self.vm = other;
                return if paused { Ok(()) } else { Err(OutOfTurn::Gone.into()) };
            }
        };
        match running.pause() {
            Ok(vm) => {
                self.vm = Some(AnyVm::Paused(vm));
                Ok(self.paused()?.discard_free()?)
            }
            Err(failed) => {
                self.vm = Some(AnyVm::Running(*failed.vm));
                Err(failed.error.into())
            }
        }
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(self.paused()?.save()?)
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.paused()?.full_hash()?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let paused = match self.vm.take() {
            Some(AnyVm::Paused(vm)) => vm,
            other => {
                let running = other.is_some();
                self.vm = other;
                return if running { Ok(()) } else { Err(OutOfTurn::Gone.into()) };
            }
        };
        match paused.resume() {
            Ok(vm) => self.vm = Some(AnyVm::Running(vm)),
            Err(failed) => {
                self.vm = Some(AnyVm::Paused(*failed.vm));
                return Err(failed.error.into());
            }
        }
        Ok(())
    }
}

enum Stage {
    /// Chunks are being written; the machine lacks its state.
    Receiving(Box<Prepared>),
    Loaded(Vm<Paused>),
    Running(Vm<Running>),
    Gone,
}

/// A machine that arrives: first only RAM and disk, then the machine, then it runs.
pub struct IncomingVm {
    stage: Stage,
    /// Given up by `discard`.
    ram: Option<GuestRam>,
    disk: Option<Arc<Overlay>>,
    /// Writes the disk, many chunks at a time.
    disk_io: Option<ChunkIo>,
    /// Since when the guest is waited for, if it runs elsewhere meanwhile.
    awaited_since: Option<Instant>,
}

impl std::fmt::Debug for IncomingVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stage = match &self.stage {
            Stage::Receiving(_) => "Receiving",
            Stage::Loaded(_) => "Loaded",
            Stage::Running(_) => "Running",
            Stage::Gone => "Gone",
        };
        f.debug_struct("IncomingVm").field("stage", &stage).finish_non_exhaustive()
    }
}

impl IncomingVm {
    /// Makes the machine that was announced, but for its state: RAM is that of the base or zero, the
    /// disk must be equal to its base. Fails if `config` describes another machine or this host cannot carry it.
    pub fn new(profile: MachineProfile, config: VmConfig) -> Result<Self, MachineError> {
        let ram = memory::map(config.base_memory.as_deref(), profile.memory_bytes)?;
        let disk = config.disk.clone();
        let prepared = Prepared::new(config, profile, ram.clone())?;
        let disk_io = disk.clone().map(|disk| ChunkIo::by(disk, Means::Calls, Means::Calls));
        let stage = Stage::Receiving(Box::new(prepared));
        Ok(Self { stage, ram: Some(ram), disk, disk_io, awaited_since: None })
    }

    /// The guest still runs, elsewhere: it will not have stood still for longer than since now, and
    /// wall clocks that say otherwise are wrong. A guest from a file has lain there for any time.
    pub fn awaited(self) -> Self {
        Self { awaited_since: Some(Instant::now()), ..self }
    }

    /// How many chunks RAM and disk have.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            ram_chunks: self.ram.as_ref().map_or(0, memory::chunk_count),
            disk_chunks: self.disk.as_ref().map_or(0, |disk| disk.chunks()),
        }
    }

    /// The machine, once it has its state.
    pub fn into_vm(self) -> Option<AnyVm> {
        match self.stage {
            Stage::Loaded(vm) => Some(AnyVm::Paused(vm)),
            Stage::Running(vm) => Some(AnyVm::Running(vm)),
            Stage::Receiving(_) | Stage::Gone => None,
        }
    }

    fn ram(&self) -> Result<&GuestRam, OutOfTurn> {
        self.ram.as_ref().ok_or(OutOfTurn::Gone)
    }

    fn disk(&self, index: u64) -> Result<&Overlay, MachineError> {
        self.disk.as_deref().ok_or(MachineError::NoDisk(index))
    }
}

/// Flushes the overlay, whose map names only writes that have completed: so one can go on while
/// chunks are written.
struct Flusher(Arc<Overlay>);

impl DiskFlusher for Flusher {
    fn flush(&self) -> Result<(), VmError> {
        Ok(self.0.flush()?)
    }
}

impl TargetVm for IncomingVm {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        match id.space {
            Space::Ram => memory::write_chunk(self.ram()?, id.index, chunk)?,
            Space::Disk => self.disk(id.index)?.write_chunk(id.index, chunk)?,
        }
        Ok(())
    }

    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        let mut disk: Vec<(u64, &Chunk)> = Vec::with_capacity(chunks.len());
        for (id, chunk) in chunks {
            match id.space {
                Space::Ram => memory::write_chunk(self.ram()?, id.index, chunk)?,
                Space::Disk => disk.push((id.index, chunk)),
            }
        }
        match (disk.first(), &mut self.disk_io) {
            (None, _) => Ok(()),
            (_, Some(io)) => Ok(io.write(&disk)?),
            (Some((first, _)), None) => Err(MachineError::NoDisk(*first).into()),
        }
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        match id.space {
            Space::Ram => memory::drop_chunk(self.ram()?, id.index)?,
            Space::Disk => self.disk(id.index)?.reset_chunk(id.index)?,
        }
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        match id.space {
            Space::Ram => memory::read_chunk(self.ram()?, id.index, into)?,
            Space::Disk => self.disk(id.index)?.read_chunk(id.index, into)?,
        }
        Ok(())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        // Half of a state may be in the machine when the other half is refused, so that ends it.
        match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Receiving(prepared) => {
                let at_most = self.awaited_since.map(|since| since.elapsed());
                self.stage = Stage::Loaded(prepared.restore(state, at_most)?);
                Ok(())
            }
            Stage::Gone => Err(OutOfTurn::Gone.into()),
            other => {
                self.stage = other;
                Err(OutOfTurn::Loaded.into())
            }
        }
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(full_hash(self.ram()?, self.disk.as_deref())?)
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        if let Some(disk) = &self.disk {
            disk.flush()?;
        }
        Ok(())
    }

    fn disk_flusher(&mut self) -> Option<Box<dyn DiskFlusher>> {
        self.disk.clone().map(|disk| Box::new(Flusher(disk)) as Box<dyn DiskFlusher>)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let paused = match std::mem::replace(&mut self.stage, Stage::Gone) {
            Stage::Loaded(vm) => vm,
            other => {
                self.stage = other;
                return Err(OutOfTurn::NotLoaded.into());
            }
        };
        match paused.resume() {
            Ok(vm) => {
                // Switches still send the guest's packets to where it was.
                if let Err(error) = vm.announce() {
                    tracing::warn!(%error, "cannot announce the guest to the network");
                }
                self.stage = Stage::Running(vm);
                Ok(())
            }
            Err(failed) => {
                self.stage = Stage::Loaded(*failed.vm);
                Err(failed.error.into())
            }
        }
    }

    fn discard(&mut self) {
        self.stage = Stage::Gone;
        self.ram = None;
        self.disk = None;
        self.disk_io = None;
    }
}
