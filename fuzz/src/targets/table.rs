//! A state table, a file that a handoff back builds on.
//!
//! Every table has exactly one encoding. Input: whether to reseal (put the root there that follows
//! from the rest), and the file.

use guest_images::ChunkHash;
use handoff::{ChunkId, Space, StateTable, root::TableError};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    world::{GEOMETRY, bases},
};

pub(super) const TARGET: Target =
    Target { name: "table", from: Origin::File, run, seeds, max_len: 20 << 10 };

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let reseal = input.u8() & 1 == 1;
    let mut bytes = input.rest().to_vec();
    let (table, end) = read(&bytes);
    match table {
        Err(TableError::Root { found, .. }) if reseal => {
            bytes[end - found.0.len()..end].copy_from_slice(&found.0);
            let (table, _) = read(&bytes);
            check(table.expect("with the right root it is a table"), &bytes[..end]);
        }
        Err(_) => return false,
        Ok(table) => check(table, &bytes[..end]),
    }
    true
}

/// The table, and how many bytes were read.
fn read(bytes: &[u8]) -> (Result<StateTable, TableError>, usize) {
    let mut left = bytes;
    let table = StateTable::read_from(&mut left, bases().own().id(), GEOMETRY);
    (table, bytes.len() - left.len())
}

fn check(table: StateTable, bytes: &[u8]) {
    let mut written = Vec::new();
    let count = table.iter().count() as u64;
    assert_eq!(count, table.len());
    assert!(table.iter().all(|(id, hash)| table.get(id) == Some(hash)));
    table.write_to(&mut written).expect("to memory");
    assert_eq!(bytes, written, "it has one encoding");
}

fn encoded(ids: impl Iterator<Item = ChunkId>) -> Vec<u8> {
    let mut table = StateTable::new(bases().own().id(), GEOMETRY);
    for id in ids {
        table.set(id, ChunkHash([id.index as u8; 32]));
    }
    let mut bytes = Vec::new();
    // The roots of groups are there once the whole has one.
    let _ = table.root();
    table.write_to(&mut bytes).expect("to memory");
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let ids = |space, indexes: &'static [u64]| {
        indexes.iter().map(move |index| ChunkId { space, index: *index })
    };
    let mixed = ids(Space::Ram, &[0, 1, 255, 256, 299]).chain(ids(Space::Disk, &[0, 39]));
    let files = [encoded(std::iter::empty()), encoded(mixed), encoded(ids(Space::Disk, &[7]))];
    let seed =
        |bytes: &Vec<u8>| [0, 1].map(|reseal| Program::new().u8(reseal).bytes(bytes).finish());
    files.iter().flat_map(seed).collect()
}
