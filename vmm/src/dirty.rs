//! What has changed: KVM's dirty log, the VMM's own writes to guest RAM, and writes to the disk.
//!
//! Nothing is tracked until a handoff begins. What had changed until then is found by asking the
//! kernel which pages of RAM exist at all, and the overlay which chunks it holds. The log is turned
//! on *before* that question: a page that appears in between is reported twice, never missed.

use std::sync::Arc;

use ::handoff::{ChunkId, ChunkSet, Geometry, Space};
use guest_images::{CHUNK_SIZE, overlay::Overlay};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    devices::virtio::block::DiskDirty,
    memory::{self, GuestRam, MemoryError},
    pagemap,
};

/// Why tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// KVM refused.
    #[error("KVM: {what} of memory slot {slot}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Which slot.
        slot: u32,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// RAM has no host address.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Who knows which pages vCPUs have written. Regions are those of guest RAM, in order.
pub(crate) trait DirtyLog {
    /// Turns the log on or off for all regions.
    fn set_enabled(&self, enabled: bool) -> Result<(), DirtyError>;
    /// Takes a region's bits, and clears them.
    fn take(&self, region: usize) -> Result<Vec<u64>, DirtyError>;
}

/// Who knows which chunks of the disk have changed.
pub(crate) trait DiskLog {
    /// How many chunks there are.
    fn chunks(&self) -> u64;
    /// Adds the chunks that differ from the base.
    fn add_changed(&self, set: &mut ChunkSet);
    /// Takes the bits of chunks written since the last call, and clears them.
    fn take(&self) -> Vec<u64>;
}

/// KVM's log: one memory slot for each region.
#[derive(Debug)]
pub(crate) struct KvmLog {
    vm: Arc<VmFd>,
    slots: Vec<kvm_userspace_memory_region>,
}

impl KvmLog {
    /// Gives RAM to KVM, without a log.
    pub(crate) fn new(vm: Arc<VmFd>, ram: &GuestRam) -> Result<Self, DirtyError> {
        let slots = ram
            .iter()
            .zip(0..)
            .map(|(region, slot)| {
                Ok(kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: region.start_addr().0,
                    memory_size: region.len(),
                    userspace_addr: memory::host_address(region)?,
                })
            })
            .collect::<Result<_, MemoryError>>()?;
        let log = Self { vm, slots };
        log.set_enabled(false)?;
        Ok(log)
    }
}

impl DirtyLog for KvmLog {
    fn set_enabled(&self, enabled: bool) -> Result<(), DirtyError> {
        for region in &self.slots {
            let flags = if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let region = kvm_userspace_memory_region { flags, ..*region };
            // SAFETY: the region is the whole of a mapping of guest RAM, which the machine keeps as
            // long as it keeps the VM (`Tracker` holds both).
            unsafe { self.vm.set_user_memory_region(region) }.map_err(|source| {
                let what = if enabled { "turning on the dirty log" } else { "setting up" };
                DirtyError::Kvm { what, slot: region.slot, source }
            })?;
        }
        Ok(())
    }

    fn take(&self, region: usize) -> Result<Vec<u64>, DirtyError> {
        let Some(slot) = self.slots.get(region) else { return Ok(Vec::new()) };
        self.vm.get_dirty_log(slot.slot, slot.memory_size as usize).map_err(|source| {
            DirtyError::Kvm { what: "reading the dirty log", slot: slot.slot, source }
        })
    }
}

/// The disk: its overlay, and what the block device writes.
pub(crate) struct Disk {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) dirty: Arc<DiskDirty>,
}

impl DiskLog for Disk {
    fn chunks(&self) -> u64 {
        self.overlay.chunks()
    }

    fn add_changed(&self, set: &mut ChunkSet) {
        for index in self.overlay.changed() {
            set.insert(ChunkId { space: Space::Disk, index });
        }
    }

    fn take(&self) -> Vec<u64> {
        self.dirty.harvest()
    }
}

/// Adds a bitmap whose first bit is chunk `first`, a multiple of 64.
fn add_words(set: &mut ChunkSet, space: Space, first: u64, words: &[u64]) {
    debug_assert_eq!(first % 64, 0, "regions begin on whole words: the layout says so");
    let first_word = (first / 64) as usize;
    for (at, bits) in words.iter().enumerate() {
        set.insert_word(space, first_word + at, *bits);
    }
}

/// The dirty set of a machine.
pub(crate) struct Tracker<L, D> {
    log: L,
    ram: GuestRam,
    disk: Option<D>,
    /// Taken from the sources, not yet handed out: a harvest that failed half way loses nothing.
    pending: ChunkSet,
}

impl<L: DirtyLog, D: DiskLog> Tracker<L, D> {
    pub(crate) fn new(log: L, ram: GuestRam, disk: Option<D>) -> Self {
        let geometry = Geometry {
            ram_chunks: memory::chunk_count(&ram),
            disk_chunks: disk.as_ref().map_or(0, DiskLog::chunks),
        };
        Self { log, ram, disk, pending: ChunkSet::new(geometry) }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.pending.geometry()
    }

    /// Turns tracking on and returns everything that may differ from zero RAM and the base disk.
    pub(crate) fn start(&mut self) -> Result<ChunkSet, DirtyError> {
        self.log.set_enabled(true)?;
        let mut first = 0;
        for region in self.ram.iter() {
            let chunks = region.len() / CHUNK_SIZE as u64;
            let existing = pagemap::existing(memory::host_address(region)?, chunks);
            add_words(&mut self.pending, Space::Ram, first, &existing);
            first += chunks;
        }
        if let Some(disk) = &self.disk {
            disk.add_changed(&mut self.pending);
        }
        self.harvest()
    }

    /// Takes everything that changed since the last call.
    pub(crate) fn harvest(&mut self) -> Result<ChunkSet, DirtyError> {
        let mut first = 0;
        for (at, region) in self.ram.iter().enumerate() {
            add_words(&mut self.pending, Space::Ram, first, &self.log.take(at)?);
            // Word by word and atomic: a mark made meanwhile is either in this harvest or in the
            // next one.
            let own = region.get_mmap().bitmap().get_and_reset();
            add_words(&mut self.pending, Space::Ram, first, &own);
            first += region.len() / CHUNK_SIZE as u64;
        }
        if let Some(disk) = &self.disk {
            add_words(&mut self.pending, Space::Disk, 0, &disk.take());
        }
        let empty = ChunkSet::new(self.geometry());
        Ok(std::mem::replace(&mut self.pending, empty))
    }

    /// Turns tracking off and forgets what has not been harvested.
    pub(crate) fn stop(&mut self) -> Result<(), DirtyError> {
        self.pending = ChunkSet::new(self.geometry());
        self.log.set_enabled(false)
    }
}

#[cfg(test)]
mod tests;
