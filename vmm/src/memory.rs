//! Guest RAM: one region below the device window and one above 4 GiB.
//!
//! A guest whose base has memory begins as a private map of the base's memory file: a page that the
//! guest has not written *is* the base's page, shared with every other guest of that base through
//! the page cache, and becomes this guest's own (anonymous) with the first write. Where the base's
//! memory is zero its file has holes, and RAM is anonymous there, as all of it is without base
//! memory: the first write then costs neither a page of the page cache nor a copy.
//!
//! A chunk's index counts RAM only; its guest-physical address skips the window. Every write
//! through `vm-memory` marks its page in the region's bitmap, which is how the VMM's own writes
//! (devices, the boot loader) become part of the dirty set.

use std::{fs::File, io, ops::Range};

use guest_images::{CHUNK_SIZE, Chunk, data_extent};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    bitmap::{AtomicBitmap, Bitmap, NewBitmap},
    mmap::{FromRangesError, MmapRegion, MmapRegionBuilder},
};

use crate::layout::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES, MMIO_WINDOW_END, MMIO_WINDOW_START};

/// Guest RAM. Cloning it shares the same memory.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size asked for cannot be given.
    #[error(
        "guest memory of {0} bytes: must be a multiple of {CHUNK_SIZE}, from {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}"
    )]
    Size(u64),
    /// The host will not map that much.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// Why.
        source: FromRangesError,
    },
    /// The base's memory cannot be this guest's.
    #[error(
        "the base's memory file has {found} bytes, a guest of this base needs {needed}: give it that much memory, or verify the base"
    )]
    BaseSize {
        /// Bytes of the file.
        found: u64,
        /// Bytes of the guest's RAM.
        needed: u64,
    },
    /// The base's memory cannot be mapped.
    #[error("cannot map {bytes} bytes of the base's memory: {reason}")]
    MapBase {
        /// Bytes asked for.
        bytes: u64,
        /// Why.
        reason: String,
    },
    /// A chunk index outside RAM.
    #[error("RAM chunk {index} is outside the guest's {chunks} chunks")]
    NoSuchChunk {
        /// The index.
        index: u64,
        /// How many there are.
        chunks: u64,
    },
    /// RAM given for a machine is not what the machine needs.
    #[error("guest memory has regions {found:x?} where the machine needs {expected:x?}")]
    WrongRegions {
        /// What was given: first address and length of each region.
        found: Vec<(u64, u64)>,
        /// What is needed.
        expected: Vec<(u64, u64)>,
    },
    /// An access failed.
    #[error("access to guest memory failed: {0}")]
    Access(#[from] GuestMemoryError),
    /// The kernel would not drop a page.
    #[error("cannot drop a guest page: {0}")]
    Drop(#[source] io::Error),
}

/// The regions of a guest with `memory_bytes` of RAM, as (first address, length).
pub fn regions(memory_bytes: u64) -> Result<Vec<(GuestAddress, usize)>, MemoryError> {
    let fits = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes);
    if !fits || !memory_bytes.is_multiple_of(CHUNK_SIZE as u64) {
        return Err(MemoryError::Size(memory_bytes));
    }
    let low = memory_bytes.min(MMIO_WINDOW_START);
    let mut regions = vec![(GuestAddress(0), low as usize)];
    if memory_bytes > low {
        regions.push((GuestAddress(MMIO_WINDOW_END), (memory_bytes - low) as usize));
    }
    Ok(regions)
}

/// Maps RAM for a guest: all zero, nothing of it present yet.
pub fn allocate(memory_bytes: u64) -> Result<GuestRam, MemoryError> {
    let regions = regions(memory_bytes)?;
    // Anonymous, MAP_PRIVATE and MAP_NORESERVE: what vm-memory maps when no file is given.
    GuestRam::from_ranges(&regions)
        .map_err(|source| MemoryError::Map { bytes: memory_bytes, source })
}

/// Maps the memory file of a base for one guest: `file` holds RAM as chunks are counted, without the
/// hole below 4 GiB. What the guest writes stays private to it.
///
/// The file must not shrink while the guest runs, or the guest dies: it belongs to a store, which
/// never changes a file of a base.
pub fn map_base(file: &File, memory_bytes: u64) -> Result<GuestRam, MemoryError> {
    let regions = regions(memory_bytes)?;
    let failed = |reason: String| MemoryError::MapBase { bytes: memory_bytes, reason };
    let found = file.metadata().map_err(|e| failed(e.to_string()))?.len();
    if found != memory_bytes {
        return Err(MemoryError::BaseSize { found, needed: memory_bytes });
    }
    let mut offset = 0;
    let mut mapped = Vec::with_capacity(regions.len());
    for (start, len) in regions {
        let file = file.try_clone().map_err(|e| failed(e.to_string()))?;
        let region = map_region(FileOffset::new(file, offset), len).map_err(&failed)?;
        let region = GuestRegionMmap::new(region, start)
            .ok_or_else(|| failed(format!("no room at {:#x}", start.0)))?;
        mapped.push(region);
        offset += len as u64;
    }
    GuestRam::from_regions(mapped).map_err(|e| failed(e.to_string()))
}

fn map_region(file: FileOffset, len: usize) -> Result<MmapRegion<AtomicBitmap>, String> {
    let region = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::with_len(len))
        .with_file_offset(file.clone())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| e.to_string())?;
    for hole in holes(&file, len as u64) {
        map_zeros(&region, hole).map_err(|e| format!("zeros in it: {e}"))?;
    }
    Ok(region)
}

/// Holes of a file that are worth a mapping of their own, from the file's offset on: whole chunks,
/// as many as the kernel's limit of mappings leaves alone.
fn holes(file: &FileOffset, len: u64) -> Vec<Range<usize>> {
    /// Smaller ones stay part of the file's map.
    const MIN_BYTES: u64 = 1 << 20;
    const MAX_HOLES: usize = 8192;
    let chunk = CHUNK_SIZE as u64;
    let (start, end) = (file.start(), file.start() + len);
    let mut holes = Vec::new();
    let mut at = start;
    while at < end && holes.len() < MAX_HOLES {
        let (data, data_end) = data_extent(file.file(), at, end).unwrap_or((end, end));
        let hole = at.next_multiple_of(chunk)..data - data % chunk;
        if hole.end.saturating_sub(hole.start) >= MIN_BYTES {
            holes.push((hole.start - start) as usize..(hole.end - start) as usize);
        }
        at = data_end;
    }
    holes
}

/// Puts anonymous zeros over part of a mapping that nobody uses yet.
fn map_zeros(region: &MmapRegion<AtomicBitmap>, part: Range<usize>) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    debug_assert!(part.end <= region.size());
    // SAFETY: the part lies inside the region, which was just mapped and which nobody refers to yet;
    // it is replaced by zeros of the same access, and goes with the region when that is unmapped.
    let failed = unsafe {
        let address = region.as_ptr().add(part.start).cast();
        // Small pages: a large one would count as changed as a whole with its first byte.
        libc::mmap(address, part.len(), access, flags, -1, 0) == libc::MAP_FAILED
            || libc::madvise(address, part.len(), libc::MADV_NOHUGEPAGE) != 0
                && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// RAM for a guest of a base with this memory, if it has any.
pub fn map(base: Option<&File>, memory_bytes: u64) -> Result<GuestRam, MemoryError> {
    base.map_or_else(|| allocate(memory_bytes), |file| map_base(file, memory_bytes))
}

/// Checks that `ram` has exactly the regions of a guest with `memory_bytes`.
pub fn check(ram: &GuestRam, memory_bytes: u64) -> Result<(), MemoryError> {
    let found: Vec<(u64, u64)> = ram.iter().map(|r| (r.start_addr().0, r.len())).collect();
    let expected: Vec<(u64, u64)> =
        regions(memory_bytes)?.into_iter().map(|(start, len)| (start.0, len as u64)).collect();
    if found == expected { Ok(()) } else { Err(MemoryError::WrongRegions { found, expected }) }
}

/// Bytes of RAM.
pub fn size_bytes(ram: &GuestRam) -> u64 {
    ram.iter().map(|region| region.len()).sum()
}

/// How many chunks RAM has.
pub fn chunk_count(ram: &GuestRam) -> u64 {
    size_bytes(ram) / CHUNK_SIZE as u64
}

/// The guest-physical address of a RAM chunk.
pub fn chunk_address(ram: &GuestRam, index: u64) -> Result<GuestAddress, MemoryError> {
    let chunks = chunk_count(ram);
    if index >= chunks {
        return Err(MemoryError::NoSuchChunk { index, chunks });
    }
    let offset = index * CHUNK_SIZE as u64;
    let hole = if offset < MMIO_WINDOW_START { 0 } else { MMIO_WINDOW_END - MMIO_WINDOW_START };
    Ok(GuestAddress(offset + hole))
}

/// The RAM chunk that holds a guest-physical address, or `None` where there is no RAM.
pub fn chunk_at(ram: &GuestRam, address: GuestAddress) -> Option<u64> {
    ram.find_region(address)?;
    let hole = if address.0 < MMIO_WINDOW_END { 0 } else { MMIO_WINDOW_END - MMIO_WINDOW_START };
    Some((address.0 - hole) / CHUNK_SIZE as u64)
}

/// Copies a chunk out of RAM. The guest may be writing: the copy is then a mix that a later
/// harvest repairs.
pub fn read_chunk(ram: &GuestRam, index: u64, into: &mut Chunk) -> Result<(), MemoryError> {
    let address = chunk_address(ram, index)?;
    Ok(ram.read_slice(into, address)?)
}

/// Copies a chunk into RAM and marks it dirty.
pub fn write_chunk(ram: &GuestRam, index: u64, chunk: &Chunk) -> Result<(), MemoryError> {
    let address = chunk_address(ram, index)?;
    Ok(ram.write_slice(chunk, address)?)
}

/// Makes a chunk what it was before the guest wrote it, by giving its page back to the host: the
/// base's content, or zero without base memory.
pub fn drop_chunk(ram: &GuestRam, index: u64) -> Result<(), MemoryError> {
    drop_chunks(ram, index..index.saturating_add(1))
}

/// The same for many chunks next to each other.
pub fn drop_chunks(ram: &GuestRam, chunks: Range<u64>) -> Result<(), MemoryError> {
    let mut next = chunks.start;
    while next < chunks.end {
        let address = chunk_address(ram, next)?;
        let Some(region) = ram.find_region(address) else {
            return Err(MemoryError::NoSuchChunk { index: next, chunks: chunk_count(ram) });
        };
        // Not beyond the region: the window may follow.
        let room = (region.len() - (address.0 - region.start_addr().0)) / CHUNK_SIZE as u64;
        let count = room.min(chunks.end - next);
        let slice = ram.get_slice(address, count as usize * CHUNK_SIZE)?;
        // SAFETY: the slice lies inside a private mapping that `ram` keeps alive, and is made of whole
        // pages of it: regions begin and end on pages. Dropping them only changes what they read as.
        let failed = unsafe {
            libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::MADV_DONTNEED)
        } != 0;
        if failed {
            return Err(MemoryError::Drop(io::Error::last_os_error()));
        }
        slice.bitmap().mark_dirty(0, slice.len());
        next += count;
    }
    Ok(())
}

/// Host address of a region's first byte, as KVM wants it.
pub fn host_address(region: &<GuestRam as GuestMemoryBackend>::R) -> Result<u64, MemoryError> {
    Ok(region.get_host_address(MemoryRegionAddress(0))? as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn high_memory_begins_after_the_window() {
        let ram = allocate(5 * GIB).unwrap();
        assert_eq!(size_bytes(&ram), 5 * GIB);
        let last_low = MMIO_WINDOW_START / 4096 - 1;
        assert_eq!(chunk_address(&ram, last_low).unwrap().0, MMIO_WINDOW_START - 4096);
        assert_eq!(chunk_address(&ram, last_low + 1).unwrap().0, MMIO_WINDOW_END);
        assert!(chunk_address(&ram, chunk_count(&ram)).is_err());
        for index in [0, 1, last_low, last_low + 1, chunk_count(&ram) - 1] {
            let address = chunk_address(&ram, index).unwrap();
            assert_eq!(chunk_at(&ram, GuestAddress(address.0 + 4095)), Some(index));
        }
        assert_eq!(chunk_at(&ram, GuestAddress(MMIO_WINDOW_START)), None);
        assert!(check(&ram, 5 * GIB).is_ok());
        assert!(matches!(check(&ram, 4 * GIB), Err(MemoryError::WrongRegions { .. })));
    }

    fn base_file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn base_memory_is_mapped_at_its_offsets_and_stays_untouched() {
        let bytes = 4 * GIB;
        let file = base_file(bytes);
        let chunks = bytes / CHUNK_SIZE as u64;
        let last_low = MMIO_WINDOW_START / 4096 - 1;
        let marked = [0, 1, last_low, last_low + 1, chunks - 1];
        for index in marked {
            file.write_all_at(&[index as u8 | 1; CHUNK_SIZE], index * CHUNK_SIZE as u64).unwrap();
        }
        let ram = map_base(&file, bytes).unwrap();
        let mut chunk = [0; CHUNK_SIZE];
        for index in marked {
            read_chunk(&ram, index, &mut chunk).unwrap();
            assert_eq!(chunk, [index as u8 | 1; CHUNK_SIZE], "chunk {index}");
            write_chunk(&ram, index, &[9; CHUNK_SIZE]).unwrap();
            file.read_exact_at(&mut chunk, index * CHUNK_SIZE as u64).unwrap();
            assert_eq!(chunk, [index as u8 | 1; CHUNK_SIZE], "the base was written");
            drop_chunk(&ram, index).unwrap();
            read_chunk(&ram, index, &mut chunk).unwrap();
            assert_eq!(chunk, [index as u8 | 1; CHUNK_SIZE], "dropped is base again");
        }
    }

    /// What is zero in the base takes nothing of the page cache, and stays told from what is not.
    #[test]
    fn holes_of_base_memory_are_zeros_of_our_own() {
        let file = base_file(MIN_MEMORY_BYTES);
        let data = [0, 3, 1000, 4000];
        for index in data {
            file.write_all_at(&[7; CHUNK_SIZE], index * CHUNK_SIZE as u64).unwrap();
        }
        let found = holes(&FileOffset::new(file.try_clone().unwrap(), 0), MIN_MEMORY_BYTES);
        if found.is_empty() {
            return println!("skipped: this file system does not tell holes");
        }
        let page = |chunk: u64| chunk as usize * CHUNK_SIZE;
        assert!(found.iter().all(|hole| hole.len() >= 1 << 20));
        for index in data {
            assert!(!found.iter().any(|hole| hole.contains(&page(index))));
        }
        let blocks =
            |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks(&file);
        let ram = map_base(&file, MIN_MEMORY_BYTES).unwrap();
        let mut chunk = [1; CHUNK_SIZE];
        for index in 0..chunk_count(&ram) {
            read_chunk(&ram, index, &mut chunk).unwrap();
            assert_eq!(chunk, [if data.contains(&index) { 7 } else { 0 }; CHUNK_SIZE]);
        }
        write_chunk(&ram, 2000, &[5; CHUNK_SIZE]).unwrap();
        drop_chunk(&ram, 2000).unwrap();
        read_chunk(&ram, 2000, &mut chunk).unwrap();
        assert_eq!(chunk, [0; CHUNK_SIZE]);
        drop_chunks(&ram, 0..chunk_count(&ram)).unwrap();
        read_chunk(&ram, 1000, &mut chunk).unwrap();
        assert_eq!(chunk, [7; CHUNK_SIZE]);
        assert!(blocks(&file) <= before + 4 * (1 << 20) / 512, "holes were filled");
    }

    #[test]
    fn runs_are_dropped_across_the_window() {
        let ram = allocate(4 * GIB).unwrap();
        let first_high = MMIO_WINDOW_START / CHUNK_SIZE as u64;
        for index in first_high - 2..first_high + 2 {
            write_chunk(&ram, index, &[1; CHUNK_SIZE]).unwrap();
        }
        drop_chunks(&ram, first_high - 1..first_high + 1).unwrap();
        let mut chunk = [0; CHUNK_SIZE];
        let mut first_byte = |index| {
            read_chunk(&ram, index, &mut chunk).unwrap();
            chunk[0]
        };
        let now: Vec<u8> = (first_high - 2..first_high + 2).map(&mut first_byte).collect();
        assert_eq!(now, [1, 0, 0, 1]);
    }

    #[test]
    fn base_memory_of_another_size_is_refused() {
        for bytes in [MIN_MEMORY_BYTES - 4096, MIN_MEMORY_BYTES + 4096] {
            let refused = map_base(&base_file(bytes), MIN_MEMORY_BYTES).unwrap_err();
            assert!(matches!(refused, MemoryError::BaseSize { found, .. } if found == bytes));
        }
    }

    #[test]
    fn sizes_that_cannot_be() {
        for bytes in [0, MIN_MEMORY_BYTES - 4096, MIN_MEMORY_BYTES + 1, !4095] {
            assert!(matches!(allocate(bytes), Err(MemoryError::Size(b)) if b == bytes));
        }
    }

    #[test]
    fn chunks_in_and_out() {
        let ram = allocate(MIN_MEMORY_BYTES).unwrap();
        let mut chunk = [7; CHUNK_SIZE];
        write_chunk(&ram, 5, &chunk).unwrap();
        assert!(ram.iter().next().unwrap().get_mmap().bitmap().is_bit_set(5));
        chunk.fill(0);
        read_chunk(&ram, 5, &mut chunk).unwrap();
        assert_eq!(chunk, [7; CHUNK_SIZE]);
        drop_chunk(&ram, 5).unwrap();
        read_chunk(&ram, 5, &mut chunk).unwrap();
        assert_eq!(chunk, [0; CHUNK_SIZE]);
        assert!(write_chunk(&ram, chunk_count(&ram), &chunk).is_err());
        assert!(drop_chunks(&ram, 5..chunk_count(&ram) + 1).is_err());
    }
}
