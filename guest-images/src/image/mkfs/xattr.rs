//! Extended attributes: all of a file's in one block of their own.

use super::{BLOCK_BYTES, MkfsError, put};

/// What all attributes of a file take at most, each with 16 bytes beside its name and its value.
pub(super) const MAX_BYTES: usize = BLOCK_BYTES as usize - HEAD_BYTES - END_BYTES;
const MAGIC: u32 = 0xea02_0000;
const HEAD_BYTES: usize = 32;
/// Entries end with zeros.
const END_BYTES: usize = 4;
const ENTRY_BYTES: usize = 16;

/// What the first part of a name is written as.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    // In the order in which Linux looks for them.
    prefix: u8,
    name_bytes: usize,
    name: Box<[u8]>,
    value: Box<[u8]>,
}

impl Xattr {
    /// An attribute; `None` if it is none that is simply kept: ACLs have a form of their own in ext4.
    pub fn new(name: &[u8], value: &[u8]) -> Option<Self> {
        let of = |(prefix, number): (&[u8], u8)| Some((number, name.strip_prefix(prefix)?));
        let (prefix, name) = PREFIXES.into_iter().find_map(of)?;
        if name.is_empty() || name.len() > 255 || name.contains(&0) {
            return None;
        }
        Some(Self { prefix, name_bytes: name.len(), name: name.into(), value: value.into() })
    }

    /// What it takes in the block.
    pub fn bytes(&self) -> usize {
        ENTRY_BYTES + self.name.len().next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }

    /// Whether both have the same name.
    pub fn is_same_name(&self, other: &Self) -> bool {
        (self.prefix, &self.name) == (other.prefix, &other.name)
    }

    fn hash(&self) -> u32 {
        let mut hash = 0u32;
        for byte in &self.name {
            hash = hash.rotate_left(5) ^ u32::from(*byte);
        }
        for word in self.value.chunks(4) {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            hash = hash.rotate_left(16) ^ u32::from_le_bytes(bytes);
        }
        hash
    }
}

/// The block with these attributes.
pub(super) fn block(xattrs: &[Xattr]) -> Result<Vec<u8>, MkfsError> {
    if xattrs.iter().map(Xattr::bytes).sum::<usize>() > MAX_BYTES {
        return Err(MkfsError::Xattrs);
    }
    let mut sorted: Vec<_> = xattrs.iter().collect();
    sorted.sort();
    let mut block = vec![0; BLOCK_BYTES as usize];
    let (mut at, mut values, mut of_all) = (HEAD_BYTES, block.len(), 0u32);
    for xattr in sorted {
        values -= xattr.value.len().next_multiple_of(4);
        block[at] = xattr.name.len() as u8;
        block[at + 1] = xattr.prefix;
        put!(block, at + 2, values as u16);
        put!(block, at + 8, xattr.value.len() as u32);
        put!(block, at + 12, xattr.hash());
        let name_at = at + ENTRY_BYTES;
        block[name_at..name_at + xattr.name.len()].copy_from_slice(&xattr.name);
        block[values..values + xattr.value.len()].copy_from_slice(&xattr.value);
        at = name_at + xattr.name.len().next_multiple_of(4);
        of_all = of_all.rotate_left(16) ^ xattr.hash();
    }
    put!(block, 0, MAGIC);
    // One file has it, in one block.
    put!(block, 4, 1u32);
    put!(block, 8, 1u32);
    put!(block, 12, of_all);
    Ok(block)
}
