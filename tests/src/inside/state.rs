//! The whole state of a paused guest, read from outside of howdah, for the offline encoder.
//!
//! RAM is read through the memory of the VM's process, where it is a private map of the base's
//! memory; the disk is exported. Neither passes through what a handoff is made of. Only pages that are
//! the process's own are read: the others are the base's by what a private map is, and reading one
//! would make it present, and so one more to look at for the handoff back.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::product::{Cloudlet, VM};
use crate::encode::{CHUNK, Encoded, Encoder, encode_file, read_up_to};

/// Parts of a base in which a handoff looks for equal chunks.
const PARTS: [&str; 4] = ["disk.raw", "kernel", "initramfs", "memory.raw"];
const MEMORY: &str = "memory.raw";
/// How much of RAM is read at once.
const PIECE: usize = 1 << 20;

/// Pauses the guest, lets the encoder see all of it, and lets it go on.
pub(crate) fn encode(cloudlet: &Cloudlet, work: &Path) -> Result<Encoded> {
    cloudlet.howdah(&["vm", "pause", VM])?;
    let encoded = encode_paused(cloudlet, work);
    cloudlet.howdah(&["vm", "resume", VM])?;
    encoded
}

fn encode_paused(cloudlet: &Cloudlet, work: &Path) -> Result<Encoded> {
    let base = base_with_memory(&cloudlet.home)?;
    let parts: Vec<PathBuf> =
        PARTS.iter().map(|part| base.join(part)).filter(|part| part.exists()).collect();
    let mut encoder = Encoder::new(&parts)?;
    let pid = fs::read_to_string(cloudlet.home.join("vms").join(VM).join("lock"))
        .context("the VM has no lock file")?;
    encode_ram(&mut encoder, pid.trim(), &base.join(MEMORY))?;
    let disk = work.join("encoded-disk.raw");
    cloudlet.howdah(&["vm", "export-disk", VM, &disk.to_string_lossy()])?;
    let encoded = encode_file(&mut encoder, &disk, Some(&base.join("disk.raw")));
    // It takes much of the lab host's memory.
    fs::remove_file(&disk)?;
    encoded?;
    encoder.finish()
}

/// The only base with memory in a cloudlet's store.
fn base_with_memory(home: &Path) -> Result<PathBuf> {
    let bases = home.join("store/bases");
    let entries =
        fs::read_dir(&bases).with_context(|| format!("cannot list {}", bases.display()))?;
    let dirs = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
    let mut with_memory = dirs?.into_iter().filter(|dir| dir.join(MEMORY).exists());
    match (with_memory.next(), with_memory.next()) {
        (Some(base), None) => Ok(base),
        (None, _) => bail!("no base with memory in {}", bases.display()),
        _ => bail!("more than one base with memory in {}", bases.display()),
    }
}

fn encode_ram(encoder: &mut Encoder, pid: &str, base_memory: &Path) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .with_context(|| format!("process {pid} of the VM is gone"))?;
    let memory = File::open(format!("/proc/{pid}/mem")).context("cannot read the VM's memory")?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("cannot read page tables")?;
    let before = File::open(base_memory)?;
    let size = before.metadata()?.len();
    let maps = guest_maps(&maps, size);
    let mapped: u64 = maps.iter().map(|map| map.bytes).sum();
    if mapped != size {
        bail!("{mapped} bytes of guest RAM are mapped from base memory, which has {size}");
    }
    let (mut now, mut old) = (vec![0; PIECE], vec![0; PIECE]);
    for map in maps {
        for piece in (0..map.bytes).step_by(PIECE) {
            let bytes = (map.bytes - piece).min(PIECE as u64);
            for own in own_pages(&pagemap, map.address + piece, bytes)? {
                let (at, length) = (piece + own.start, (own.end - own.start) as usize);
                let (now, old) = (&mut now[..length], &mut old[..length]);
                let places = [(&memory, &mut *now, map.address), (&before, &mut *old, map.offset)];
                for (file, into, start) in places {
                    if read_up_to(file, into, start + at)? != length {
                        bail!("guest RAM at {:#x} cannot be read", map.address + at);
                    }
                }
                encoder.take_changed(now, old)?;
            }
        }
    }
    Ok(())
}

/// Which bytes from `address` on are in pages of the process's own: present or swapped, and of no file.
fn own_pages(pagemap: &File, address: u64, bytes: u64) -> Result<Vec<Range<u64>>> {
    const ENTRY_BYTES: u64 = 8;
    let page = CHUNK as u64;
    let mut entries = vec![0; (bytes / page * ENTRY_BYTES) as usize];
    pagemap
        .read_exact_at(&mut entries, address / page * ENTRY_BYTES)
        .context("cannot read the VM's page tables")?;
    let entries = entries.chunks_exact(ENTRY_BYTES as usize);
    let entries = entries.map(|entry| entry.try_into().map_or(u64::MAX, u64::from_le_bytes));
    Ok(runs_of_own(entries))
}

fn runs_of_own(entries: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    const FILE: u64 = 1 << 61;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (at, entry) in (0..).step_by(CHUNK).zip(entries) {
        if entry & PRESENT_OR_SWAPPED == 0 || entry & FILE != 0 {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == at => last.end += CHUNK as u64,
            _ => runs.push(at..at + CHUNK as u64),
        }
    }
    runs
}

/// A piece of guest RAM in the VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GuestMap {
    address: u64,
    bytes: u64,
    /// Where it is in the base's memory.
    offset: u64,
}

/// Guest RAM: writable private maps of base memory, and the anonymous ones right behind them, which
/// stand where the base's memory is a hole. `size` is that of the base's memory.
fn guest_maps(maps: &str, size: u64) -> Vec<GuestMap> {
    let mut found: Vec<GuestMap> = Vec::new();
    for map in maps.lines().filter_map(parse_map) {
        let last = found.last().map(|last| (last.address + last.bytes, last.offset + last.bytes));
        match (map.name, last) {
            (Some(name), _) if Path::new(name).file_name().is_some_and(|name| name == MEMORY) => {
                found.push(map.guest);
            }
            // The kernel may have joined it with what is behind.
            (None, Some((address, offset))) if address == map.guest.address && offset < size => {
                let bytes = map.guest.bytes.min(size - offset);
                found.push(GuestMap { bytes, offset, ..map.guest });
            }
            _ => {}
        }
    }
    found
}

/// A writable private map.
struct PrivateMap<'a> {
    guest: GuestMap,
    /// The file; none if it is anonymous.
    name: Option<&'a str>,
}

fn parse_map(line: &str) -> Option<PrivateMap<'_>> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let (rights, offset) = (words.next()?, words.next()?);
    let name = words.nth(2);
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (address, end) = (hex(from)?, hex(to)?);
    let guest = GuestMap { address, bytes: end.checked_sub(address)?, offset: hex(offset)? };
    (rights.starts_with("rw") && rights.ends_with('p')).then_some(PrivateMap { guest, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_its_own_are_those_that_are_there_and_of_no_file() {
        let (present, swapped, file) = (1 << 63, 1 << 62, 1 << 61);
        let entries = [0, present, swapped | 5, present | file, file, present | 7, 0];
        let page = CHUNK as u64;
        assert_eq!(runs_of_own(entries.into_iter()), [page..3 * page, 5 * page..6 * page]);
    }

    #[test]
    fn guest_ram_is_the_private_map_of_base_memory() {
        let maps = "\
7f0000000000-7f0030000000 rw-p 00000000 00:15 77   /a/store/bases/ff/memory.raw
7f0030000000-7f0038000000 rw-p 00000000 00:00 0 
7f0038000000-7f0040000000 rw-p 38000000 00:15 77   /a/store/bases/ff/memory.raw
7f0050000000-7f0090000000 r--s 00000000 00:15 77   /a/store/bases/ff/memory.raw
7f00a0000000-7f00a0001000 rw-p 40000000 00:15 77   /a/store/bases/ff/memory.raw (deleted)
7f00a0001000-7f00a0009000 rw-p 00000000 00:00 0 
7f00b0000000-7f00b0001000 rw-p 00000000 00:15 78   /a/store/bases/ff/disk.raw
7f00c0000000-7f00c0001000 rw-p 00000000 00:00 0 ";
        let found = guest_maps(maps, 0x4000_3000);
        assert_eq!(found.len(), 5);
        assert_eq!((found[1].bytes, found[1].offset), (0x800_0000, 0x3000_0000));
        assert_eq!((found[3].address, found[3].offset), (0x7f00_a000_0000, 1 << 30));
        assert_eq!((found[4].bytes, found[4].offset), (0x2000, 0x4000_1000));
        assert_eq!(found.iter().map(|map| map.bytes).sum::<u64>(), 0x4000_3000);
    }
}
