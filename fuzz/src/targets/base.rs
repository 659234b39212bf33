//! A base's directory: its chunk index, and files that have other lengths than they should.
//!
//! A base that opens finds the same chunk whether it is asked for one or for many, and names no place
//! that it does not have. Input: which file is altered and how, whether the index is resealed,
//! and the index.

use std::fs;

use guest_images::{Base, ChunkHash, Place, base::INDEX_FILE};

use super::{Origin, Target};
use crate::{
    disk,
    input::{Input, Program},
    scratch::Scratch,
};

pub(super) const TARGET: Target =
    Target { name: "base", from: Origin::File, run, seeds, max_len: 8 << 10 };

/// Of an index for a base without memory: what its header has before its own checksum.
const CHECKED_BYTES: usize = 24 + 3 * 32 + 32 + 8;
const ENTRY_BYTES: usize = 40;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let (which, length, how) = (input.u8(), input.u16(), input.u8());
    let index = sealed(input.rest(), how);
    let (id, files) = disk::files();
    let scratch = Scratch::new();
    let dir = scratch.path().join(id.to_string());
    fs::create_dir(&dir).expect("a directory for the base");
    for (number, (name, content)) in files.iter().enumerate() {
        let mut content = if name == INDEX_FILE { index.clone() } else { content.clone() };
        if usize::from(which) == number + 1 {
            content.resize(length.into(), 0);
        }
        fs::write(dir.join(name), content).expect("a file of the base");
    }
    let Ok(base) = Base::open(&dir) else { return false };
    let mut hashes: Vec<ChunkHash> = index
        .get(CHECKED_BYTES + 32..)
        .unwrap_or_default()
        .chunks(ENTRY_BYTES)
        .filter_map(|entry| entry.first_chunk().map(|hash| ChunkHash(*hash)))
        .collect();
    hashes.extend([[0; 32], [0xff; 32], [0x80; 32]].map(ChunkHash));
    let one_by_one: Vec<Option<Place>> = hashes.iter().map(|hash| base.lookup(hash)).collect();
    let mut at_once = vec![None; hashes.len()];
    base.lookup_batch(&hashes, &mut at_once);
    assert_eq!(one_by_one, at_once);
    for place in one_by_one.into_iter().flatten() {
        assert!(base.chunk(place).is_some(), "{place:?} is in the base");
    }
    true
}

/// The index that the input asks for: bit 0 says to keep its own header's checksum, bit 1 to keep its
/// own count of entries.
fn sealed(bytes: &[u8], how: u8) -> Vec<u8> {
    let mut index = bytes.to_vec();
    let head = CHECKED_BYTES + 32;
    if how & 1 != 0 || index.len() < head {
        return index;
    }
    if how & 2 == 0 {
        let entries = ((index.len() - head) / ENTRY_BYTES) as u64;
        index[16..24].copy_from_slice(&entries.to_le_bytes());
        index.truncate(head + entries as usize * ENTRY_BYTES);
    }
    let checksum = blake3::hash(&index[..CHECKED_BYTES]);
    index[CHECKED_BYTES..head].copy_from_slice(checksum.as_bytes());
    index
}

fn seeds() -> Vec<Vec<u8>> {
    let (_, files) = disk::files();
    let (_, index) =
        files.iter().find(|(name, _)| name == INDEX_FILE).expect("a base has an index");
    let seed =
        |which, length, how| Program::new().u8(which).u16(length).u8(how).bytes(index).finish();
    let wrong_lengths = (1..=files.len() as u8).map(|which| seed(which, 4096, 0));
    [seed(0, 0, 0), seed(0, 0, 1), seed(0, 0, 2)].into_iter().chain(wrong_lengths).collect()
}
