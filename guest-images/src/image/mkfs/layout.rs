//! Where in a file system what is.

use super::{BLOCK_BYTES, MIN_BYTES, MkfsError, superblock::DESCRIPTOR_BYTES};
use crate::manifest::MAX_PART_BYTES;

/// One block of bits says which blocks of a group are taken.
pub(super) const BLOCKS_PER_GROUP: u64 = 8 * BLOCK_BYTES;
pub(super) const INODE_BYTES: u64 = 256;
const INODES_PER_BLOCK: u64 = BLOCK_BYTES / INODE_BYTES;
/// As `mke2fs` has it: a guest makes files too.
const BYTES_PER_INODE: u64 = 16 << 10;
/// A last group with less room behind its own tables is left out.
const LEAST_IN_GROUP: u64 = 64;

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: u64,
    /// How many; what one extent can say.
    pub blocks: u64,
}

/// Sizes of a file system. Blocks and inodes have 32 bits: 4 TiB are 2^30 blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    blocks: u64,
    groups: u64,
    inodes_per_group: u64,
    descriptor_blocks: u64,
}

impl Layout {
    pub(super) fn new(bytes: u64, inodes: u64) -> Result<Self, MkfsError> {
        if !(MIN_BYTES..=MAX_PART_BYTES).contains(&bytes) {
            return Err(MkfsError::Size);
        }
        let layout = Self::of_blocks(bytes / BLOCK_BYTES, inodes)?;
        let last = layout.groups - 1;
        if layout.group_blocks(last) >= layout.overhead(last) + LEAST_IN_GROUP {
            return Ok(layout);
        }
        // The groups before it are whole.
        match last {
            0 => Err(MkfsError::Full),
            _ => Self::of_blocks(layout.first_block(last), inodes),
        }
    }

    fn of_blocks(blocks: u64, inodes: u64) -> Result<Self, MkfsError> {
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let wanted = inodes.saturating_add(inodes / 4).max(blocks * BLOCK_BYTES / BYTES_PER_INODE);
        // Whole blocks of inodes, and whole bytes of bits.
        let inodes_per_group = wanted.div_ceil(groups).next_multiple_of(INODES_PER_BLOCK);
        if inodes_per_group > BLOCKS_PER_GROUP {
            return Err(MkfsError::Full);
        }
        let descriptor_blocks = (groups * DESCRIPTOR_BYTES).div_ceil(BLOCK_BYTES);
        Ok(Self { blocks, groups, inodes_per_group, descriptor_blocks })
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn groups(&self) -> u64 {
        self.groups
    }

    pub(super) fn inodes_per_group(&self) -> u64 {
        self.inodes_per_group
    }

    pub(super) fn descriptor_blocks(&self) -> u64 {
        self.descriptor_blocks
    }

    pub(super) fn first_block(&self, group: u64) -> u64 {
        group * BLOCKS_PER_GROUP
    }

    pub(super) fn group_blocks(&self, group: u64) -> u64 {
        self.blocks.saturating_sub(self.first_block(group)).min(BLOCKS_PER_GROUP)
    }

    pub(super) fn block_bitmap(&self, group: u64) -> u64 {
        let tables = if has_superblock(group) { 1 + self.descriptor_blocks } else { 0 };
        self.first_block(group) + tables
    }

    pub(super) fn inode_bitmap(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 1
    }

    pub(super) fn inode_table(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 2
    }

    /// Blocks of a group that are not for data.
    fn overhead(&self, group: u64) -> u64 {
        let table_blocks = self.inodes_per_group / INODES_PER_BLOCK;
        self.inode_table(group) + table_blocks - self.first_block(group)
    }

    pub(super) fn group_of_inode(&self, number: u32) -> u64 {
        u64::from(number).saturating_sub(1) / self.inodes_per_group
    }

    /// Where in the file an inode is; `None` if there is none of this number.
    pub(super) fn inode_at(&self, number: u32) -> Option<u64> {
        let group = self.group_of_inode(number);
        if number == 0 || group >= self.groups {
            return None;
        }
        let index = (u64::from(number) - 1) % self.inodes_per_group;
        Some(self.inode_table(group) * BLOCK_BYTES + index * INODE_BYTES)
    }

    /// Data blocks in a row, at `from` or behind it, as many as wanted or as there are in the group.
    pub(super) fn next_run(&self, from: u64, wanted: u64) -> Option<Run> {
        let group = from / BLOCKS_PER_GROUP;
        if group >= self.groups {
            return None;
        }
        let end = self.first_block(group) + self.group_blocks(group);
        let start = from.max(self.first_block(group) + self.overhead(group));
        if start >= end {
            // The end of the last group is the end.
            return None;
        }
        Some(Run { start, blocks: wanted.min(end - start) })
    }

    /// How many blocks at the begin of a group are taken, if data has come up to `next`.
    pub(super) fn used_blocks(&self, group: u64, next: u64) -> u64 {
        let data = next.saturating_sub(self.first_block(group)).min(self.group_blocks(group));
        data.max(self.overhead(group))
    }

    /// How many inodes at the begin of a group are taken, if `last` is the highest of all.
    pub(super) fn used_inodes(&self, group: u64, last: u32) -> u64 {
        u64::from(last).saturating_sub(group * self.inodes_per_group).min(self.inodes_per_group)
    }
}

/// Whether a group begins with a superblock: the first ones, and powers of 3, 5 and 7.
pub(super) fn has_superblock(group: u64) -> bool {
    let is_power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power_of)
}
