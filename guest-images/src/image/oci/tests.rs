//! Whole images, made here, read, and what comes of them looked at by others.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;
use crate::image::mkfs::tests::assert_sound;

const MIB: u64 = 1 << 20;

/// A layer that is being written.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, mode: u32, size: usize) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header
    }

    fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = Self::header(EntryType::Regular, mode, content.len());
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    fn link(mut self, kind: EntryType, path: &str, target: &str) -> Self {
        self.0.append_link(&mut Self::header(kind, 0o777, 0), path, target).unwrap();
        self
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// An image layout that is being written.
struct Layout {
    dir: TempDir,
    layers: Vec<Value>,
    contents: Vec<String>,
    process: Value,
}

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir, layers: Vec::new(), contents: Vec::new(), process: json!({}) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = Digest::of(content);
        let name = digest.to_string().replace(':', "/");
        fs::write(self.dir.path().join("blobs").join(name), content).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": content.len()})
    }

    fn layer(mut self, packing: &str, tar: Vec<u8>) -> Self {
        let packed = match packing {
            "+gzip" => gzip(&tar),
            "+zstd" => zstd::bulk::compress(&tar, 3).unwrap(),
            _ => tar.clone(),
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{packing}");
        self.layers.push(self.blob(&media_type, &packed));
        self.contents.push(Digest::of(&tar).to_string());
        self
    }

    fn process(mut self, process: Value) -> Self {
        self.process = process;
        self
    }

    fn config(&self) -> Value {
        json!({
            "architecture": "amd64", "os": "linux", "config": self.process,
            "rootfs": {"type": "layers", "diff_ids": self.contents},
        })
    }

    /// The manifest's descriptor.
    fn manifest(&self, config: &Value) -> Value {
        let config =
            self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": self.layers});
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
    }

    /// Writes the documents.
    fn done(self) -> Self {
        self.index(&[self.manifest(&self.config())]);
        self
    }

    /// As one archive.
    fn archive(&self) -> PathBuf {
        let path = self.dir.path().with_extension("tar");
        let mut builder = Builder::new(fs::File::create(&path).unwrap());
        builder.append_dir_all(".", self.dir.path()).unwrap();
        builder.finish().unwrap();
        path
    }
}

fn merge(path: &Path) -> Result<Merged, OciError> {
    Image::open(path, None)?.merge(16 * MIB, &mut |_, _| {})
}

/// The image's disk, which the checker of file systems likes.
fn disk(path: &Path) -> fs::File {
    let file = tempfile::tempfile().unwrap();
    let (mut last, mut all) = (0, 0);
    merge(path)
        .unwrap()
        .write(&file, &mut |done, total| {
            assert!(done >= last && done <= total, "{done} of {total}");
            (last, all) = (done, total);
        })
        .unwrap();
    assert_eq!(last, all);
    assert_sound(&file);
    file
}

fn why(path: &Path) -> String {
    merge(path).map(|_| ()).unwrap_err().to_string()
}

/// Three layers, each packed in another way.
fn image() -> Layout {
    let base = Layer::new()
        .file("bin/sh", 0o755, b"a shell")
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")
        .file("gone", 0o644, b"gone")
        .file("var/cache/old", 0o644, &[7; 100_000])
        .link(EntryType::Symlink, "usr/bin/sh", "/bin/sh")
        .link(EntryType::Link, "bin/ash", "bin/sh");
    let next = Layer::new().file(".wh.gone", 0, b"").file("var/cache/.wh..wh..opq", 0, b"").file(
        "var/cache/new",
        0o600,
        &[9; 5000],
    );
    let last = Layer::new().file("etc/passwd", 0o640, b"another\n");
    Layout::new()
        .layer("", base.done())
        .layer("+gzip", next.done())
        .layer("+zstd", last.done())
        .process(
            json!({"Cmd": ["/bin/app", "it's"], "Env": ["A=b"], "User": "", "WorkingDir": null}),
        )
        .done()
}

#[test]
fn an_image_becomes_a_disk() {
    let layout = image();
    let file = disk(&layout.path());
    let system = crate::image::mkfs::tests::open(&file);
    assert_eq!(system.read("/etc/passwd").unwrap(), b"another\n");
    assert_eq!(system.symlink_metadata("/etc/passwd").unwrap().mode(), 0o640);
    assert_eq!(system.read("/bin/ash").unwrap(), b"a shell");
    assert_eq!(system.read("/usr/bin/sh").unwrap(), b"a shell");
    assert_eq!(system.read("/var/cache/new").unwrap(), [9; 5000]);
    for gone in ["/gone", "/var/cache/old", "/.wh.gone", "/var/cache/.wh..wh..opq"] {
        assert!(!system.exists(gone).unwrap(), "{gone}");
    }
    let script = String::from_utf8(system.read("/sbin/howdah-init").unwrap()).unwrap();
    assert!(script.contains("export A='b'\n"), "{script}");
    assert!(script.ends_with(concat!("main '/bin/app' 'it'", r"\''s'", "\n")), "{script}");
    // The same image makes the same disk, from an archive of it too.
    let bytes = |mut file: fs::File| {
        use std::io::Seek;
        file.rewind().unwrap();
        blake3::Hasher::new().update_reader(file).unwrap().finalize()
    };
    assert_eq!(bytes(file), bytes(disk(&layout.archive())));
}

#[test]
fn what_it_starts_with_depends_on_what_there_is() {
    let startup = |layer: Layer, process: Value| {
        let layout = Layout::new().layer("", layer.done()).process(process).done();
        merge(&layout.path()).unwrap().startup().cloned()
    };
    let shell = || Layer::new().file("bin/sh", 0o755, b"sh");
    let command = |words: &[&str]| {
        Some(Startup::Command(words.iter().map(|word| (*word).to_owned()).collect()))
    };
    let process = || json!({"Entrypoint": ["/a"], "Cmd": ["b"]});
    assert_eq!(startup(shell(), process()), command(&["/a", "b"]));
    assert_eq!(startup(shell(), json!({})), command(&["/bin/sh"]));
    assert_eq!(startup(shell(), Value::Null), command(&["/bin/sh"]));
    let system = || shell().file("lib/systemd/systemd", 0o755, b"1");
    let system = system().link(EntryType::Symlink, "sbin/init", "/lib/systemd/systemd");
    assert_eq!(startup(system, process()), Some(Startup::System));
    // busybox is an init too, which starts nothing by itself.
    let busybox = || {
        let layer = Layer::new().file("bin/busybox", 0o755, b"1");
        let layer = layer.link(EntryType::Symlink, "bin/sh", "busybox");
        layer.link(EntryType::Link, "sbin/init", "bin/busybox")
    };
    assert_eq!(startup(busybox(), process()), command(&["/a", "b"]));
    assert_eq!(startup(busybox(), json!({})), Some(Startup::System));
    // Neither, or one that cannot be run.
    let bare = Layer::new().file("app", 0o755, b"1").file("bin/sh", 0o644, b"sh");
    assert_eq!(startup(bare, process()), None);
    let dangling = Layer::new().link(EntryType::Symlink, "bin/sh", "/missing");
    assert_eq!(startup(dangling, process()), None);
    assert!(command(&["a"]).unwrap().cmdline().ends_with(" init=/sbin/howdah-init"));
}

#[test]
fn the_image_for_this_host_is_chosen() {
    let layout = image();
    let sound = layout.manifest(&layout.config());
    let foreign = json!({"mediaType": "x", "digest": Digest::of(b"?").to_string(), "size": 1});
    let with = |descriptor: &Value, key: &str, value: Value| {
        let mut descriptor = descriptor.clone();
        descriptor[key] = value;
        descriptor
    };
    let platform = |descriptor: &Value, os: &str, architecture: &str, variant: Option<&str>| {
        let platform = json!({"os": os, "architecture": architecture, "variant": variant});
        with(descriptor, "platform", platform)
    };
    let index = |manifests: &[Value]| {
        let text = json!({"manifests": manifests}).to_string();
        layout.blob("application/vnd.oci.image.index.v1+json", text.as_bytes())
    };
    // An index in an index, with others, an attestation and a newer variant.
    layout.index(&[index(&[
        platform(&foreign, "linux", "arm64", None),
        platform(&foreign, "unknown", "unknown", None),
        platform(&foreign, "linux", "amd64", Some("v3")),
        platform(&sound, "linux", "amd64", None),
    ])]);
    merge(&layout.path()).unwrap();
    layout.index(&[platform(&foreign, "linux", "s390x", None)]);
    let said = why(&layout.path());
    assert!(said.contains("linux/amd64") && said.contains("linux/s390x"), "{said}");
    let mut config = layout.config();
    config["architecture"] = "arm64".into();
    layout.index(&[layout.manifest(&config)]);
    assert!(why(&layout.path()).contains("linux/arm64"));
    // Names.
    let named = |descriptor: &Value, name: &str| {
        let annotations = json!({"org.opencontainers.image.ref.name": name});
        with(descriptor, "annotations", annotations)
    };
    layout.index(&[named(&sound, "app:1"), named(&foreign, "app:2")]);
    let said = why(&layout.path());
    assert!(said.contains("--ref: app:1, app:2"), "{said}");
    for name in ["app:1", "1"] {
        Image::open(&layout.path(), Some(name)).unwrap();
    }
    let said = Image::open(&layout.path(), Some("3")).unwrap_err().to_string();
    assert!(said.contains("no image \"3\"") && said.contains("app:2"), "{said}");
    layout.index(&[named(&sound, "app:1"), named(&sound, "app:latest")]);
    merge(&layout.path()).unwrap();
    // Round and round.
    let mut deep = sound;
    for _ in 0..5 {
        deep = index(&[deep]);
    }
    layout.index(&[deep]);
    assert!(why(&layout.path()).contains("indexes"));
}

#[test]
fn content_that_is_not_what_it_should_be_is_refused() {
    // Each blob, one byte of it, and all behind its half.
    for which in 0..5 {
        let layout = image();
        let dir = layout.path().join("blobs/sha256");
        let mut blobs: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        blobs.sort();
        let content = fs::read(&blobs[which]).unwrap();
        let mut other = content.clone();
        let at = other.len() / 2;
        other[at] ^= 1;
        fs::write(&blobs[which], &other).unwrap();
        let said = why(&layout.path());
        assert!(said.contains("sha256:") && said.contains("digest"), "{said}");
        fs::write(&blobs[which], &content[..at]).unwrap();
        assert!(why(&layout.path()).contains("bytes and should have"));
        fs::remove_file(&blobs[which]).unwrap();
        assert!(why(&layout.path()).contains("missing"));
    }
    // A layer whose digest is right and whose content is another than the configuration says.
    let mut layout = image();
    layout.contents[1] = Digest::of(b"another").to_string();
    let layout = layout.done();
    assert!(why(&layout.path()).contains("digest"));
    let mut layout = image();
    layout.contents.pop();
    let layout = layout.done();
    assert!(why(&layout.path()).contains("3 layers"));
    let mut layout = image();
    layout.layers[0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    let layout = layout.done();
    assert!(why(&layout.path()).contains("encrypted"));
    let mut layout = image();
    layout.layers[0]["digest"] = "sha256:../../../../etc/passwd".into();
    let layout = layout.done();
    assert!(why(&layout.path()).contains("no SHA-256 digest"));
}

#[test]
fn an_image_that_means_harm_is_refused() {
    let refused = |packing: &str, tar: Vec<u8>, says: &str| {
        let layout = Layout::new().layer(packing, tar).done();
        let said = why(&layout.path());
        assert!(said.contains(says), "{said}");
    };
    let raw = |path: &[u8], size: u64| {
        let mut header = Layer::header(EntryType::Regular, 0o644, 0);
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    refused("", raw(b"../../../../tmp/howdah-escaped", 0), "leads out of the image");
    refused("", raw(b"huge", 1 << 50), "--disk-mib");
    refused("", raw(b"short", 1000), "cut short");
    refused("", vec![b'x'; 600], "no header");
    refused("+gzip", gzip(b"x")[..10].to_vec(), "cut short");
    assert!(!Path::new("/tmp/howdah-escaped").exists());
    // A bomb: half a gigabyte of zeros behind the end of the archive.
    let mut bomb = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    io::copy(&mut io::repeat(0).take(512 << 20), &mut bomb).unwrap();
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    let mut layout = Layout::new();
    layout.layers.push(layout.blob("application/vnd.oci.image.layer.v1.tar+zstd", &bomb));
    let layout = layout.done();
    assert!(why(&layout.path()).contains("--disk-mib"));
    // Files that each fit and together do not.
    let half = vec![1; 9 << 20];
    let both = Layer::new().file("a", 0o644, &half).file("b", 0o644, &half).done();
    let layout = Layout::new().layer("+zstd", both).done();
    let to = tempfile::tempfile().unwrap();
    let full = merge(&layout.path()).unwrap().write(&to, &mut |_, _| {}).unwrap_err().to_string();
    assert!(full.contains("16 MiB") && full.contains("--disk-mib"), "{full}");
}

#[test]
fn what_docker_saves_is_read_too() {
    let layout = image();
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<_> = (0..3).map(|n| format!("{n}/layer.tar")).collect();
    let mut contents = Vec::new();
    for (layer, name) in layout.layers.iter().zip(&layers) {
        let digest = layer["digest"].as_str().unwrap().replace(':', "/");
        let packed = fs::read(layout.path().join("blobs").join(digest)).unwrap();
        contents.push((name.clone(), packed));
    }
    contents.push(("config.json".into(), layout.config().to_string().into_bytes()));
    let list = json!([{"Config": "config.json", "RepoTags": ["app:1"], "Layers": layers}]);
    contents.push(("manifest.json".into(), list.to_string().into_bytes()));
    let save = |contents: &[(String, Vec<u8>)]| {
        let path = dir.path().join("saved.tar");
        let mut builder = Builder::new(fs::File::create(&path).unwrap());
        for (name, content) in contents {
            let mut header = Layer::header(EntryType::Regular, 0o644, content.len());
            builder.append_data(&mut header, name, content.as_slice()).unwrap();
        }
        builder.finish().unwrap();
        path
    };
    let saved = save(&contents);
    assert_eq!(
        Image::open(&saved, Some("1")).unwrap().id(),
        Image::open(&layout.path(), None).unwrap().id()
    );
    merge(&saved).unwrap();
    contents[0].1[600] ^= 1;
    assert!(why(&save(&contents)).contains("digest"));
    contents.remove(0);
    assert!(why(&save(&contents)).contains("0/layer.tar is missing"));
}

#[test]
fn what_is_no_image_is_told() {
    let dir = tempfile::tempdir().unwrap();
    assert!(why(dir.path()).contains("no OCI image"));
    assert!(matches!(merge(&dir.path().join("none")), Err(OciError::Open(_))));
    let text = dir.path().join("text");
    fs::write(&text, "x".repeat(1000)).unwrap();
    assert!(why(&text).contains("no OCI image"));
    fs::write(&text, gzip(b"x")).unwrap();
    assert!(why(&text).contains("gunzip"));
    fs::write(dir.path().join("index.json"), "{").unwrap();
    assert!(why(dir.path()).contains("index.json"));
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(why(&pipe).contains("no regular file"));
}
