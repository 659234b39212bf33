//! Building an index from runs: entries sorted by hash, a run for each slab of a part.
//!
//! The hashes are cut into *buckets* by their first bytes. A bucket is taken together from all
//! runs, sorted and written; several are at work at once, and memory holds no more than those.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{ENTRY_BYTES, Entry, PartRoots, header, prefix};
use crate::in_order::in_order;

/// Entries that a bucket has on average: 2.5 MiB of them.
const BUCKET_ENTRIES: u64 = 1 << 16;
/// No more buckets than this, as each costs a search in each run.
const MAX_BUCKETS: u64 = 1 << 16;

/// Entries in the form of an index file, sorted by hash, then place.
pub(crate) type Run<'a> = &'a [[u8; ENTRY_BYTES]];

/// Puts entries in the order of an index; equal hashes stay.
pub(crate) fn sort_run(entries: &mut [Entry]) {
    entries.sort_unstable();
}

/// Writes an index of the entries of all runs: of each hash the first place, disk before kernel
/// before initramfs before memory, low chunk numbers before high ones. The file is empty, and the
/// caller makes it durable.
pub(crate) fn write(file: &File, roots: &PartRoots, runs: &[Run<'_>]) -> io::Result<()> {
    let total: u64 = runs.iter().map(|run| run.len() as u64).sum();
    let buckets = (total / BUCKET_ENTRIES).clamp(1, MAX_BUCKETS).next_power_of_two();
    let mut checksum = blake3::Hasher::new();
    let mut at = roots.header_bytes() as u64;
    let mut entries = 0;
    in_order(
        buckets,
        |bucket| bucket_bytes(bucket, buckets.trailing_zeros(), runs),
        |bytes: Vec<u8>| {
            checksum.update(&bytes);
            file.write_all_at(&bytes, at)?;
            at += bytes.len() as u64;
            entries += (bytes.len() / ENTRY_BYTES) as u64;
            Ok::<_, io::Error>(())
        },
    )?;
    file.write_all_at(&header(roots, entries, checksum.finalize().as_bytes()), 0)
}

/// The entries of one bucket of `1 << bits`, as they are in the file.
fn bucket_bytes(bucket: u64, bits: u32, runs: &[Run<'_>]) -> Vec<u8> {
    let number = |entry: &[u8; ENTRY_BYTES]| {
        let (hash, _) = entry.split_first_chunk::<32>().unwrap_or((&[0; 32], &[]));
        prefix(hash).checked_shr(u64::BITS - bits).unwrap_or(0)
    };
    let mut entries = Vec::new();
    for run in runs {
        let start = run.partition_point(|entry| number(entry) < bucket);
        let rest = run.get(start..).unwrap_or_default();
        let len = rest.partition_point(|entry| number(entry) == bucket);
        entries.extend(rest.iter().take(len).map(Entry::from_bytes));
    }
    super::sort(&mut entries);
    entries.iter().flat_map(|entry| entry.to_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::{
        base::{Part, Place},
        chunk::ChunkHash,
        index::Index,
    };

    /// An entry whose hash begins with `key`, evenly spread over the buckets.
    fn entry(key: u16, part: u8, index: u64) -> Entry {
        let mut hash = [7; 32];
        hash[..2].copy_from_slice(&key.to_be_bytes());
        let part = Part::try_from(part).unwrap();
        Entry::new(ChunkHash(hash), Place { part, index })
    }

    fn built(runs: &[Vec<Entry>]) -> Vec<Entry> {
        let runs: Vec<Vec<[u8; ENTRY_BYTES]>> = runs
            .iter()
            .map(|run| {
                let mut run = run.clone();
                sort_run(&mut run);
                run.iter().map(|entry| entry.to_bytes()).collect()
            })
            .collect();
        let runs: Vec<Run<'_>> = runs.iter().map(Vec::as_slice).collect();
        let file = NamedTempFile::new().unwrap();
        let roots = PartRoots(vec![[1; 32], [2; 32], [3; 32], [4; 32]]);
        write(file.as_file(), &roots, &runs).unwrap();
        let index = Index::open(file.path(), &roots).unwrap();
        assert!(index.entries_intact());
        index.entries().collect()
    }

    proptest! {
        /// However entries are spread over runs, the index is that of all of them sorted at once.
        #[test]
        fn runs_merge_to_one_sorted_index(
            entries in proptest::collection::vec((0u16..300, 0u8..4, 0u64..50), 0..400),
            cuts in 1usize..9,
        ) {
            let all: Vec<_> = entries.iter().map(|&(k, part, i)| entry(k * 200, part, i)).collect();
            let runs: Vec<_> = all.chunks(all.len().div_ceil(cuts).max(1)).map(<[_]>::to_vec).collect();
            let mut expected = all.clone();
            crate::index::sort(&mut expected);
            prop_assert_eq!(built(&runs), expected);
        }
    }

    #[test]
    fn many_buckets_follow_each_other() {
        let all: Vec<_> = (0..400_000u32)
            .map(|n| {
                let hash = blake3::hash(&n.to_le_bytes());
                let place = Place { part: Part::Disk, index: u64::from(n) };
                Entry::new(ChunkHash(*hash.as_bytes()), place)
            })
            .collect();
        let runs: Vec<_> = all.chunks(30_000).map(<[_]>::to_vec).collect();
        let mut expected = all.clone();
        crate::index::sort(&mut expected);
        assert!(built(&runs) == expected);
    }
}
