//! File systems made by `mke2fs`, as recipes make theirs; skipped where there is none.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use proptest::prelude::*;

use super::*;

/// An image with an MBR whose second partition is an ext4 file system with these files. Content `-> path` is a
/// symbolic link.
fn image(files: &[(&str, &str)]) -> Option<tempfile::NamedTempFile> {
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = dir.path().join("root").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("-> ") {
            Some(target) => symlink(target, path).unwrap(),
            None => fs::write(path, content).unwrap(),
        }
    }
    let system = dir.path().join("fs");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(dir.path().join("root"))
        .arg(&system)
        .arg("4M")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdout(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) || !Path::new(&system).exists() {
        eprintln!("skipped: no mke2fs that works; `make setup` installs it");
        return None;
    }
    let system = fs::read(system).unwrap();
    let mut disk = vec![0; 1 << 20];
    disk[440..444].copy_from_slice(&7u32.to_le_bytes());
    disk[466] = 0x83;
    disk[470..474].copy_from_slice(&2048u32.to_le_bytes());
    disk[474..478].copy_from_slice(&(system.len() as u32 / 512).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(system);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), disk).unwrap();
    Some(file)
}

/// As much of an ELF kernel as is looked at, and what tells one from another.
macro_rules! kernel {
    ($name:literal) => {
        concat!("\x7fELF\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0>\0", $name)
    };
}

const GRUB: &str = "
set default=0
if [ x$feature = xy ]; then
  linux_gfx_mode=keep
fi
menuentry 'Debian GNU/Linux' --class debian {
        echo    'Loading Linux 6.12 ...'
        linux   /boot/vmlinuz-6.12 root=PARTUUID=5f3a ro  console=tty0 console=ttyS0,115200 $extra
        initrd  /boot/initrd.img-6.12
}
menuentry 'recovery' {
        linux   /boot/vmlinuz-6.11 single
        initrd  /boot/initrd.img-6.11
}
";

#[test]
fn a_disk_boots_as_its_loader_would_boot_it() {
    let files = [
        ("boot/grub/grub.cfg", GRUB),
        ("boot/vmlinuz-6.12", kernel!("new")),
        ("boot/initrd.img-6.12", "initrd"),
        ("boot/vmlinuz-6.11", "old"),
        ("etc/fstab", ""),
    ];
    let Some(disk) = image(&files) else { return };
    let boot = find(disk.as_file()).unwrap();
    assert_eq!(boot.kernel, kernel!("new").as_bytes());
    assert_eq!(boot.initramfs.as_deref(), Some(b"initrd".as_slice()));
    assert_eq!(boot.cmdline, "root=PARTUUID=5f3a ro console=tty0 console=ttyS0,115200");
    assert_eq!(boot.found, "/boot/grub/grub.cfg of partition 2");
}

#[test]
fn without_a_loader_the_newest_kernel_is_taken() {
    let files = [
        ("boot/vmlinuz-6.9", "a"),
        ("boot/vmlinuz-6.12", kernel!("b")),
        ("boot/initrd.img-6.12", "c"),
    ];
    let Some(disk) = image(&files) else { return };
    let boot = find(disk.as_file()).unwrap();
    assert_eq!(
        (boot.kernel, boot.initramfs),
        (kernel!("b").as_bytes().to_vec(), Some(b"c".to_vec()))
    );
    assert_eq!(boot.cmdline, "ro root=PARTUUID=00000007-02 console=ttyS0");
    let Some(empty) = image(&[("etc/fstab", "")]) else { return };
    let why = find(empty.as_file()).unwrap_err().to_string();
    assert!(why.contains("no /boot") && why.contains("--kernel"), "{why}");
    let Some(text) = image(&[("boot/vmlinuz-1", "no kernel at all")]) else { return };
    let why = find(text.as_file()).unwrap_err().to_string();
    assert!(why.contains("/boot/vmlinuz-1") && why.contains("bzImage"), "{why}");
    let Some(gone) = image(&[("boot/grub/grub.cfg", GRUB)]) else { return };
    let why = find(gone.as_file()).unwrap_err().to_string();
    assert!(why.contains("/boot/vmlinuz-6.12"), "{why}");
}

#[test]
fn links_are_followed_inside_of_the_image_and_not_for_ever() {
    let entry = "linux /vmlinuz ro\ninitrd /initrd.img\n";
    let sound = [
        ("boot/grub/grub.cfg", entry),
        ("vmlinuz", "-> boot/../boot/./vmlinuz-1"),
        ("initrd.img", "-> /boot/../../../boot/initrd-1"),
        ("boot/vmlinuz-1", kernel!("linked")),
        ("boot/initrd-1", "initrd"),
    ];
    let Some(disk) = image(&sound) else { return };
    let boot = find(disk.as_file()).unwrap();
    assert_eq!(
        (boot.kernel, boot.initramfs),
        (kernel!("linked").as_bytes().to_vec(), Some(b"initrd".to_vec()))
    );
    for (vmlinuz, says) in
        [("-> vmlinuz", "symbolic links"), ("-> /etc/hostname", "NotFound"), ("-> boot", "regular")]
    {
        let files = [("boot/grub/grub.cfg", entry), ("vmlinuz", vmlinuz)];
        let Some(disk) = image(&files) else { return };
        let why = find(disk.as_file()).unwrap_err().to_string();
        assert!(why.contains("/vmlinuz") && (why.contains(says) || says == "NotFound"), "{why}");
    }
}

#[test]
fn sizes_that_nobody_makes_are_not_believed() {
    let files = [("boot/vmlinuz-1", "kernel")];
    // Where in the superblock, and what: the size of blocks, their count, blocks in a group.
    for (at, bytes) in
        [(0x18, [20, 0, 0, 0]), (0x18, [0xff; 4]), (0x4, [0xff; 4]), (0x20, [1, 0, 0, 0])]
    {
        let Some(disk) = image(&files) else { return };
        let mut content = fs::read(disk.path()).unwrap();
        let at = (1 << 20) + 1024 + at;
        content[at..at + 4].copy_from_slice(&bytes);
        fs::write(disk.path(), content).unwrap();
        let why = find(disk.as_file()).unwrap_err().to_string();
        assert!(why.contains("ext4 file system that can be read"), "{why}");
    }
}

/// However an image is damaged, it is read or refused.
#[test]
fn a_damaged_disk_is_survived() {
    let files = [
        ("boot/grub/grub.cfg", GRUB),
        ("boot/vmlinuz-6.12", kernel!("k")),
        ("boot/initrd.img-6.12", "i"),
    ];
    let Some(disk) = image(&files) else { return };
    let sound = fs::read(disk.path()).unwrap();
    let damage =
        prop::collection::vec((0..sound.len().min(1 << 20 | 160 << 10), any::<u8>()), 1..40);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) };
    proptest::test_runner::TestRunner::new(config)
        .run(&damage, |damage| {
            // Most of it where the file system keeps its own.
            let mut bytes = sound.clone();
            for (at, byte) in damage {
                let at = (1 << 20) + at % (160 << 10);
                bytes[at] = byte;
            }
            fs::write(disk.path(), &bytes).unwrap();
            let _ = find(disk.as_file());
            Ok(())
        })
        .unwrap();
}
