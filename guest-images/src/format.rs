//! Tells by their first bytes the files that are not what an import needs.

/// Bytes from the beginning that the checks look at.
pub(crate) const HEAD_BYTES: usize = 4096;

/// A known format that is not a raw disk: its name, where its magic is, the magic.
const FOREIGN: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("Android sparse", 0, b"\x3a\xff\x26\xed"),
];

/// Compressed files: name, magic, the command that unpacks them.
const COMPRESSED: &[(&str, &[u8], &str)] = &[
    ("gzip", b"\x1f\x8b\x08", "gunzip"),
    ("xz", b"\xfd7zXZ\0", "unxz"),
    ("zstd", b"\x28\xb5\x2f\xfd", "unzstd"),
    ("bzip2", b"BZh91AY&SY", "bunzip2"),
    ("lz4", b"\x04\x22\x4d\x18", "unlz4"),
];

/// Why a file cannot be that part. Reads well after the file's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A disk image of another format.
    #[error("is a {0} image, a raw one is needed: convert it with `qemu-img convert -O raw`")]
    ForeignDisk(&'static str),
    /// A compressed file.
    #[error("is compressed with {0}: unpack it with `{1}` first")]
    Compressed(&'static str, &'static str),
    /// An ELF file for another machine.
    #[error("is an ELF file for machine {0}; a 64-bit x86 kernel (machine 62) is needed")]
    ElfMachine(u16),
    /// An ELF file that is not 64-bit little-endian.
    #[error("is a 32-bit or big-endian ELF file; a 64-bit x86 kernel is needed")]
    ElfClass,
    /// Nothing that boots.
    #[error("is neither a bzImage (such as /boot/vmlinuz-*) nor an ELF kernel (vmlinux)")]
    NoKernel,
}

fn has(head: &[u8], at: usize, magic: &[u8]) -> bool {
    head.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

pub(crate) fn check_compressed(head: &[u8]) -> Result<(), FormatError> {
    match COMPRESSED.iter().find(|(_, magic, _)| has(head, 0, magic)) {
        Some((name, _, command)) => Err(FormatError::Compressed(name, command)),
        None => Ok(()),
    }
}

/// Refuses what is certainly not a raw disk. Anything may be one.
pub(crate) fn check_disk(head: &[u8]) -> Result<(), FormatError> {
    if let Some((name, ..)) = FOREIGN.iter().find(|(_, at, magic)| has(head, *at, magic)) {
        return Err(FormatError::ForeignDisk(name));
    }
    check_compressed(head)
}

/// Accepts a bzImage or a 64-bit x86 ELF file.
pub(crate) fn check_kernel(head: &[u8]) -> Result<(), FormatError> {
    if has(head, 0, b"\x7fELF") {
        if !has(head, 4, &[2, 1]) {
            return Err(FormatError::ElfClass);
        }
        let machine = head.get(18..20).and_then(|bytes| bytes.first_chunk::<2>());
        return match machine.map(|bytes| u16::from_le_bytes(*bytes)) {
            Some(62) => Ok(()),
            other => Err(FormatError::ElfMachine(other.unwrap_or_default())),
        };
    }
    if has(head, 0x1fe, &[0x55, 0xaa]) && has(head, 0x202, b"HdrS") {
        return Ok(());
    }
    check_compressed(head)?;
    Err(FormatError::NoKernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn foreign_disks_are_named_with_the_way_out() {
        for (name, at, magic) in FOREIGN {
            let error = check_disk(&with(*at, magic)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("qemu-img convert -O raw"), "{error}");
        }
        for (_, magic, command) in COMPRESSED {
            let error = check_disk(&with(0, magic)).unwrap_err().to_string();
            assert!(error.contains(command), "{error}");
        }
        // A boot sector, an ext4 superblock, nothing at all.
        check_disk(&with(510, &[0x55, 0xaa])).unwrap();
        check_disk(&with(1080, &[0x53, 0xef])).unwrap();
        check_disk(&[]).unwrap();
    }

    #[test]
    fn kernels_are_told_from_the_rest() {
        let mut bzimage = with(0x1fe, &[0x55, 0xaa]);
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        check_kernel(&bzimage).unwrap();
        bzimage[0x202] = 0;
        assert_eq!(check_kernel(&bzimage), Err(FormatError::NoKernel));

        let mut elf = with(0, b"\x7fELF\x02\x01");
        elf[18] = 62;
        check_kernel(&elf).unwrap();
        elf[18] = 183;
        assert_eq!(check_kernel(&elf), Err(FormatError::ElfMachine(183)));
        elf[4] = 1;
        assert_eq!(check_kernel(&elf), Err(FormatError::ElfClass));

        assert_eq!(check_kernel(b""), Err(FormatError::NoKernel));
        assert_eq!(check_kernel(b"\x7fELF"), Err(FormatError::ElfClass));
        assert_eq!(check_kernel(b"\x7fELF\x02\x01"), Err(FormatError::ElfMachine(0)));
        assert!(matches!(check_kernel(b"\x1f\x8b\x08"), Err(FormatError::Compressed("gzip", _))));
    }
}
