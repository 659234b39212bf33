//! The stages as one: chunks in at the source, bytes between, chunks out at the target.

use std::sync::{Arc, LazyLock};

use guest_images::{CHUNK_SIZE, Chunk, Part, Place, chunk::ZERO_CHUNK};
use proptest::prelude::*;

use super::*;
use crate::{
    base_view::{BasePlace, BaseView, Bases, own_chunk, own_place, testing::MemBase},
    chunks::{ChunkId, ChunkSet, Geometry, Space},
    order::RoundOrder,
    root::StateTable,
    vm::{TargetVm, VmError},
};

/// Disk and RAM are larger than the base's: what lies beyond begins as zeros.
const GEOMETRY: Geometry = Geometry { ram_chunks: 700, disk_chunks: 320 };
const BASE_DISK_CHUNKS: u64 = 300;
const BASE_RAM_CHUNKS: u64 = 600;

/// Content number `n`: 0 is zeros; some are on the base's disk (1-63), in its kernel (100-109) or
/// its memory (200-249), some in another base (300-319), the others nowhere.
fn content(n: u16) -> Chunk {
    static BODY: LazyLock<Chunk> = LazyLock::new(|| {
        let mut body = [0; CHUNK_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut body);
        body
    });
    if n == 0 {
        return *ZERO_CHUNK;
    }
    // Alike but for a few bytes, at the ends and in between.
    let mut chunk = *BODY;
    chunk[..2].copy_from_slice(&n.to_le_bytes());
    chunk[CHUNK_SIZE - 2..].copy_from_slice(&n.to_be_bytes());
    chunk[usize::from(n) * 8] ^= 0x55;
    chunk
}

fn base() -> Arc<MemBase> {
    static BASE: LazyLock<Arc<MemBase>> = LazyLock::new(|| {
        // Some chunks of the disk are zeros, some are equal to each other.
        let disk = (0..BASE_DISK_CHUNKS as u16).map(|i| content(i % 64)).collect();
        let of_ram = |i| if i % 10 == 9 { 0 } else { 200 + i % 50 };
        let memory = (0..BASE_RAM_CHUNKS as u16).map(|i| content(of_ram(i))).collect();
        let kernel = (100..110).map(content).collect();
        Arc::new(MemBase::new(disk, kernel, vec![]).with_memory(memory))
    });
    BASE.clone()
}

fn bases() -> Bases {
    let other = (300..320).map(content).collect();
    let other = Arc::new(MemBase::new(other, vec![], vec![]));
    Bases::new(base() as Arc<dyn BaseView>, vec![other as Arc<dyn BaseView>]).unwrap()
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
        all_chunks().iter().for_each(|id| vm.reset_chunk(id).unwrap());
        vm
    }

    fn chunk(&mut self, id: ChunkId) -> &mut Chunk {
        match id.space {
            Space::Ram => &mut self.ram[id.index as usize],
            Space::Disk => &mut self.disk[id.index as usize],
        }
    }

    /// Every chunk that is not what it was in the beginning.
    fn changed(&mut self) -> ChunkSet {
        let base = self.base.clone();
        let mut changed = ChunkSet::new(GEOMETRY);
        for id in all_chunks().iter() {
            if self.chunk(id) != own_chunk(&*base, id).unwrap() {
                changed.insert(id);
            }
        }
        changed
    }

    /// The root by its definition, from the contents alone.
    fn root(&mut self) -> crate::StateRoot {
        let mut table = StateTable::new(self.base.id(), GEOMETRY);
        for id in self.changed().iter() {
            table.set(id, guest_images::ChunkHash::of(self.chunk(id)));
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

fn all_chunks() -> ChunkSet {
    let mut all = ChunkSet::new(GEOMETRY);
    for word in 0..all.word_count(Space::Ram).max(all.word_count(Space::Disk)) {
        all.insert_word(Space::Ram, word as usize, u64::MAX);
        all.insert_word(Space::Disk, word as usize, u64::MAX);
    }
    all
}

fn ids() -> impl Strategy<Value = ChunkId> {
    // Few chunks, so that they meet again; and both ends of each space and of its base.
    prop_oneof![
        (0u64..20).prop_map(ram),
        (595u64..605).prop_map(ram),
        (690u64..700).prop_map(ram),
        (0u64..20).prop_map(disk),
        (290u64..320).prop_map(disk),
    ]
}

/// What a guest does to a chunk.
#[derive(Clone, Copy, Debug)]
enum Change {
    Write(u16),
    /// Freed and handed out anew, or trimmed.
    Zero,
    /// Freed and discarded by the balloon, or written as it was.
    ToBase,
    /// One byte written.
    Poke(usize, u8),
}

impl Change {
    fn make(self, vm: &mut MemVm, id: ChunkId) {
        match self {
            Self::Write(n) => *vm.chunk(id) = content(n),
            Self::Zero => *vm.chunk(id) = *ZERO_CHUNK,
            Self::ToBase => vm.reset_chunk(id).unwrap(),
            Self::Poke(at, byte) => vm.chunk(id)[at] = byte,
        }
    }
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0u16..325).prop_map(Change::Write),
        1 => Just(Change::Zero),
        1 => Just(Change::ToBase),
        3 => (0..CHUNK_SIZE, any::<u8>()).prop_map(|(at, byte)| Change::Poke(at, byte)),
    ]
}

/// One round: neighbours from `id` on, and what the guest does to them.
type Round = Vec<(ChunkId, Change, u64)>;

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let round = prop::collection::vec((ids(), changes(), 1u64..6), 0..40);
    prop::collection::vec(round, 1..5)
}

/// Makes the changes of a round; returns what they touched.
fn live(vm: &mut MemVm, round: &Round) -> ChunkSet {
    let mut dirty = ChunkSet::new(GEOMETRY);
    for &(id, change, run) in round {
        for i in 0..run {
            let id = ChunkId { index: id.index + i, ..id };
            if dirty.insert(id) {
                change.make(vm, id);
            }
        }
    }
    dirty
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
            compressor: Compressor::new(),
            sealer: Sealer::new(b"handoff"),
        }
    }

    fn round(&mut self, vm: &mut MemVm, round: u32, dirty: ChunkSet, wire: &mut Vec<Vec<u8>>) {
        let (forecast, before) = (self.foresee(vm, &dirty), self.outbound.stats());
        assert_eq!(forecast.chunks, dirty.len());
        self.outbound.begin(round);
        for id in RoundOrder::shuffled(dirty, round.into()) {
            *self.outbound.slot(id).unwrap() = *vm.chunk(id);
            self.send(round, wire);
        }
        self.outbound.end().unwrap();
        self.send(round, wire);
        let nothing = |stats: &Stats| {
            let chunks = |class| stats.classes().find(|(c, _)| *c == class).unwrap().1.chunks;
            chunks(Class::Unchanged) + chunks(Class::Known)
        };
        let Forecast { chunks, news, again, references } = forecast;
        let foreseen = chunks - news - again - references;
        assert_eq!(nothing(&self.outbound.stats()) - nothing(&before), foreseen);
    }

    /// Looks at all of them first. That this changes nothing is what the target shows in the end.
    fn foresee(&mut self, vm: &mut MemVm, dirty: &ChunkSet) -> Forecast {
        let mut forecast = Forecast::default();
        let mut ids = dirty.iter();
        loop {
            let (ids, slots) = self.outbound.slots(&mut ids).unwrap();
            if ids.is_empty() {
                return forecast;
            }
            ids.iter().zip(slots).for_each(|(id, slot)| *slot = *vm.chunk(*id));
            self.outbound.foresee(&mut forecast).unwrap();
        }
    }

    fn send(&mut self, round: u32, wire: &mut Vec<Vec<u8>>) {
        while let Some(batch) = self.outbound.poll() {
            let packed = self.compressor.pack(Mode::DEFAULT, &batch.body).unwrap();
            let mut bytes = Vec::new();
            self.sealer.seal(round, SegmentKind::Chunks, packed).encode_into(&mut bytes);
            wire.push(bytes);
        }
    }
}

fn deliver(wire: &[Vec<u8>], vm: &mut MemVm, mut resolver: Resolver) -> Resolver {
    let mut opener = Opener::new(b"handoff");
    let mut decompressor = Decompressor::new();
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
    let all = StageOptions::SWITCHES;
    let off = prop_oneof![Just(vec![]), prop::sample::subsequence(all.to_vec(), 0..=all.len())];
    let delta = prop::sample::select(DeltaMode::ALL.to_vec());
    let cache_bytes = prop::sample::select(vec![0, 3 * CHUNK_SIZE, 1 << 20]);
    (off, delta, cache_bytes).prop_map(|(off, delta, delta_cache_bytes)| {
        let mut options = StageOptions { delta, delta_cache_bytes, ..StageOptions::default() };
        off.into_iter().for_each(|name| options.switch_off(name).unwrap());
        options
    })
}

/// Sends rounds of a guest that `source` knows, and gives what came of it at `target`.
fn hand_off(
    guest: &mut MemVm,
    rounds: &[Round],
    mut dirty: ChunkSet,
    source: &mut Source,
    (target, resolver): (&mut MemVm, Resolver),
) -> Resolver {
    let mut wire = Vec::new();
    for (number, round) in rounds.iter().enumerate() {
        dirty.union(&live(guest, round));
        source.round(guest, number as u32 + 1, dirty, &mut wire);
        dirty = ChunkSet::new(GEOMETRY);
    }
    deliver(&wire, target, resolver)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever the guest does over however many rounds, after a handoff that was aborted at any
    /// point, there and back again, and whatever is switched off, the target ends with the same
    /// contents and both ends with the root of these contents.
    #[test]
    fn target_equals_source(
        (aborted, there, at_peer, back) in (rounds(), rounds(), rounds(), rounds()),
        (options, options_back) in (options(), options()),
        kept_bytes in prop::sample::select(vec![0, 3 * CHUNK_SIZE, 1 << 20]),
    ) {
        let mut guest = MemVm::new(base());
        let gone = (&mut MemVm::new(base()), Resolver::new(bases(), GEOMETRY));
        let nothing = ChunkSet::new(GEOMETRY);
        hand_off(&mut guest, &aborted, nothing, &mut Source::new(options), gone);

        let mut source = Source::new(options);
        let mut target = MemVm::new(base());
        let resolver = Resolver::new(bases(), GEOMETRY).keeping(kept_bytes);
        let changed = guest.changed();
        let mut resolver =
            hand_off(&mut guest, &there, changed, &mut source, (&mut target, resolver));
        prop_assert!(target == guest);
        let root = guest.root();
        prop_assert_eq!(source.outbound.root(), root);
        prop_assert_eq!(resolver.root(), root);
        check_stats(&source.outbound.stats(), &options)?;

        // The first source keeps its paused copy, and both remember the table.
        let (mut home, known) = (guest.clone(), source.outbound.into_table());
        let mut changed = ChunkSet::new(GEOMETRY);
        at_peer.iter().for_each(|round| changed.union(&live(&mut target, round)));
        known.iter().for_each(|(id, _)| _ = changed.insert(id));
        let mut source = Source::new(options_back);
        let (table, received) = resolver.into_parts();
        source.outbound = source.outbound.with_start(table).with_received(Arc::new(received));
        let resolver = Resolver::new(bases(), GEOMETRY).with_start(known);
        let mut resolver =
            hand_off(&mut target, &back, changed, &mut source, (&mut home, resolver));
        prop_assert!(home == target);
        let root = target.root();
        prop_assert_eq!(source.outbound.root(), root);
        prop_assert_eq!(resolver.root(), root);
        check_stats(&source.outbound.stats(), &options_back)?;
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
        rounds in rounds(), at in any::<prop::sample::Index>(), xor in 1u8.., cut: bool,
        delta in prop::sample::select(DeltaMode::ALL.to_vec()),
    ) {
        let options = StageOptions { delta, ..StageOptions::default() };
        let mut outbound = Outbound::new(bases(), GEOMETRY, options);
        let mut vm = MemVm::new(base());
        outbound.begin(1);
        for round in &rounds {
            for id in live(&mut vm, round).iter() {
                *outbound.slot(id).unwrap() = *vm.chunk(id);
            }
        }
        outbound.end().unwrap();
        let Some(batch) = outbound.poll() else { return Ok(()) };
        let mut body = batch.body;
        let at = at.index(body.len());
        if cut { body.truncate(at) } else { body[at] ^= xor }
        let _ = Resolver::new(bases(), GEOMETRY).apply(&mut MemVm::new(base()), &body);
        if cut {
            prop_assert!(Batch::parse(&body).is_err());
        }
    }
}

/// What the figures of any handoff have in common.
fn check_stats(stats: &Stats, options: &StageOptions) -> Result<(), TestCaseError> {
    let chunk_bytes = |chunks: u64| chunks * CHUNK_SIZE as u64;
    let sum = |of: fn(&Share) -> u64| stats.classes().map(|(_, share)| of(share)).sum::<u64>();
    prop_assert!(stats[Class::Data].bytes_out >= chunk_bytes(stats[Class::Data].chunks));
    prop_assert_eq!(stats[Class::Unchanged].bytes_out + stats[Class::Known].bytes_out, 0);
    let [classify, delta, pack] = [Stage::Classify, Stage::Delta, Stage::Pack].map(|s| stats[s]);
    prop_assert_eq!(classify.chunks, stats.chunks());
    prop_assert_eq!(classify.bytes_in, sum(|share| share.bytes_in));
    prop_assert_eq!(delta.chunks, stats[Class::Data].chunks + stats[Class::Delta].chunks);
    prop_assert_eq!((delta.bytes_in, pack.bytes_in), (classify.bytes_out, delta.bytes_out));
    prop_assert!(pack.bytes_out >= pack.bytes_in && pack.bytes_out >= sum(|s| s.bytes_out));
    let cpu = classify.cpu_ns + delta.cpu_ns;
    prop_assert!(
        cpu.abs_diff(sum(|share| share.cpu_ns)) <= 20 && (cpu > 0 || classify.chunks == 0)
    );
    let off = [
        (Class::Unchanged, options.unchanged),
        (Class::Known, options.known),
        (Class::Reset, options.reset),
        (Class::Zero, options.zero),
        (Class::BaseDisk, options.base_disk),
        (Class::BaseMemory, options.base_memory),
        (Class::OtherBase, options.other_bases),
        (Class::Seen, options.seen),
        (Class::Delta, options.delta != DeltaMode::None),
    ];
    for (class, on) in off {
        prop_assert!(on || stats[class].chunks == 0, "{class:?} is off");
    }
    Ok(())
}

fn classify(classifier: &mut Classifier, id: ChunkId, n: u16) -> Op {
    classifier.classify(id, &content(n)).unwrap().op
}

fn at(base: u8, part: Part, index: u64) -> BasePlace {
    BasePlace { base, place: Place { part, index } }
}

#[test]
fn each_way_is_taken() {
    let mut c = Classifier::new(bases(), GEOMETRY);
    let kernel = at(0, Part::Kernel, 3);
    assert_eq!(classify(&mut c, ram(1), 201), Op::Unchanged, "RAM begins as base memory");
    assert_eq!(classify(&mut c, ram(600), 0), Op::Unchanged, "zeros beyond the memory's end");
    assert_eq!(classify(&mut c, disk(7), 7), Op::Unchanged, "disk begins as base");
    assert_eq!(classify(&mut c, disk(319), 0), Op::Unchanged, "zeros beyond the base's end");
    assert_eq!(classify(&mut c, ram(1), 103), Op::FromBase(kernel));
    assert_eq!(classify(&mut c, disk(9), 103), Op::FromBase(kernel));
    assert_eq!(classify(&mut c, disk(9), 203), Op::FromBase(at(0, Part::Memory, 3)));
    assert_eq!(classify(&mut c, disk(10), 310), Op::FromBase(at(1, Part::Disk, 10)));
    assert_eq!(classify(&mut c, ram(2), 120), Op::Data);
    assert_eq!(classify(&mut c, ram(2), 120), Op::Unchanged);
    assert_eq!(classify(&mut c, disk(8), 120), Op::FromSeen(ram(2)));
    for id in [disk(8), ram(3)] {
        assert_eq!(classify(&mut c, id, 0), Op::Zero);
        assert_eq!(classify(&mut c, id, 0), Op::Unchanged);
    }
    assert_eq!(classify(&mut c, disk(8), 8), Op::Reset);
    assert_eq!(classify(&mut c, ram(3), 203), Op::Reset);
    assert_eq!(classify(&mut c, ram(2), 202), Op::Reset);
    assert_eq!(classify(&mut c, ram(3), 120), Op::Data, "the chunk seen no longer holds it");
    assert_eq!(classify(&mut c, ram(1), 201), Op::Reset);
    assert_eq!(classify(&mut c, disk(9), 9), Op::Reset);
    assert_eq!(c.table().len(), 2);
}

/// On the way back, what the target kept is known; what changed since is not, even if it changes
/// back; and contents that it kept may be referred to.
#[test]
fn an_earlier_visit_is_known() {
    let mut c = Classifier::new(bases(), GEOMETRY);
    for (id, n) in [(ram(1), 120), (ram(2), 121), (disk(3), 122)] {
        assert_eq!(classify(&mut c, id, n), Op::Data);
    }
    let mut c = Classifier::new(bases(), GEOMETRY).with_start(c.into_table());
    assert_eq!(classify(&mut c, ram(1), 120), Op::Known);
    assert_eq!(classify(&mut c, ram(9), 121), Op::FromSeen(ram(2)));
    assert_eq!(classify(&mut c, ram(2), 0), Op::Zero);
    assert_eq!(classify(&mut c, ram(2), 0), Op::Unchanged);
    assert_eq!(classify(&mut c, disk(3), 3), Op::Reset);
}

/// What a guest did, so that every optimisation has something to do: in the first handoff, and at
/// the peer before the way back.
fn every_way() -> (Vec<Round>, Vec<Round>) {
    use Change::*;
    let there = vec![
        vec![
            (ram(0), Write(103), 1),    // base disk (kernel)
            (ram(2), Write(7), 5),      // base disk
            (disk(2), Write(225), 5),   // base memory
            (ram(20), Write(305), 5),   // another base
            (ram(30), ToBase, 5),       // unchanged
            (ram(40), Zero, 5),         // zero
            (ram(650), Write(130), 1),  // data: its base state is zeros
            (ram(110), Write(140), 8),  // the same content eight times: seen
            (ram(120), Poke(99, 1), 8), // delta against base memory
        ],
        vec![
            (ram(40), ToBase, 5),         // reset
            (ram(650), Poke(2000, 9), 1), // delta against what was sent
        ],
    ];
    // A chunk that never went, and one that came: delta against base and against what came.
    let back = vec![vec![(ram(200), Write(150), 1), (ram(650), Poke(3000, 77), 1)]];
    (there, back)
}

/// The figures of both handoffs with these options; what arrives is checked.
fn both_ways(options: StageOptions) -> (Stats, Stats) {
    let (there, back) = every_way();
    let (mut guest, mut target) = (MemVm::new(base()), MemVm::new(base()));
    let mut source = Source::new(options);
    let resolver = Resolver::new(bases(), GEOMETRY).keeping(1 << 20);
    let nothing = ChunkSet::new(GEOMETRY);
    let resolver = hand_off(&mut guest, &there, nothing, &mut source, (&mut target, resolver));
    assert!(target == guest);
    let there = source.outbound.stats();
    let known = source.outbound.into_table();
    let mut changed = ChunkSet::new(GEOMETRY);
    known.iter().for_each(|(id, _)| _ = changed.insert(id));
    let mut source = Source::new(options);
    let (table, received) = resolver.into_parts();
    source.outbound = source.outbound.with_start(table).with_received(Arc::new(received));
    let resolver = Resolver::new(bases(), GEOMETRY).with_start(known);
    hand_off(&mut target, &back, changed, &mut source, (&mut guest, resolver));
    assert!(target == guest);
    (there, source.outbound.stats())
}

fn bytes_out(stats: &Stats) -> u64 {
    stats.classes().map(|(_, share)| share.bytes_out).sum()
}

/// Every optimisation does what it is for, and all that it is for: if one were switched off, or
/// broke, the numbers here would not come out.
#[test]
fn every_optimisation_is_on() {
    let (there, back) = both_ways(StageOptions::default());
    let counts = Class::ALL.map(|class| there[class].chunks);
    //       unchanged known reset zero disk memory other seen delta data
    assert_eq!(counts, [5, 0, 5, 5, 6, 5, 5, 7, 10, 1], "{there:?}");
    assert!(there[Class::Delta].bytes_out < 10 * 20, "{:?}", there[Class::Delta]);
    let counts = Class::ALL.map(|class| back[class].chunks);
    assert_eq!(counts[Class::Known as usize], known_chunks(&there) - 1);
    assert_eq!((back[Class::Delta].chunks, back[Class::Data].chunks), (2, 0), "{back:?}");
    assert_eq!(back.chunks(), known_chunks(&there) + 1);
    assert!(bytes_out(&back) < 200, "{} bytes", bytes_out(&back));
}

/// Chunks that differ from base after the first handoff of [`every_way`].
fn known_chunks(there: &Stats) -> u64 {
    // One chunk was sent twice.
    there.chunks() - there[Class::Unchanged].chunks - there[Class::Reset].chunks * 2 - 1
}

/// Each switch ends its class, costs bytes, and leaves the rest working.
#[test]
fn every_switch_switches() {
    let (there, back) = both_ways(StageOptions::default());
    let cost = |options| {
        let (there_off, back_off) = both_ways(options);
        let cost = (bytes_out(&there_off) + bytes_out(&back_off)) as i64;
        (there_off, back_off, cost - (bytes_out(&there) + bytes_out(&back)) as i64)
    };
    for (name, class) in [
        ("unchanged", Class::Unchanged),
        ("reset", Class::Reset),
        ("zero", Class::Zero),
        ("base-disk", Class::BaseDisk),
        ("base-memory", Class::BaseMemory),
        ("other-bases", Class::OtherBase),
        ("seen", Class::Seen),
        ("known", Class::Known),
    ] {
        let mut options = StageOptions { delta: DeltaMode::None, ..StageOptions::default() };
        options.switch_off(name).unwrap();
        let (there_off, back_off, cost) = cost(options);
        assert_eq!(there_off[class].chunks + back_off[class].chunks, 0, "{name}");
        assert!(cost > 0, "{name}: {cost}");
    }
    for (delta, least) in [(DeltaMode::None, 9 * 4000), (DeltaMode::Xor, 9 * 4000)] {
        let options = StageOptions { delta, ..StageOptions::default() };
        let (there_off, _, cost) = cost(options);
        assert_eq!(there_off[Class::Delta].chunks > 0, delta != DeltaMode::None);
        assert!(cost > least, "{delta}: {cost}");
    }
    // Without a cache only what base holds is a reference.
    let options = StageOptions { delta_cache_bytes: 0, ..StageOptions::default() };
    let (there_off, ..) = cost(options);
    assert_eq!(there_off[Class::Delta].chunks, there[Class::Delta].chunks - 1);
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

/// Chunks of the batches that a generation of new data makes.
fn batches_of(outbound: &mut Outbound) -> Vec<u64> {
    let mut made = Vec::new();
    for index in 0..GEOMETRY.ram_chunks {
        let mut random = blake3::Hasher::new().update(&index.to_le_bytes()).finalize_xof();
        random.fill(outbound.slot(ChunkId { space: Space::Ram, index }).unwrap());
        made.extend(std::iter::from_fn(|| outbound.poll()));
    }
    outbound.end().unwrap();
    made.extend(std::iter::from_fn(|| outbound.poll()));
    made.iter().map(|batch| batch.chunks).collect()
}

#[test]
fn a_generation_that_begins_small_grows() {
    let new = || {
        let limits = BatchLimits { data_chunks: 100, chunks: 1000 };
        Outbound::new(bases(), GEOMETRY, StageOptions::default()).with_limits(limits)
    };
    let mut outbound = new();
    outbound.begin_small(1);
    assert_eq!(batches_of(&mut outbound), [8, 16, 32, 64, 100, 100, 100, 100, 100, 80]);
    let mut outbound = new();
    outbound.begin(1);
    assert_eq!(batches_of(&mut outbound), [100; 7]);
}

/// An op whose outcome depends on nothing that came before.
fn alone() -> impl Strategy<Value = Op> {
    let place = |index| BasePlace { base: 0, place: Place { part: Part::Disk, index } };
    prop_oneof![
        Just(Op::Reset),
        Just(Op::Zero),
        Just(Op::Data),
        (0..BASE_DISK_CHUNKS).prop_map(move |index| Op::FromBase(place(index))),
    ]
}

/// A chunk, what becomes of it, and with which batch of its generation that travels.
type Alone = (ChunkId, Op, u8);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Ops that stand by themselves may arrive in any order, and more than once: of each chunk the
    /// newest generation stays, and the root is that of what stayed.
    #[test]
    fn newest_wins_in_any_order(
        (generations, order, again) in prop::collection::vec(
            prop::collection::vec((ids(), alone(), 0u8..3), 0..40), 1..6,
        ).prop_flat_map(|generations: Vec<Vec<Alone>>| {
            let batches = generations.len() * 3;
            let order = Just((0..batches).collect::<Vec<_>>()).prop_shuffle();
            let again = prop::collection::vec(0..batches, 0..6);
            (Just(generations), order, again)
        }),
    ) {
        // Within one generation a chunk has one content: the first that is named.
        let mut newest = std::collections::BTreeMap::new();
        let mut batches = vec![Vec::new(); generations.len() * 3];
        for (number, ops) in generations.iter().enumerate() {
            let mut named = ChunkSet::new(GEOMETRY);
            for &(id, op, part) in ops {
                if !named.contains(id) {
                    named.insert(id);
                    batches[number * 3 + usize::from(part)].push((id, op));
                    newest.insert(id, (number as u32 + 1, op));
                }
            }
        }
        let mut expected = MemVm::new(base());
        for (id, (generation, op)) in newest {
            apply(&mut expected, generation, &[(id, op)]).unwrap();
        }
        let mut vm = MemVm::new(base());
        let mut resolver = Resolver::new(bases(), GEOMETRY);
        for n in order.into_iter().chain(again) {
            resolver.apply(&mut vm, &body((n / 3) as u32 + 1, &batches[n])).unwrap();
        }
        prop_assert!(vm == expected);
        prop_assert_eq!(resolver.root(), vm.root());
    }
}
