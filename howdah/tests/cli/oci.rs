//! `howdah base import --oci`, of images that are made here.

use std::{fs, path::PathBuf, process::Command};

use guest_images::image::oci::Digest;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use crate::common::{Cloudlet, kernel};

/// An image in the cloudlet's directory, as `image` and, in an archive, as `image.tar`: one layer with these
/// files, of which `-> path` is a symbolic link.
pub(crate) fn image(cloudlet: &Cloudlet, files: &[(&str, &[u8])], process: &Value) {
    let mut layer = Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = Header::new_gnu();
        header.set_mode(0o755);
        header.set_mtime(1_000_000_000);
        header.set_uid(0);
        header.set_gid(0);
        match content.strip_prefix(b"-> ") {
            Some(target) => {
                header.set_entry_type(EntryType::Symlink);
                header.set_size(0);
                let target = str::from_utf8(target).unwrap();
                layer.append_link(&mut header, path, target).unwrap();
            }
            None => {
                header.set_size(content.len() as u64);
                layer.append_data(&mut header, path, *content).unwrap();
            }
        }
    }
    let layer = layer.into_inner().unwrap();
    let content = Digest::of(&layer).to_string();
    let _ = fs::remove_dir_all(cloudlet.path("image"));
    let blob = |media_type: &str, content: &[u8]| {
        let digest = Digest::of(content).to_string();
        cloudlet.file(&format!("image/blobs/{}", digest.replace(':', "/")), content);
        json!({"mediaType": media_type, "digest": digest, "size": content.len()})
    };
    let layer = blob("application/vnd.oci.image.layer.v1.tar", &layer);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": process,
        "rootfs": {"type": "layers", "diff_ids": [content]},
    });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let manifest =
        blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    cloudlet.file("image/index.json", index.to_string().as_bytes());
    cloudlet.file("image/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    let mut archive = Builder::new(fs::File::create(cloudlet.path("image.tar")).unwrap());
    archive.append_dir_all(".", cloudlet.path("image")).unwrap();
    archive.finish().unwrap();
}

fn shell() -> Vec<(&'static str, &'static [u8])> {
    vec![("bin/sh", b"a shell"), ("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")]
}

/// Where the only base is, and what its manifest says.
fn only_base(cloudlet: &Cloudlet) -> (PathBuf, String) {
    let listed = cloudlet.line("base ls --json").ok().json();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let dir = cloudlet.home().join("store/bases").join(listed[0]["id"].as_str().unwrap());
    let manifest = fs::read_to_string(dir.join("manifest.json")).unwrap();
    (dir, manifest)
}

#[test]
fn a_container_image_becomes_a_base() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("kernel", &kernel());
    cloudlet.file("initramfs", b"an initramfs");
    image(&cloudlet, &shell(), &json!({"Entrypoint": ["/app"], "Cmd": ["--port", "80"]}));
    let given = "--kernel kernel --initramfs initramfs --disk-mib 64";
    let ran = cloudlet.line(&format!("base import app --oci image {given}")).ok();
    assert!(ran.stderr.contains("it starts /app --port 80"), "{ran:?}");
    let (dir, manifest) = only_base(&cloudlet);
    let cmdline = "console=ttyS0 root=/dev/vda rw reboot=k panic=-1 init=/sbin/howdah-init";
    assert!(manifest.contains(cmdline), "{manifest}");
    assert_eq!(fs::read(dir.join("initramfs")).unwrap(), b"an initramfs");
    assert_eq!(fs::metadata(dir.join("disk.raw")).unwrap().len(), 64 << 20);
    let left: Vec<_> =
        fs::read_dir(cloudlet.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["store"]);
    // The checker of file systems finds nothing in it.
    let checked = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(dir.join("disk.raw"))
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output();
    match checked {
        Ok(ran) => assert!(ran.status.success(), "{ran:?}"),
        Err(_) => eprintln!("skipped: no e2fsck; `make setup` installs it"),
    }
    // From an archive, and at another cloudlet, it is the same base.
    cloudlet.line(&format!("base import again --oci image.tar {given}")).ok();
    assert_eq!(only_base(&cloudlet).0, dir);
    let other = Cloudlet::new();
    let archive = cloudlet.path("image.tar");
    for name in ["kernel", "initramfs"] {
        fs::copy(cloudlet.path(name), other.path(name)).unwrap();
    }
    other.line(&format!("base import app --oci {} {given}", archive.display())).ok();
    assert_eq!(only_base(&other).0.file_name(), dir.file_name());
}

#[test]
fn an_image_with_an_init_and_a_kernel_needs_nothing_else() {
    let cloudlet = Cloudlet::new();
    let kernel = kernel();
    let mut files = shell();
    files.extend([
        ("lib/systemd/systemd", &b"1"[..]),
        ("sbin/init", b"-> /lib/systemd/systemd"),
        ("boot/vmlinuz-6.12.0", &kernel),
        ("boot/initrd.img-6.12.0", b"an initrd"),
    ]);
    image(&cloudlet, &files, &json!({"Cmd": ["/bin/bash"]}));
    let ran = cloudlet.line("base import system --oci image.tar").ok();
    assert!(ran.stderr.contains("/sbin/init") && ran.stderr.contains("/boot/vmlinuz-6.12.0"));
    let (dir, manifest) = only_base(&cloudlet);
    assert!(
        manifest.contains("\"console=ttyS0 root=/dev/vda rw reboot=k panic=-1\""),
        "{manifest}"
    );
    assert_eq!(fs::read(dir.join("kernel")).unwrap(), kernel);
    assert_eq!(fs::read(dir.join("initramfs")).unwrap(), b"an initrd");
    // The operator's own words count.
    cloudlet.run(&["base", "import", "own", "--oci", "image", "--cmdline", "init=/x"]).ok();
    let names = cloudlet.line("base ls --json").ok().json();
    assert_eq!(names.as_array().unwrap().len(), 2);
}

#[test]
fn an_image_that_cannot_be_a_base_is_refused_and_leaves_nothing() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("kernel", &kernel());
    let import = |words: &str| cloudlet.line(&format!("base import x {words}"));
    image(&cloudlet, &[("app", b"static")], &json!({"Entrypoint": ["/app"]}));
    import("--oci image --kernel kernel").fails(2, &["image", "cannot boot", "/bin/sh", "init="]);
    let bare = ["base", "import", "bare", "--oci", "image", "--kernel", "kernel"];
    cloudlet.run(&[&bare[..], &["--cmdline", "root=/dev/vda init=/app"]].concat()).ok();
    cloudlet.line("base rm bare").ok();

    image(&cloudlet, &shell(), &json!({}));
    import("--oci image").fails(2, &["no kernel", "--kernel"]);
    import("--oci image --kernel missing").fails(3, &["missing"]);
    import("--oci missing --kernel kernel").fails(3, &["missing"]);
    import("--oci kernel --kernel kernel").fails(6, &["kernel", "no OCI image"]);
    import("--oci home --kernel kernel").fails(6, &["no OCI image"]);
    import("--oci image --ref other --kernel kernel").fails(3, &["other"]);
    import("--oci image --disk kernel").fails(2, &["--oci", "--disk"]);
    import("--disk kernel --disk-mib 64").fails(2, &["--disk-mib", "--disk "]);
    import("--from image --ref a").fails(2, &["--ref"]);
    import("--oci image --disk-mib 1").fails(2, &["--disk-mib"]);

    let large = vec![7; 12 << 20];
    let mut files = shell();
    files.push(("large", &large));
    image(&cloudlet, &files, &json!({}));
    import("--oci image --kernel kernel --disk-mib 8").fails(2, &["8 MiB", "--disk-mib"]);
    import("--oci image --kernel kernel --disk-mib 12").fails(2, &["12 MiB", "--disk-mib"]);

    // Out of the image leads no way, and a blob has to be what its name says.
    image(&cloudlet, &shell(), &json!({}));
    let blobs = cloudlet.path("image/blobs/sha256");
    let layer = fs::read_dir(blobs).unwrap().map(|entry| entry.unwrap().path());
    let layer = layer.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut content = fs::read(&layer).unwrap();
    content[0] ^= 1;
    fs::write(&layer, &content).unwrap();
    import("--oci image --kernel kernel").fails(6, &["sha256:", "digest"]);
    assert!(cloudlet.line("base ls --json").json().as_array().unwrap().is_empty());
    let left: Vec<_> =
        fs::read_dir(cloudlet.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["store"]);
}
