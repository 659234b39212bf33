//! The stages as one: chunks in at the source, bytes between, chunks out at the target.

use std::sync::{Arc, LazyLock};

use guest_images::{CHUNK_SIZE, Chunk, Part, Place, chunk::ZERO_CHUNK};
use proptest::prelude::*;

use super::*;
use crate::{
    base_view::{BasePlace, BaseView, Bases, own_place, testing::MemBase},
    chunks::{ChunkId, ChunkSet, Geometry, Space},
    order::RoundOrder,
    root::StateTable,
    vm::{TargetVm, VmError},
};

/// The disk is larger than the base's: what lies beyond begins as zeros.
const GEOMETRY: Geometry = Geometry { ram_chunks: 700, disk_chunks: 320 };
const BASE_DISK_CHUNKS: u64 = 300;

/// Content number `n`: 0 is zeros, some are on the base disk, some in its kernel, some nowhere.
fn content(n: u16) -> Chunk {
    let mut chunk = [0; CHUNK_SIZE];
    // Alike but for a few bytes, at the end and in between.
    chunk[..2].copy_from_slice(&n.to_le_bytes());
    chunk[CHUNK_SIZE - 2..].copy_from_slice(&n.to_be_bytes());
    chunk[usize::from(n)] |= u8::from(n > 0) << (n % 8);
    chunk
}

fn base() -> Arc<MemBase> {
    static BASE: LazyLock<Arc<MemBase>> = LazyLock::new(|| {
        // Some chunks of the disk are zeros, some are equal to each other.
        let disk = (0..BASE_DISK_CHUNKS as u16).map(|i| content(i % 64)).collect();
        Arc::new(MemBase::new(disk, (100..110).map(content).collect(), vec![]))
    });
    BASE.clone()
}

fn bases() -> Bases {
    Bases::from(base() as Arc<dyn BaseView>)
}

/// RAM and disk in memory.
#[derive(Clone, PartialEq)]
struct MemVm {
    base: Arc<MemBase>,
    ram: Vec<Chunk>,
    disk: Vec<Chunk>,
}

impl PartialEq for MemBase {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl MemVm {
    fn new(base: Arc<MemBase>) -> Self {
        let mut vm = Self {
            ram: vec![*ZERO_CHUNK; GEOMETRY.ram_chunks as usize],
            disk: vec![*ZERO_CHUNK; GEOMETRY.disk_chunks as usize],
            base,
        };
        for index in 0..GEOMETRY.disk_chunks {
            vm.reset_chunk(ChunkId { space: Space::Disk, index }).unwrap();
        }
        vm
    }

    fn chunk(&mut self, id: ChunkId) -> &mut Chunk {
        match id.space {
            Space::Ram => &mut self.ram[id.index as usize],
            Space::Disk => &mut self.disk[id.index as usize],
        }
    }

    /// The root by its definition, from the contents alone.
    fn root(&mut self) -> crate::StateRoot {
        let mut table = StateTable::new(self.base.id(), GEOMETRY);
        let base = self.base.clone();
        let mut all = ChunkSet::new(GEOMETRY);
        for word in 0..all.word_count(Space::Ram).max(all.word_count(Space::Disk)) {
            all.insert_word(Space::Ram, word as usize, u64::MAX);
            all.insert_word(Space::Disk, word as usize, u64::MAX);
        }
        for id in all.iter() {
            let mut own = *ZERO_CHUNK;
            if let Some(place) = own_place(&*base, id) {
                base.read(place, &mut own).unwrap();
            }
            if *self.chunk(id) != own {
                table.set(id, guest_images::ChunkHash::of(self.chunk(id)));
            }
        }
        table.root()
    }
}

impl TargetVm for MemVm {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        *self.chunk(id) = *chunk;
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        let mut own = *ZERO_CHUNK;
        if let Some(place) = own_place(&*self.base, id) {
            self.base.read(place, &mut own)?;
        }
        self.write_chunk(id, &own)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = *self.chunk(id);
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok(self.root().0)
    }

    fn load_state(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn discard(&mut self) {}
}

fn ram(index: u64) -> ChunkId {
    ChunkId { space: Space::Ram, index }
}

fn disk(index: u64) -> ChunkId {
    ChunkId { space: Space::Disk, index }
}

fn ids() -> impl Strategy<Value = ChunkId> {
    // Few chunks, so that they meet again; and both ends of each space.
    prop_oneof![
        (0u64..20).prop_map(ram),
        (690u64..700).prop_map(ram),
        (0u64..20).prop_map(disk),
        (290u64..320).prop_map(disk),
    ]
}

/// One round: neighbours from `id` on, and the contents that the guest writes to them.
fn writes() -> impl Strategy<Value = Vec<(ChunkId, u16, u64)>> {
    prop::collection::vec((ids(), 0u16..130, 1u64..6), 0..40)
}

struct Source {
    outbound: Outbound,
    compressor: Compressor,
    sealer: Sealer,
}

impl Source {
    fn new(options: StageOptions) -> Self {
        Self {
            outbound: Outbound::new(bases(), GEOMETRY, options)
                .with_limits(BatchLimits { data_chunks: 5, chunks: 40 }),
            compressor: Compressor::new().unwrap(),
            sealer: Sealer::new(b"handoff"),
        }
    }

    fn round(&mut self, vm: &mut MemVm, round: u32, dirty: ChunkSet, wire: &mut Vec<Vec<u8>>) {
        self.outbound.begin(round);
        for id in RoundOrder::shuffled(dirty, round.into()) {
            *self.outbound.slot(id).unwrap() = *vm.chunk(id);
            self.send(round, wire);
        }
        self.outbound.end().unwrap();
        self.send(round, wire);
    }

    fn send(&mut self, round: u32, wire: &mut Vec<Vec<u8>>) {
        while let Some(batch) = self.outbound.poll() {
            let packed = self.compressor.compress(&batch.body).unwrap();
            let mut bytes = Vec::new();
            self.sealer.seal(round, SegmentKind::Chunks, packed).encode_into(&mut bytes);
            wire.push(bytes);
        }
    }
}

fn deliver(wire: &[Vec<u8>], vm: &mut MemVm) -> Resolver {
    let mut opener = Opener::new(b"handoff");
    let mut decompressor = Decompressor::new().unwrap();
    let mut resolver = Resolver::new(bases(), GEOMETRY);
    for bytes in wire {
        let segment = Segment::decode(bytes).unwrap();
        opener.open(&segment).unwrap();
        let body =
            decompressor.decompress(segment.codec, segment.raw_len, &segment.payload).unwrap();
        let applied = resolver.apply(vm, body).unwrap();
        assert_eq!(applied.stale, 0);
    }
    resolver
}

fn options() -> impl Strategy<Value = StageOptions> {
    prop::sample::subsequence(StageOptions::SWITCHES.to_vec(), 0..=StageOptions::SWITCHES.len())
        .prop_map(|off| {
            let mut options = StageOptions::default();
            off.into_iter().for_each(|name| options.switch_off(name).unwrap());
            options
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest writes over however many rounds, and whatever is switched off, the
    /// target ends with the same contents and both ends with the root of these contents.
    #[test]
    fn target_equals_source(
        rounds in prop::collection::vec(writes(), 1..5),
        options in prop_oneof![Just(StageOptions::default()), options()],
    ) {
        let mut guest = MemVm::new(base());
        let mut source = Source::new(options);
        let mut wire = Vec::new();
        for (number, writes) in rounds.into_iter().enumerate() {
            let mut dirty = ChunkSet::new(GEOMETRY);
            for (id, n, run) in writes {
                for i in 0..run {
                    let id = ChunkId { index: id.index + i, ..id };
                    if dirty.insert(id) {
                        *guest.chunk(id) = content(n + i as u16);
                    }
                }
            }
            source.round(&mut guest, number as u32 + 1, dirty, &mut wire);
        }
        let mut target = MemVm::new(base());
        let mut resolver = deliver(&wire, &mut target);
        prop_assert!(target == guest);
        let root = guest.root();
        prop_assert_eq!(source.outbound.root(), root);
        prop_assert_eq!(resolver.root(), root);
        let stats = source.outbound.stats();
        let bytes_out: u64 = stats.classes().map(|(_, share)| share.bytes_out).sum();
        prop_assert!(bytes_out >= stats[Class::Data].chunks * CHUNK_SIZE as u64);
        prop_assert_eq!(stats[Class::Unchanged].bytes_out, 0);
    }

    /// Nothing that a peer can send makes the target panic, or write outside the guest.
    #[test]
    fn hostile_bodies(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 30)) {
        let mut vm = MemVm::new(base());
        for body in bodies {
            let _ = Resolver::new(bases(), GEOMETRY).apply(&mut vm, &body);
        }
    }

    /// The same for bodies that are almost right.
    #[test]
    fn mangled_bodies(
        writes in writes(), at in any::<prop::sample::Index>(), xor in 1u8.., cut: bool,
    ) {
        let mut batch = BatchBuilder::new(1);
        let mut classifier = Classifier::new(bases(), GEOMETRY);
        for (id, n, _) in writes {
            let op = classifier.classify(id, &content(n)).unwrap().op;
            if let Some(what) = op.what(&content(n)) {
                batch.push(id, what).unwrap();
            }
        }
        let mut body = batch.finish().body;
        let at = at.index(body.len());
        if cut { body.truncate(at) } else { body[at] ^= xor }
        let _ = Resolver::new(bases(), GEOMETRY).apply(&mut MemVm::new(base()), &body);
        if cut {
            prop_assert!(Batch::parse(&body).is_err());
        }
    }
}

fn classify(classifier: &mut Classifier, id: ChunkId, n: u16) -> Op {
    classifier.classify(id, &content(n)).unwrap().op
}

#[test]
fn each_way_is_taken() {
    let mut c = Classifier::new(bases(), GEOMETRY);
    let kernel = BasePlace { base: 0, place: Place { part: Part::Kernel, index: 3 } };
    assert_eq!(classify(&mut c, ram(0), 0), Op::Unchanged, "RAM begins as zeros");
    assert_eq!(classify(&mut c, disk(7), 7), Op::Unchanged, "disk begins as base");
    assert_eq!(classify(&mut c, disk(319), 0), Op::Unchanged, "zeros beyond the base's end");
    assert_eq!(classify(&mut c, ram(1), 103), Op::FromBase(kernel));
    assert_eq!(classify(&mut c, disk(9), 103), Op::FromBase(kernel));
    assert_eq!(classify(&mut c, ram(2), 120), Op::Data);
    assert_eq!(classify(&mut c, ram(2), 120), Op::Unchanged);
    assert_eq!(classify(&mut c, disk(8), 120), Op::FromSeen(ram(2)));
    assert_eq!(classify(&mut c, disk(8), 0), Op::Zero);
    assert_eq!(classify(&mut c, disk(8), 0), Op::Unchanged);
    assert_eq!(classify(&mut c, disk(8), 8), Op::Reset);
    assert_eq!(classify(&mut c, ram(2), 0), Op::Reset);
    assert_eq!(classify(&mut c, ram(3), 120), Op::Data, "the chunk seen no longer holds it");
    assert_eq!(classify(&mut c, ram(1), 0), Op::Reset);
    assert_eq!(classify(&mut c, disk(9), 9), Op::Reset);
    assert_eq!(c.table().len(), 1);
}

#[test]
fn a_chunk_never_refers_to_itself() {
    let mut c = Classifier::new(bases(), GEOMETRY)
        .with_options(StageOptions { unchanged: false, ..StageOptions::default() });
    assert_eq!(classify(&mut c, ram(2), 120), Op::Data);
    assert_eq!(classify(&mut c, ram(2), 121), Op::Data);
    assert_eq!(classify(&mut c, ram(2), 120), Op::Data);
}

#[test]
fn outside_is_an_error_on_both_sides() {
    let mut c = Classifier::new(bases(), GEOMETRY);
    for id in [ram(700), disk(320), ram(u64::MAX / 2)] {
        assert!(matches!(c.classify(id, &content(1)), Err(ClassifyError::Outside { .. })));
        let ops = [(id, Op::Reset), (id, Op::Data), (ram(0), Op::FromSeen(id))];
        for (id, op) in ops {
            let mut vm = MemVm::new(base());
            let error = apply(&mut vm, 1, &[(ram(1), Op::Data), (id, op)]).unwrap_err();
            assert!(matches!(error, ResolveError::Outside { .. }), "{error}");
            assert!(vm == MemVm::new(base()), "nothing is written");
        }
    }
    let place = Place { part: Part::Initramfs, index: 0 };
    for base_number in 0..4 {
        let at = BasePlace { base: base_number, place };
        let error = apply(&mut MemVm::new(base()), 1, &[(ram(0), Op::FromBase(at))]).unwrap_err();
        assert!(matches!(error, ResolveError::NoSuchPlace { chunks: 0, .. }), "{error}");
    }
}

fn body(generation: u32, ops: &[(ChunkId, Op)]) -> Vec<u8> {
    let mut batch = BatchBuilder::new(generation);
    for (id, op) in ops {
        batch.push(*id, op.what(&content(120 + generation as u16)).unwrap()).unwrap();
    }
    batch.finish().body
}

fn apply(vm: &mut MemVm, generation: u32, ops: &[(ChunkId, Op)]) -> Result<Applied, ResolveError> {
    Resolver::new(bases(), GEOMETRY).apply(vm, &body(generation, ops))
}

/// Disk items without a version let a reordered block overwrite a newer one: so every chunk has
/// one, and it outlives a chunk's return to its base state.
#[test]
fn older_never_overwrites_newer() {
    let mut vm = MemVm::new(base());
    let mut resolver = Resolver::new(bases(), GEOMETRY);
    resolver.apply(&mut vm, &body(3, &[(disk(4), Op::Data), (disk(5), Op::Reset)])).unwrap();
    let root = resolver.root();
    let old = body(2, &[(disk(4), Op::Zero), (disk(5), Op::Data), (disk(6), Op::Data)]);
    let applied = resolver.apply(&mut vm, &old).unwrap();
    assert_eq!((applied.chunks, applied.stale), (1, 2));
    assert_eq!(*vm.chunk(disk(4)), content(123));
    assert_eq!(*vm.chunk(disk(5)), content(5));
    assert_eq!(*vm.chunk(disk(6)), content(122));
    assert_ne!(resolver.root(), root);
    assert_eq!(resolver.root(), vm.root());
}

#[test]
fn references_to_what_was_not_received() {
    let error = apply(&mut MemVm::new(base()), 1, &[(ram(0), Op::FromSeen(ram(1)))]).unwrap_err();
    assert!(matches!(error, ResolveError::NotReceived { .. }), "{error}");

    let mut vm = MemVm::new(base());
    let mut resolver = Resolver::new(bases(), GEOMETRY);
    resolver.apply(&mut vm, &body(1, &[(ram(1), Op::Data)])).unwrap();
    vm.chunk(ram(1))[17] ^= 1;
    let refers = body(1, &[(ram(0), Op::FromSeen(ram(1)))]);
    let error = resolver.apply(&mut vm, &refers).unwrap_err();
    assert!(matches!(error, ResolveError::Altered { .. }), "{error}");
}

/// What the target enters depends on the bytes, so a source that names content in an odd way
/// cannot make it compute another root.
#[test]
fn the_table_goes_by_content() {
    let own = BasePlace { base: 0, place: Place { part: Part::Disk, index: 70 } };
    let mut vm = MemVm::new(base());
    let mut resolver = Resolver::new(bases(), GEOMETRY);
    let empty = resolver.root();
    // Chunks 6 and 70 of the base disk are equal, so both come back to their base state.
    resolver
        .apply(&mut vm, &body(1, &[(disk(6), Op::FromBase(own)), (disk(70), Op::Data)]))
        .unwrap();
    resolver.apply(&mut vm, &body(1, &[(disk(70), Op::FromBase(own))])).unwrap();
    assert_eq!(resolver.root(), empty);
    assert!(resolver.table().is_empty());
}
