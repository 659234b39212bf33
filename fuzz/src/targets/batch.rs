//! Batches: bodies of segments from a peer, applied one after the other to a guest.
//!
//! What a batch says is applied whole, or refused before the guest is of any use; after every batch
//! that was taken the root is that of what the guest holds. What reads a batch to describe it takes
//! what is applied.

use guest_images::{Part, Place};
use handoff::{
    BasePlace, ChunkId, Space,
    sim::MemTarget,
    stage::{Batch, BatchBuilder, DeltaCodec, Resolver, What},
};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    world::{GEOMETRY, bases, chunk, root_of},
};

pub(super) const TARGET: Target =
    Target { name: "batch", from: Origin::Peer, run, seeds, max_len: 64 << 10 };

/// Bytes of contents that the target keeps for a way back: few, so that some must go.
const KEEP_BYTES: usize = 6 * 4096;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut vm = MemTarget::new(bases(), GEOMETRY);
    let mut resolver = Resolver::new(bases(), GEOMETRY).keeping(KEEP_BYTES);
    while !input.is_empty() {
        let body = input.block();
        let described = Batch::parse(body).map(|batch| batch.steps().count() as u64);
        let Ok(applied) = resolver.apply(&mut vm, body) else {
            // The handoff is declined and the guest discarded.
            return false;
        };
        assert_eq!(described.ok(), Some(applied.chunks + applied.stale));
        assert_eq!(resolver.root(), root_of(&vm), "the table is of what the guest holds");
    }
    true
}

/// Bodies with everything that a body can have.
pub(super) fn bodies() -> Vec<Vec<u8>> {
    let ram = |index| ChunkId { space: Space::Ram, index };
    let disk = |index| ChunkId { space: Space::Disk, index };
    let place =
        |base, part, index| What::FromBase(BasePlace { base, place: Place { part, index } });
    let (one, two) = (chunk(1), chunk(201));
    let xor = [7; 4096];
    let first: &[(ChunkId, What<'_>)] = &[
        (ram(0), What::Data(&one)),
        (ram(1), What::Data(&two)),
        (ram(2), What::Zero),
        (ram(299), What::Zero),
        (disk(5), What::Zero),
        (disk(6), place(0, Part::Disk, 7)),
        (disk(7), place(0, Part::Kernel, 2)),
        (ram(20), place(0, Part::Memory, 3)),
        (ram(21), place(1, Part::Disk, 9)),
    ];
    let second: &[(ChunkId, What<'_>)] = &[
        (ram(3), What::FromSeen(ram(1))),
        (disk(8), What::FromSeen(ram(1))),
        (ram(1), What::Reset),
        (ram(0), What::Delta(DeltaCodec::Runs, &[4, 0, 1, 9, 9])),
        (disk(39), What::Delta(DeltaCodec::Xor, &xor)),
    ];
    let body = |generation, steps: &[(ChunkId, What<'_>)]| {
        let mut batch = BatchBuilder::new(generation);
        for (id, what) in steps {
            batch.push(*id, *what).expect("a small batch");
        }
        batch.finish().body
    };
    vec![body(1, first), body(2, second)]
}

fn seeds() -> Vec<Vec<u8>> {
    let bodies = bodies();
    let one = |body: &Vec<u8>| Program::new().block(body).finish();
    let both: Vec<u8> = bodies.iter().flat_map(one).collect();
    bodies.iter().map(one).chain([both]).collect()
}
