//! Which pages of guest RAM are no longer what they began as: asked of the kernel's page tables.
//!
//! Of a private map of base memory a page that is still file-backed, or not there at all, is the
//! base's; only an anonymous one is the guest's own. Where RAM began as zeros only a page that
//! exists can be anything else. Both are the same question, so nothing needs to be tracked before a
//! handoff begins.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use guest_images::CHUNK_SIZE;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iowr_nr};

use crate::memory::{self, GuestRam, MemoryError};

/// One bit for each page of a region of RAM: whether it may differ from what it began as. Where that
/// cannot be found out, all may.
pub(crate) fn changed(
    region: &<GuestRam as GuestMemoryBackend>::R,
) -> Result<Vec<u64>, MemoryError> {
    changed_in(region, 0..region.len() / CHUNK_SIZE as u64)
}

/// The same for some pages of a region, counted within it: the first bit is that of the first.
pub(crate) fn changed_in(
    region: &<GuestRam as GuestMemoryBackend>::R,
    pages: Range<u64>,
) -> Result<Vec<u64>, MemoryError> {
    let address = memory::host_address(region)? + pages.start * CHUNK_SIZE as u64;
    let count = pages.end.saturating_sub(pages.start);
    Ok(ask(address, count).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read /proc/self/pagemap: all pages count as changed");
        let mut all = vec![0; words(count)];
        set_range(&mut all, 0, count);
        all
    }))
}

/// This process's page tables. Opened once: later some threads may open nothing any more.
fn own_pagemap() -> io::Result<&'static File> {
    static OPEN: OnceLock<File> = OnceLock::new();
    if let Some(file) = OPEN.get() {
        return Ok(file);
    }
    let file = File::open("/proc/self/pagemap")?;
    Ok(OPEN.get_or_init(|| file))
}

/// Opens what [`changed`] asks, before threads that will ask are confined. A failure is told when
/// it is asked.
pub(crate) fn open() {
    let _ = own_pagemap();
}

fn words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// Asks in the way that this kernel has: found out by trying once.
fn ask(address: u64, pages: u64) -> io::Result<Vec<u64>> {
    static NO_SCAN: AtomicBool = AtomicBool::new(false);
    let pagemap = own_pagemap()?;
    if !NO_SCAN.load(Ordering::Relaxed) {
        match scan(pagemap, address, pages) {
            Ok(changed) => return Ok(changed),
            Err(error) => {
                tracing::debug!(%error, "no PAGEMAP_SCAN here: reading /proc/self/pagemap");
                NO_SCAN.store(true, Ordering::Relaxed);
            }
        }
    }
    read(pagemap, address, pages)
}

// Of linux/fs.h, since 6.7.
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// `struct page_region`: pages next to each other that are alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArgument);

/// The kernel walks the page tables and names only what is asked for: the cost follows what has
/// changed, not the size of RAM.
fn scan(pagemap: &File, address: u64, pages: u64) -> io::Result<Vec<u64>> {
    const REGIONS: usize = 1024;
    let mut found = [PageRegion::default(); REGIONS];
    let mut changed = vec![0; words(pages)];
    let page = CHUNK_SIZE as u64;
    // A page that began as zero and was only read has the kernel's one page of zeros.
    let not = PAGE_IS_FILE | PAGE_IS_PFNZERO;
    let (mut start, end) = (address, address + pages * page);
    while start < end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end,
            vec: found.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: not,
            category_mask: not,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: not,
            ..ScanArgument::default()
        };
        // SAFETY: the request is the one that takes this argument; `vec` points to `vec_len` regions
        // that live until the call returns, and nothing else refers to them meanwhile.
        let count = unsafe { ioctl_with_mut_ref(pagemap, PAGEMAP_SCAN(), &mut argument) };
        let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
        for region in found.iter().take(count) {
            let first = region.start.max(address) - address;
            let last = region.end.min(end).saturating_sub(address);
            set_range(&mut changed, first / page, last / page);
        }
        if argument.walk_end <= start {
            return Err(io::Error::other("PAGEMAP_SCAN goes no further"));
        }
        start = argument.walk_end;
    }
    Ok(changed)
}

/// Sets the bits from `first` up to but not including `end`.
pub(crate) fn set_range(words: &mut [u64], first: u64, end: u64) {
    let mut at = first;
    while at < end {
        let (word, bit) = ((at / 64) as usize, at % 64);
        let count = (64 - bit).min(end - at);
        let ones = if count == 64 { u64::MAX } else { (1 << count) - 1 };
        if let Some(word) = words.get_mut(word) {
            *word |= ones << bit;
        }
        at += count;
    }
}

/// The runs of ones in a bitmap, ascending.
pub(crate) fn runs(words: &[u64]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for (at, word) in (0u64..).zip(words) {
        let mut left = *word;
        while left != 0 {
            let from = left.trailing_zeros();
            let len = (left >> from).trailing_ones();
            let start = at * 64 + u64::from(from);
            let end = start + u64::from(len);
            match out.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => out.push(start..end),
            }
            // Both shifts stay below 64, for a full word too.
            left &= !((u64::MAX >> (64 - len)) << from);
        }
    }
    out
}

/// One entry for each page, whether anything is there or not.
fn read(pagemap: &File, address: u64, pages: u64) -> io::Result<Vec<u64>> {
    const ENTRY_BYTES: usize = 8;
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    /// Of a file, or shared.
    const FILE: u64 = 1 << 61;
    const BATCH_PAGES: usize = 64 * 1024;
    let is_changed = |entry: u64| entry & PRESENT_OR_SWAPPED != 0 && entry & FILE == 0;
    let mut words = Vec::with_capacity(words(pages));
    let mut batch = vec![0; BATCH_PAGES.min(pages as usize) * ENTRY_BYTES];
    let first = address / CHUNK_SIZE as u64;
    for at in (0..pages).step_by(BATCH_PAGES) {
        let count = BATCH_PAGES.min((pages - at) as usize);
        let Some(bytes) = batch.get_mut(..count * ENTRY_BYTES) else { break };
        pagemap.read_exact_at(bytes, (first + at) * ENTRY_BYTES as u64)?;
        for entries in bytes.chunks(64 * ENTRY_BYTES) {
            let changed = |(bit, entry): (usize, &[u8])| {
                let entry = entry.try_into().map_or(u64::MAX, u64::from_le_bytes);
                u64::from(is_changed(entry)) << bit
            };
            words.push(entries.chunks(ENTRY_BYTES).enumerate().map(changed).sum());
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use guest_images::Chunk;
    use proptest::prelude::*;
    use vm_memory::GuestMemoryBackend;

    use crate::{layout::MIN_MEMORY_BYTES, memory};

    use super::*;

    #[test]
    fn runs_of_ones() {
        assert!(runs(&[0, 0]).is_empty());
        assert_eq!(runs(&[u64::MAX, 1, 1 << 1]), [0..65, 129..130]);
        assert_eq!(runs(&[0b1011, 0, 1 << 63, 1 | 1 << 63]), [0..2, 3..4, 191..193, 255..256]);
    }

    const PAGES: u64 = MIN_MEMORY_BYTES / CHUNK_SIZE as u64;

    /// Data in every third page, and a hole from the middle on.
    fn base() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MEMORY_BYTES).unwrap();
        for page in (0..PAGES / 2).step_by(3) {
            file.write_all_at(&[5; CHUNK_SIZE], page * CHUNK_SIZE as u64).unwrap();
        }
        file
    }

    fn set_of(words: &[u64]) -> BTreeSet<u64> {
        (0..PAGES).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1).collect()
    }

    /// Both ways of asking: which pages were changed, and which of these were only read. The scan does
    /// not count those.
    fn both_ways(ram: &GuestRam) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let address = memory::host_address(ram.iter().next().unwrap()).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let plain = set_of(&read(&pagemap, address, PAGES).unwrap());
        match scan(&pagemap, address, PAGES) {
            Ok(scanned) => {
                let scanned = set_of(&scanned);
                assert!(scanned.is_subset(&plain));
                let only_read = plain.difference(&scanned).copied().collect();
                (scanned, only_read)
            }
            Err(error) => {
                println!("no PAGEMAP_SCAN: {error}");
                (plain, BTreeSet::new())
            }
        }
    }

    #[test]
    fn pages_never_touched_are_unchanged() {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        memory::write_chunk(&ram, 3, &[1; CHUNK_SIZE]).unwrap();
        let (changed, _) = both_ways(&ram);
        assert!(changed.contains(&3));
        assert!(!changed.contains(&(PAGES - 1)));
        let words = super::changed(ram.iter().next().unwrap()).unwrap();
        assert_eq!(set_of(&words), changed);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read(u64),
        Write(u64),
        WriteRun(u64, u64),
        Drop(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..PAGES).prop_map(Step::Read),
            (0..PAGES).prop_map(Step::Write),
            ((0..PAGES), 1..200u64).prop_map(|(at, len)| Step::WriteRun(at, len)),
            (0..PAGES).prop_map(Step::Drop),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Of base memory exactly the pages that were written and not dropped since.
        #[test]
        fn of_base_memory_what_was_written(steps in prop::collection::vec(step(), 1..80)) {
            let ram = memory::map_base(&base(), MIN_MEMORY_BYTES).unwrap();
            let (mut written, mut read) = (BTreeSet::new(), BTreeSet::new());
            let mut chunk: Chunk = [0; CHUNK_SIZE];
            for step in steps {
                match step {
                    Step::Read(page) => {
                        memory::read_chunk(&ram, page, &mut chunk).unwrap();
                        read.insert(page);
                    }
                    Step::Write(page) => {
                        // The same content is a write all the same.
                        memory::read_chunk(&ram, page, &mut chunk).unwrap();
                        memory::write_chunk(&ram, page, &chunk).unwrap();
                        written.insert(page);
                    }
                    Step::WriteRun(at, len) => {
                        for page in at..(at + len).min(PAGES) {
                            memory::write_chunk(&ram, page, &[1; CHUNK_SIZE]).unwrap();
                            written.insert(page);
                        }
                    }
                    Step::Drop(page) => {
                        memory::drop_chunk(&ram, page).unwrap();
                        written.remove(&page);
                    }
                }
            }
            let (mut changed, only_read) = both_ways(&ram);
            prop_assert!(only_read.is_subset(&read));
            // Where the kernel has no scan, zeros that were only read count too.
            changed.retain(|page| written.contains(page) || !read.contains(page));
            prop_assert_eq!(changed, written);
        }
    }

    #[test]
    fn ranges_of_bits() {
        let mut words = [0; 3];
        set_range(&mut words, 62, 130);
        assert_eq!(words, [0b11 << 62, u64::MAX, 0b11]);
        set_range(&mut words, 5, 5);
        set_range(&mut words, 190, 400);
        assert_eq!(words, [0b11 << 62, u64::MAX, 0b11 | 0b11 << 62]);
    }
}
