//! Container images that an operator fetched somewhere: their documents, their layers, the disk that comes of them.
//!
//! An input is an archive as it is, or layers and a process, of which the target makes an image whose digests are
//! right: as whoever means harm would. Any of it is read or refused, in bounded memory. What is written is a disk of
//! the size that was asked for, with a file system that another reader reads.

use std::{fs::File, io::Write, path::Path};

use guest_images::image::{
    boot::{self, BootError},
    oci::{Digest, Image},
};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::{Origin, Target};
use crate::{Input, Program, scratch::Scratch};

pub(super) const TARGET: Target =
    Target { name: "oci", from: Origin::File, run: import, seeds, max_len: 60 << 10 };

const DISK_BYTES: u64 = 8 << 20;
/// More are not made of an input.
const MAX_LAYERS: usize = 8;
/// An archive as it is, or one to be made.
const AS_IT_IS: u8 = 0;
const MADE: u8 = 1;
/// How a layer is packed.
const PACKINGS: u8 = 3;

fn import(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let archive = match input.u8() {
        AS_IT_IS => input.rest().to_vec(),
        _ => image(&mut input),
    };
    let scratch = Scratch::new();
    let Ok(image) = Image::open(&scratch.file("image", &archive), None) else { return false };
    let mut progress = |done, total| assert!(done <= total, "{done} of {total}");
    let Ok(merged) = image.merge(DISK_BYTES, &mut progress) else { return false };
    let path = scratch.file("disk", b"");
    let to = File::options().read(true).write(true).open(&path).expect("a scratch file");
    if merged.write(&to, &mut progress).is_err() {
        return false;
    }
    check(&path);
    true
}

/// A disk is whole, and a file system.
fn check(path: &Path) {
    let disk = File::open(path).expect("a scratch file");
    assert_eq!(disk.metadata().expect("a scratch file").len(), DISK_BYTES);
    match boot::find(&disk) {
        Ok(_) | Err(BootError::File { .. } | BootError::Cmdline) => {}
        // No kernel is in it, which whoever found that out has looked for.
        Err(BootError::None(why)) => assert!(!why.contains("can be read"), "{why}"),
        Err(error) => panic!("{error}"),
    }
}

/// The image that an input says: its process, then layers.
fn image(input: &mut Input<'_>) -> Vec<u8> {
    let process: Value = serde_json::from_slice(input.block()).unwrap_or_default();
    let (mut layers, mut contents, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
    let mut all_known = true;
    while !input.is_empty() && layers.len() < MAX_LAYERS {
        let packing = input.below(PACKINGS);
        let content = input.block();
        let packed = pack(packing, content);
        layers.push(describe("application/vnd.oci.image.layer.v1.tar", &packed));
        contents.push(Digest::of(content).to_string());
        // Of what is packed in the input already, the content is not known here.
        let looks_packed = matches!(content, [0x1f, 0x8b, ..] | [0x28, 0xb5, ..] | [_, 0x2a, ..]);
        all_known &= packing != 0 || !looks_packed;
        blobs.push(packed);
    }
    if !all_known {
        contents.clear();
    }
    let config = json!({"config": process, "rootfs": {"diff_ids": contents}}).to_string();
    let manifest =
        json!({"config": describe("x", config.as_bytes()), "layers": layers}).to_string();
    let index = json!({"manifests": [describe("manifest", manifest.as_bytes())]}).to_string();
    blobs.extend([config.into_bytes(), manifest.into_bytes()]);
    let mut archive = Builder::new(Vec::new());
    put(&mut archive, "index.json", index.as_bytes());
    for blob in &blobs {
        let name = Digest::of(blob).to_string().replace(':', "/");
        put(&mut archive, &format!("blobs/{name}"), blob);
    }
    archive.into_inner().expect("an archive in memory")
}

fn describe(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(blob).to_string(), "size": blob.len()})
}

fn pack(packing: u8, content: &[u8]) -> Vec<u8> {
    match packing {
        0 => content.to_vec(),
        1 => zstd::bulk::compress(content, 1).expect("a short text"),
        _ => {
            let level = flate2::Compression::fast();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(content).expect("memory");
            encoder.finish().expect("memory")
        }
    }
}

fn header(kind: EntryType, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_size(bytes);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header
}

fn put(archive: &mut Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let mut header = header(EntryType::Regular, content.len() as u64);
    archive.append_data(&mut header, path, content).expect("an archive in memory");
}

/// A layer with an entry of every kind.
fn base_layer() -> Vec<u8> {
    let mut layer = Builder::new(Vec::new());
    put(&mut layer, "bin/sh", b"a shell");
    put(&mut layer, "var/old", &[7; 5000]);
    let long = "directory/".repeat(15);
    for (kind, path, target) in [
        (EntryType::Symlink, "lib", "usr/lib"),
        (EntryType::Symlink, long.as_str(), long.as_str()),
        (EntryType::Link, "bin/ash", "bin/sh"),
    ] {
        let mut header = header(kind, 0);
        layer.append_link(&mut header, path, target).expect("an archive in memory");
    }
    let mut device = header(EntryType::Char, 0);
    device.set_device_major(1).and_then(|()| device.set_device_minor(3)).expect("numbers");
    layer.append_data(&mut device, "dev/null", std::io::empty()).expect("memory");
    let extensions = [("SCHILY.xattr.user.a", &b"b"[..]), ("mtime", b"1.5"), ("uid", b"70000")];
    layer.append_pax_extensions(extensions).expect("memory");
    put(&mut layer, "etc/passwd", b"root:x:0:0::/root:/bin/sh\n");
    layer.into_inner().expect("an archive in memory")
}

fn upper_layer() -> Vec<u8> {
    let mut layer = Builder::new(Vec::new());
    put(&mut layer, "var/.wh..wh..opq", b"");
    put(&mut layer, "bin/.wh.ash", b"");
    put(&mut layer, "lib/new", b"new");
    layer.into_inner().expect("an archive in memory")
}

fn seeds() -> Vec<Vec<u8>> {
    let process = json!({"Cmd": ["/bin/app", "it's"], "Env": ["A=b"], "User": "1:2"}).to_string();
    let of = |packing: u8| {
        let program = Program::new().u8(MADE).block(process.as_bytes());
        let program = program.u8(packing).block(&base_layer());
        program.u8(packing).block(&upper_layer()).finish()
    };
    let made = of(0);
    let whole = [vec![AS_IT_IS], image(&mut Input::new(&made[1..]))].concat();
    vec![made, of(1), of(2), whole]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_sound() {
        assert!(seeds().iter().all(|seed| import(seed)));
    }
}
