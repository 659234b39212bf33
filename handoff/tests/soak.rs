//! Random segments, whole and damaged, through all that a target does to them. Run for long, and
//! under address sanitizer, by `make soak`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{sync::Arc, thread};

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash, Part, Place, chunk::ZERO_CHUNK};
use handoff::{
    Bases, ChunkId, Geometry, Space, StateRoot, StateTable, TargetVm,
    base_view::{BasePlace, is_base_state, testing::MemBase},
    sim::MemTarget,
    stage::{
        BatchBuilder, Compressor, Decompressor, DeltaCodec, Inspected, Inspector, Mode, Opener,
        Packed, Resolver, Sealer, Segment, SegmentKind, Unchecked, What,
    },
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

const GEOMETRY: Geometry = Geometry { ram_chunks: 700, disk_chunks: 320 };
const BASE_CHUNKS: u64 = 256;
const MODES: [&str; 7] = ["none", "lz4", "zstd:1", "zstd:3", "gzip:1", "bzip2:1", "xz:0"];
/// Segments that are decoded at once.
const AT_ONCE: usize = 9;

fn content(rng: &mut SmallRng) -> Chunk {
    let mut chunk = *ZERO_CHUNK;
    let random = rng.random_range(0..=CHUNK_SIZE);
    rng.fill(&mut chunk[..random]);
    chunk
}

fn bases(rng: &mut SmallRng) -> Bases {
    let mut part = || (0..BASE_CHUNKS).map(|_| content(rng)).collect::<Vec<_>>();
    let own = MemBase::new(part(), vec![], vec![]).with_memory(part());
    Bases::from(Arc::new(own) as Arc<dyn handoff::BaseView>)
}

fn any_id(rng: &mut SmallRng) -> ChunkId {
    let space = if rng.random() { Space::Ram } else { Space::Disk };
    ChunkId { space, index: rng.random_range(0..GEOMETRY.space_len(space)) }
}

/// What the target should hold, and what makes segments of changes to it.
struct Model {
    rng: SmallRng,
    bases: Bases,
    holds: MemTarget,
    sealer: Sealer,
    compressor: Compressor,
}

impl Model {
    fn held(&mut self, id: ChunkId) -> Chunk {
        let mut chunk = *ZERO_CHUNK;
        self.holds.read_chunk(id, &mut chunk).unwrap();
        chunk
    }

    /// A batch of this generation.
    fn body(&mut self, generation: u32) -> Vec<u8> {
        let mut batch = BatchBuilder::new(generation);
        for _ in 0..self.rng.random_range(1..40) {
            let id = any_id(&mut self.rng);
            match self.rng.random_range(0..6) {
                0 => {
                    self.holds.reset_chunk(id).unwrap();
                    batch.push(id, What::Reset).unwrap();
                }
                1 => {
                    self.holds.write_chunk(id, ZERO_CHUNK).unwrap();
                    batch.push(id, What::Zero).unwrap();
                }
                2 => {
                    let part = if self.rng.random() { Part::Disk } else { Part::Memory };
                    let index = self.rng.random_range(0..BASE_CHUNKS);
                    let at = BasePlace { base: 0, place: Place { part, index } };
                    self.holds.write_chunk(id, self.bases.chunk(at).unwrap()).unwrap();
                    batch.push(id, What::FromBase(at)).unwrap();
                }
                3 => {
                    let source = any_id(&mut self.rng);
                    let chunk = self.held(source);
                    if !is_base_state(self.bases.own(), source, &chunk).unwrap() {
                        self.holds.write_chunk(id, &chunk).unwrap();
                        batch.push(id, What::FromSeen(source)).unwrap();
                    }
                }
                _ => {
                    let chunk = content(&mut self.rng);
                    self.holds.write_chunk(id, &chunk).unwrap();
                    batch.push(id, What::Data(&chunk)).unwrap();
                }
            }
        }
        batch.finish().body
    }

    fn pack(&mut self, body: &[u8]) -> Packed {
        let mode: Mode = MODES[self.rng.random_range(0..MODES.len())].parse().unwrap();
        self.compressor.pack(mode, body).unwrap()
    }

    fn segment(&mut self, generation: u32) -> Segment {
        let body = self.body(generation);
        let packed = self.pack(&body);
        self.sealer.seal(generation, SegmentKind::Chunks, packed)
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        match self.rng.random_range(0..4) {
            0 => bytes.truncate(self.rng.random_range(0..=bytes.len())),
            1 => bytes.push(self.rng.random()),
            _ => {}
        }
        for _ in 0..self.rng.random_range(0..4) {
            if !bytes.is_empty() {
                let at = self.rng.random_range(0..bytes.len());
                bytes[at] ^= 1 << self.rng.random_range(0..8);
            }
        }
    }

    /// A batch that no honest source makes, sealed as if one had: of any chunks, with deltas and
    /// references of any kind, then damaged, as a body or as what it is packed to.
    fn hostile(&mut self) -> Segment {
        let mut batch = BatchBuilder::new(self.rng.random());
        for _ in 0..self.rng.random_range(1..20) {
            let (id, source) = (any_id(&mut self.rng), any_id(&mut self.rng));
            let mut delta = vec![0; self.rng.random_range(1..200)];
            self.rng.fill(&mut delta[..]);
            let codec =
                DeltaCodec::from_u8(self.rng.random_range(0..4)).unwrap_or(DeltaCodec::Runs);
            let chunk = content(&mut self.rng);
            let what = match self.rng.random_range(0..3) {
                0 => What::FromSeen(source),
                1 => What::Delta(codec, &delta),
                _ => What::Data(&chunk),
            };
            batch.push(id, what).unwrap();
        }
        let mut body = batch.finish().body;
        if self.rng.random() {
            self.damage(&mut body);
        }
        let mut packed = self.pack(&body);
        if self.rng.random() {
            let mut payload = std::mem::take(&mut packed.payload);
            self.damage(&mut payload);
            packed.payload = payload;
        }
        Sealer::new(b"hostile").seal(1, SegmentKind::Chunks, packed)
    }
}

fn decode(segment: Unchecked, inspector: &Inspector) -> Result<Inspected, String> {
    let segment = segment.check().map_err(|e| e.to_string())?;
    let mut inspected = Inspected::default();
    Decompressor::new()
        .decompress_into(segment.codec, segment.raw_len, &segment.payload, inspected.body_mut())
        .map_err(|e| e.to_string())?;
    inspector.inspect(&mut inspected).map_err(|e| e.to_string())?;
    Ok(inspected)
}

/// The root by its definition, from contents alone.
fn root_of(vm: &mut MemTarget, bases: &Bases) -> StateRoot {
    let mut table = StateTable::new(bases.own().id(), GEOMETRY);
    let mut chunk = *ZERO_CHUNK;
    for space in [Space::Ram, Space::Disk] {
        for index in 0..GEOMETRY.space_len(space) {
            let id = ChunkId { space, index };
            vm.read_chunk(id, &mut chunk).unwrap();
            if !is_base_state(bases.own(), id, &chunk).unwrap() {
                table.set(id, ChunkHash::of(&chunk));
            }
        }
    }
    table.root()
}

fn soak(segments: usize, seed: u64) {
    println!("seed {seed}, {segments} segments");
    let mut rng = SmallRng::seed_from_u64(seed);
    let bases = bases(&mut rng);
    let mut model = Model {
        rng,
        holds: MemTarget::new(bases.clone(), GEOMETRY),
        bases: bases.clone(),
        sealer: Sealer::new(b"soak"),
        compressor: Compressor::new(),
    };
    let mut vm = MemTarget::new(bases.clone(), GEOMETRY);
    let mut resolver = Resolver::new(bases.clone(), GEOMETRY).keeping(40 * CHUNK_SIZE);
    let mut opener = Opener::new(b"soak");
    let inspector = resolver.inspector().clone();
    let (mut refused, mut done) = (0, 0);
    while done < segments {
        let generation = (done / 50) as u32 + 1;
        let taken: Vec<_> = (0..AT_ONCE.min(segments - done))
            .map(|_| {
                let segment = model.segment(generation);
                let mut bytes = Vec::new();
                segment.encode_into(&mut bytes);
                let whole = opener.clone();
                let taken = opener.take(Segment::decode(&bytes).unwrap()).unwrap();
                let sound = bytes.clone();
                model.damage(&mut bytes);
                if bytes != sound
                    && let Ok(altered) = Segment::decode(&bytes)
                    && let Ok(altered) = whole.clone().take(altered)
                {
                    altered.check().unwrap_err();
                }
                taken
            })
            .collect();
        let decoded: Vec<_> = thread::scope(|scope| {
            let decoding: Vec<_> = taken
                .into_iter()
                .map(|segment| scope.spawn(|| decode(segment, &inspector).unwrap()))
                .collect();
            decoding.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for inspected in &decoded {
            assert_eq!(resolver.apply_inspected(&mut vm, inspected).unwrap().stale, 0);
        }
        done += decoded.len();
        let mut scratch = MemTarget::new(bases.clone(), GEOMETRY);
        let mut into = Resolver::new(bases.clone(), GEOMETRY);
        for _ in 0..decoded.len() {
            let segment = Opener::new(b"hostile").take(model.hostile()).unwrap();
            let applied = decode(segment, &inspector)
                .and_then(|i| into.apply_inspected(&mut scratch, &i).map_err(|e| e.to_string()));
            refused += u32::from(applied.is_err());
        }
    }
    assert!(refused > 0, "nothing hostile was refused");
    let root = root_of(&mut vm, &bases);
    assert_eq!(root, root_of(&mut model.holds, &bases));
    assert_eq!(resolver.root(), root);
    println!("{done} sound segments applied, {refused} of as many hostile ones refused");
}

#[test]
fn a_few_random_segments() {
    soak(200, rand::random());
}

#[test]
#[ignore = "takes a minute or more: `make soak`"]
fn many_random_segments() {
    soak(10_000, rand::random());
}
