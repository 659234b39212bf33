//! A state table as bytes: what a side remembers of a guest between its visits.
//!
//! ```text
//! magic   [8]     "howdah/t"
//! version u32     1
//! base    [32]    id of the base
//! RAM     u64     chunks
//! disk    u64     chunks
//! groups  u64     groups that follow, RAM before disk, ascending, none empty:
//!   space   u8      0 RAM, 1 disk
//!   number  u64
//!   present [32]    one bit for each chunk of the group, the lowest bit of the first byte first
//!   hash    [32]    for each bit that is set
//! root    [32]    the state root of all this
//! ```
//!
//! Integers are little-endian. Each table has exactly one encoding.

use std::io::{self, Read, Write};

use guest_images::{BaseId, ChunkHash};

use super::{GROUP_CHUNKS, Group, StateRoot, StateTable};
use crate::chunks::{ChunkId, Geometry, Space};

const MAGIC: [u8; 8] = *b"howdah/t";
const VERSION: u32 = 1;
const GROUP_WORDS: usize = GROUP_CHUNKS as usize / 64;

/// Why bytes are not the state table of this VM.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// They could not be read, or end too early.
    #[error("cannot read the state table: {0}")]
    Io(#[from] io::Error),
    /// They are something else, or of another version.
    #[error("not a state table of version {VERSION}: it begins with {0:02x?}")]
    Magic([u8; 12]),
    /// It is about another base or other sizes.
    #[error("the state table is about base {base} with {geometry:?}, not about this VM")]
    OtherVm {
        /// Its base.
        base: BaseId,
        /// Its sizes.
        geometry: Geometry,
    },
    /// A group that cannot be.
    #[error("group {number} of space {space} cannot be: {what}")]
    Group {
        /// The space it claims.
        space: u8,
        /// The number it claims.
        number: u64,
        /// Why not.
        what: &'static str,
    },
    /// The bytes were altered.
    #[error("the state table says its root is {said}, but it is {found}")]
    Root {
        /// What it says.
        said: StateRoot,
        /// What follows from the rest.
        found: StateRoot,
    },
}

impl StateTable {
    /// Writes the table's encoding.
    pub fn write_to(&self, mut out: impl Write) -> io::Result<()> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&self.base.0)?;
        for number in
            [self.geometry.ram_chunks, self.geometry.disk_chunks, self.groups.len() as u64]
        {
            out.write_all(&number.to_le_bytes())?;
        }
        for ((space, number), group) in &self.groups {
            out.write_all(&[*space as u8])?;
            out.write_all(&number.to_le_bytes())?;
            for word in group.present {
                out.write_all(&word.to_le_bytes())?;
            }
            for hash in (0..GROUP_CHUNKS as usize).filter_map(|slot| group.get(slot)) {
                out.write_all(&hash.0)?;
            }
        }
        out.write_all(&self.current_root().0)
    }

    /// Reads what [`StateTable::write_to`] wrote, and no byte more. The bytes may be anything:
    /// what is returned is a table of this base and these sizes whose root is the one it claims.
    /// Memory grows with what was read, not with what was claimed.
    pub fn read_from(
        mut from: impl Read,
        base: BaseId,
        geometry: Geometry,
    ) -> Result<Self, TableError> {
        let from = &mut from;
        let head: [u8; 12] = take(from)?;
        if head[..8] != MAGIC || head[8..] != VERSION.to_le_bytes() {
            return Err(TableError::Magic(head));
        }
        let found = BaseId(take(from)?);
        let sizes = Geometry { ram_chunks: number(from)?, disk_chunks: number(from)? };
        if (found, sizes) != (base, geometry) {
            return Err(TableError::OtherVm { base: found, geometry: sizes });
        }
        let mut table = Self::new(base, geometry);
        for _ in 0..number(from)? {
            table.read_group(from)?;
        }
        let (said, found) = (StateRoot(take(from)?), table.root());
        if said != found {
            return Err(TableError::Root { said, found });
        }
        Ok(table)
    }

    fn read_group(&mut self, from: &mut impl Read) -> Result<(), TableError> {
        let ([space_number], number) = (take(from)?, number(from)?);
        let cannot = |what| TableError::Group { space: space_number, number, what };
        let space = match space_number {
            0 => Space::Ram,
            1 => Space::Disk,
            _ => return Err(cannot("there is no such space")),
        };
        let key = (space, number);
        if self.groups.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err(cannot("it does not come after the group before it"));
        }
        let mut present = [0; GROUP_WORDS];
        for word in &mut present {
            *word = u64::from_le_bytes(take(from)?);
        }
        let last = (0..GROUP_CHUNKS)
            .rev()
            .find(|slot| present[*slot as usize / 64] >> (slot % 64) & 1 == 1);
        let Some(last) = last else { return Err(cannot("it is empty")) };
        let last = number.checked_mul(GROUP_CHUNKS).and_then(|first| first.checked_add(last));
        if !last.is_some_and(|index| self.geometry.contains(ChunkId { space, index })) {
            return Err(cannot("it has chunks that the guest has not"));
        }
        let mut group = Group::new();
        for slot in 0..GROUP_CHUNKS as usize {
            if present[slot / 64] >> (slot % 64) & 1 == 1 {
                group.set(slot, ChunkHash(take(from)?));
                self.len += 1;
            }
        }
        self.groups.insert(key, group);
        Ok(())
    }
}

fn take<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    take(from).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: BaseId = BaseId([7; 32]);
    const GEOMETRY: Geometry = Geometry { ram_chunks: 1000, disk_chunks: 600 };

    fn table(held: &[(bool, u64, u8)]) -> StateTable {
        let mut table = StateTable::new(BASE, GEOMETRY);
        for &(disk, index, n) in held {
            let space = if disk { Space::Disk } else { Space::Ram };
            table.set(ChunkId { space, index }, ChunkHash([n; 32]));
        }
        table
    }

    fn bytes(table: &StateTable) -> Vec<u8> {
        let mut bytes = Vec::new();
        table.write_to(&mut bytes).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<StateTable, TableError> {
        StateTable::read_from(bytes, BASE, GEOMETRY)
    }

    proptest! {
        #[test]
        fn comes_back_as_it_was(
            held in prop::collection::vec((any::<bool>(), 0u64..1100, 0u8..5), 0..200),
        ) {
            let mut table = table(&held);
            let bytes = bytes(&table);
            let mut rest = &[&bytes[..], b"rest"].concat()[..];
            let mut back = StateTable::read_from(&mut rest, BASE, GEOMETRY).unwrap();
            prop_assert_eq!(rest, b"rest");
            prop_assert!(back.iter().eq(table.iter()));
            prop_assert_eq!(back.len(), table.len());
            prop_assert_eq!(table.iter().count() as u64, table.len());
            prop_assert_eq!(back.root(), table.root());
            prop_assert_eq!(table.current_root(), table.root());
            prop_assert!(table.iter().all(|(id, hash)| table.get(id) == Some(hash)));
        }

        /// Any one byte altered, or any end missing, is noticed.
        #[test]
        fn damage_is_noticed(
            held in prop::collection::vec((any::<bool>(), 0u64..600, 0u8..5), 0..20),
            at in any::<prop::sample::Index>(),
            xor in 1u8..,
        ) {
            let mut bytes = bytes(&table(&held));
            let at = at.index(bytes.len());
            prop_assert!(read(&bytes[..at]).is_err());
            bytes[at] ^= xor;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes(
            body in prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..300),
        ) {
            let mut claims = bytes(&table(&[]));
            claims.truncate(12 + 32 + 16);
            claims.extend(body);
            if let Ok(table) = read(&claims) {
                prop_assert!(table.len() <= 1600);
            }
        }
    }

    #[test]
    fn of_another_vm() {
        let bytes = bytes(&table(&[(false, 3, 1)]));
        let other = Geometry { ram_chunks: 1001, ..GEOMETRY };
        for (base, geometry) in [(BaseId([8; 32]), GEOMETRY), (BASE, other)] {
            let read = StateTable::read_from(&bytes[..], base, geometry);
            assert!(matches!(read, Err(TableError::OtherVm { .. })));
        }
    }

    #[test]
    fn groups_beyond_the_guest() {
        for (space, number, slot) in [(0u8, 3u64, 232u32), (1, 2, 88), (0, u64::MAX, 0), (2, 0, 0)]
        {
            let mut bytes = bytes(&table(&[]));
            bytes.truncate(12 + 32 + 16);
            bytes.extend(1u64.to_le_bytes());
            bytes.push(space);
            bytes.extend(number.to_le_bytes());
            let mut present = [0u8; 32];
            present[slot as usize / 8] = 1 << (slot % 8);
            bytes.extend(present);
            bytes.extend([1; 64]);
            assert!(matches!(read(&bytes), Err(TableError::Group { .. })), "{space} {number}");
        }
    }
}
