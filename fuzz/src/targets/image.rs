//! Disk images that an operator fetched somewhere: qcow2, and what boots a raw disk.
//!
//! Any bytes are read or refused, in bounded memory; what is read of a qcow2 file is as long as it says, and a
//! small file is never much on disk. A disk is its beginning (boot sector, partition table, superblock, inodes)
//! as the input has it.

use std::fs::File;

use guest_images::image::{boot, qcow2::Qcow2};

use super::{Origin, Target};
use crate::scratch::Scratch;

pub(super) const QCOW2: Target =
    Target { name: "qcow2", from: Origin::File, run: unpack, seeds: images, max_len: 32 << 10 };
pub(super) const DISK: Target =
    Target { name: "disk", from: Origin::File, run: look, seeds: disks, max_len: 96 << 10 };

/// Larger disks are not unpacked here: a sparse file is quickly made, but this is tried often.
const MAX_DISK_BYTES: u64 = 16 << 20;
const CLUSTER: usize = 4096;
const SECTOR: usize = 512;

fn unpack(data: &[u8]) -> bool {
    let Ok(image) = Qcow2::open(data) else { return false };
    let bytes = image.disk_bytes();
    if bytes > MAX_DISK_BYTES {
        return false;
    }
    let scratch = Scratch::new();
    let path = scratch.file("disk", b"");
    let to = File::options().read(true).write(true).open(&path).expect("a scratch file");
    let mut done = 0;
    let unpacked = image.write_raw(&to, &mut |now| {
        assert!(now >= done && now <= bytes, "progress goes forward");
        done = now;
    });
    let length = to.metadata().expect("a scratch file").len();
    assert_eq!(length, bytes, "a disk is as long as its image says");
    if unpacked.is_ok() {
        assert_eq!(done, bytes, "all of it was looked at");
    }
    unpacked.is_ok()
}

fn look(data: &[u8]) -> bool {
    let scratch = Scratch::new();
    let disk = File::open(scratch.file("disk", data)).expect("a scratch file");
    match boot::find(&disk) {
        Ok(boot) => {
            assert!(boot.cmdline.len() <= 2047 && !boot.cmdline.contains(char::is_control));
            true
        }
        Err(error) => {
            assert!(!matches!(error, boot::BootError::Damaged), "nothing panics: {error}");
            false
        }
    }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Two clusters, one of them of zeros; the first plain or compressed.
fn image(compressed: Option<u8>) -> Vec<u8> {
    let mut file = vec![0; 4 * CLUSTER];
    put(&mut file, 0, b"QFI\xfb");
    put(&mut file, 4, &3u32.to_be_bytes());
    put(&mut file, 20, &12u32.to_be_bytes());
    put(&mut file, 24, &(2 * CLUSTER as u64).to_be_bytes());
    put(&mut file, 36, &1u32.to_be_bytes());
    put(&mut file, 40, &(CLUSTER as u64).to_be_bytes());
    put(&mut file, 100, &112u32.to_be_bytes());
    put(&mut file, CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(&mut file, 2 * CLUSTER, &(3 * CLUSTER as u64).to_be_bytes());
    put(&mut file, 2 * CLUSTER + 8, &1u64.to_be_bytes());
    file[3 * CLUSTER..].fill(7);
    let Some(codec) = compressed else { return file };
    put(&mut file, 2 * CLUSTER, &((1 << 62) | (3 * CLUSTER as u64)).to_be_bytes());
    if codec == 1 {
        put(&mut file, 72, &8u64.to_be_bytes());
        file[104] = 1;
        let packed = zstd::bulk::compress(&[5; CLUSTER], 3).expect("a short text");
        put(&mut file, 3 * CLUSTER, &packed);
    } else {
        // Deflate's plainest: one block that is stored.
        let length = (CLUSTER as u16).to_le_bytes();
        let mut packed = vec![1, length[0], length[1], !length[0], !length[1]];
        packed.extend([5; CLUSTER]);
        file.truncate(3 * CLUSTER);
        file.extend(packed);
        // It reaches into nine sectors.
        put(&mut file, 2 * CLUSTER, &((1 << 62) | (8 << 58) | (3 * CLUSTER as u64)).to_be_bytes());
    }
    file
}

fn images() -> Vec<Vec<u8>> {
    let mut version_2 = image(None);
    put(&mut version_2, 4, &2u32.to_be_bytes());
    put(&mut version_2, 2 * CLUSTER + 8, &0u64.to_be_bytes());
    vec![image(None), image(Some(0)), image(Some(1)), version_2]
}

/// The committed one is sound: an ext4 file system that is small because it has little in it.
fn disks() -> Vec<Vec<u8>> {
    let system = include_bytes!("../../seeds/disk/ext4").to_vec();
    let mut mbr = vec![0; SECTOR];
    mbr[446 + 4] = 0x83;
    put(&mut mbr, 446 + 8, &1u32.to_le_bytes());
    put(&mut mbr, 446 + 12, &((system.len() / SECTOR) as u32).to_le_bytes());
    put(&mut mbr, 510, &[0x55, 0xaa]);
    let mut gpt = mbr.clone();
    gpt[446 + 4] = 0xee;
    let mut header = vec![0; SECTOR];
    put(&mut header, 0, b"EFI PART");
    put(&mut header, 72, &2u64.to_le_bytes());
    put(&mut header, 80, &[1, 0, 0, 0, 128, 0, 0, 0]);
    let mut entries = vec![0; SECTOR];
    entries[..32].fill(1);
    put(&mut entries, 32, &3u64.to_le_bytes());
    put(&mut entries, 40, &(2 + (system.len() / SECTOR) as u64).to_le_bytes());
    vec![system.clone(), [mbr, system.clone()].concat(), [gpt, header, entries, system].concat()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_sound() {
        assert!(images().iter().all(|seed| unpack(seed)));
        assert!(disks().iter().all(|seed| look(seed)));
    }
}
