//! What the engine's targets share: a small guest, its base, and its root by definition.

use std::sync::{Arc, LazyLock};

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash};
use handoff::{
    BaseView, Bases, Geometry, Offer, StateRoot, StateTable,
    base_view::{is_base_state, testing::MemBase},
    ownership::{Epoch, HandoffId, Question, VmId},
    sim::MemTarget,
};

/// More than one group of a state table in RAM, less than one on the disk.
pub const GEOMETRY: Geometry = Geometry { ram_chunks: 300, disk_chunks: 40 };

/// The handoff that is under way.
pub const QUESTION: Question =
    Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(2) };

/// A chunk that is no other's.
pub fn chunk(seed: u8) -> Chunk {
    let mut chunk = [seed; CHUNK_SIZE];
    chunk[..8].copy_from_slice(&u64::from(seed).wrapping_mul(0x9e37_79b9).to_le_bytes());
    chunk
}

fn made() -> Bases {
    let disk = (0..30).map(chunk).collect();
    let own = MemBase::new(disk, vec![chunk(100); 3], vec![chunk(110)])
        .with_memory((120..130).map(chunk).collect());
    let also = MemBase::new((130..140).map(chunk).collect(), vec![chunk(140)], Vec::new());
    let also: Vec<Arc<dyn BaseView>> = vec![Arc::new(also)];
    Bases::new(Arc::new(own), also).expect("two bases are not too many")
}

/// The guest's base, with a memory, and one more that both sides hold.
pub fn bases() -> Bases {
    static BASES: LazyLock<Bases> = LazyLock::new(made);
    BASES.clone()
}

/// What a source offers of the guest.
pub fn offer() -> Offer {
    let bases = bases();
    Offer {
        vm_name: "vm".into(),
        base: bases.own().id(),
        geometry: GEOMETRY,
        changed_disk_chunks: 3,
        machine: b"one vCPU".to_vec(),
        also: bases.iter().skip(1).map(|(_, base)| base.id()).collect(),
        known: Vec::new(),
    }
}

/// The root by its definition, from contents alone.
pub fn root_of(vm: &MemTarget) -> StateRoot {
    let bases = bases();
    let mut table = StateTable::new(bases.own().id(), vm.geometry());
    for id in vm.written() {
        let chunk = vm.chunk(id).expect("what was written is there");
        if !is_base_state(bases.own(), id, chunk).expect("the base is in memory") {
            table.set(id, ChunkHash::of(chunk));
        }
    }
    table.root()
}
