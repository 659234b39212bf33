//! A base's manifest, a file that comes with the base.
//!
//! What was parsed can be written, and is then read as the same base.

use guest_images::{MachineInfo, Manifest, MemoryInfo, PartInfo, PartRoot, manifest};

use super::{Origin, Target};

pub(super) const TARGET: Target =
    Target { name: "manifest", from: Origin::File, run, seeds, max_len: 8 << 10 };

fn run(data: &[u8]) -> bool {
    let Ok(manifest) = Manifest::parse(data) else { return false };
    manifest.check().expect("what is parsed is checked");
    let json = manifest.to_json().expect("what was parsed can be written");
    let again = Manifest::parse(&json).expect("what was written can be parsed");
    assert_eq!((again.id(), &again), (manifest.id(), &manifest));
    assert_eq!(again.canonical(), manifest.canonical());
    true
}

fn part(bytes: u64, seed: u8) -> PartInfo {
    PartInfo { bytes, root: PartRoot([seed; 32]) }
}

fn seeds() -> Vec<Vec<u8>> {
    let machine = MachineInfo::of(b"a machine");
    let memory = MemoryInfo { ram: part(64 << 20, 4), machine };
    let of = |initramfs: Option<PartInfo>, memory: Option<MemoryInfo>| Manifest {
        version: manifest::version_for(memory.as_ref()),
        arch: manifest::ARCH.into(),
        disk: part(1 << 30, 1),
        kernel: part(8_123_456, 2),
        initramfs,
        cmdline: "console=ttyS0 root=/dev/vda rw".into(),
        memory,
    };
    let json = |manifest: Manifest| manifest.to_json().expect("a sound manifest");
    vec![json(of(None, None)), json(of(Some(part(70_000, 3)), None)), json(of(None, Some(memory)))]
}
