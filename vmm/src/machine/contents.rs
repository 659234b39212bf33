//! What RAM holds, without touching what certainly is zero.

use guest_images::{CHUNK_SIZE, Chunk, chunk::is_zero, data_extent};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::MachineError;
use crate::{
    memory::{self, GuestRam},
    pagemap,
};

/// Calls `each` with every chunk of RAM that is not zero, in order. `chunk` is room for one.
///
/// Looked at is what the guest has changed, and where the base's memory file has data: the cost
/// follows what RAM holds, not its size.
pub(super) fn for_each(
    ram: &GuestRam,
    chunk: &mut Chunk,
    mut each: impl FnMut(u64, &Chunk) -> Result<(), MachineError>,
) -> Result<(), MachineError> {
    let mut first = 0;
    for region in ram.iter() {
        let mut present = pagemap::changed(region)?;
        if let Some(base) = region.file_offset() {
            let (mut at, end) = (base.start(), base.start() + region.len());
            while let Some((start, stop)) = data_extent(base.file(), at, end) {
                let page = |offset: u64| (offset - base.start()) / CHUNK_SIZE as u64;
                pagemap::set_range(&mut present, page(start), page(stop + CHUNK_SIZE as u64 - 1));
                at = stop;
            }
        }
        for (word, mut bits) in (0..).zip(present) {
            while bits != 0 {
                let at = word * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if at >= region.len() / CHUNK_SIZE as u64 {
                    break;
                }
                memory::read_chunk(ram, first + at, chunk)?;
                if !is_zero(chunk) {
                    each(first + at, chunk)?;
                }
            }
        }
        first += region.len() / CHUNK_SIZE as u64;
    }
    Ok(())
}
