//! What has changed: KVM's dirty log, the VMM's own writes to guest RAM, and writes to the disk.
//!
//! Nothing is tracked until a handoff begins. What had changed until then is found by asking the
//! kernel which pages of RAM are no longer what they began as (`pagemap`), and the overlay
//! which chunks it holds. The log is turned on *before* that question: a page that changes in between
//! is reported twice, never missed.
//!
//! A page is watched again when it is handed out, before anybody can copy it: what the guest writes
//! from then on is seen, and a look at the log tells it without taking it, so that the engine need not
//! copy now what it would have to copy again.

mod free;
mod kvm;

use std::{ops::Range, sync::Arc};

use ::handoff::{ChunkId, ChunkSet, Geometry, Space};
use free::Free;
use guest_images::{CHUNK_SIZE, overlay::Overlay};
pub(crate) use kvm::KvmLog;
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
    /// Whether bits stay set until [`DirtyLog::clear`]; then any may be set when the log is turned
    /// on. Otherwise [`DirtyLog::read`] clears what it returns.
    fn is_manual(&self) -> bool;
    /// A region's bits.
    fn read(&self, region: usize) -> Result<Vec<u64>, DirtyError>;
    /// Clears bits of a region, beginning with its word `first_word`, and watches these pages: the
    /// next write to one sets its bit again.
    fn clear(&self, region: usize, first_word: u64, bits: &[u64]) -> Result<(), DirtyError>;
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

/// How many words of 64 chunks a region has.
fn words_of(region: &impl GuestMemoryRegion) -> usize {
    (region.len() / CHUNK_SIZE as u64).div_ceil(64) as usize
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
    on: bool,
    /// While the guest is asked for its free pages.
    free: Option<Free>,
}

impl<L: DirtyLog, D: DiskLog> Tracker<L, D> {
    pub(crate) fn new(log: L, ram: GuestRam, disk: Option<D>) -> Self {
        let geometry = Geometry {
            ram_chunks: memory::chunk_count(&ram),
            disk_chunks: disk.as_ref().map_or(0, DiskLog::chunks),
        };
        let pending = ChunkSet::new(geometry);
        Self { log, ram, disk, pending, on: false, free: None }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.pending.geometry()
    }

    /// Turns tracking on and returns everything that may differ from the base.
    pub(crate) fn start(&mut self) -> Result<ChunkSet, DirtyError> {
        self.forget();
        self.log.set_enabled(true)?;
        self.on = true;
        let mut first = 0;
        for (at, region) in self.ram.iter().enumerate() {
            // What the VMM has written until now shows in the page tables. What it has dropped is
            // base again, and there is nothing to say of it.
            region.get_mmap().bitmap().reset();
            if self.log.is_manual() {
                // Nothing is watched when the log is turned on. From here on all is.
                self.log.clear(at, 0, &vec![u64::MAX; words_of(region)])?;
            }
            add_words(&mut self.pending, Space::Ram, first, &pagemap::changed(region)?);
            first += region.len() / CHUNK_SIZE as u64;
        }
        if let Some(disk) = &self.disk {
            disk.add_changed(&mut self.pending);
        }
        self.harvest()
    }

    /// Takes everything that changed since the last call, and watches it: a copy that is made
    /// afterwards is the newest content, or a later harvest returns the chunk again.
    pub(crate) fn harvest(&mut self) -> Result<ChunkSet, DirtyError> {
        self.collect()?;
        if self.log.is_manual() {
            self.watch_pending()?;
        }
        let empty = ChunkSet::new(self.geometry());
        Ok(std::mem::replace(&mut self.pending, empty))
    }

    /// What the next harvest would return if it came now. Nothing is taken, and nothing watched anew
    /// where the log is manual.
    pub(crate) fn peek(&mut self) -> Result<ChunkSet, DirtyError> {
        if !self.on {
            return Ok(ChunkSet::new(self.geometry()));
        }
        self.collect()?;
        Ok(self.pending.clone())
    }

    /// Brings `pending` up to date.
    fn collect(&mut self) -> Result<(), DirtyError> {
        let mut first = 0;
        for (at, region) in self.ram.iter().enumerate() {
            let log = self.log.read(at)?;
            // Word by word and atomic: a mark made meanwhile is either in this harvest or in the
            // next one.
            let own = region.get_mmap().bitmap().get_and_reset();
            add_words(&mut self.pending, Space::Ram, first, &log);
            add_words(&mut self.pending, Space::Ram, first, &own);
            first += region.len() / CHUNK_SIZE as u64;
        }
        if let Some(disk) = &self.disk {
            add_words(&mut self.pending, Space::Disk, 0, &disk.take());
        }
        if let Some(free) = &mut self.free {
            free.written(&self.pending);
        }
        Ok(())
    }

    /// Clears the log's bits of what is about to be handed out, and of nothing else: a bit that was set
    /// after the log was read stays.
    fn watch_pending(&self) -> Result<(), DirtyError> {
        let mut first = 0;
        for (at, region) in self.ram.iter().enumerate() {
            let words = first / 64..first / 64 + words_of(region) as u64;
            let bits: Vec<u64> = words.map(|at| self.pending.word(Space::Ram, at)).collect();
            self.log.clear(at, 0, &bits)?;
            first += region.len() / CHUNK_SIZE as u64;
        }
        Ok(())
    }

    /// From now on it is noted which pages are written, so that the guest may be asked for its free
    /// ones. `false` if nothing is tracked. What was written and not yet taken counts as written.
    pub(crate) fn begin_free(&mut self) -> bool {
        if self.on {
            self.free = Some(Free::new(self.geometry()));
        }
        self.on
    }

    /// Whether the guest is being asked.
    pub(crate) fn is_asking(&self) -> bool {
        self.free.is_some()
    }

    /// Notes what the guest called free, and returns what of it has not been written since it was
    /// asked.
    pub(crate) fn add_free(&mut self, named: &[Range<u64>]) -> Result<ChunkSet, DirtyError> {
        if !named.is_empty() {
            self.collect()?;
        }
        let free = self.free.as_mut();
        Ok(free.map_or_else(|| ChunkSet::new(self.pending.geometry()), |free| free.add(named)))
    }

    /// Gives back to the host what is still free, of a guest that is paused. The next harvest names
    /// it all, whether it could be given back or not.
    pub(crate) fn discard_free(&mut self) -> Result<(), DirtyError> {
        if self.free.is_none() {
            return Ok(());
        }
        self.collect()?;
        let Some(free) = self.free.take() else { return Ok(()) };
        self.pending.union(free.chunks());
        for run in free.runs() {
            if let Err(error) = memory::drop_chunks(&self.ram, run.clone()) {
                // They keep what they hold, and are sent.
                tracing::warn!(%error, ?run, "cannot give free pages back");
            }
        }
        Ok(())
    }

    /// Turns tracking off and forgets what has not been harvested.
    pub(crate) fn stop(&mut self) -> Result<(), DirtyError> {
        self.forget();
        self.on = false;
        self.log.set_enabled(false)
    }

    fn forget(&mut self) {
        self.pending = ChunkSet::new(self.geometry());
        self.free = None;
    }
}

#[cfg(test)]
impl<D> Tracker<KvmLog, D> {
    pub(crate) fn use_plain_log(&mut self) -> Result<(), DirtyError> {
        self.log.use_plain()
    }

    /// Whether KVM notes what the guest writes: it has no log to read where it does not.
    pub(crate) fn is_logged(&self) -> bool {
        self.log.read(0).is_ok()
    }
}

#[cfg(test)]
mod tests;
