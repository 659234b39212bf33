//! Reading qcow2, versions 2 and 3: what `qemu-img` and the makers of cloud images write.
//!
//! An image is clusters. A table of tables (L1, L2) says of every guest cluster where in the file it is,
//! or that it is zero, or which compressed bytes hold it. Images that are not whole in themselves
//! (a backing file, an external data file), are encrypted, or use what is not known here, are refused.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use super::{ReadAt, be};
use crate::{files, manifest::MAX_PART_BYTES};

/// What a qcow2 file begins with.
pub const MAGIC: &[u8; 4] = b"QFI\xfb";
const HEADER_BYTES: usize = 112;
/// Bytes that the shortest compressed cluster takes, about: of zeros, by either codec.
const LEAST_PACKED_BYTES: u64 = 16;
/// A window larger than any cluster: what a decompressor makes room for.
const MAX_ZSTD_WINDOW_LOG: u32 = 22;
/// Clusters of 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u64> = 9..=21;
/// The largest table of tables: that of 4 TiB in the smallest clusters would be larger, which nobody makes.
const MAX_L1_BYTES: u64 = 32 << 20;
const ENTRY_BYTES: u64 = 8;
/// Bits 9 to 55 of an entry are an offset in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// In version 3: the cluster is zero, whatever its offset.
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// Bits of features without which an image cannot be read. A dirty one has wrong counts of references,
/// which are not read here.
mod incompatible {
    pub(super) const DIRTY: u64 = 1;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const EXTERNAL_DATA: u64 = 1 << 2;
    pub(super) const COMPRESSION_TYPE: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
    pub(super) const KNOWN: u64 = DIRTY | COMPRESSION_TYPE;
}

/// Why a qcow2 image is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It cannot be read.
    #[error("reading it: {0}")]
    Io(#[from] io::Error),
    /// It is another format.
    #[error("it does not begin as a qcow2 image does")]
    Magic,
    /// Another version's.
    #[error(
        "it is qcow2 version {0}, and versions 2 and 3 are read: convert it with `qemu-img convert -O raw`"
    )]
    Version(u64),
    /// It is what differs from another image.
    #[error(
        "it is only what differs from its backing file {0:?}: make it whole with `qemu-img convert -O qcow2`"
    )]
    BackingFile(String),
    /// It uses what is not known here.
    #[error("{0}: convert it with `qemu-img convert -O raw`")]
    Feature(&'static str),
    /// A number in it is impossible.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// How compressed clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    Deflate,
    Zstd,
}

/// An open image.
#[derive(Debug)]
pub struct Qcow2<F> {
    file: F,
    version: u64,
    bytes: u64,
    cluster_bits: u64,
    codec: Codec,
    l1: Vec<u64>,
}

/// How often clusters of the file may yet be used. In a sound image no two entries name the same one, so
/// that a small file cannot be made to look like terabytes.
#[derive(Debug)]
struct Budget {
    clusters: u64,
    packed: u64,
}

impl Budget {
    fn of(file_bytes: u64, cluster_bits: u64) -> Self {
        Self {
            clusters: file_bytes.div_ceil(1 << cluster_bits),
            packed: file_bytes / LEAST_PACKED_BYTES,
        }
    }

    fn spend(&mut self, place: Cluster) -> Result<(), Qcow2Error> {
        let left = match place {
            Cluster::Zero => return Ok(()),
            Cluster::At(_) => &mut self.clusters,
            Cluster::Packed { .. } => &mut self.packed,
        };
        let spent = left.checked_sub(1);
        *left = spent
            .ok_or(Qcow2Error::Damaged("several entries of its tables name the same cluster"))?;
        Ok(())
    }
}

/// Where a guest cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    Zero,
    At(u64),
    Packed { at: u64, bytes: u64 },
}

impl<F: ReadAt> Qcow2<F> {
    /// Opens an image: checks its header and reads its table of tables.
    pub fn open(file: F) -> Result<Self, Qcow2Error> {
        let mut header = [0; HEADER_BYTES];
        // Version 2 has 72 bytes of header; what is behind is read as zeros where a file ends there.
        let there = file.len().min(HEADER_BYTES as u64) as usize;
        file.read_exact_at(header.get_mut(..there).unwrap_or_default(), 0)?;
        if !header.starts_with(MAGIC) {
            return Err(Qcow2Error::Magic);
        }
        let version = be(&header, 4, 4);
        if !(2..=3).contains(&version) {
            return Err(Qcow2Error::Version(version));
        }
        let (backing, length) = (be(&header, 8, 8), be(&header, 16, 4));
        if backing != 0 {
            return Err(Qcow2Error::BackingFile(name(&file, backing, length)));
        }
        if be(&header, 32, 4) != 0 {
            return Err(Qcow2Error::Feature("it is encrypted"));
        }
        let codec = if version == 3 { check_features(&header)? } else { Codec::Deflate };
        let cluster_bits = be(&header, 20, 4);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Qcow2Error::Damaged("its clusters have an impossible size"));
        }
        let bytes = be(&header, 24, 8);
        if bytes > MAX_PART_BYTES {
            return Err(Qcow2Error::Damaged("it says that its disk has more than 4 TiB"));
        }
        let (count, at) = (be(&header, 36, 4), be(&header, 40, 8));
        // One table has an entry for each eight bytes of a cluster, each of which speaks of a cluster.
        let needed = bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if count < needed || count * ENTRY_BYTES > MAX_L1_BYTES {
            return Err(Qcow2Error::Damaged("its table of tables does not fit its size"));
        }
        let mut table = vec![0; (needed * ENTRY_BYTES) as usize];
        file.read_exact_at(&mut table, at)?;
        let l1 = table.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        Ok(Self { file, version, bytes, cluster_bits, codec, l1 })
    }

    /// The length of the disk in it.
    pub fn disk_bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the disk in it to an empty file, with holes where it is zero. `progress` hears how many bytes
    /// of the disk are done.
    pub fn write_raw(&self, to: &File, progress: &mut dyn FnMut(u64)) -> Result<(), Qcow2Error> {
        to.set_len(self.bytes)?;
        let cluster_bytes = 1u64 << self.cluster_bits;
        let per_table = cluster_bytes / ENTRY_BYTES;
        let mut budget = Budget::of(self.file.len(), self.cluster_bits);
        let (mut table, mut cluster) =
            (vec![0; cluster_bytes as usize], vec![0; cluster_bytes as usize]);
        for (number, entry) in (0..).zip(&self.l1) {
            let first = number * per_table * cluster_bytes;
            if self.read_table(*entry, &mut table)? {
                budget.spend(Cluster::At(*entry))?;
                for (n, entry) in (0..).zip(table.as_chunks().0) {
                    let at = first + n * cluster_bytes;
                    let inside = self.bytes.saturating_sub(at).min(cluster_bytes) as usize;
                    let place = self.place(u64::from_be_bytes(*entry))?;
                    if inside == 0 || place == Cluster::Zero {
                        continue;
                    }
                    budget.spend(place)?;
                    self.read_cluster(place, &mut cluster)?;
                    let read = cluster.get(..inside).unwrap_or_default();
                    write_sparse(to, at, read)?;
                }
            }
            progress(first.saturating_add(per_table * cluster_bytes).min(self.bytes));
        }
        Ok(())
    }

    /// Reads a table of clusters; `false` if there is none, since all of its clusters are zero.
    fn read_table(&self, entry: u64, table: &mut [u8]) -> Result<bool, Qcow2Error> {
        let at = entry & OFFSET_MASK;
        if at == 0 {
            return Ok(false);
        }
        if at & ((1 << self.cluster_bits) - 1) != 0 {
            return Err(Qcow2Error::Damaged("a table is not at the begin of a cluster"));
        }
        self.file.read_exact_at(table, at)?;
        Ok(true)
    }

    /// What an entry of a table says.
    fn place(&self, entry: u64) -> Result<Cluster, Qcow2Error> {
        if entry & COMPRESSED != 0 {
            // Offset in the lower bits, then how many more sectors of 512 bytes it reaches into.
            let split = 62 - (self.cluster_bits - 8);
            let at = entry & ((1 << split) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> split;
            let bytes = (sectors + 1) * SECTOR - at % SECTOR;
            return Ok(Cluster::Packed { at, bytes });
        }
        let at = entry & OFFSET_MASK;
        if at == 0 || self.version == 3 && entry & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if at & ((1 << self.cluster_bits) - 1) != 0 {
            return Err(Qcow2Error::Damaged("a cluster is not where a cluster can be"));
        }
        Ok(Cluster::At(at))
    }

    fn read_cluster(&self, place: Cluster, into: &mut [u8]) -> Result<(), Qcow2Error> {
        match place {
            Cluster::Zero => into.fill(0),
            Cluster::At(at) => {
                // The last cluster of a file may end early.
                let there = self.file.len().saturating_sub(at).min(into.len() as u64) as usize;
                if there == 0 {
                    return Err(Qcow2Error::Damaged("a cluster is beyond the end of the file"));
                }
                let (read, rest) = into.split_at_mut(there);
                rest.fill(0);
                self.file.read_exact_at(read, at)?;
            }
            Cluster::Packed { at, bytes } => {
                // At most a cluster and a sector; and its sectors may reach beyond the end of the file.
                let bytes = self.file.len().saturating_sub(at).min(bytes) as usize;
                let mut packed = vec![0; bytes];
                self.file.read_exact_at(&mut packed, at)?;
                self.unpack(&packed, into)?;
            }
        }
        Ok(())
    }

    fn unpack(&self, packed: &[u8], into: &mut [u8]) -> Result<(), Qcow2Error> {
        // What comes behind the cluster's own data is of others.
        let unpacked = match self.codec {
            Codec::Deflate => flate2::read::DeflateDecoder::new(packed).read_exact(into),
            Codec::Zstd => {
                zstd::stream::read::Decoder::with_buffer(packed).and_then(|mut decoder| {
                    decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
                    decoder.single_frame().read_exact(into)
                })
            }
        };
        unpacked.map_err(|_| Qcow2Error::Damaged("a compressed cluster cannot be unpacked"))
    }
}

fn check_features(header: &[u8]) -> Result<Codec, Qcow2Error> {
    let features = be(header, 72, 8);
    for (bit, what) in [
        (incompatible::CORRUPT, "it is marked as corrupt (`qemu-img check -r all` may mend it)"),
        (incompatible::EXTERNAL_DATA, "its data is in another file"),
        (incompatible::EXTENDED_L2, "it has subclusters"),
        (!incompatible::KNOWN, "it uses features that are not known here"),
    ] {
        if features & bit != 0 {
            return Err(Qcow2Error::Feature(what));
        }
    }
    // The bit says that the byte behind the header's fixed part is there and not 0, which is deflate.
    Ok(match features & incompatible::COMPRESSION_TYPE {
        0 => Codec::Deflate,
        _ if header.get(104) == Some(&1) => Codec::Zstd,
        _ => return Err(Qcow2Error::Feature("it is compressed in a way that is not known here")),
    })
}

/// The name of a backing file, for people.
fn name<F: ReadAt>(file: &F, at: u64, length: u64) -> String {
    let mut bytes = vec![0; length.min(1023) as usize];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect(),
        Err(_) => "a file whose name cannot be read".into(),
    }
}

/// As [`files::write_sparse`], for lengths that are no whole chunks.
fn write_sparse(to: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    if at.is_multiple_of(crate::chunk::CHUNK_SIZE as u64) {
        return files::write_sparse(to, at, bytes);
    }
    // Clusters smaller than a chunk.
    if bytes.iter().any(|byte| *byte != 0) { to.write_all_at(bytes, at) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
