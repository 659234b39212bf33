//! What says that there is a file system: superblock, descriptors of groups, bitmaps, the journal's own.

use super::{BLOCK_BYTES, JOURNAL, Label, inode, layout::Layout, put};
use crate::image::mkfs::{FIRST, LOST_AND_FOUND, layout};

/// Where the first one is.
pub(super) const AT: u64 = 1024;
const BYTES: usize = 1024;
pub(super) const DESCRIPTOR_BYTES: u64 = 32;
const MAGIC: u16 = 0xef53;
/// What is in use: a journal, attributes, directories that may have an index.
const COMPAT: u32 = 0x4 | 0x8 | 0x20;
/// Kinds in directories, extents.
const INCOMPAT: u32 = 0x2 | 0x40;
/// Few copies of the superblock, large files, huge files, uncounted links, large inodes.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40;
/// Names are hashed as bytes with a sign, where a guest makes an index.
const SIGNED_HASH: u32 = 1;
const HALF_MD4: u8 = 1;
/// Mounted with extended attributes and ACLs, unless told otherwise.
const MOUNT_OPTIONS: u32 = 0x4 | 0x8;
const VOLUME: &[u8] = b"howdah";
/// Inodes have the fields that newer kernels want.
const EXTRA_BYTES: u16 = 32;
const _: () = assert!(LOST_AND_FOUND + 1 == FIRST);

/// The superblock, as far as it is the same in all groups.
pub(super) fn superblock(
    layout: &Layout,
    label: &Label,
    (free_blocks, free_inodes): (u64, u64),
    journal: &[u8; inode::MAP_BYTES],
) -> [u8; BYTES] {
    let mut block = [0; BYTES];
    put!(block, 0, (layout.groups() * layout.inodes_per_group()) as u32);
    put!(block, 4, layout.blocks() as u32);
    put!(block, 12, free_blocks as u32);
    put!(block, 16, free_inodes as u32);
    // Blocks of 1024 bytes, shifted by two.
    put!(block, 24, 2u32);
    put!(block, 28, 2u32);
    put!(block, 32, layout::BLOCKS_PER_GROUP as u32);
    put!(block, 36, layout::BLOCKS_PER_GROUP as u32);
    put!(block, 40, layout.inodes_per_group() as u32);
    put!(block, 48, label.made);
    // Never checked because it was mounted often.
    put!(block, 54, u16::MAX);
    put!(block, 56, MAGIC);
    // Clean; where it is damaged, go on.
    put!(block, 58, 1u16);
    put!(block, 60, 1u16);
    put!(block, 64, label.made);
    put!(block, 76, 1u32);
    put!(block, 84, LOST_AND_FOUND);
    put!(block, 88, layout::INODE_BYTES as u16);
    put!(block, 92, COMPAT);
    put!(block, 96, INCOMPAT);
    put!(block, 100, RO_COMPAT);
    block[104..120].copy_from_slice(&label.uuid);
    block[120..120 + VOLUME.len()].copy_from_slice(VOLUME);
    put!(block, 224, JOURNAL);
    block[236..252].copy_from_slice(&label.uuid);
    block[252] = HALF_MD4;
    // A copy of the journal's map follows below.
    block[253] = 1;
    put!(block, 256, MOUNT_OPTIONS);
    put!(block, 264, label.made);
    block[268..268 + inode::MAP_BYTES].copy_from_slice(journal);
    put!(block, 332, (super::JOURNAL_BLOCKS * BLOCK_BYTES) as u32);
    put!(block, 348, EXTRA_BYTES);
    put!(block, 350, EXTRA_BYTES);
    put!(block, 352, SIGNED_HASH);
    block
}

/// In which group a superblock is.
pub(super) fn set_group(block: &mut [u8; BYTES], group: u64) {
    put!(block, 90, group as u16);
}

/// A group's descriptor.
pub(super) fn describe(
    into: &mut [u8],
    layout: &Layout,
    group: u64,
    (free_blocks, free_inodes): (u64, u64),
    dirs: u16,
) {
    put!(into, 0, layout.block_bitmap(group) as u32);
    put!(into, 4, layout.inode_bitmap(group) as u32);
    put!(into, 8, layout.inode_table(group) as u32);
    put!(into, 12, free_blocks as u16);
    put!(into, 14, free_inodes as u16);
    put!(into, 16, dirs);
}

/// A block of bits: the first `used` are taken, and what is behind `there` does not exist.
pub(super) fn bitmap(used: u64, there: u64) -> Vec<u8> {
    let mut bits = vec![0u8; BLOCK_BYTES as usize];
    set(&mut bits, 0, used);
    set(&mut bits, there, 8 * BLOCK_BYTES);
    bits
}

/// Sets bits, byte by byte where a byte is whole.
fn set(bits: &mut [u8], from: u64, to: u64) {
    for (first, byte) in (0..).step_by(8).zip(bits) {
        let low = from.saturating_sub(first).min(8);
        let high = to.saturating_sub(first).min(8);
        if low < high {
            *byte |= ((1u16 << high) - (1 << low)) as u8;
        }
    }
}

/// The first block of an empty journal: big-endian, as all of a journal.
pub(super) fn journal(blocks: u64, label: &Label) -> [u8; BYTES] {
    let mut block = [0; BYTES];
    // Magic, superblock of version 2, no sequence; then the size of blocks, how many, the first of the log,
    // the sequence that will be expected, and no begin: nothing is to be replayed.
    let numbers = [0xc03b_3998, 4, 0, BLOCK_BYTES as u32, blocks as u32, 1, 1, 0];
    for (into, number) in block.as_chunks_mut().0.iter_mut().zip(numbers) {
        *into = u32::to_be_bytes(number);
    }
    block[48..64].copy_from_slice(&label.uuid);
    // One file system uses it.
    block[64..68].copy_from_slice(&1u32.to_be_bytes());
    block
}
