//! The state root: one hash of all that makes a guest's RAM and disk differ from its base.
//!
//! # What it is
//!
//! Let the *base state* of a chunk be the chunk of the same number of the base's memory or disk:
//! zeros beyond the end of that, and in RAM where the base has no memory. A chunk *differs* when its content is not its base state.
//! With `H(context, data)` = BLAKE3 in its key-derivation mode, integers little-endian:
//!
//! ```text
//! group root  = H("howdah 2026 state-root group v1",
//!                 for each chunk of the group that differs, ascending:
//!                     slot in the group u8, BLAKE3 of its content [32])
//! state root  = H("howdah 2026 state-root top v1",
//!                 base id [32], RAM chunks u64, disk chunks u64,
//!                 for each group with a chunk that differs, RAM before disk, ascending:
//!                     space u8, group number u64, group root [32])
//! ```
//!
//! A group is [`GROUP_CHUNKS`] chunks with neighbouring numbers of one space. Every part of both
//! inputs has a fixed length, so no two states give the same input. The root is a function of base
//! id, geometry and content alone: not of what was sent, in which order or how often.
//!
//! # What it costs
//!
//! Asking again hashes the groups that changed since (up to 8 KiB each) and 41 bytes for each group
//! with a difference: 42 KB for a guest that changed all of its 1 GiB. Nothing scans RAM or disk.
//! Memory: 32 bytes for each chunk that differs, with some to spare, and 100 for each MiB with one.

mod file;

use std::{collections::BTreeMap, fmt};

use guest_images::{BaseId, ChunkHash};
use serde::{Deserialize, Serialize};

use crate::chunks::{ChunkId, Geometry, Space};
pub use file::TableError;

/// Chunks in a group: 1 MiB of the guest. The slot must fit a byte.
pub const GROUP_CHUNKS: u64 = 256;

const GROUP_CONTEXT: &str = "howdah 2026 state-root group v1";
const TOP_CONTEXT: &str = "howdah 2026 state-root top v1";

/// One hash of a guest's RAM and disk, bound to its base and sizes. See the module for its makeup.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StateRoot(pub [u8; 32]);

impl fmt::Display for StateRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for StateRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StateRoot({})", hex::encode(&self.0[..6]))
    }
}

/// A group's place: ordered as the root takes them.
pub(crate) type GroupKey = (Space, u64);

/// Where a chunk is: its group and its slot in it.
pub(crate) fn group_of(id: ChunkId) -> (GroupKey, usize) {
    ((id.space, id.index / GROUP_CHUNKS), (id.index % GROUP_CHUNKS) as usize)
}

/// The hashes of a group's chunks, and the group root while it is known.
#[derive(Clone)]
struct Group {
    present: [u64; GROUP_CHUNKS as usize / 64],
    /// Of the chunks that are present alone, ascending: a guest that changed a page here and there
    /// must not cost the memory of one that changed them all.
    hashes: Vec<ChunkHash>,
    root: Option<[u8; 32]>,
}

/// A group's hashes grow by so many, or by a quarter of what they are.
const GROUP_GROWTH: usize = 8;

impl Group {
    fn new() -> Self {
        Self { present: [0; 4], hashes: Vec::new(), root: None }
    }

    fn has(&self, slot: usize) -> bool {
        self.present[slot / 64] >> (slot % 64) & 1 == 1
    }

    /// Where the hash of `slot` is, or would be.
    fn rank(&self, slot: usize) -> usize {
        let (full, rest) = self.present.split_at(slot / 64);
        let below = rest.first().map_or(0, |word| word & ((1 << (slot % 64)) - 1));
        (full.iter().map(|word| word.count_ones()).sum::<u32>() + below.count_ones()) as usize
    }

    fn get(&self, slot: usize) -> Option<ChunkHash> {
        if self.has(slot) { self.hashes.get(self.rank(slot)).copied() } else { None }
    }

    fn set(&mut self, slot: usize, hash: ChunkHash) {
        let at = self.rank(slot);
        if self.has(slot) {
            if let Some(held) = self.hashes.get_mut(at).filter(|held| **held != hash) {
                *held = hash;
                self.root = None;
            }
            return;
        }
        if self.hashes.len() == self.hashes.capacity() {
            let most = (GROUP_CHUNKS as usize).saturating_sub(self.hashes.len());
            self.hashes.reserve_exact(GROUP_GROWTH.max(self.hashes.len() / 4).min(most));
        }
        self.hashes.insert(at, hash);
        self.present[slot / 64] |= 1 << (slot % 64);
        self.root = None;
    }

    fn clear(&mut self, slot: usize) {
        if self.has(slot) {
            self.hashes.remove(self.rank(slot));
            self.present[slot / 64] &= !(1 << (slot % 64));
            self.root = None;
        }
    }

    fn is_empty(&self) -> bool {
        self.present == [0; 4]
    }

    fn root(&self) -> [u8; 32] {
        if let Some(root) = self.root {
            return root;
        }
        let mut hasher = blake3::Hasher::new_derive_key(GROUP_CONTEXT);
        for slot in 0..=u8::MAX {
            if let Some(hash) = self.get(slot.into()) {
                hasher.update(&[slot]);
                hasher.update(&hash.0);
            }
        }
        *hasher.finalize().as_bytes()
    }
}

/// For every chunk that differs from its base state, the hash of its newest content.
///
/// The source keeps one for what the target will hold once it applied all that was sent; the
/// target keeps one for what it holds.
#[derive(Clone)]
pub struct StateTable {
    base: BaseId,
    geometry: Geometry,
    groups: BTreeMap<GroupKey, Group>,
    len: u64,
    /// Groups whose root is not known, each once; some may be gone.
    stale: Vec<GroupKey>,
}

impl StateTable {
    /// The table of a guest that equals its base.
    pub fn new(base: BaseId, geometry: Geometry) -> Self {
        Self { base, geometry, groups: BTreeMap::new(), len: 0, stale: Vec::new() }
    }

    /// The base that this table is about.
    pub fn base(&self) -> BaseId {
        self.base
    }

    /// The geometry that bounds this table.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How many chunks differ from their base state.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the guest equals its base.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Records that the chunk now has this content, which must not be its base state. Returns what
    /// was recorded before. A chunk outside the geometry is ignored.
    pub fn set(&mut self, id: ChunkId, hash: ChunkHash) -> Option<ChunkHash> {
        if !self.geometry.contains(id) {
            return None;
        }
        let (key, slot) = group_of(id);
        let mut is_new = false;
        let group = self.groups.entry(key).or_insert_with(|| {
            is_new = true;
            Group::new()
        });
        let was_known = is_new || group.root.is_some();
        let before = group.get(slot);
        group.set(slot, hash);
        if was_known && group.root.is_none() {
            self.stale.push(key);
        }
        self.len += u64::from(before.is_none());
        before
    }

    /// Records that the chunk equals its base state. Returns what was recorded before.
    pub fn clear(&mut self, id: ChunkId) -> Option<ChunkHash> {
        let (key, slot) = group_of(id);
        let group = self.groups.get_mut(&key)?;
        let before = group.get(slot)?;
        if group.root.is_some() {
            self.stale.push(key);
        }
        group.clear(slot);
        if group.is_empty() {
            self.groups.remove(&key);
        }
        self.len -= 1;
        Some(before)
    }

    /// The hash of the chunk's content, or `None` where it equals its base state.
    pub fn get(&self, id: ChunkId) -> Option<ChunkHash> {
        let (key, slot) = group_of(id);
        self.groups.get(&key)?.get(slot)
    }

    /// Bytes of memory that the table takes.
    pub fn memory_bytes(&self) -> usize {
        let group = size_of::<GroupKey>() + size_of::<Group>();
        let hashes: usize = self.groups.values().map(|group| group.hashes.capacity()).sum();
        self.groups.len() * group + hashes * size_of::<ChunkHash>()
    }

    /// Every chunk that differs from its base state with its hash: RAM before disk, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (ChunkId, ChunkHash)> + '_ {
        self.groups.iter().flat_map(|(&(space, number), group)| {
            (0..GROUP_CHUNKS).filter_map(move |slot| {
                let id = ChunkId { space, index: number * GROUP_CHUNKS + slot };
                Some((id, group.get(slot as usize)?))
            })
        })
    }

    /// The state root now. Takes `&mut` to keep the group roots it works out.
    pub fn root(&mut self) -> StateRoot {
        while self.tidy(usize::MAX) {}
        self.current_root()
    }

    /// Does part of the work of [`StateTable::root`] beforehand: works out the roots of at most so
    /// many groups, and says whether there are more.
    pub fn tidy(&mut self, groups: usize) -> bool {
        let rest = self.stale.len().saturating_sub(groups);
        for key in self.stale.drain(rest..) {
            if let Some(group) = self.groups.get_mut(&key) {
                group.root = Some(group.root());
            }
        }
        !self.stale.is_empty()
    }

    /// [`StateTable::root`] for a table that is only read: what changed since the last call of that
    /// one is worked out again each time.
    pub fn current_root(&self) -> StateRoot {
        let mut hasher = blake3::Hasher::new_derive_key(TOP_CONTEXT);
        hasher.update(&self.base.0);
        hasher.update(&self.geometry.ram_chunks.to_le_bytes());
        hasher.update(&self.geometry.disk_chunks.to_le_bytes());
        for ((space, number), group) in &self.groups {
            let mut entry = [0; 41];
            entry[0] = *space as u8;
            entry[1..9].copy_from_slice(&number.to_le_bytes());
            entry[9..].copy_from_slice(&group.root());
            hasher.update(&entry);
        }
        StateRoot(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for StateTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateTable")
            .field("base", &self.base)
            .field("geometry", &self.geometry)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const GEOMETRY: Geometry = Geometry { ram_chunks: 1000, disk_chunks: 600 };

    fn hash(n: u8) -> ChunkHash {
        ChunkHash([n; 32])
    }

    fn ids() -> impl Strategy<Value = ChunkId> {
        prop_oneof![
            (0..GEOMETRY.ram_chunks).prop_map(|index| ChunkId { space: Space::Ram, index }),
            (0..GEOMETRY.disk_chunks).prop_map(|index| ChunkId { space: Space::Disk, index }),
        ]
    }

    proptest! {
        #[test]
        fn root_depends_on_final_contents_only(
            history in prop::collection::vec((ids(), prop::option::of(0u8..4), any::<bool>()), 0..300),
        ) {
            let mut lived = StateTable::new(BaseId([7; 32]), GEOMETRY);
            let mut last = BTreeMap::new();
            for (id, content, ask) in history {
                let before = match content {
                    Some(n) => lived.set(id, hash(n)),
                    None => lived.clear(id),
                };
                prop_assert_eq!(before, last.insert(id, content.map(hash)).flatten());
                if ask {
                    lived.tidy(1);
                }
            }
            let mut fresh = StateTable::new(BaseId([7; 32]), GEOMETRY);
            for (id, content) in last.iter().rev() {
                prop_assert_eq!(lived.get(*id), *content);
                if let Some(h) = content {
                    fresh.set(*id, *h);
                }
            }
            prop_assert_eq!(lived.len(), fresh.len());
            prop_assert_eq!(lived.root(), fresh.root());
        }

        #[test]
        fn one_chunk_more_is_another_root(
            held in prop::collection::btree_map(ids(), 0u8..4, 0..50), id in ids(), n in 0u8..4,
        ) {
            let mut table = StateTable::new(BaseId([7; 32]), GEOMETRY);
            for (id, n) in held {
                table.set(id, hash(n));
            }
            let before = table.root();
            let changed = table.set(id, hash(n)) != Some(hash(n));
            prop_assert_eq!(table.root() != before, changed);
        }
    }

    #[test]
    fn bound_to_base_and_geometry() {
        let roots = [
            StateTable::new(BaseId([1; 32]), GEOMETRY).root(),
            StateTable::new(BaseId([2; 32]), GEOMETRY).root(),
            StateTable::new(BaseId([1; 32]), Geometry { ram_chunks: 999, ..GEOMETRY }).root(),
            StateTable::new(BaseId([1; 32]), Geometry { disk_chunks: 601, ..GEOMETRY }).root(),
        ];
        for (i, a) in roots.iter().enumerate() {
            assert!(roots[i + 1..].iter().all(|b| a != b));
        }
    }

    /// The documented makeup, written out by hand. A change here is a change of protocol.
    #[test]
    fn made_as_documented() {
        let mut table = StateTable::new(BaseId([1; 32]), GEOMETRY);
        table.set(ChunkId { space: Space::Disk, index: 513 }, hash(9));
        table.set(ChunkId { space: Space::Ram, index: 3 }, hash(8));
        let group =
            |slot: u8, n: u8| blake3::derive_key(GROUP_CONTEXT, &[&[slot][..], &[n; 32]].concat());
        let mut top = [1u8; 32].to_vec();
        top.extend(1000u64.to_le_bytes());
        top.extend(600u64.to_le_bytes());
        top.push(0);
        top.extend(0u64.to_le_bytes());
        top.extend(group(3, 8));
        top.push(1);
        top.extend(2u64.to_le_bytes());
        top.extend(group(1, 9));
        assert_eq!(table.root(), StateRoot(blake3::derive_key(TOP_CONTEXT, &top)));
    }

    #[test]
    fn ignores_what_is_outside() {
        let mut table = StateTable::new(BaseId([1; 32]), GEOMETRY);
        let empty = table.root();
        let outside = ChunkId { space: Space::Ram, index: GEOMETRY.ram_chunks };
        assert_eq!(table.set(outside, hash(1)), None);
        assert_eq!(table.get(outside), None);
        assert_eq!(table.clear(outside), None);
        assert_eq!(table.root(), empty);
    }
}
