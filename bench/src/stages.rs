//! The benchmarks.

use std::hint::black_box;

use anyhow::{Context, ensure};
use guest_images::{CHUNK_SIZE, Chunk, ChunkHash, Part, Place};
use handoff::stage::{
    Class, Classifier, Compressor, DeltaMode, Mode, Outbound, Stage, StageOptions,
    outbound::SAMPLE_GROUPS, pack::MAX_BATCH_DATA_CHUNKS,
};

use crate::{
    harness::{Bench, Outcome},
    world::World,
};

fn bytes(chunks: &[Chunk]) -> u64 {
    (chunks.len() * CHUNK_SIZE) as u64
}

/// Classifies all of a guest's RAM and checks that every chunk fell into `class`.
fn classify(world: &World, chunks: &[Chunk], class: Class) -> anyhow::Result<()> {
    let mut classifier = Classifier::new(world.bases(), world.geometry);
    let (mut decisions, mut cpu_ns) = (Vec::new(), Vec::new());
    for (number, (ids, chunks)) in world.groups(chunks).enumerate() {
        decisions.clear();
        cpu_ns.clear();
        let sample = (number as u64).is_multiple_of(SAMPLE_GROUPS).then_some(&mut cpu_ns);
        classifier.classify_group(&ids, chunks, &mut decisions, sample)?;
        let as_expected = decisions.iter().all(|decision| decision.op.class() == class);
        ensure!(as_expected, "a chunk that is not {} in group {number}", class.name());
    }
    Ok(())
}

/// Chunks that are as the base has them, which is most of any guest: against comparing them.
pub(crate) fn unchanged(world: &World, runs: usize) -> anyhow::Result<Outcome> {
    let own = |index| world.base.chunk(Place { part: Part::Memory, index });
    let bench = Bench {
        group: "stages",
        name: "classify_unchanged".into(),
        reference_name: "memcmp",
        bound: 0.6,
        bytes: bytes(&world.same),
        runs,
    };
    let compare = || {
        let equal = (0..).zip(&world.same).all(|(i, chunk)| black_box(own(i) == Some(chunk)));
        ensure!(equal, "the guest is not its base");
        Ok(())
    };
    bench.run(compare, || classify(world, &world.same, Class::Unchanged))
}

/// Chunks that differ from base where they are and equal it elsewhere, as a guest's page cache
/// does: compared, hashed, found in the index, entered in the state table. Against hashing them.
pub(crate) fn hash_and_look_up(world: &World, runs: usize) -> anyhow::Result<Outcome> {
    let bench = Bench {
        group: "stages",
        name: "classify_base_disk".into(),
        reference_name: "blake3",
        bound: 0.7,
        bytes: bytes(&world.page_cache),
        runs,
    };
    let hash = || {
        world.page_cache.iter().for_each(|chunk| _ = black_box(ChunkHash::of(chunk)));
        Ok(())
    };
    bench.run(hash, || classify(world, &world.page_cache, Class::BaseDisk))
}

/// Trying a delta where there is none to be had: it must be nearly free next to the codec that
/// the chunk goes to then. The stage is measured by its own account.
pub(crate) fn delta_in_vain(world: &World, runs: usize) -> anyhow::Result<Outcome> {
    // Unlike its base and of a kind that compresses: noise would be waved through by the codec.
    let chunks: Vec<Chunk> =
        (0..world.same.len().min(8 * 1024)).map(|n| like_memory(n as u64)).collect();
    let mut compressor = Compressor::new();
    let batches: Vec<&[u8]> =
        chunks.chunks(MAX_BATCH_DATA_CHUNKS).map(<[Chunk]>::as_flattened).collect();
    let bench = Bench {
        group: "stages",
        name: "delta_in_vain".into(),
        reference_name: "zstd",
        bound: 5.0,
        bytes: bytes(&chunks),
        runs,
    };
    let compress = || {
        for batch in &batches {
            black_box(compressor.pack(Mode::DEFAULT, batch)?);
        }
        Ok(())
    };
    let options = StageOptions { delta: DeltaMode::Auto, ..StageOptions::default() };
    let mut delta_ns = Vec::new();
    let mut outcome = bench.run(compress, || {
        let mut outbound = Outbound::new(world.bases(), world.geometry, options);
        outbound.begin(1);
        for (ids, chunks) in world.groups(&chunks) {
            for (id, chunk) in ids.into_iter().zip(chunks) {
                *outbound.slot(id)? = *chunk;
            }
            while outbound.poll().is_some() {}
        }
        outbound.end()?;
        let stats = outbound.stats();
        ensure!(stats[Class::Data].chunks == chunks.len() as u64, "{stats:?}");
        delta_ns.push(stats[Stage::Delta].cpu_ns);
        Ok(())
    })?;
    delta_ns.sort_unstable();
    let median = *delta_ns.get(delta_ns.len() / 2).context("no run")?;
    outcome.value = bytes(&chunks) as f64 * 1e9 / median.max(1) as f64;
    outcome.ratio = outcome.value / outcome.reference;
    outcome.met = outcome.ratio >= outcome.bound;
    Ok(outcome)
}

/// A chunk of words with few distinct high bytes, as pointers and counters have.
fn like_memory(n: u64) -> Chunk {
    let mut chunk = [0; CHUNK_SIZE];
    let (words, _) = chunk.as_chunks_mut::<8>();
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in words {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = match state & 3 {
            0 => 0,
            1 => 0x7fff_0000_0000 | state & 0xf_fff8,
            _ => state >> 40,
        };
        *word = value.to_le_bytes();
    }
    chunk
}
