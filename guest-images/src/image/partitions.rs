//! Partition tables: GPT, and MBR with its logical partitions left out.

use std::io;

use super::{ReadAt, le};

const SECTOR: u64 = 512;
/// Entries of a GPT that are looked at.
const MAX_ENTRIES: u64 = 256;
const GPT_MAGIC: &[u8; 8] = b"EFI PART";
const GPT_ENTRY_BYTES: std::ops::RangeInclusive<u64> = 128..=4096;
/// What an MBR says of a disk that has a GPT.
const PROTECTIVE: u8 = 0xee;

/// A stretch of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1: that of `/dev/vda1`.
    pub number: u32,
    /// Where it begins.
    pub at: u64,
    /// How long it is.
    pub bytes: u64,
    /// What `root=PARTUUID=` calls it.
    pub uuid: String,
}

/// The partitions of a disk, in order of their numbers; none if there is no table. What lies beyond the end of
/// the disk is left out.
pub fn partitions(disk: &impl ReadAt) -> io::Result<Vec<Partition>> {
    let mut mbr = [0; SECTOR as usize];
    if disk.len() < 2 * SECTOR {
        return Ok(Vec::new());
    }
    disk.read_exact_at(&mut mbr, 0)?;
    if !mbr.ends_with(&[0x55, 0xaa]) {
        return Ok(Vec::new());
    }
    let rows: Vec<&[u8]> = mbr.get(446..510).unwrap_or_default().chunks(16).collect();
    let mut found = if rows.iter().any(|row| row.get(4) == Some(&PROTECTIVE)) {
        gpt(disk)?
    } else {
        let disk_id = le(&mbr, 440, 4);
        (1..).zip(rows).filter_map(|(number, row)| of_mbr(number, row, disk_id)).collect()
    };
    found.retain(|part: &Partition| part.at.saturating_add(part.bytes) <= disk.len());
    Ok(found)
}

/// One of the four rows of an MBR. An extended partition holds others, which nothing boots from.
fn of_mbr(number: u32, row: &[u8], disk_id: u64) -> Option<Partition> {
    let (kind, first, count) = (*row.get(4)?, le(row, 8, 4), le(row, 12, 4));
    if matches!(kind, 0 | 0x05 | 0x0f | 0x85) || first == 0 || count == 0 {
        return None;
    }
    let uuid = format!("{disk_id:08x}-{number:02x}");
    Some(Partition { number, at: first * SECTOR, bytes: count * SECTOR, uuid })
}

/// The entries of a GPT. Its checksums tell damage, not lies; an image with a damaged table is not booted by
/// anything, and is refused by what is not found in it.
fn gpt(disk: &impl ReadAt) -> io::Result<Vec<Partition>> {
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, SECTOR)?;
    let (at, count, size) = (le(&header, 72, 8), le(&header, 80, 4), le(&header, 84, 4));
    if !header.starts_with(GPT_MAGIC) || !GPT_ENTRY_BYTES.contains(&size) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut entry = [0; 128];
    for number in 0..count.min(MAX_ENTRIES) {
        let offset = at.checked_mul(SECTOR).and_then(|at| at.checked_add(number * size));
        let Some(offset) = offset.filter(|at| at.saturating_add(size) <= disk.len()) else { break };
        disk.read_exact_at(&mut entry, offset)?;
        let (first, last) = (le(&entry, 32, 8), le(&entry, 40, 8));
        let is_empty = entry.iter().take(16).all(|byte| *byte == 0);
        let bytes =
            last.checked_sub(first).and_then(|more| more.checked_add(1)?.checked_mul(SECTOR));
        let start = first.checked_mul(SECTOR).filter(|_| !is_empty && first > 1);
        if let Some((at, bytes)) = start.zip(bytes) {
            found.push(Partition { number: number as u32 + 1, at, bytes, uuid: guid(&entry, 16) });
        }
    }
    Ok(found)
}

/// A GUID as text: three little-endian numbers, then bytes.
fn guid(bytes: &[u8], at: usize) -> String {
    let tail = |from: usize, to: usize| hex::encode(bytes.get(at + from..at + to).unwrap_or(&[]));
    let (a, b, c) = (le(bytes, at, 4), le(bytes, at + 4, 2), le(bytes, at + 6, 2));
    format!("{a:08x}-{b:04x}-{c:04x}-{}-{}", tail(8, 10), tail(10, 16))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mbr(rows: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut disk = vec![0; 64 * 512];
        disk[440..444].copy_from_slice(&0xdead_beef_u32.to_le_bytes());
        for (n, (kind, first, count)) in rows.iter().enumerate() {
            let row = 446 + 16 * n;
            disk[row + 4] = *kind;
            disk[row + 8..row + 12].copy_from_slice(&first.to_le_bytes());
            disk[row + 12..row + 16].copy_from_slice(&count.to_le_bytes());
        }
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk
    }

    #[test]
    fn an_mbr_is_read() {
        let disk = mbr(&[(0x83, 8, 16), (0x05, 30, 4), (0x83, 40, 100), (0x82, 40, 8)]);
        let found = partitions(&disk.as_slice()).unwrap();
        let numbers: Vec<_> = found.iter().map(|part| (part.number, part.at, part.bytes)).collect();
        assert_eq!(numbers, [(1, 4096, 8192), (4, 40 * 512, 4096)]);
        assert_eq!(found[0].uuid, "deadbeef-01");
        assert_eq!(partitions(&[0u8; 4096].as_slice()).unwrap(), []);
        assert_eq!(partitions(&[0u8; 10].as_slice()).unwrap(), []);
    }

    #[test]
    fn a_gpt_is_read() {
        let mut disk = mbr(&[(PROTECTIVE, 1, 63)]);
        disk[512..520].copy_from_slice(GPT_MAGIC);
        disk[584..592].copy_from_slice(&2u64.to_le_bytes());
        disk[592..596].copy_from_slice(&128u32.to_le_bytes());
        disk[596..600].copy_from_slice(&128u32.to_le_bytes());
        // The fourteenth alone: numbers are places in the table.
        let entry = 2 * 512 + 13 * 128;
        disk[entry] = 1;
        for n in 0..16 {
            disk[entry + 16 + n] = n as u8;
        }
        disk[entry + 32..entry + 40].copy_from_slice(&40u64.to_le_bytes());
        disk[entry + 40..entry + 48].copy_from_slice(&47u64.to_le_bytes());
        let uuid = "03020100-0504-0706-0809-0a0b0c0d0e0f".to_owned();
        let expected = Partition { number: 14, at: 40 * 512, bytes: 8 * 512, uuid };
        assert_eq!(partitions(&disk.as_slice()).unwrap(), [expected]);
        // One that goes beyond the disk is left out.
        disk[entry + 40] = 200;
        assert_eq!(partitions(&disk.as_slice()).unwrap(), []);
    }

    proptest! {
        #[test]
        fn nothing_in_a_table_panics(
            mut disk in prop::collection::vec(any::<u8>(), 1024..6000),
            gpt in any::<bool>(),
            at in 0u64..12,
        ) {
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            if gpt {
                disk[450] = PROTECTIVE;
                disk[512..520].copy_from_slice(GPT_MAGIC);
                disk[584..592].copy_from_slice(&at.to_le_bytes());
                disk[596..600].copy_from_slice(&128u32.to_le_bytes());
            }
            let bytes = disk.len() as u64;
            for part in partitions(&disk.as_slice()).unwrap() {
                prop_assert!(part.at + part.bytes <= bytes);
            }
        }
    }
}
