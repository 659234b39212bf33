//! An offline encoder: what a state takes when everything about it is known beforehand.
//!
//! A yardstick for the bytes that a handoff puts on the link. It sees the whole state at once, has
//! all the time it wants, and needs no words for what goes where. Chunks of the state that differ
//! from the base are taken in order; those that are zero, equal any chunk of the base or an earlier
//! chunk of the state are left out; what is left is compressed in batches of 1 MiB by zstd, level 3.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    hash::{DefaultHasher, Hasher},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

/// Bytes of a chunk.
pub(crate) const CHUNK: usize = 4096;
const BATCH: usize = 1 << 20;
const LEVEL: i32 = 3;
/// How much of a file is read at once; a whole number of chunks.
const PIECE: usize = 1 << 20;

/// What the encoder made of a state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Encoded {
    /// Chunks that differ from base in their place.
    pub(crate) changed: u64,
    /// Of those, all zero.
    pub(crate) zero: u64,
    /// Of those, equal to a chunk of the base.
    pub(crate) base: u64,
    /// Of those, equal to an earlier one.
    pub(crate) repeated: u64,
    /// What is left.
    pub(crate) left: u64,
    /// What is left, compressed.
    pub(crate) bytes: u64,
}

/// Encodes the changed chunks of one state.
pub(crate) struct Encoder {
    base: BaseChunks,
    seen: HashSet<[u8; 32]>,
    batch: Vec<u8>,
    encoded: Encoded,
}

impl Encoder {
    /// One that knows these parts of the base.
    pub(crate) fn new(parts: &[PathBuf]) -> Result<Self> {
        Ok(Self {
            base: BaseChunks::read(parts)?,
            seen: HashSet::new(),
            batch: Vec::with_capacity(BATCH),
            encoded: Encoded::default(),
        })
    }

    /// Takes a chunk that differs from base in its place.
    pub(crate) fn take(&mut self, chunk: &[u8]) -> Result<()> {
        self.encoded.changed += 1;
        if is_zero(chunk) {
            self.encoded.zero += 1;
        } else if self.base.holds(chunk)? {
            self.encoded.base += 1;
        } else if !self.seen.insert(*blake3::hash(chunk).as_bytes()) {
            self.encoded.repeated += 1;
        } else {
            self.encoded.left += 1;
            self.batch.extend_from_slice(chunk);
            if self.batch.len() >= BATCH {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Takes those chunks of `now` that differ from `before`, of the same place in its file.
    pub(crate) fn take_changed(&mut self, now: &[u8], before: &[u8]) -> Result<()> {
        for (at, chunk) in now.chunks(CHUNK).enumerate() {
            let old = before
                .get(at * CHUNK..)
                .map_or(&[][..], |old| old.get(..chunk.len()).unwrap_or(old));
            if chunk != old {
                self.take(chunk)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.batch.is_empty() {
            let packed = zstd::bulk::compress(&self.batch, LEVEL).context("zstd")?;
            self.encoded.bytes += packed.len() as u64;
            self.batch.clear();
        }
        Ok(())
    }

    /// What came of it.
    pub(crate) fn finish(mut self) -> Result<Encoded> {
        self.flush()?;
        Ok(self.encoded)
    }
}

/// Finds chunks of a base. Hashes only tell where to look: bytes are compared.
struct BaseChunks {
    parts: Vec<File>,
    places: HashMap<u64, (usize, u64)>,
}

impl BaseChunks {
    fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut chunks = Self { parts: Vec::new(), places: HashMap::new() };
        for path in paths {
            let opened = File::open(path);
            let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
            let part = chunks.parts.len();
            let places = &mut chunks.places;
            for_each_piece(&file, |at, piece| {
                for (index, chunk) in piece.chunks(CHUNK).enumerate() {
                    if chunk.len() == CHUNK && !is_zero(chunk) {
                        let place = (part, at + (index * CHUNK) as u64);
                        places.entry(quick_hash(chunk)).or_insert(place);
                    }
                }
                Ok(())
            })
            .with_context(|| format!("cannot read {}", path.display()))?;
            chunks.parts.push(file);
        }
        Ok(chunks)
    }

    fn holds(&self, chunk: &[u8]) -> Result<bool> {
        let Some((part, at)) = self.places.get(&quick_hash(chunk)) else { return Ok(false) };
        let mut found = [0; CHUNK];
        let file = self.parts.get(*part).context("a place outside the base")?;
        file.read_exact_at(&mut found, *at).context("cannot read the base again")?;
        Ok(chunk == found)
    }
}

fn quick_hash(chunk: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(chunk);
    hasher.finish()
}

/// Whether a chunk holds nothing but zeros.
pub(crate) fn is_zero(chunk: &[u8]) -> bool {
    chunk.iter().all(|byte| *byte == 0)
}

/// Reads a file from its beginning to its end.
pub(crate) fn for_each_piece(
    file: &File,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    loop {
        let count = read_up_to(file, &mut piece, at)?;
        if count == 0 {
            return Ok(());
        }
        each(at, piece.get(..count).unwrap_or_default())?;
        at += count as u64;
    }
}

/// Fills a buffer from a place in a file, or as much of it as the file has.
pub(crate) fn read_up_to(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Arguments of `lab encode`.
#[derive(Args)]
pub(crate) struct EncodeArgs {
    /// A file of the state and the file of the base that it started from, as STATE=BASE; BASE may be
    /// empty for none. May be given several times
    #[arg(long = "state", required = true, value_name = "STATE=BASE")]
    states: Vec<String>,

    /// A part of the base in which equal chunks are looked for; may be given several times
    #[arg(long, value_name = "FILE")]
    base: Vec<PathBuf>,
}

/// Runs the encoder on files, and prints what came of it.
pub(crate) fn run(args: &EncodeArgs) -> Result<i32> {
    let mut encoder = Encoder::new(&args.base)?;
    for state in &args.states {
        let Some((now, before)) = state.split_once('=') else {
            bail!("--state {state}: give STATE=BASE");
        };
        let before = (!before.is_empty()).then_some(Path::new(before));
        encode_file(&mut encoder, Path::new(now), before)?;
    }
    crate::say(&serde_json::to_string_pretty(&encoder.finish()?)?);
    Ok(0)
}

/// Encodes what a file holds and the file that it started from does not, in the same place.
pub(crate) fn encode_file(encoder: &mut Encoder, now: &Path, before: Option<&Path>) -> Result<()> {
    let open =
        |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let before = before.map(open).transpose()?;
    let mut old = vec![0; PIECE];
    for_each_piece(&open(now)?, |at, piece| {
        let known = match &before {
            Some(before) => read_up_to(before, &mut old, at)?,
            None => 0,
        };
        encoder.take_changed(piece, old.get(..known).unwrap_or_default())
    })
    .with_context(|| format!("cannot encode {}", now.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A chunk that does not compress.
    fn noise(seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; CHUNK];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn what_is_known_costs_nothing_and_the_rest_is_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other, now) =
            (dir.path().join("base"), dir.path().join("other"), dir.path().join("now"));
        fs::write(&base, [noise(1), noise(2), noise(3), noise(4)].concat()).unwrap();
        fs::write(&other, [vec![0; CHUNK], noise(9)].concat()).unwrap();
        // Unchanged, of the other part, moved, zero, new, repeated, new and compressible.
        let state =
            [noise(1), noise(9), noise(2), vec![0; CHUNK], noise(5), noise(5), vec![7; CHUNK]];
        fs::write(&now, state.concat()).unwrap();
        let mut encoder = Encoder::new(&[base.clone(), other]).unwrap();
        encode_file(&mut encoder, &now, Some(&base)).unwrap();
        let encoded = encoder.finish().unwrap();
        let bytes = encoded.bytes;
        let expected = Encoded { changed: 6, zero: 1, base: 2, repeated: 1, left: 2, bytes };
        assert_eq!(encoded, expected);
        assert!((CHUNK as u64..CHUNK as u64 + 100).contains(&bytes), "{bytes}");
    }

    #[test]
    fn without_a_base_everything_but_zeros_counts() {
        let dir = tempfile::tempdir().unwrap();
        let now = dir.path().join("now");
        let state: Vec<u8> = (0..=255).flat_map(noise).chain(vec![0; 3 * CHUNK]).collect();
        fs::write(&now, &state).unwrap();
        let mut encoder = Encoder::new(&[]).unwrap();
        encode_file(&mut encoder, &now, None).unwrap();
        let encoded = encoder.finish().unwrap();
        assert_eq!((encoded.left, encoded.zero, encoded.base), (256, 3, 0));
        assert!(encoded.bytes >= 1 << 20, "noise does not compress: {}", encoded.bytes);
    }
}
