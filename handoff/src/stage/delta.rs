//! The stage between classifying and packing: a chunk as what changed in it, and its reverse.
//!
//! The reference is what the target holds in the same chunk at that moment: its base state, or the
//! content that was sent last, as long as the source still has that in a cache of bounded size. Of a
//! guest that goes back to where it came from, it is also what came with the guest. A
//! wrong reference cannot be taken: what is in the cache goes by the hash that the state table has
//! for the target's chunk. That the target arrives at the same content is proved by the state root,
//! as it is for everything else.

use std::{fmt, ops::Range, str::FromStr, sync::Arc};

use guest_images::{CHUNK_SIZE, Chunk};

use super::{
    classify::{Decision, Op},
    delta_cache::SentCache,
    options::StageOptions,
    pack::What,
};
use crate::{
    base_view::{Bases, own_place},
    chunks::ChunkId,
};

/// The longest delta. The paper's formats say every byte of the chunk and a little more; what is
/// the same in both is zero in them and falls to the codec.
pub const MAX_DELTA_BYTES: usize = CHUNK_SIZE + 256;

/// Runs with fewer words between them, or as many, are one.
const MIN_GAP_WORDS: usize = 1;

/// The longest run: what one byte can say.
const MAX_RUN_BYTES: usize = 256;

/// Bytes before a run.
const RUN_HEAD_BYTES: usize = 3;

const WORD: usize = size_of::<u64>();

/// How a delta is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DeltaCodec {
    /// The runs of bytes that changed: `unchanged bytes before u16 le, bytes - 1 u8, bytes ...`
    /// again and again. Longer runs are several.
    Runs = 0,
    /// Every byte combined with that of the reference by exclusive or.
    Xor = 1,
    /// A bsdiff patch as the `bsdiff` crate writes it, uncompressed.
    Bsdiff = 2,
}

impl DeltaCodec {
    /// The codec with this number on the wire.
    pub fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Runs),
            1 => Some(Self::Xor),
            2 => Some(Self::Bsdiff),
            _ => None,
        }
    }
}

/// Which deltas are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeltaMode {
    /// Runs of changed bytes, for each chunk where they are shorter than what is not zero in it.
    #[default]
    Auto,
    /// None.
    None,
    /// Exclusive or, for every chunk that has a reference: to compare with.
    Xor,
    /// A bsdiff patch, for every chunk that has a reference: to compare with.
    Bsdiff,
}

impl DeltaMode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::Auto, Self::None, Self::Xor, Self::Bsdiff];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Xor => "xor",
            Self::Bsdiff => "bsdiff",
        }
    }
}

impl fmt::Display for DeltaMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no delta mode {name:?}; there are: {}", DeltaMode::ALL.map(DeltaMode::name).join(", ")
)]
pub struct UnknownDeltaMode {
    /// The name.
    pub name: String,
}

impl FromStr for DeltaMode {
    type Err = UnknownDeltaMode;

    fn from_str(name: &str) -> Result<Self, UnknownDeltaMode> {
        let mode = Self::ALL.into_iter().find(|mode| mode.name() == name);
        mode.ok_or_else(|| UnknownDeltaMode { name: name.to_owned() })
    }
}

/// What came here leaves at least this fraction of the cache to what is sent.
const LEAST_CACHE: usize = 4;

/// Makes deltas of the chunks that nothing cheaper stands for.
pub(super) struct DeltaStage {
    mode: DeltaMode,
    cache: SentCache,
    /// What this side received of the state in which the target began.
    received: Option<Arc<SentCache>>,
    /// The deltas of one group, one after the other.
    bytes: Vec<u8>,
    /// For each chunk of the group its delta, if it has one.
    made: Vec<Option<(DeltaCodec, Range<usize>)>>,
}

impl DeltaStage {
    pub(super) fn new(options: &StageOptions) -> Self {
        let cache_bytes = match options.delta {
            DeltaMode::None => 0,
            _ => options.delta_cache_bytes,
        };
        Self {
            mode: options.delta,
            cache: SentCache::new(cache_bytes),
            received: None,
            bytes: Vec::new(),
            made: Vec::new(),
        }
    }

    /// The same with more references: what this side received of the state in which the target
    /// began. Of what is sent, less is kept then: both together take little more memory.
    pub(super) fn with_received(self, received: Arc<SentCache>) -> Self {
        let most = self.cache.capacity_bytes();
        let left = most.saturating_sub(received.len() * CHUNK_SIZE).max(most / LEAST_CACHE);
        Self { received: Some(received), cache: SentCache::new(left), ..self }
    }

    /// Makes the deltas of a group of classified chunks, in the order in which they will be sent.
    pub(super) fn encode_group(
        &mut self,
        bases: &Bases,
        ids: &[ChunkId],
        chunks: &[Chunk],
        decisions: &[Decision],
    ) {
        self.bytes.clear();
        self.made.clear();
        if self.mode == DeltaMode::None {
            return;
        }
        for ((id, chunk), decision) in ids.iter().zip(chunks).zip(decisions) {
            let sent = decision.op == Op::Data;
            let made = sent.then(|| self.encode(bases, *id, chunk, decision)).flatten();
            self.made.push(made);
            if let (true, Some(hash)) = (sent, decision.after) {
                self.cache.insert(*id, hash, chunk, decision.before.is_some());
            }
        }
    }

    fn encode(
        &mut self,
        bases: &Bases,
        id: ChunkId,
        chunk: &Chunk,
        decision: &Decision,
    ) -> Option<(DeltaCodec, Range<usize>)> {
        let reference = match decision.before {
            Some(hash) => {
                let received = || self.received.as_ref()?.get(id, &hash);
                self.cache.get(id, &hash).or_else(received)?
            }
            None => bases.own().chunk(own_place(bases.own(), id)?)?,
        };
        let start = self.bytes.len();
        let codec = match self.mode {
            DeltaMode::None => return None,
            DeltaMode::Auto => DeltaCodec::Runs,
            DeltaMode::Xor => DeltaCodec::Xor,
            DeltaMode::Bsdiff => DeltaCodec::Bsdiff,
        };
        let made = match codec {
            DeltaCodec::Runs => {
                // Runs compress about as well as the chunk would: to be shorter is enough.
                put_runs(reference, chunk, nonzero_bytes(chunk), &mut self.bytes)
            }
            DeltaCodec::Xor => {
                self.bytes.extend(reference.iter().zip(chunk).map(|(old, new)| old ^ new));
                true
            }
            DeltaCodec::Bsdiff => bsdiff::diff(reference, chunk, &mut self.bytes).is_ok(),
        };
        let len = self.bytes.len() - start;
        if made && (1..=MAX_DELTA_BYTES).contains(&len) {
            return Some((codec, start..start + len));
        }
        self.bytes.truncate(start);
        None
    }

    /// Bytes of the group's deltas, and how many there are.
    pub(super) fn made(&self) -> (usize, usize) {
        (self.bytes.len(), self.made.iter().flatten().count())
    }

    /// The delta of chunk number `i` of the group.
    pub(super) fn what(&self, i: usize) -> Option<What<'_>> {
        let (codec, range) = self.made.get(i)?.as_ref()?;
        Some(What::Delta(*codec, self.bytes.get(range.clone())?))
    }
}

/// Bytes in words that are not zero.
fn nonzero_bytes(chunk: &Chunk) -> usize {
    let (words, _) = chunk.as_chunks::<WORD>();
    words.iter().filter(|word| **word != [0; WORD]).count() * WORD
}

/// Appends the runs in which `new` differs from `old`; gives up when they take more than `budget`
/// bytes, or where nothing differs. What was appended until then is for the caller to drop.
fn put_runs(old: &Chunk, new: &Chunk, budget: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let ((old_words, _), (new_words, _)) = (old.as_chunks::<WORD>(), new.as_chunks::<WORD>());
    let differs = |word: usize| old_words.get(word) != new_words.get(word);
    let words = new_words.len();
    let (mut word, mut told) = (0, 0);
    while let Some(first) = (word..words).find(|word| differs(*word)) {
        // The run ends before the first gap that is long enough.
        let mut last = first;
        while let Some(next) =
            (last + 1..words.min(last + 2 + MIN_GAP_WORDS)).find(|word| differs(*word))
        {
            last = next;
        }
        let (mut from, mut to) = (first * WORD, (last + 1) * WORD);
        while old[from] == new[from] {
            from += 1;
        }
        while old[to - 1] == new[to - 1] {
            to -= 1;
        }
        let heads = (to - from).div_ceil(MAX_RUN_BYTES);
        if out.len() - start + heads * RUN_HEAD_BYTES + (to - from) > budget {
            return false;
        }
        for run in new[from..to].chunks(MAX_RUN_BYTES) {
            out.extend_from_slice(&((from - told) as u16).to_le_bytes());
            out.push((run.len() - 1) as u8);
            out.extend_from_slice(run);
            from += run.len();
            told = from;
        }
        word = last + 1;
    }
    out.len() > start
}

/// A delta that cannot be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a {codec:?} delta of {len} bytes is malformed")]
pub struct DeltaError {
    /// Its codec.
    pub codec: DeltaCodec,
    /// Its length.
    pub len: usize,
}

/// Changes `chunk`, the reference, into what the delta says. After an error its content is
/// undefined. Takes no more memory than a few chunks, whatever the delta claims.
pub fn apply(codec: DeltaCodec, delta: &[u8], chunk: &mut Chunk) -> Result<(), DeltaError> {
    let done = match codec {
        DeltaCodec::Runs => apply_runs(delta, chunk),
        DeltaCodec::Xor => (delta.len() == CHUNK_SIZE)
            .then(|| chunk.iter_mut().zip(delta).for_each(|(byte, change)| *byte ^= change)),
        DeltaCodec::Bsdiff => apply_bsdiff(delta, chunk),
    };
    done.ok_or(DeltaError { codec, len: delta.len() })
}

fn apply_runs(mut delta: &[u8], chunk: &mut Chunk) -> Option<()> {
    let mut at = 0;
    while !delta.is_empty() {
        let ([low, high, len], rest) = delta.split_first_chunk::<RUN_HEAD_BYTES>()?;
        let (run, rest) = rest.split_at_checked(usize::from(*len) + 1)?;
        at += usize::from(u16::from_le_bytes([*low, *high]));
        chunk.get_mut(at..at + run.len())?.copy_from_slice(run);
        at += run.len();
        delta = rest;
    }
    Some(())
}

fn apply_bsdiff(delta: &[u8], chunk: &mut Chunk) -> Option<()> {
    // Each byte made takes one byte of the patch, so that a short patch cannot make much.
    let mut patch = (delta.len() <= MAX_DELTA_BYTES).then_some(delta)?;
    let mut made = Vec::with_capacity(CHUNK_SIZE);
    bsdiff::patch(chunk, &mut patch, &mut made).ok()?;
    *chunk = made.as_slice().try_into().ok()?;
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A chunk of runs of bytes, and the same with some bytes changed.
    fn pair() -> impl Strategy<Value = (Chunk, Chunk)> {
        let runs = prop::collection::vec((0usize..CHUNK_SIZE, 0usize..900, any::<u8>()), 0..12);
        let changes = prop::collection::vec((0usize..CHUNK_SIZE, 1usize..700, any::<u8>()), 0..12);
        let paint = |chunk: &mut Chunk, runs: &[(usize, usize, u8)]| {
            for &(at, len, byte) in runs {
                let end = CHUNK_SIZE.min(at + len);
                chunk[at..end].iter_mut().zip(0u32..).for_each(|(b, n)| *b = byte ^ (n / 7) as u8);
            }
        };
        (runs, changes).prop_map(move |(runs, changes)| {
            let mut old = [0; CHUNK_SIZE];
            paint(&mut old, &runs);
            let mut new = old;
            paint(&mut new, &changes);
            (old, new)
        })
    }

    proptest! {
        #[test]
        fn runs_round_trip((old, new) in pair(), budget in 0usize..CHUNK_SIZE + 100) {
            let mut delta = vec![9];
            if put_runs(&old, &new, budget, &mut delta) {
                prop_assert!(old != new && delta.len() - 1 <= budget);
                let mut back = old;
                apply(DeltaCodec::Runs, &delta[1..], &mut back).unwrap();
                prop_assert!(back == new);
            } else {
                // Runs cost a head of three bytes for each nine bytes or more.
                let differ = old.iter().zip(&new).filter(|(a, b)| a != b).count();
                prop_assert!(differ == 0 || differ * 12 > budget, "{differ} of {budget}");
            }
        }

        #[test]
        fn patches_round_trip((old, new) in pair()) {
            let mut delta = Vec::new();
            bsdiff::diff(&old, &new, &mut delta).unwrap();
            prop_assume!(delta.len() <= MAX_DELTA_BYTES);
            let mut back = old;
            apply(DeltaCodec::Bsdiff, &delta, &mut back).unwrap();
            prop_assert!(back == new);
        }

        /// Whatever a peer sends as a delta is applied or an error, never a panic.
        #[test]
        fn hostile_deltas(
            (mut chunk, _) in pair(), delta in prop::collection::vec(any::<u8>(), 0..200),
            claims in prop::collection::vec(0u64..9000, 0..3), number in 0u8..3,
        ) {
            let control: Vec<u8> = claims.iter().flat_map(|n| n.to_le_bytes()).collect();
            let codec = DeltaCodec::from_u8(number).unwrap();
            let _ = apply(codec, &[control, delta].concat(), &mut chunk);
        }
    }

    #[test]
    fn a_patch_that_claims_much_is_refused() {
        for claim in [u64::MAX, 1 << 40, 4097] {
            let patch = [claim.to_le_bytes(), claim.to_le_bytes(), [0; 8]].concat();
            apply(DeltaCodec::Bsdiff, &patch, &mut [0; CHUNK_SIZE]).unwrap_err();
        }
        apply(DeltaCodec::Bsdiff, &[], &mut [0; CHUNK_SIZE]).unwrap_err();
        apply(DeltaCodec::Xor, &[0; CHUNK_SIZE - 1], &mut [0; CHUNK_SIZE]).unwrap_err();
        apply(DeltaCodec::Runs, &[255, 15, 1, 7, 7], &mut [0; CHUNK_SIZE]).unwrap_err();
        apply(DeltaCodec::Runs, &[255, 15, 0, 7], &mut [0; CHUNK_SIZE]).unwrap();
    }

    #[test]
    fn small_changes_are_small() {
        let mut old = [5; CHUNK_SIZE];
        let mut new = old;
        new[100] = 6;
        new[4000..4004].fill(7);
        let mut delta = Vec::new();
        assert!(put_runs(&old, &new, 1000, &mut delta));
        assert_eq!(delta.len(), 3 + 1 + 3 + 4);
        // Another chunk altogether is told early.
        old.fill(9);
        delta.clear();
        assert!(!put_runs(&old, &new, 1000, &mut delta));
        assert!(delta.len() <= 1000);
    }

    #[test]
    fn names_and_numbers() {
        for mode in DeltaMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "vcdiff".parse::<DeltaMode>().unwrap_err();
        assert!(error.to_string().contains("auto, none, xor, bsdiff"), "{error}");
        for number in 0..=3 {
            let codec = DeltaCodec::from_u8(number);
            assert!(codec.is_none_or(|codec| codec as u8 == number));
        }
    }
}
