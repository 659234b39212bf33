//! Giving pages back to the host.

use std::io;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions, bitmap::Bitmap};

use crate::{devices::virtio::buffers::Buffers, memory::GuestRam};

/// Gives the pages that lie wholly inside `buffers` back to the host and marks them dirty; returns
/// how many bytes that were. They then read as what RAM is mapped from: zeros, or base memory.
///
/// The caller knows that the guest does not care for their content and is not using them.
pub(super) fn discard(ram: &GuestRam, buffers: &Buffers) -> Result<u64, GuestMemoryError> {
    let mut discarded = 0;
    for piece in buffers.whole_pages() {
        let len = (piece.end - piece.start) as usize;
        for slice in ram.get_slices(GuestAddress(piece.start), len, Permissions::ReadWrite)? {
            let slice = slice?;
            // SAFETY: the slice lies inside a private mapping that `ram` keeps alive and is made of
            // whole pages of it: the piece is, and regions begin and end on pages. Dropping private
            // pages changes what they read as, which the guest may do at any time too.
            let failed = unsafe {
                let start = slice.ptr_guard_mut().as_ptr().cast();
                libc::madvise(start, slice.len(), libc::MADV_DONTNEED)
            } != 0;
            if failed {
                // No harm: the pages keep their content. Some of them may be gone nonetheless.
                let error = io::Error::last_os_error();
                tracing::warn!(%error, bytes = slice.len(), "cannot give free pages back");
            } else {
                discarded += slice.len() as u64;
            }
            // After the content changed: a mark that was harvested before would be lost with it.
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
    Ok(discarded)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::{devices::virtio::buffers::Buffer, layout::MIN_MEMORY_BYTES, memory, pagemap};

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
    }
}
