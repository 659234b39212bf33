//! Inodes: what they say of a file, and where its content is.

use super::{
    BLOCK_BYTES, Entry, Kind, MAX_LINKS, Meta, MkfsError, ROOT, Run, layout::INODE_BYTES, put,
};

/// Where an inode's map of its content is, and how long.
const MAP_AT: usize = 40;
pub(super) const MAP_BYTES: usize = 60;
/// The map is a tree of extents.
const EXTENTS_FLAG: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const EXTENT_BYTES: usize = 12;
const IN_INODE: usize = 4;
const IN_BLOCK: usize = BLOCK_BYTES as usize / EXTENT_BYTES - 1;
/// Fields behind the classical 128 bytes that are in use.
const EXTRA_BYTES: u16 = 32;
/// Counts of blocks are in sectors.
const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / 512;

/// An inode's bytes.
#[derive(Debug)]
pub(super) struct Inode {
    bytes: [u8; INODE_BYTES as usize],
    blocks: u64,
}

/// Writes a block of a map and says where.
type WriteMap<'a> = dyn FnMut(&[u8]) -> Result<u64, MkfsError> + 'a;

impl Inode {
    pub(super) fn new(meta: &Meta, kind: Kind, links: u32) -> Result<Self, MkfsError> {
        let links = match kind {
            // A directory with too many in it to count has one.
            Kind::Directory if links >= MAX_LINKS => 1,
            _ if links > MAX_LINKS => return Err(MkfsError::Links),
            _ => links,
        };
        let mut node = Self { bytes: [0; INODE_BYTES as usize], blocks: 0 };
        let bytes = &mut node.bytes;
        put!(bytes, 0, (meta.mode & 0o7777) | format_bits(kind));
        put!(bytes, 2, meta.uid as u16);
        put!(bytes, 24, meta.gid as u16);
        put!(bytes, 120, (meta.uid >> 16) as u16);
        put!(bytes, 122, (meta.gid >> 16) as u16);
        put!(bytes, 26, links as u16);
        put!(bytes, 128, EXTRA_BYTES);
        let (low, extra) = time(meta.seconds, meta.nanoseconds);
        // Accessed, changed, modified, made.
        for (at, extra_at) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
            put!(bytes, at, low);
            put!(bytes, extra_at, extra);
        }
        Ok(node)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn map(&self) -> [u8; MAP_BYTES] {
        let mut map = [0; MAP_BYTES];
        map.copy_from_slice(&self.bytes[MAP_AT..MAP_AT + MAP_BYTES]);
        map
    }

    /// A symbolic link that fits in the place of the map.
    pub(super) fn set_short(&mut self, target: &[u8]) {
        self.set_size(target.len() as u64);
        if let Some(place) = self.bytes.get_mut(MAP_AT..MAP_AT + target.len()) {
            place.copy_from_slice(target);
        }
    }

    /// A device: in the old encoding where the numbers fit into it.
    pub(super) fn set_device(&mut self, major: u32, minor: u32) {
        if major < 256 && minor < 256 {
            put!(self.bytes, MAP_AT, major << 8 | minor);
        } else {
            let device = (minor & 0xff) | major << 8 | (minor & !0xff) << 12;
            put!(self.bytes, MAP_AT + 4, device);
        }
    }

    pub(super) fn set_xattrs(&mut self, block: u64) {
        put!(self.bytes, 104, block as u32);
        self.add_blocks(1);
    }

    /// A content of so many bytes in these runs.
    pub(super) fn set_runs(
        &mut self,
        bytes: u64,
        runs: &[Run],
        write: &mut WriteMap<'_>,
    ) -> Result<(), MkfsError> {
        self.set_size(bytes);
        put!(self.bytes, 32, EXTENTS_FLAG);
        self.add_blocks(runs.iter().map(|run| run.blocks).sum());
        let mut extents = Vec::with_capacity(runs.len() * EXTENT_BYTES);
        let mut first = 0u64;
        let mut starts = Vec::new();
        for run in runs {
            starts.push(first as u32);
            extents.extend((first as u32).to_le_bytes());
            extents.extend((run.blocks as u16).to_le_bytes());
            extents.extend(0u16.to_le_bytes());
            extents.extend((run.start as u32).to_le_bytes());
            first += run.blocks;
        }
        let mut depth = 0;
        // Blocks of extents, until what leads to them fits into the inode.
        while starts.len() > IN_INODE {
            let mut above = Vec::new();
            let mut above_starts = Vec::new();
            for (extents, starts) in
                extents.chunks(IN_BLOCK * EXTENT_BYTES).zip(starts.chunks(IN_BLOCK))
            {
                let mut block = vec![0; BLOCK_BYTES as usize];
                node(&mut block, extents, IN_BLOCK, depth);
                let at = write(&block)?;
                self.add_blocks(1);
                let start = starts.first().copied().unwrap_or_default();
                above_starts.push(start);
                above.extend(start.to_le_bytes());
                above.extend((at as u32).to_le_bytes());
                above.extend([0; 4]);
            }
            (extents, starts) = (above, above_starts);
            depth += 1;
        }
        let map = &mut self.bytes[MAP_AT..MAP_AT + MAP_BYTES];
        node(map, &extents, IN_INODE, depth);
        Ok(())
    }

    fn set_size(&mut self, bytes: u64) {
        put!(self.bytes, 4, bytes as u32);
        put!(self.bytes, 108, (bytes >> 32) as u32);
    }

    fn add_blocks(&mut self, blocks: u64) {
        self.blocks += blocks;
        let sectors = self.blocks * SECTORS_PER_BLOCK;
        put!(self.bytes, 28, sectors as u32);
        put!(self.bytes, 116, (sectors >> 32) as u16);
    }
}

/// A node of a tree of extents; `entries` has at most `most` of them.
fn node(into: &mut [u8], entries: &[u8], most: usize, depth: u16) {
    put!(into, 0, EXTENT_MAGIC);
    put!(into, 2, (entries.len() / EXTENT_BYTES) as u16);
    put!(into, 4, most as u16);
    put!(into, 6, depth);
    if let Some(place) = into.get_mut(EXTENT_BYTES..EXTENT_BYTES + entries.len()) {
        place.copy_from_slice(entries);
    }
}

fn format_bits(kind: Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice => 0o020_000,
        Kind::Directory => 0o040_000,
        Kind::BlockDevice => 0o060_000,
        Kind::File => 0o100_000,
        Kind::Symlink => 0o120_000,
    }
}

/// A time as an inode has it: 32 bits with a sign, then two more bits of seconds and the nanoseconds. Until
/// the year 2446, from 1901 on.
fn time(seconds: i64, nanoseconds: u32) -> (u32, u32) {
    let seconds = seconds.clamp(i32::MIN.into(), (4 << 32) - 1 + i64::from(i32::MIN));
    let low = seconds as i32;
    let epoch = ((seconds - i64::from(low)) >> 32) as u32 & 3;
    (low as u32, nanoseconds.min(999_999_999) << 2 | epoch)
}

/// The blocks of a directory: a list of names, which none of begins in one block and ends in the next.
pub(super) fn directory(number: u32, parent: u32, entries: &[Entry<'_>]) -> Vec<u8> {
    let parent = if number == ROOT { ROOT } else { parent };
    let own = [(number, &b"."[..]), (parent, b"..")].map(|(number, name)| Entry {
        number,
        kind: Kind::Directory,
        name,
    });
    let block = BLOCK_BYTES as usize;
    let mut bytes = Vec::new();
    let mut last = 0;
    for entry in own.iter().chain(entries) {
        let needed = (8 + entry.name.len()).next_multiple_of(4);
        let in_block = bytes.len() % block;
        if !bytes.is_empty() && (in_block == 0 || in_block + needed > block) {
            stretch(&mut bytes, last);
        }
        last = bytes.len();
        bytes.extend(entry.number.to_le_bytes());
        bytes.extend((needed as u16).to_le_bytes());
        bytes.extend([entry.name.len() as u8, entry.kind as u8]);
        bytes.extend(entry.name);
        bytes.resize(last + needed, 0);
    }
    stretch(&mut bytes, last);
    bytes
}

/// Lets the last entry reach to the end of its block.
fn stretch(bytes: &mut Vec<u8>, last: usize) {
    let end = bytes.len().next_multiple_of(BLOCK_BYTES as usize);
    bytes.resize(end, 0);
    put!(bytes, last + 4, (end - last) as u16);
}
