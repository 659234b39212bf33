//! What an honest source would say of the guest that a target's input makes.

use handoff::{
    StateRoot, TargetVm,
    sim::MemTarget,
    stage::{Codec, Decompressor, Packed, Resolver, Segment, SegmentKind, pack::MAX_BATCH_BYTES},
};

use crate::{
    input::Input,
    world::{GEOMETRY, bases},
};

/// A payload: its codec, the length of its body (of a raw one its own), itself.
pub fn packed(input: &mut Input<'_>) -> Packed {
    let codec = Codec::ALL[usize::from(input.below(Codec::ALL.len() as u8))];
    let raw_len = input.u32() % (MAX_BATCH_BYTES as u32 + 1);
    let payload = input.block().to_vec();
    let raw_len = if codec == Codec::Raw { payload.len() as u32 } else { raw_len };
    Packed { codec, raw_len, payload }
}

/// A guest to which the same segments are applied.
pub struct Model {
    vm: MemTarget,
    resolver: Resolver,
    decompressor: Decompressor,
}

impl Model {
    /// In its base state.
    pub fn new() -> Self {
        let (vm, resolver) = (MemTarget::new(bases(), GEOMETRY), Resolver::new(bases(), GEOMETRY));
        Self { vm, resolver, decompressor: Decompressor::new() }
    }

    /// What cannot be applied is left out: whoever is told it refuses it at that point.
    pub fn apply(&mut self, segment: &Segment) {
        let Segment { kind: SegmentKind::Chunks, codec, raw_len, payload, .. } = segment else {
            return;
        };
        if let Ok(body) = self.decompressor.decompress(*codec, *raw_len, payload) {
            let _ = self.resolver.apply(&mut self.vm, body);
        }
    }

    /// The state root.
    pub fn root(&mut self) -> StateRoot {
        self.resolver.root()
    }
    /// The hash of all RAM and disk.
    pub fn full_hash(&mut self) -> [u8; 32] {
        self.vm.full_hash().expect("a guest in memory")
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}
