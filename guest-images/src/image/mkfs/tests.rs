//! What is written is read again by `e2fsck`, which must find nothing, and by another reader of ext4.

use std::{os::unix::fs::FileExt, process::Command};

use super::*;

const LABEL: Label =
    Label { uuid: *b"\x11\x22\x33\x44\x55\x66\x47\x77\x88\x99howdah", made: 1_767_225_600 };

/// The checker of file systems has nothing to say.
pub(crate) fn assert_sound(file: &File) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(file));
    let ran = Command::new("e2fsck")
        .args(["-f", "-n", &path])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output();
    let Ok(ran) = ran else {
        eprintln!("skipped: no e2fsck; `make setup` installs it");
        return;
    };
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(said.lines().filter(|line| !line.starts_with("Pass ")).count(), 1, "{said}");
}

/// Another reader's view of it.
pub(crate) fn open(file: &File) -> ext4_view::Ext4 {
    struct Whole(File);
    impl ext4_view::Ext4Read for Whole {
        fn read(
            &mut self,
            from: u64,
            into: &mut [u8],
        ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
            Ok(self.0.read_exact_at(into, from)?)
        }
    }
    ext4_view::Ext4::load(Box::new(Whole(file.try_clone().unwrap()))).unwrap()
}

fn directory<'a>(number: u32, name: &'a str) -> Entry<'a> {
    Entry { number, kind: Kind::Directory, name: name.as_bytes() }
}

fn meta(mode: u16) -> Meta {
    Meta { mode, uid: 1000, gid: 70_000, seconds: 1_000_000_000, nanoseconds: 5, xattrs: vec![] }
}

/// The root, which has these beside `lost+found`.
fn root(mkfs: &mut Mkfs<'_>, entries: &[Entry<'_>]) {
    let dirs = entries.iter().filter(|entry| entry.kind == Kind::Directory).count() as u32;
    let mut all = entries.to_vec();
    all.push(directory(LOST_AND_FOUND, "lost+found"));
    let content = Content::Directory { parent: ROOT, entries: &all };
    mkfs.add(ROOT, 3 + dirs, &Meta { mode: 0o755, ..Meta::default() }, content).unwrap();
    let content = Content::Directory { parent: ROOT, entries: &[] };
    mkfs.add(LOST_AND_FOUND, 2, &Meta { mode: 0o700, ..Meta::default() }, content).unwrap();
}

fn write(file: &File, runs: &[Run], mut bytes: &[u8]) {
    for run in runs {
        let (now, later) = bytes.split_at(bytes.len().min((run.blocks * BLOCK_BYTES) as usize));
        file.write_all_at(now, run.start * BLOCK_BYTES).unwrap();
        bytes = later;
    }
    assert!(bytes.is_empty());
}

#[test]
fn an_empty_one_is_sound_whatever_its_size() {
    for bytes in [MIN_BYTES, 64 << 20, (128 << 20) + 4096, (128 << 20) + (3 << 20) + 512, 5 << 30] {
        let file = tempfile::tempfile().unwrap();
        let mut mkfs = Mkfs::new(&file, bytes, 10, LABEL).unwrap();
        root(&mut mkfs, &[]);
        mkfs.finish().unwrap();
        assert_eq!(file.metadata().unwrap().len(), bytes);
        assert_sound(&file);
    }
    let file = tempfile::tempfile().unwrap();
    for bytes in [0, 4096, 5 << 40] {
        assert!(matches!(Mkfs::new(&file, bytes, 1, LABEL), Err(MkfsError::Size)));
    }
    assert!(matches!(Mkfs::new(&file, MIN_BYTES, u32::MAX, LABEL), Err(MkfsError::Full)));
    // A last group that is too small for its own tables does not take inodes away.
    let file = tempfile::tempfile().unwrap();
    let mut mkfs = Mkfs::new(&file, (128 << 20) + 8192, 20_000, LABEL).unwrap();
    mkfs.add(20_000, 1, &Meta::default(), Content::Fifo).unwrap();
}

#[test]
fn every_kind_of_file_is_read_as_it_was_given() {
    let file = tempfile::tempfile().unwrap();
    let mut mkfs = Mkfs::new(&file, 32 << 20, 20, LABEL).unwrap();
    let long = "x/".repeat(100);
    let entries = [
        Entry { number: 12, kind: Kind::File, name: b"file" },
        Entry { number: 12, kind: Kind::File, name: b"again" },
        directory(13, "dir"),
        Entry { number: 14, kind: Kind::Symlink, name: b"short" },
        Entry { number: 15, kind: Kind::Symlink, name: b"long" },
        Entry { number: 16, kind: Kind::CharDevice, name: b"null" },
        Entry { number: 17, kind: Kind::BlockDevice, name: b"large" },
        Entry { number: 18, kind: Kind::Fifo, name: b"pipe" },
        Entry { number: 19, kind: Kind::File, name: b"empty" },
    ];
    root(&mut mkfs, &entries);
    let content: Vec<u8> = (0..100_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    let mut own = meta(0o4755);
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    own.xattrs = [("user.b", &b"12345"[..]), ("security.capability", &capability), ("user.a", b"")]
        .map(|(name, value)| Xattr::new(name.as_bytes(), value).unwrap())
        .to_vec();
    let runs = mkfs.add(12, 2, &own, Content::File { bytes: content.len() as u64 }).unwrap();
    write(&file, &runs, &content);
    // A directory of more blocks than one.
    let names: Vec<String> = (0..700).map(|n| format!("{n:0>40}")).collect();
    let many: Vec<_> = names
        .iter()
        .zip(20..)
        .map(|(name, number)| Entry { number, kind: Kind::File, name: name.as_bytes() })
        .collect();
    mkfs.add(13, 2, &meta(0o1777), Content::Directory { parent: ROOT, entries: &many }).unwrap();
    mkfs.add(14, 1, &meta(0o777), Content::Symlink(b"dir/../file")).unwrap();
    mkfs.add(15, 1, &meta(0o777), Content::Symlink(long.as_bytes())).unwrap();
    let null = Content::Device { is_block: false, major: 1, minor: 3 };
    mkfs.add(16, 1, &meta(0o666), null).unwrap();
    let large = Content::Device { is_block: true, major: 300, minor: 70_000 };
    mkfs.add(17, 1, &meta(0o660), large).unwrap();
    mkfs.add(18, 1, &meta(0o600), Content::Fifo).unwrap();
    mkfs.add(19, 1, &meta(0), Content::File { bytes: 0 }).unwrap();
    for entry in &many {
        mkfs.add(entry.number, 1, &meta(0o400), Content::File { bytes: 0 }).unwrap();
    }
    mkfs.finish().unwrap();
    assert_sound(&file);
    let system = open(&file);
    assert_eq!(system.read("/file").unwrap(), content);
    assert_eq!(system.read("/again").unwrap(), content);
    let meta = system.symlink_metadata("/file").unwrap();
    assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o4755, 1000, 70_000));
    assert_eq!(system.read_link("/short").unwrap().as_ref(), b"dir/../file");
    assert_eq!(system.read_link("/long").unwrap().as_ref(), long.as_bytes());
    assert_eq!(system.read_dir("/dir").unwrap().count(), 702);
    let path =
        format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file));
    let debugfs = |request: &str| {
        let ran = Command::new("debugfs")
            .args(["-R", request, &path])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output();
        ran.ok().map(|ran| String::from_utf8_lossy(&ran.stdout).into_owned())
    };
    let Some(said) = debugfs("ea_list file") else { return };
    assert!(said.contains("user.b (5) = \"12345\"") && said.contains("capability (20)"), "{said}");
    let said = debugfs("stat large").unwrap();
    assert!(said.contains("300:70000"), "{said}");
    let said = debugfs("stat null").unwrap();
    assert!(said.contains("01:03") && said.contains("mtime: 0x3b9aca00:00000014"), "{said}");
}

#[test]
fn a_file_reaches_over_groups_and_a_full_disk_is_told() {
    let file = tempfile::tempfile().unwrap();
    // Each group adds an extent, so that there are more than an inode has room for.
    let mut mkfs = Mkfs::new(&file, 2 << 30, 20, LABEL).unwrap();
    root(&mut mkfs, &[Entry { number: 12, kind: Kind::File, name: b"large" }]);
    let bytes = 1 << 30;
    let runs = mkfs.add(12, 1, &meta(0o644), Content::File { bytes }).unwrap();
    assert!(runs.len() > 4, "{runs:?}");
    assert_eq!(runs.iter().map(|run| run.blocks).sum::<u64>() * BLOCK_BYTES, bytes);
    let too_large = mkfs.add(13, 1, &meta(0o644), Content::File { bytes });
    assert!(matches!(too_large, Err(MkfsError::Full)));
    let file = tempfile::tempfile().unwrap();
    let mut mkfs = Mkfs::new(&file, 2 << 30, 20, LABEL).unwrap();
    root(&mut mkfs, &[Entry { number: 12, kind: Kind::File, name: b"large" }]);
    let runs = mkfs.add(12, 1, &meta(0o644), Content::File { bytes }).unwrap();
    let last = runs.last().unwrap();
    let end = (last.start + last.blocks) * BLOCK_BYTES;
    file.write_all_at(b"end", end - 3).unwrap();
    mkfs.finish().unwrap();
    assert_sound(&file);
}

#[test]
fn what_cannot_be_said_in_ext4_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let mut mkfs = Mkfs::new(&file, MIN_BYTES, 20, LABEL).unwrap();
    let mut much = meta(0o644);
    much.xattrs = vec![Xattr::new(b"user.much", &[1; 4096]).unwrap()];
    let content = Content::File { bytes: 0 };
    assert!(matches!(mkfs.add(12, 1, &much, content), Err(MkfsError::Xattrs)));
    much.xattrs = vec![Xattr::new(b"user.fits", &[1; 4096 - 36 - 16 - 4]).unwrap()];
    mkfs.add(12, 1, &much, content).unwrap();
    assert!(matches!(mkfs.add(13, 65_001, &meta(0), content), Err(MkfsError::Links)));
    for name in ["user.", "system.posix_acl_access", "btrfs.x", ""] {
        assert_eq!(Xattr::new(name.as_bytes(), b""), None);
    }
}
