//! The two seams through which the engine sees a VM.

use std::time::Duration;

use guest_images::{BaseId, Chunk};
use serde::{Deserialize, Serialize};

use crate::{
    base_view::Bases,
    chunks::{ChunkId, ChunkSet, Geometry},
    root::{StateRoot, StateTable},
};

/// An error of a VM or host, as text for a person: the engine's decision is always the same
/// (abort the handoff, keep the guest where it is), so it carries what, where and the way out.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// The least share of the time for which [`SourceVm::throttle`] lets vCPUs run: the guest goes on,
/// and its network does not time out.
pub const LEAST_RUN_SHARE: f64 = 0.1;

/// A running VM that can be sent away.
///
/// Contract of the whole: until [`SourceVm::pause`] the guest runs; after it nothing of the guest
/// runs until [`SourceVm::resume`]. The union of `start_tracking` and all `harvest` results holds
/// every chunk that differs from the base, and every change after a chunk was harvested makes a
/// later harvest return it again (a read that races with a guest write is repaired by that).
pub trait SourceVm {
    /// How large the VM's spaces are. Does not change.
    fn geometry(&self) -> Geometry;

    /// How many chunks of the disk differ from the base, for the offer: asked before tracking
    /// starts, which goes on while the target gets ready. The guest may write more.
    fn changed_disk_chunks(&mut self) -> Result<u64, VmError>;

    /// What pausing and saving here, and loading and running at a host like this one, will take
    /// together, apart from RAM and disk; none if the VM has nothing to tell it by.
    fn cutover_cost(&self) -> Option<Duration> {
        None
    }

    /// Starts dirty tracking, then returns every chunk that may differ from its base state: in RAM
    /// the base's memory (zeros where the base has none), on disk the base disk.
    fn start_tracking(&mut self) -> Result<ChunkSet, VmError>;

    /// Chunks changed since the last harvest: KVM's dirty log, the VMM's own writes to guest
    /// memory, and disk writes. Clears what it returns. A chunk that was returned before and has not
    /// been read since need not be returned again, unless [`SourceVm::peek_dirty`] has named it
    /// meanwhile: read every other chunk that you are given. After
    /// [`SourceVm::pause`] devices have drained, so that one more harvest is complete.
    fn harvest(&mut self) -> Result<ChunkSet, VmError>;

    /// Ends dirty tracking after an abort. Dirty bits not harvested are dropped: the next
    /// [`SourceVm::start_tracking`] starts afresh.
    fn stop_tracking(&mut self) -> Result<(), VmError>;

    /// RAM chunks that the guest called free since this was last asked, and that no harvest
    /// returned after the guest had called them so. The engine asks while the guest runs, and does
    /// not send what is in the answer: it leaves the set of the round under way.
    ///
    /// Nothing is lost by that, because of what the VM promises for each chunk it ever returned
    /// here: if the guest writes it again, a later harvest returns it, as for every write. If not,
    /// [`SourceVm::pause`] brings it back to its base state (as
    /// [`TargetVm::reset_chunk`] does) before it returns, and the next harvest returns it too, so
    /// that both ends hold the same bytes whatever was sent before. Before the pause nothing is
    /// discarded: after an abort the guest finds its memory as it left it.
    fn take_free_hints(&mut self) -> Result<ChunkSet, VmError> {
        Ok(ChunkSet::new(self.geometry()))
    }

    /// What has become dirty since the last harvest (or the start of tracking), without taking it: a
    /// later harvest returns all of it, also what has not been read since it was last returned. The
    /// engine asks while the guest runs, some ten times a second, and leaves what is in the answer out
    /// of the round under way: it would only be sent again.
    ///
    /// It may name less than there is; a VM that cannot tell names nothing.
    fn peek_dirty(&mut self) -> Result<ChunkSet, VmError> {
        Ok(ChunkSet::new(self.geometry()))
    }

    /// From now on lets the vCPUs run for this share of the time: 1.0 is full speed, and shares below
    /// [`LEAST_RUN_SHARE`] are taken for that. Returns whether the VM can do that at all; it may be
    /// asked at any time. [`SourceVm::pause`], [`SourceVm::resume`] and [`SourceVm::stop_tracking`]
    /// give full speed back by themselves.
    fn throttle(&mut self, _run_share: f64) -> Result<bool, VmError> {
        Ok(false)
    }

    /// Copies one chunk's present content.
    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError>;

    /// Copies the present content of each of `ids` into the chunk with its number in `into`, which
    /// is as long. What [`SourceVm::read_chunk`] promises holds for each by itself; they need not be
    /// of one moment, nor copied in order. For VMs that read many chunks cheaper than one by one.
    fn read_chunks(&mut self, ids: &[ChunkId], into: &mut [Chunk]) -> Result<(), VmError> {
        debug_assert_eq!(ids.len(), into.len());
        for (id, into) in ids.iter().zip(into) {
            self.read_chunk(*id, into)?;
        }
        Ok(())
    }

    /// Stops vCPUs, drains devices, discards what is still free by
    /// [`SourceVm::take_free_hints`]. Returns when nothing of the guest can change.
    fn pause(&mut self) -> Result<(), VmError>;

    /// The paused machine's state but RAM and disk: vCPUs, interrupt controllers, clock, devices.
    /// Opaque to the engine. Saving may raise interrupts into state and write guest memory, so the
    /// engine harvests after it.
    fn save_state(&mut self) -> Result<Vec<u8>, VmError>;

    /// BLAKE3 over all RAM, then all disk, with every chunk that is not zero under its number, read
    /// from the paused guest and not from what the engine noted. Equal to [`TargetVm::full_hash`]
    /// of an equal guest. Asked for only when a handoff is audited: the guest waits meanwhile.
    fn full_hash(&mut self) -> Result<[u8; 32], VmError>;

    /// Lets a paused guest go on, here.
    fn resume(&mut self) -> Result<(), VmError>;
}

/// What the source offers before any data moves. The target must check all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The VM's name.
    pub vm_name: String,
    /// The base both must hold.
    pub base: BaseId,
    /// Sizes of RAM and disk.
    pub geometry: Geometry,
    /// Chunks that may differ from base, by the source's count: what the target must have room for.
    pub changed_disk_chunks: u64,
    /// vCPUs, CPU features and devices, encoded by the VMM; compared before data moves.
    pub machine: Vec<u8>,
    /// Other bases that the source holds and could refer to, at most [`MAX_ALSO`].
    pub also: Vec<BaseId>,
    /// States of this VM that the source remembers having left at the peer, at most [`MAX_KNOWN`].
    pub known: Vec<StateRoot>,
}

/// The most bases in [`Offer::also`].
pub const MAX_ALSO: usize = 3;
/// The most states in [`Offer::known`].
pub const MAX_KNOWN: usize = 4;

/// Why a target will not take a VM: told to the peer, which keeps its guest running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Protocol versions do not overlap.
    #[error("the peer speaks protocol {theirs}, this side {ours}: update the older one")]
    Version {
        /// Version of the side that refuses.
        ours: u32,
        /// Version it was offered.
        theirs: u32,
    },
    /// The base is not in the target's store.
    #[error("the peer does not hold base {0}: import it there with `howdah base import`")]
    UnknownBase(BaseId),
    /// Not enough room.
    #[error("the peer has {available_bytes} bytes free for {what} and needs {needed_bytes}")]
    NoSpace {
        /// Disk or memory.
        what: String,
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes there.
        available_bytes: u64,
    },
    /// The target's CPU or devices cannot carry this machine.
    #[error("the peer cannot run this machine: {0}")]
    Machine(String),
    /// The target already runs or holds a VM of this name, or a newer epoch of it.
    #[error("the peer will not take this VM: {0}")]
    Conflict(String),
    /// Anything else.
    #[error("the peer refused: {0}")]
    Other(String),
}

/// What makes a [`TargetVm`] out of an offer, or says why not.
pub trait TargetHost {
    /// The VM it makes.
    type Vm: TargetVm;

    /// Checks the offer and reserves all that is needed: memory, disk, devices.
    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Self::Vm>, Refusal>;
}

/// What a target has ready for an offer.
#[derive(Debug)]
pub struct Prepared<Vm> {
    /// The VM, in its base state, or in the state of `start`.
    pub vm: Vm,
    /// [`Offer::base`] first, then those of [`Offer::also`] that are held here, in that order.
    pub bases: Bases,
    /// The state that `vm` holds already, if it is one of [`Offer::known`]. Whoever gives it has
    /// hashed every chunk of it: memory and disks lose bits between visits.
    pub start: Option<StateTable>,
}

/// Makes a disk durable while it is written.
pub trait DiskFlusher: Send {
    /// Makes durable at least all that was written before the call. Never called by two threads at
    /// once, nor while [`TargetVm::make_disk_durable`] is, nor once the guest runs.
    fn flush(&self) -> Result<(), VmError>;
}

/// A VM that is being received: in its base state, or in that of [`Prepared::start`], until chunks
/// are written.
pub trait TargetVm {
    /// Writes one chunk.
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError>;

    /// Writes these chunks, no two of which have the same number. After an error any of them may
    /// have been written. For VMs that write many chunks cheaper than one by one.
    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        for (id, chunk) in chunks {
            self.write_chunk(*id, chunk)?;
        }
        Ok(())
    }

    /// Makes one chunk equal to the base again: the base's memory in RAM (zero without one), the
    /// base disk's content on disk.
    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError>;

    /// Copies one chunk's present content.
    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError>;

    /// Builds the machine from the state that [`SourceVm::save_state`] gave. Nothing runs yet.
    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError>;

    /// Makes everything written to the disk durable.
    fn make_disk_durable(&mut self) -> Result<(), VmError>;

    /// Something that makes the disk durable from another thread, while chunks are written; asked
    /// for once, before the first of them. Without one the disk is made durable only at the end,
    /// while the guest waits.
    fn disk_flusher(&mut self) -> Option<Box<dyn DiskFlusher>> {
        None
    }

    /// The hash of all RAM and disk, as [`SourceVm::full_hash`] has it.
    fn full_hash(&mut self) -> Result<[u8; 32], VmError>;

    /// Starts the guest: called once, only after ownership is durable. An error means that not one
    /// instruction of the guest ran: the target then declines, and the source may run it again.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Drops all that was received. Called when the handoff is aborted or declined.
    fn discard(&mut self);
}
