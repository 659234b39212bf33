//! Images made up byte by byte, and by `qemu-img` where there is one.

use std::{
    fs,
    io::{Seek, Write},
    process::Command,
};

use proptest::prelude::*;

use super::*;
use crate::image::Raw;

const BITS: u32 = 12;
const CLUSTER: usize = 1 << BITS;

/// Four clusters: data, none, zero, compressed; then a little more than a half of one with data.
fn small() -> Vec<u8> {
    let mut file = vec![0; 5 * CLUSTER];
    file[..4].copy_from_slice(MAGIC);
    file[7] = 3;
    file[20..24].copy_from_slice(&BITS.to_be_bytes());
    file[24..32].copy_from_slice(&(4 * CLUSTER as u64 + 2560).to_be_bytes());
    file[36..40].copy_from_slice(&1u32.to_be_bytes());
    file[40..48].copy_from_slice(&(CLUSTER as u64).to_be_bytes());
    file[100..104].copy_from_slice(&104u32.to_be_bytes());
    let mut put = |at: usize, entry: u64| file[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    put(CLUSTER, (2 * CLUSTER as u64) | (1 << 63));
    put(2 * CLUSTER, (3 * CLUSTER as u64) | (1 << 63));
    put(2 * CLUSTER + 16, (4 * CLUSTER as u64) | ZERO);
    put(2 * CLUSTER + 24, COMPRESSED | (5 * CLUSTER as u64 + 100));
    put(2 * CLUSTER + 32, 4 * CLUSTER as u64);
    file[3 * CLUSTER..4 * CLUSTER].fill(7);
    file[4 * CLUSTER..].fill(9);
    let mut packed = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&[5; CLUSTER]).unwrap();
    file.extend([1; 100]);
    file.extend(packed.finish().unwrap());
    file
}

/// Why an image is not taken.
fn refused(file: &[u8]) -> Qcow2Error {
    disk(file).map(|disk| disk.len()).unwrap_err()
}

/// The disk in an image.
fn disk(file: &[u8]) -> Result<Vec<u8>, Qcow2Error> {
    let to = tempfile::tempfile().unwrap();
    Qcow2::open(file)?.write_raw(&to, &mut |_| {})?;
    let mut bytes = vec![0; to.metadata().unwrap().len() as usize];
    FileExt::read_exact_at(&to, &mut bytes, 0).unwrap();
    Ok(bytes)
}

#[test]
fn every_kind_of_cluster_is_read() {
    let disk = disk(&small()).unwrap();
    assert_eq!(disk.len(), 4 * CLUSTER + 2560);
    let clusters: Vec<_> = disk.chunks(CLUSTER).collect();
    for (cluster, byte) in clusters.iter().zip([7, 0, 0, 5, 9]) {
        assert!(cluster.iter().all(|b| *b == byte), "{byte}");
    }
}

#[test]
fn what_is_not_whole_in_itself_is_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut file = small();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refused(&file).to_string()
    };
    let mut file = small();
    file[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 0, 8]);
    file[200..208].copy_from_slice(b"base.img");
    let why = refused(&file).to_string();
    assert!(why.contains("base.img") && why.contains("qemu-img convert"), "{why}");
    assert!(with(4, &[0, 0, 0, 1]).contains("version 1"));
    assert!(with(32, &[0, 0, 0, 1]).contains("encrypted"));
    assert!(with(72, &[0, 0, 0, 0, 0, 0, 0, 4]).contains("another file"));
    assert!(with(72, &[0, 0, 0, 0, 0, 0, 0, 16]).contains("subclusters"));
    assert!(with(72, &[1, 0, 0, 0, 0, 0, 0, 0]).contains("not known"));
    assert!(with(24, &[9; 8]).contains("4 TiB"));
    assert!(with(36, &[0; 4]).contains("table of tables"));
    assert!(with(72, &[0, 0, 0, 0, 0, 0, 0, 8]).contains("compressed in a way"));
    assert!(with(2 * CLUSTER, &[0, 0, 0, 0, 0, 0, 0x32, 0]).contains("where a cluster"));
    assert!(with(2 * CLUSTER, &[0, 0, 1, 0, 0, 0, 0, 0]).contains("beyond the end"));
    assert!(with(20, &[0, 0, 0, 63]).contains("clusters"));
    assert!(with(0, b"QED").contains("qcow2"));
}

/// A file of a few clusters that says that it holds terabytes, all of them in the same cluster.
#[test]
fn tables_that_go_in_circles_end() {
    let mut file = small();
    let entries = CLUSTER / 8;
    let put = |file: &mut Vec<u8>, at: usize, entry: u64| {
        file[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    };
    file[24..32].copy_from_slice(&((entries * entries * CLUSTER) as u64).to_be_bytes());
    file[36..40].copy_from_slice(&(entries as u32).to_be_bytes());
    for n in 0..entries {
        put(&mut file, CLUSTER + 8 * n, 2 * CLUSTER as u64);
        put(&mut file, 2 * CLUSTER + 8 * n, 3 * CLUSTER as u64);
    }
    assert!(refused(&file).to_string().contains("the same cluster"));
    // Tables that are their own clusters, and compressed ones.
    for n in 0..entries {
        put(&mut file, 2 * CLUSTER + 8 * n, COMPRESSED | (5 * CLUSTER as u64 + 100));
    }
    assert!(refused(&file).to_string().contains("the same cluster"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_survived(damage in prop::collection::vec((0usize..5 * CLUSTER, any::<u8>()), 1..20)) {
        let mut file = small();
        for (at, byte) in damage {
            // Mostly where tables are; the size stays, so that tests stay small.
            let at = if at % 2 == 0 { at % 104 } else { CLUSTER + at % (CLUSTER + 64) };
            if !(24..32).contains(&at) {
                file[at] = byte;
            }
        }
        let _ = disk(&file);
    }
}

#[test]
fn what_qemu_img_makes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    let mut file = fs::File::create(&raw).unwrap();
    for n in 0..40u8 {
        file.write_all(&[n / 3; 50_000]).unwrap();
        file.seek_relative(100_000).unwrap();
    }
    file.set_len(6_100_480).unwrap();
    for options in [
        &["-o", "compat=0.10"][..],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "cluster_size=2M"],
    ] {
        let made = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args(options)
            .args([&raw, &image])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: no qemu-img that makes {options:?}; `make setup` installs it");
            return;
        }
        let out = fs::File::create(dir.path().join("out")).unwrap();
        let opened = Qcow2::open(Raw::new(fs::File::open(&image).unwrap()).unwrap()).unwrap();
        opened.write_raw(&out, &mut |_| {}).unwrap();
        assert!(
            fs::read(dir.path().join("out")).unwrap() == fs::read(&raw).unwrap(),
            "{options:?}"
        );
    }
}
