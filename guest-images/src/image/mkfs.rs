//! New ext4 file systems, written in one go: no tool, no mounting, no privileges, and the same bytes for the
//! same files, so that the same tree makes the same base wherever it is imported.
//!
//! ```text
//! group 0: superblock, descriptors │ bitmaps │ inodes │ journal, data ─► in the order of Mkfs::add
//! group n: (copies of both, where sparse_super has them) │ bitmaps │ inodes │ data ─►
//! ```
//!
//! What is given is trusted to be a tree: one number for each inode, in order, and directories that name
//! them. Sizes are not: what does not fit is an error.

mod inode;
mod layout;
mod superblock;
mod xattr;

use std::{fs::File, io, os::unix::fs::FileExt};

use layout::Layout;

pub use layout::Run;
pub use xattr::Xattr;

/// Bytes of a block: that of a chunk, so that what a guest changes in a file is what is sent of it.
pub const BLOCK_BYTES: u64 = 4096;
/// The inode of the root directory.
pub const ROOT: u32 = 2;
/// The inode of the root's `lost+found`, which there must be.
pub const LOST_AND_FOUND: u32 = 11;
/// The first inode that is free for others; the next ones follow without gaps.
pub const FIRST: u32 = 12;
/// The longest name in a directory, and the longest target of a symbolic link.
pub const MAX_NAME_BYTES: usize = 255;
/// The longest target of a symbolic link.
pub const MAX_LINK_BYTES: usize = 4095;
/// Names of one file. More subdirectories are not counted.
pub const MAX_LINKS: u32 = 65_000;
/// The smallest disk: room for the journal, and something beside it.
pub const MIN_BYTES: u64 = 8 << 20;

/// The journal: the smallest that Linux takes, so that guests write to few blocks.
const JOURNAL_BLOCKS: u64 = 1024;
const JOURNAL: u32 = 8;

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub enum MkfsError {
    /// Its file cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The files need more room than there is.
    #[error("there is not room for all files")]
    Full,
    /// The disk is smaller or larger than one is made here.
    #[error("a disk has 8 MiB to 4 TiB")]
    Size,
    /// The files' own attributes do not fit.
    #[error("its extended attributes have more than {} bytes together", xattr::MAX_BYTES)]
    Xattrs,
    /// The file has too many names.
    #[error("it has more than {MAX_LINKS} names")]
    Links,
}

/// What tells a file system from others, and when it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Seconds since 1970: when it counts as made.
    pub made: u32,
}

/// What every inode has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions, with setuid, setgid and the sticky bit.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When its content changed last, which is taken for the other times too: seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// Its extended attributes.
    pub xattrs: Vec<Xattr>,
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// A file; its bytes are written by whoever has them, to where [`Mkfs::add`] says.
    File {
        /// How many.
        bytes: u64,
    },
    /// A directory.
    Directory {
        /// Where `..` leads.
        parent: u32,
        /// What is in it, without `.` and `..`.
        entries: &'a [Entry<'a>],
    },
    /// A symbolic link to this target.
    Symlink(&'a [u8]),
    /// A device node.
    Device {
        /// Of blocks or of characters.
        is_block: bool,
        /// Its numbers.
        major: u32,
        /// Within the major number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Whose it is.
    pub number: u32,
    /// What that is.
    pub kind: Kind,
    /// The name, 1 to [`MAX_NAME_BYTES`] long.
    pub name: &'a [u8],
}

/// Kinds of inodes, as directories have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A file.
    File = 1,
    /// A directory.
    Directory = 2,
    /// A device of characters.
    CharDevice = 3,
    /// A device of blocks.
    BlockDevice = 4,
    /// A named pipe.
    Fifo = 5,
    /// A symbolic link.
    Symlink = 7,
}

impl Content<'_> {
    /// Which kind that is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::File { .. } => Kind::File,
            Self::Directory { .. } => Kind::Directory,
            Self::Symlink(_) => Kind::Symlink,
            Self::Device { is_block: true, .. } => Kind::BlockDevice,
            Self::Device { is_block: false, .. } => Kind::CharDevice,
            Self::Fifo => Kind::Fifo,
        }
    }
}

/// A file system that is being written. Without [`Mkfs::finish`] it is none.
#[derive(Debug)]
pub struct Mkfs<'f> {
    file: &'f File,
    label: Label,
    layout: Layout,
    /// All data blocks before this one are taken.
    next_block: u64,
    /// The highest number of an inode.
    last_inode: u32,
    /// Directories by group.
    dirs: Vec<u16>,
    journal: [u8; inode::MAP_BYTES],
}

impl<'f> Mkfs<'f> {
    /// Begins one of `bytes` bytes, with room for `inodes` inodes and some more, in an empty file.
    pub fn new(file: &'f File, bytes: u64, inodes: u32, label: Label) -> Result<Self, MkfsError> {
        let layout = Layout::new(bytes, inodes.into())?;
        file.set_len(bytes)?;
        let dirs = vec![0; layout.groups() as usize];
        let last_inode = LOST_AND_FOUND;
        let journal = [0; inode::MAP_BYTES];
        let mut mkfs = Self { file, label, layout, next_block: 0, last_inode, dirs, journal };
        mkfs.add_journal()?;
        Ok(mkfs)
    }

    /// Writes an inode and, but for a file's, its content. Where a file's content has to go, is returned.
    pub fn add(
        &mut self,
        number: u32,
        links: u32,
        meta: &Meta,
        content: Content<'_>,
    ) -> Result<Vec<Run>, MkfsError> {
        let mut node = inode::Inode::new(meta, content.kind(), links)?;
        let mut runs = Vec::new();
        match content {
            Content::File { bytes } => {
                runs = self.allocate(bytes.div_ceil(BLOCK_BYTES))?;
                node.set_runs(bytes, &runs, &mut |block| self.write_map(block))?;
            }
            Content::Directory { parent, entries } => {
                let blocks = inode::directory(number, parent, entries);
                let group = self.layout.group_of_inode(number) as usize;
                if let Some(dirs) = self.dirs.get_mut(group) {
                    *dirs += 1;
                }
                let runs = self.allocate(blocks.len() as u64 / BLOCK_BYTES)?;
                self.write_runs(&runs, &blocks)?;
                node.set_runs(blocks.len() as u64, &runs, &mut |block| self.write_map(block))?;
            }
            Content::Symlink(target) if target.len() < inode::MAP_BYTES => node.set_short(target),
            Content::Symlink(target) => {
                let runs = self.allocate(1)?;
                self.write_runs(&runs, target)?;
                node.set_runs(target.len() as u64, &runs, &mut |block| self.write_map(block))?;
            }
            Content::Device { major, minor, .. } => node.set_device(major, minor),
            Content::Fifo => {}
        }
        if !meta.xattrs.is_empty() {
            let block = xattr::block(&meta.xattrs)?;
            let at = self.allocate_one()?;
            self.file.write_all_at(&block, at * BLOCK_BYTES)?;
            node.set_xattrs(at);
        }
        self.write_inode(number, &node)?;
        Ok(runs)
    }

    /// Writes what makes a file system of it.
    pub fn finish(self) -> Result<(), MkfsError> {
        let groups = self.layout.groups();
        let mut free = (0, 0);
        let mut descriptors = vec![0; (self.layout.descriptor_blocks() * BLOCK_BYTES) as usize];
        let per_group = superblock::DESCRIPTOR_BYTES as usize;
        for (group, descriptor) in (0..groups).zip(descriptors.chunks_exact_mut(per_group)) {
            let of_group = self.layout.group_blocks(group);
            let used = self.layout.used_blocks(group, self.next_block);
            let inodes = self.layout.used_inodes(group, self.last_inode);
            let bitmap = superblock::bitmap(used, of_group);
            self.file.write_all_at(&bitmap, self.layout.block_bitmap(group) * BLOCK_BYTES)?;
            let bitmap = superblock::bitmap(inodes, self.layout.inodes_per_group());
            self.file.write_all_at(&bitmap, self.layout.inode_bitmap(group) * BLOCK_BYTES)?;
            let free_here = (of_group - used, self.layout.inodes_per_group() - inodes);
            free = (free.0 + free_here.0, free.1 + free_here.1);
            let dirs = self.dirs.get(group as usize).copied().unwrap_or_default();
            superblock::describe(descriptor, &self.layout, group, free_here, dirs);
        }
        let mut block = superblock::superblock(&self.layout, &self.label, free, &self.journal);
        // The one that counts comes last.
        for group in (0..groups).rev().filter(|group| layout::has_superblock(*group)) {
            let first = self.layout.first_block(group);
            self.file.write_all_at(&descriptors, (first + 1) * BLOCK_BYTES)?;
            superblock::set_group(&mut block, group);
            let at = if group == 0 { superblock::AT } else { first * BLOCK_BYTES };
            self.file.write_all_at(&block, at)?;
        }
        Ok(())
    }

    fn add_journal(&mut self) -> Result<(), MkfsError> {
        let meta = Meta { mode: 0o600, seconds: self.label.made.into(), ..Meta::default() };
        let mut node = inode::Inode::new(&meta, Kind::File, 1)?;
        let runs = self.allocate(JOURNAL_BLOCKS)?;
        let bytes = JOURNAL_BLOCKS * BLOCK_BYTES;
        node.set_runs(bytes, &runs, &mut |block| self.write_map(block))?;
        self.journal = node.map();
        let head = superblock::journal(JOURNAL_BLOCKS, &self.label);
        self.write_runs(&runs, &head)?;
        self.write_inode(JOURNAL, &node)
    }

    fn allocate_one(&mut self) -> Result<u64, MkfsError> {
        self.allocate(1)?.first().map(|run| run.start).ok_or(MkfsError::Full)
    }

    /// So many blocks, in as few runs as groups allow.
    fn allocate(&mut self, mut blocks: u64) -> Result<Vec<Run>, MkfsError> {
        let mut runs = Vec::new();
        while blocks > 0 {
            let run = self.layout.next_run(self.next_block, blocks).ok_or(MkfsError::Full)?;
            self.next_block = run.start + run.blocks;
            blocks -= run.blocks;
            runs.push(run);
        }
        Ok(runs)
    }

    /// Writes a block of an extent tree; says where it is.
    fn write_map(&mut self, block: &[u8]) -> Result<u64, MkfsError> {
        let at = self.allocate_one()?;
        self.file.write_all_at(block, at * BLOCK_BYTES)?;
        Ok(at)
    }

    /// Writes bytes from the first run's begin on.
    fn write_runs(&self, runs: &[Run], mut bytes: &[u8]) -> Result<(), MkfsError> {
        for run in runs {
            let here = bytes.len().min((run.blocks * BLOCK_BYTES) as usize);
            let (now, later) = bytes.split_at(here);
            self.file.write_all_at(now, run.start * BLOCK_BYTES)?;
            bytes = later;
        }
        Ok(())
    }

    fn write_inode(&mut self, number: u32, node: &inode::Inode) -> Result<(), MkfsError> {
        let at = self.layout.inode_at(number).ok_or(MkfsError::Full)?;
        self.file.write_all_at(node.bytes(), at)?;
        self.last_inode = self.last_inode.max(number);
        Ok(())
    }
}

/// Writes a number, little-endian, in as many bytes as its type has.
macro_rules! put {
    ($into:expr, $at:expr, $number:expr) => {{
        let bytes = $number.to_le_bytes();
        $into[$at..$at + bytes.len()].copy_from_slice(&bytes);
    }};
}
use put;

#[cfg(test)]
pub(super) mod tests;
