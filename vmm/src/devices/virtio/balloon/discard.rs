//! Giving pages back to the host.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use crate::{
    devices::virtio::buffers::Buffers,
    memory::{self, GuestRam, MemoryError},
    pagemap,
};

const PAGE: u64 = guest_images::CHUNK_SIZE as u64;

/// Gives the pages that lie wholly inside `buffers` back to the host and marks them dirty; returns
/// how many bytes that were. They then read as what RAM is mapped from: zeros, or base memory.
///
/// Pages that read so already are left alone, and not marked: Linux reports a free block again
/// whenever a neighbour becomes free, and a handoff would look at all of it.
///
/// The caller knows that the guest does not care for their content and is not using them.
pub(super) fn discard(ram: &GuestRam, buffers: &Buffers) -> Result<u64, MemoryError> {
    let mut discarded = 0;
    for piece in buffers.whole_pages() {
        let mut at = piece.start;
        while let Some(region) = ram.find_region(GuestAddress(at)).filter(|_| at < piece.end) {
            let offset = at - region.start_addr().0;
            let end = (offset + piece.end - at).min(region.len());
            let changed = pagemap::changed_in(region, offset / PAGE..end / PAGE)?;
            for run in pagemap::runs(&changed) {
                let from = at + run.start * PAGE;
                discarded += discard_run(ram, GuestAddress(from), run.end - run.start)?;
            }
            at += end - offset;
        }
    }
    Ok(discarded)
}

fn discard_run(ram: &GuestRam, at: GuestAddress, pages: u64) -> Result<u64, MemoryError> {
    let Some(first) = memory::chunk_at(ram, at) else { return Ok(0) };
    // Marks after it has dropped: a mark that was harvested before would be lost with it.
    match memory::drop_chunks(ram, first..first + pages) {
        Ok(()) => Ok(pages * PAGE),
        Err(error) => {
            // No harm: they keep their content, or some do.
            tracing::warn!(%error, pages, "cannot give free pages back");
            let slice = ram.get_slice(at, (pages * PAGE) as usize)?;
            slice.bitmap().mark_dirty(0, slice.len());
            Ok(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::{devices::virtio::buffers::Buffer, layout::MIN_MEMORY_BYTES};

    /// Of RAM that is a map of base memory, what is discarded is base again: it needs no sending.
    #[test]
    fn what_is_discarded_is_base_again() {
        let base = tempfile::tempfile().unwrap();
        base.set_len(MIN_MEMORY_BYTES).unwrap();
        base.write_all_at(&[7; 8192], 0x10_0000).unwrap();
        let ram = memory::map_base(&base, MIN_MEMORY_BYTES).unwrap();
        let at = GuestAddress(0x10_0000);
        ram.write_slice(&[9; 8192], at).unwrap();
        let region = ram.iter().next().unwrap();
        region.get_mmap().bitmap().reset();
        let mut pages = Buffers::default();
        pages.push(Buffer { address: at, len: 4096 });
        assert_eq!(discard(&ram, &pages).unwrap(), 4096);
        let mut now = [0; 8192];
        ram.read_slice(&mut now, at).unwrap();
        assert_eq!((now[0], now[4095], now[4096]), (7, 7, 9));
        let dirty = [0x100, 0x101].map(|page| region.bitmap().dirty_at(page * 4096));
        assert_eq!(dirty, [true, false]);
        assert_eq!(pagemap::changed(region).unwrap()[4] & 0b11, 0b10);
        // What is base already is left alone.
        region.get_mmap().bitmap().reset();
        assert_eq!(discard(&ram, &pages).unwrap(), 0);
        assert!(!region.bitmap().dirty_at(0x10_0000));
    }
}
