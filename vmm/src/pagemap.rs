//! Which pages of guest RAM exist at all: /proc/self/pagemap.

use std::{fs::File, io, os::unix::fs::FileExt};

use guest_images::CHUNK_SIZE;

/// One bit for each page of a private mapping of this process: whether it exists, in memory or
/// swapped out. One that does not has never been written, so it is zero. Where that cannot be
/// found out, all exist.
pub(crate) fn existing(host_address: u64, pages: u64) -> Vec<u64> {
    read(host_address, pages).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read /proc/self/pagemap: all of RAM counts as written");
        vec![u64::MAX; pages.div_ceil(64) as usize]
    })
}

fn read(host_address: u64, pages: u64) -> io::Result<Vec<u64>> {
    const ENTRY_BYTES: usize = 8;
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    const BATCH_PAGES: usize = 64 * 1024;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut words = Vec::with_capacity(pages.div_ceil(64) as usize);
    let mut batch = vec![0; BATCH_PAGES.min(pages as usize) * ENTRY_BYTES];
    let first = host_address / CHUNK_SIZE as u64;
    for at in (0..pages).step_by(BATCH_PAGES) {
        let count = BATCH_PAGES.min((pages - at) as usize);
        let Some(bytes) = batch.get_mut(..count * ENTRY_BYTES) else { break };
        pagemap.read_exact_at(bytes, (first + at) * ENTRY_BYTES as u64)?;
        for entries in bytes.chunks(64 * ENTRY_BYTES) {
            let present = |(bit, entry): (usize, &[u8])| {
                let entry = entry.try_into().map_or(u64::MAX, u64::from_le_bytes);
                u64::from(entry & PRESENT_OR_SWAPPED != 0) << bit
            };
            words.push(entries.chunks(ENTRY_BYTES).enumerate().map(present).sum());
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use crate::{layout::MIN_MEMORY_BYTES, memory};

    use super::*;

    #[test]
    fn pages_never_touched_do_not_exist() {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        memory::write_chunk(&ram, 3, &[1; CHUNK_SIZE]).unwrap();
        let region = ram.iter().next().unwrap();
        let pages = MIN_MEMORY_BYTES / CHUNK_SIZE as u64;
        let words = read(memory::host_address(region).unwrap(), pages).unwrap();
        assert_eq!(words.len() as u64, pages.div_ceil(64));
        assert_ne!(words[0] & 1 << 3, 0);
        assert_eq!(*words.last().unwrap(), 0);
    }
}
