//! Traces of known content: the same seed gives the same trace.

use std::time::Duration;

use guest_images::{CHUNK_SIZE, Chunk, Part, Place};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

use super::{BuildError, Trace, TraceBuilder};
use crate::{ChunkId, Geometry, Space};

/// Different words in text.
const WORDS: usize = 2048;
/// Types of objects.
const TYPES: usize = 48;
/// Where a kernel's code is, and how much of it there is.
const TEXT: u64 = 0xffff_ffff_8100_0000;
const TEXT_BYTES: u32 = 8 << 20;
/// Pages that objects are in.
const HEAP_PAGES: u32 = 1 << 18;
/// Where objects are that pointers point to.
const HEAP: u64 = 0xffff_8880_0000_0000;
/// How far apart they are.
const HEAP_BYTES: u64 = 64 << 20;

/// What chunks hold, in shares of any sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Words: compresses to about a third.
    pub text: u32,
    /// Objects of a few types in slabs, as a kernel's: most of what a guest writes that no base has.
    /// Strong codecs leave much less of it than fast ones, and those that know alignment the least.
    pub objects: u32,
    /// Pointers and small numbers in no order: compresses to about half.
    pub pointers: u32,
    /// Does not compress.
    pub random: u32,
    /// What the base disk holds.
    pub page_cache: u32,
    /// Zeros.
    pub zero: u32,
}

impl Mix {
    /// What a guest's memory is like without its page cache.
    pub const MEMORY: Self =
        Self { text: 1, objects: 7, pointers: 1, random: 1, page_cache: 0, zero: 1 };
    /// What a guest's memory is like when it has read much from its disk.
    pub const PAGE_CACHE: Self = Self { page_cache: 24, ..Self::MEMORY };
    /// Media that are compressed already.
    pub const RANDOM: Self = Self { random: 1, ..Self::NOTHING };
    /// All that compresses well.
    pub const TEXT: Self = Self { text: 1, ..Self::NOTHING };
    /// Nothing yet: to name a few kinds.
    pub const NOTHING: Self =
        Self { text: 0, objects: 0, pointers: 0, random: 0, page_cache: 0, zero: 0 };

    fn pick(self, n: u32) -> Kind {
        let Self { text, objects, pointers, random, page_cache, zero } = self;
        let shares = [
            (text, Kind::Text),
            (objects, Kind::Objects),
            (pointers, Kind::Pointers),
            (random, Kind::Random),
            (page_cache, Kind::PageCache),
            (zero, Kind::Zero),
        ];
        let sum: u64 = shares.iter().map(|(share, _)| u64::from(*share)).sum();
        let mut at = u64::from(n) % sum.max(1);
        for (share, kind) in shares {
            match at.checked_sub(share.into()) {
                Some(left) => at = left,
                None => return kind,
            }
        }
        Kind::Zero
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Objects,
    Pointers,
    Random,
    PageCache,
    Zero,
}

/// A guest that is made up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Synth {
    /// Everything follows from it.
    pub seed: u64,
    /// Chunks of RAM.
    pub ram_chunks: u64,
    /// Chunks of the disk. The base's disk is as large; of it as many chunks are held as
    /// [`Mix::page_cache`] refers to, at most [`Synth::cache_chunks`].
    pub disk_chunks: u64,
    /// Different chunks of the base disk that are in the guest's page cache.
    pub cache_chunks: u64,
    /// Chunks of RAM that differ from base when the trace begins. The first [`Synth::hot`] of them
    /// are those that are written on.
    pub changed: u64,
    /// Chunks of the disk that differ.
    pub changed_disk: u64,
    /// What they hold.
    pub mix: Mix,
    /// Whether the base has a memory; of what changed, the share that differs from it in a few places
    /// only is [`Synth::near_base`].
    pub base_memory: bool,
    /// See there.
    pub near_base: f64,
    /// Chunks that are written to again and again.
    pub hot: u64,
    /// How many writes a second there are, ...
    pub writes_per_s: f64,
    /// ... of which this share goes to chunks that were not written before, ...
    pub cold_share: f64,
    /// ... and this share to the disk.
    pub disk_share: f64,
    /// How many bytes of a chunk a write changes.
    pub write_bytes: usize,
    /// How long it goes on.
    pub duration: Duration,
}

impl Default for Synth {
    /// A guest of 1 GiB, 40 MiB of which differ from base; a small working set.
    fn default() -> Self {
        Self {
            seed: 1,
            ram_chunks: 262_144,
            disk_chunks: 65_536,
            cache_chunks: 4096,
            changed: 10_000,
            changed_disk: 200,
            mix: Mix::MEMORY,
            base_memory: false,
            near_base: 0.25,
            hot: 500,
            writes_per_s: 200.0,
            cold_share: 0.05,
            disk_share: 0.02,
            write_bytes: 512,
            duration: Duration::from_secs(30),
        }
    }
}

impl Synth {
    /// Makes the trace. It holds all contents: 4 KiB for each chunk that differs and each write.
    pub fn build(&self) -> Result<Trace, BuildError> {
        Maker::new(*self).make()
    }
}

struct Maker {
    spec: Synth,
    rng: SmallRng,
    words: Vec<Vec<u8>>,
    types: Vec<Vec<Field>>,
    cache: Vec<Chunk>,
    builder: TraceBuilder,
    /// What chunks that may be written hold now.
    now: std::collections::HashMap<ChunkId, Chunk>,
}

impl Maker {
    fn new(spec: Synth) -> Self {
        let geometry = Geometry { ram_chunks: spec.ram_chunks, disk_chunks: spec.disk_chunks };
        let mut parts = [0; Part::ALL.len()];
        parts[Part::Disk as usize] = spec.disk_chunks;
        if spec.base_memory {
            parts[Part::Memory as usize] = spec.ram_chunks;
        }
        let mut rng = SmallRng::seed_from_u64(spec.seed);
        let words = (0..WORDS).map(|_| word(&mut rng)).collect();
        let types = (0..TYPES).map(|_| object_type(&mut rng)).collect();
        let builder = TraceBuilder::new(geometry, parts, u32::MAX as usize);
        Self { spec, rng, words, types, cache: Vec::new(), builder, now: Default::default() }
    }

    fn make(mut self) -> Result<Trace, BuildError> {
        let spec = self.spec;
        if spec.mix.page_cache > 0 {
            for index in 0..spec.cache_chunks.min(spec.disk_chunks) {
                let chunk = self.content(if index % 3 == 0 { Kind::Text } else { Kind::Pointers });
                self.builder.base(Place { part: Part::Disk, index }, &chunk)?;
                self.cache.push(chunk);
            }
        }
        // Chunks lie in runs, as a guest's allocations do.
        for (space, changed) in [(Space::Ram, spec.changed), (Space::Disk, spec.changed_disk)] {
            for n in 0..changed.min(self.spec_len(space)) {
                self.begin_with(ChunkId { space, index: n })?;
            }
        }
        self.write_on()?;
        Ok(self.builder.finish(spec.duration))
    }

    fn spec_len(&self, space: Space) -> u64 {
        match space {
            Space::Ram => self.spec.ram_chunks,
            Space::Disk => self.spec.disk_chunks,
        }
    }

    fn begin_with(&mut self, id: ChunkId) -> Result<(), BuildError> {
        let kind = self.spec.mix.pick(self.rng.next_u32());
        let chunk = self.content(kind);
        if self.spec.base_memory && id.space == Space::Ram {
            let mut before = chunk;
            if self.rng.random::<f64>() < self.spec.near_base {
                self.write_some(&mut before, 64);
            } else {
                before = self.content(Kind::Pointers);
            }
            self.builder.base(Place { part: Part::Memory, index: id.index }, &before)?;
        }
        self.now.insert(id, chunk);
        self.builder.initial(id, &chunk)
    }

    fn write_on(&mut self) -> Result<(), BuildError> {
        let spec = self.spec;
        let writes = (spec.writes_per_s * spec.duration.as_secs_f64()) as u64;
        let hot = spec.hot.min(spec.ram_chunks).max(1);
        let mut cold = spec.changed;
        let mut cold_disk = spec.changed_disk;
        for n in 0..writes {
            let at = Duration::from_secs_f64(n as f64 / spec.writes_per_s);
            let fresh = self.rng.random::<f64>() < spec.cold_share;
            let on_disk = spec.disk_chunks > 0 && self.rng.random::<f64>() < spec.disk_share;
            let (space, end, next, hot) = match on_disk {
                false => (Space::Ram, spec.ram_chunks, &mut cold, hot),
                true => (Space::Disk, spec.disk_chunks, &mut cold_disk, hot.min(spec.disk_chunks)),
            };
            let index = if fresh && *next < end {
                *next += 1;
                *next - 1
            } else {
                self.rng.random_range(0..hot)
            };
            let id = ChunkId { space, index };
            let chunk = match self.now.get(&id) {
                Some(chunk) if spec.write_bytes < CHUNK_SIZE => {
                    let mut chunk = *chunk;
                    self.write_some(&mut chunk, spec.write_bytes);
                    chunk
                }
                _ => {
                    let kind = spec.mix.pick(self.rng.next_u32());
                    self.content(kind)
                }
            };
            self.now.insert(id, chunk);
            self.builder.change(at, id, &chunk)?;
        }
        Ok(())
    }

    /// Changes so many bytes at one place.
    fn write_some(&mut self, chunk: &mut Chunk, bytes: usize) {
        let kind = if self.rng.random::<bool>() { Kind::Pointers } else { Kind::Text };
        let from = self.content(kind);
        let bytes = bytes.clamp(1, CHUNK_SIZE);
        let at = self.rng.random_range(0..=CHUNK_SIZE - bytes);
        chunk[at..at + bytes].copy_from_slice(&from[at..at + bytes]);
    }

    fn content(&mut self, kind: Kind) -> Chunk {
        let mut chunk = [0; CHUNK_SIZE];
        match kind {
            Kind::Zero => {}
            Kind::Random => self.rng.fill_bytes(&mut chunk),
            Kind::Text => self.text(&mut chunk),
            Kind::Objects => self.objects(&mut chunk),
            Kind::Pointers => self.pointers(&mut chunk),
            Kind::PageCache if self.cache.is_empty() => self.text(&mut chunk),
            Kind::PageCache => chunk = self.cache[self.rng.random_range(0..self.cache.len())],
        }
        chunk
    }

    fn text(&mut self, chunk: &mut Chunk) {
        let mut at = 0;
        while at < CHUNK_SIZE {
            // A few words are frequent, most are rare.
            let n = self.rng.random::<f64>().powi(4) * (WORDS - 1) as f64;
            let word = &self.words[n as usize];
            let len = word.len().min(CHUNK_SIZE - at);
            chunk[at..at + len].copy_from_slice(&word[..len]);
            at += len;
        }
    }

    /// A slab of one type: its objects differ in some fields, and one in seven is free.
    fn objects(&mut self, chunk: &mut Chunk) {
        let rng = &mut self.rng;
        let fields = &self.types[rng.random_range(0..self.types.len())];
        let mut page = || HEAP + u64::from(rng.next_u32() % HEAP_PAGES) * CHUNK_SIZE as u64;
        let (own, other) = (page(), page());
        for (at, object) in chunk.chunks_exact_mut(8 * fields.len()).enumerate() {
            let here = own + (at * 8 * fields.len()) as u64;
            let live = rng.random::<f64>() < 0.85;
            for (field, cell) in fields.iter().zip(object.as_chunks_mut::<8>().0) {
                let value = match *field {
                    Field::Always(value) => value,
                    _ if !live => 0,
                    Field::Itself => here + u64::from(rng.next_u32() % 3) * 8,
                    Field::Another => other + u64::from(rng.next_u32() % 512) * 64,
                    Field::Small => (rng.random::<f64>().powi(3) * 200.0) as u64,
                    Field::OneOf(values) => values[rng.next_u32() as usize % values.len()],
                    Field::Any => rng.next_u64(),
                };
                *cell = value.to_le_bytes();
            }
        }
    }

    fn pointers(&mut self, chunk: &mut Chunk) {
        for cell in chunk.as_chunks_mut::<8>().0 {
            let n = self.rng.next_u32();
            let value = match n % 8 {
                0..3 => HEAP + u64::from(n >> 3) % HEAP_BYTES / 16 * 16,
                3..6 => u64::from(n >> 16 & 0xff),
                _ => 0,
            };
            *cell = value.to_le_bytes();
        }
    }
}

/// What a field of an object holds.
#[derive(Clone, Copy)]
enum Field {
    /// The same in all objects of the type: zero, or a function.
    Always(u64),
    /// A place in the object.
    Itself,
    /// Another object, near those that its neighbours point to.
    Another,
    Small,
    OneOf([u64; 3]),
    Any,
}

fn object_type(rng: &mut SmallRng) -> Vec<Field> {
    let fields = [8, 12, 16, 24, 32, 48, 64, 96][rng.random_range(0..8)];
    let field = |rng: &mut SmallRng| match rng.next_u32() % 50 {
        0..8 => Field::Always(TEXT + u64::from(rng.next_u32() % TEXT_BYTES) / 16 * 16),
        8..20 => Field::Always(0),
        20..26 => Field::Itself,
        26..36 => Field::Another,
        36..42 => Field::Small,
        42..49 => Field::OneOf(std::array::from_fn(|_| u64::from(rng.next_u32() >> 12))),
        _ => Field::Any,
    };
    (0..fields).map(|_| field(rng)).collect()
}

fn word(rng: &mut SmallRng) -> Vec<u8> {
    let len = rng.random_range(2..10);
    let letters = (0..len).map(|_| b'a' + (rng.next_u32() % 26) as u8);
    letters.chain(*b" ").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(mix: Mix) -> f64 {
        let spec = Synth { mix, changed: 512, writes_per_s: 0.0, ..Synth::default() };
        let trace = spec.build().unwrap();
        let bytes: Vec<u8> = trace
            .initial()
            .iter()
            .filter(|(id, _)| id.space == Space::Ram)
            .flat_map(|(_, content)| *trace.contents().get(*content).unwrap())
            .collect();
        zstd::bulk::compress(&bytes, 3).unwrap().len() as f64 / bytes.len() as f64
    }

    #[test]
    fn kinds_compress_as_they_are_said_to() {
        let only = Mix::NOTHING;
        let text = ratio(Mix::TEXT);
        assert!((0.2..0.45).contains(&text), "{text}");
        let objects = ratio(Mix { objects: 1, ..only });
        assert!((0.1..0.3).contains(&objects), "{objects}");
        let pointers = ratio(Mix { pointers: 1, ..only });
        assert!((0.3..0.6).contains(&pointers), "{pointers}");
        assert!(ratio(Mix::RANDOM) > 0.99);
        assert!(ratio(Mix { zero: 1, ..only }) < 0.01);
    }

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        let spec = Synth { changed: 200, duration: Duration::from_secs(2), ..Synth::default() };
        let (one, two) = (spec.build().unwrap(), spec.build().unwrap());
        assert_eq!(one.changes(), two.changes());
        assert!(one.contents().iter().eq(two.contents().iter()));
        assert_eq!(one.changes().len(), 400);
        let other = Synth { seed: 2, ..spec }.build().unwrap();
        assert!(!other.contents().iter().eq(one.contents().iter()));
    }
}
