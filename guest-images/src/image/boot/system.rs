//! A file system in an image, with bounds around its reader.
//!
//! The reader of ext4 checks what it reads, but trusts sizes: of blocks, of groups, of a journal, of a link's
//! target. So these are looked at before it does.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
};

use ext4_view::{DirEntry, Ext4, Ext4Error, Ext4Read};

use super::super::{le, partitions::Partition};

/// Where the superblock is, and how long.
const SUPERBLOCK: (u64, usize) = (1024, 1024);
const MAGIC: u64 = 0xef53;
/// Blocks of 64 KiB.
const MAX_LOG_BLOCK_SIZE: u64 = 6;
/// 16 TiB in the usual groups of 128 MiB.
const MAX_GROUPS: u64 = 1 << 17;
/// What `mke2fs` makes at most.
const MAX_JOURNAL_BYTES: u64 = 1 << 30;
/// Feature bits that matter here: descriptors are longer than 32 bytes.
const INCOMPAT_64BIT: u64 = 0x80;
/// The longest directory: its entries are looked at one by one.
const MAX_DIR_BYTES: u64 = 16 << 20;
/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;
/// Symbolic links on the way to a file, and the longest target: as Linux has it.
const MAX_LINKS: usize = 40;
const MAX_LINK_BYTES: u64 = 4095;
/// Steps on the way to a file.
const MAX_STEPS: usize = 1000;

/// Why a file in an image is not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error(transparent)]
    Ext4(#[from] Ext4Error),
    #[error("reading it: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Odd(&'static str),
    #[error("it has {bytes} bytes, {most} are the most")]
    TooLarge { bytes: u64, most: u64 },
}

/// A stretch of a disk, as the reader wants it.
struct Window {
    file: File,
    at: u64,
    bytes: u64,
}

impl Window {
    fn read_at(&self, into: &mut [u8], from: u64) -> io::Result<()> {
        let end = from.checked_add(into.len() as u64).filter(|end| *end <= self.bytes);
        end.ok_or(ErrorKind::UnexpectedEof)?;
        self.file.read_exact_at(into, self.at.saturating_add(from))
    }
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        from: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.read_at(into, from)?)
    }
}

/// A file system.
pub(super) struct System(Ext4);

impl System {
    /// Opens that of a partition; `None` if there is none.
    pub(super) fn open(disk: &File, part: &Partition) -> Result<Option<Self>, FileError> {
        let window = Window { file: disk.try_clone()?, at: part.at, bytes: part.bytes };
        let mut superblock = vec![0; SUPERBLOCK.1];
        match window.read_at(&mut superblock, SUPERBLOCK.0) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if le(&superblock, 0x38, 2) != MAGIC {
            return Ok(None);
        }
        check(&superblock, &window)?;
        let system = Ext4::load(Box::new(window))?;
        // Better to say now why nothing in it can be read than later that nothing is there.
        system.symlink_metadata("/")?;
        Ok(Some(Self(system)))
    }

    /// Whether there is such a file or directory.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.resolve(path).is_ok()
    }

    /// Reads a file that must not be larger than that.
    pub(super) fn read(&self, path: &str, most: u64) -> Result<Vec<u8>, FileError> {
        let path = self.resolve(path)?;
        let meta = self.0.symlink_metadata(path.as_str())?;
        if !meta.file_type().is_regular_file() {
            return Err(FileError::Odd("it is not a regular file"));
        }
        let bytes = meta.len();
        if bytes > most {
            return Err(FileError::TooLarge { bytes, most });
        }
        Ok(self.0.read(path.as_str())?)
    }

    /// The names in a directory; none where there is none.
    pub(super) fn names(&self, dir: &str) -> Vec<String> {
        let name = |entry: DirEntry| {
            std::str::from_utf8(entry.file_name().as_ref()).ok().map(str::to_owned)
        };
        let Ok(path) = self.resolve(dir) else { return Vec::new() };
        let small =
            self.0.symlink_metadata(path.as_str()).is_ok_and(|meta| meta.len() <= MAX_DIR_BYTES);
        match self.0.read_dir(path.as_str()) {
            Ok(entries) if small => {
                entries.take(MAX_ENTRIES).filter_map(|entry| name(entry.ok()?)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The path of a file without links, `.` and `..`. Links lead nowhere but into this file system.
    fn resolve(&self, path: &str) -> Result<String, FileError> {
        let mut ahead: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let (mut found, mut links, mut steps) = (String::new(), 0, 0);
        while let Some(name) = ahead.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(FileError::Odd("its path has too many steps"));
            }
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    found.truncate(found.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let here = if found.is_empty() { "/" } else { &found };
            // A name is looked for in a directory entry by entry.
            if self.0.symlink_metadata(here)?.len() > MAX_DIR_BYTES {
                return Err(FileError::Odd("a directory on the way is larger than 16 MiB"));
            }
            let next = format!("{found}/{name}");
            let meta = self.0.symlink_metadata(next.as_str())?;
            if !meta.is_symlink() {
                found = next;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(FileError::Odd("too many symbolic links lead to one another"));
            }
            if meta.len() > MAX_LINK_BYTES {
                return Err(FileError::Odd("a symbolic link is longer than 4095 bytes"));
            }
            let target = self.0.read_link(next.as_str())?;
            let target = std::str::from_utf8(target.as_ref());
            let target =
                target.map_err(|_| FileError::Odd("a symbolic link's target is not text"))?;
            if target.starts_with('/') {
                found.clear();
            }
            ahead.extend(target.split('/').rev().map(str::to_owned));
        }
        Ok(if found.is_empty() { "/".into() } else { found })
    }
}

/// Refuses sizes that nobody makes, before anything is allocated by them.
fn check(superblock: &[u8], window: &Window) -> Result<(), FileError> {
    let number = |at, count| le(superblock, at, count);
    let log = number(0x18, 4);
    if log > MAX_LOG_BLOCK_SIZE {
        return Err(FileError::Odd("its blocks have an impossible size"));
    }
    let block_bytes = 1024u64 << log;
    let is_64bit = number(0x60, 4) & INCOMPAT_64BIT != 0;
    let blocks = number(0x4, 4) | if is_64bit { number(0x150, 4) << 32 } else { 0 };
    if blocks.checked_mul(block_bytes).is_none_or(|bytes| bytes > window.bytes) {
        return Err(FileError::Odd("it is larger than its partition"));
    }
    let per_group = number(0x20, 4).max(1);
    if blocks.div_ceil(per_group) > MAX_GROUPS {
        return Err(FileError::Odd("it has too many groups"));
    }
    check_journal(superblock, block_bytes, is_64bit, window)
}

/// The journal is read as a whole, if there is one.
fn check_journal(
    superblock: &[u8],
    block_bytes: u64,
    is_64bit: bool,
    window: &Window,
) -> Result<(), FileError> {
    const HAS_JOURNAL: u64 = 4;
    let number = |at, count| le(superblock, at, count);
    let (inode, inode_bytes) = (number(0xe0, 4), number(0x58, 2));
    if number(0x5c, 4) & HAS_JOURNAL == 0 || inode == 0 {
        return Ok(());
    }
    // In the first group, as everybody makes it: a reserved inode.
    if inode > number(0x28, 4) {
        return Err(FileError::Odd("its journal is not where a journal is"));
    }
    // The first group's descriptor is in the block behind the superblock's.
    let descriptor_at = (SUPERBLOCK.0 / block_bytes + 1) * block_bytes;
    let mut descriptor = [0; 64];
    window.read_at(&mut descriptor, descriptor_at)?;
    let high = if is_64bit && number(0xfe, 2) >= 64 { le(&descriptor, 0x28, 4) << 32 } else { 0 };
    let table = (le(&descriptor, 0x8, 4) | high).checked_mul(block_bytes);
    let at = table.and_then(|at| at.checked_add((inode - 1) * inode_bytes));
    let mut start = [0; 128];
    let at = at.ok_or(FileError::Odd("its journal is not where a journal is"))?;
    window.read_at(&mut start, at)?;
    let bytes = le(&start, 0x4, 4) | le(&start, 0x6c, 4) << 32;
    if bytes > MAX_JOURNAL_BYTES {
        return Err(FileError::Odd("its journal is larger than 1 GiB"));
    }
    Ok(())
}
