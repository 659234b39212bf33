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
