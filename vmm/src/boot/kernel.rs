//! Kernel and initramfs files: recognised, checked, and put into guest RAM.

use std::{
    fs::File,
    io::{Cursor, Read},
    path::Path,
};

use guest_images::CHUNK_SIZE;
use linux_loader::loader::{BzImage, Elf, KernelLoader, bootparam::setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BootError, KernelError};
use crate::{
    layout::{HIMEM_START, KERNEL_LOAD},
    memory::GuestRam,
};

/// Largest kernel file: far above any that is built.
const KERNEL_MAX_BYTES: u64 = 512 << 20;
/// Largest initramfs.
const INITRAMFS_MAX_BYTES: u64 = 1 << 30;
/// Offset of the setup header in a bzImage.
const SETUP_HEADER: usize = 0x1f1;
/// Offset of the setup header's magic in a bzImage.
const SETUP_MAGIC: usize = 0x202;
/// Bytes that must be there before anything of a bzImage is believed.
const SETUP_HEADER_END: usize = 0x26c;
const SECTOR_BYTES: u64 = 512;
/// `syssize` counts these.
const PARAGRAPH_BYTES: u64 = 16;
/// First boot protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// Where a bzImage's 64-bit entry point is, from its load address.
const ENTRY_64: u64 = 0x200;
/// Up to where kernels accept an initramfs when their header does not say.
const INITRAMFS_ADDRESS_MAX: u64 = 0x7fff_ffff;

/// A kernel in guest RAM.
#[derive(Debug)]
pub(super) struct LoadedKernel {
    /// Where the first vCPU starts.
    pub(super) entry: GuestAddress,
    /// First address that the kernel does not use while it unpacks itself.
    pub(super) end: u64,
    /// The bzImage's header; an ELF kernel has none.
    pub(super) header: Option<setup_header>,
}

/// An initramfs in guest RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoadedInitramfs {
    pub(super) address: GuestAddress,
    pub(super) bytes: u64,
}

/// First address after low RAM.
fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.iter().next().map_or(0, |region| region.len())
}

pub(super) fn load(ram: &GuestRam, path: &Path) -> Result<LoadedKernel, BootError> {
    let image = read(path)?;
    load_image(ram, &image).map_err(|why| BootError::Kernel { path: path.into(), why })
}

fn read(path: &Path) -> Result<Vec<u8>, BootError> {
    let failed = |source| BootError::Read { what: "kernel", path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let mut image = Vec::new();
    file.take(KERNEL_MAX_BYTES + 1).read_to_end(&mut image).map_err(failed)?;
    let bytes = image.len() as u64;
    if bytes > KERNEL_MAX_BYTES {
        let (what, path, max) = ("kernel", path.into(), KERNEL_MAX_BYTES);
        return Err(BootError::TooLarge { what, path, bytes, max });
    }
    Ok(image)
}

fn load_image(ram: &GuestRam, image: &[u8]) -> Result<LoadedKernel, KernelError> {
    match image {
        [0x7f, b'E', b'L', b'F', ..] => load_elf(ram, image),
        [0x1f, 0x8b, ..] => Err(KernelError::Compressed("gzip")),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(KernelError::Compressed("xz")),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Err(KernelError::Compressed("zstd")),
        _ if image.get(SETUP_MAGIC..SETUP_MAGIC + 4) == Some(b"HdrS") => load_bzimage(ram, image),
        _ => Err(KernelError::Foreign(image.iter().take(8).copied().collect())),
    }
}

/// The header fields that decide whether a bzImage can be loaded, read by hand because they must
/// be checked before the loader believes them.
struct BzHeader {
    version: u16,
    file_bytes: u64,
    xloadflags: u16,
    init_bytes: u64,
}

impl BzHeader {
    fn parse(image: &[u8]) -> Result<Self, KernelError> {
        let bytes = image.len() as u64;
        let truncated = |needed| KernelError::Truncated { bytes, needed };
        let header =
            image.get(SETUP_HEADER..SETUP_HEADER_END).ok_or(truncated(SETUP_HEADER_END as u64))?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| u64::from(u16_at(at)) | u64::from(u16_at(at + 2)) << 16;
        let setup_sectors = if header[0] == 0 { 4 } else { u64::from(header[0]) };
        let file_bytes =
            (setup_sectors + 1) * SECTOR_BYTES + u32_at(0x1f4 - SETUP_HEADER) * PARAGRAPH_BYTES;
        if bytes < file_bytes {
            return Err(truncated(file_bytes));
        }
        Ok(Self {
            version: u16_at(0x206 - SETUP_HEADER),
            file_bytes,
            xloadflags: u16_at(0x236 - SETUP_HEADER),
            init_bytes: u32_at(0x260 - SETUP_HEADER),
        })
    }
}

fn load_bzimage(ram: &GuestRam, image: &[u8]) -> Result<LoadedKernel, KernelError> {
    let header = BzHeader::parse(image)?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64Bit { version: header.version });
    }
    let end = KERNEL_LOAD + header.init_bytes.max(header.file_bytes);
    check_fits(ram, end)?;
    let loaded = BzImage::load(
        ram,
        Some(GuestAddress(KERNEL_LOAD)),
        &mut Cursor::new(image),
        Some(GuestAddress(HIMEM_START)),
    )?;
    Ok(LoadedKernel {
        entry: GuestAddress(KERNEL_LOAD + ENTRY_64),
        end: end.max(loaded.kernel_end),
        header: loaded.setup_header,
    })
}

fn load_elf(ram: &GuestRam, image: &[u8]) -> Result<LoadedKernel, KernelError> {
    let loaded = Elf::load(ram, None, &mut Cursor::new(image), Some(GuestAddress(HIMEM_START)))?;
    check_fits(ram, loaded.kernel_end)?;
    Ok(LoadedKernel { entry: loaded.kernel_load, end: loaded.kernel_end, header: None })
}

fn check_fits(ram: &GuestRam, needed: u64) -> Result<(), KernelError> {
    let available = low_ram_end(ram);
    if needed <= available { Ok(()) } else { Err(KernelError::DoesNotFit { needed, available }) }
}

/// Puts the initramfs as high as the kernel allows, so that it is out of the unpacking kernel's way.
pub(super) fn load_initramfs(
    ram: &GuestRam,
    path: &Path,
    kernel: &LoadedKernel,
) -> Result<LoadedInitramfs, BootError> {
    let what = "initramfs";
    let failed = |source| BootError::Read { what, path: path.into(), source };
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > INITRAMFS_MAX_BYTES {
        let (path, max) = (path.into(), INITRAMFS_MAX_BYTES);
        return Err(BootError::TooLarge { what, path, bytes, max });
    }
    let highest = kernel.header.map_or(INITRAMFS_ADDRESS_MAX, |h| u64::from(h.initrd_addr_max));
    let limit = low_ram_end(ram).min(highest + 1);
    let address = limit
        .checked_sub(bytes)
        .map(|address| address & !(CHUNK_SIZE as u64 - 1))
        .filter(|address| *address >= kernel.end)
        .ok_or(BootError::InitramfsDoesNotFit { bytes, kernel_end: kernel.end, limit })?;
    let address = GuestAddress(address);
    ram.read_exact_volatile_from(address, &mut file, bytes as usize)?;
    Ok(LoadedInitramfs { address, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{layout::MIN_MEMORY_BYTES, memory};

    /// A bzImage that has all the right fields and no kernel in it.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x1f4..0x1f8].copy_from_slice(&(3072u32 / 16).to_le_bytes());
        image[SETUP_MAGIC..SETUP_MAGIC + 4].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[1024..].fill(0x90);
        image
    }

    fn ram() -> GuestRam {
        memory::allocate(MIN_MEMORY_BYTES).unwrap()
    }

    #[test]
    fn a_bzimage_is_loaded() {
        let ram = ram();
        let kernel = load_image(&ram, &bzimage()).unwrap();
        assert_eq!(kernel.entry.0, KERNEL_LOAD + 0x200);
        assert_eq!(kernel.end, KERNEL_LOAD + 0x10_0000);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(KERNEL_LOAD)).unwrap(), 0x90);
    }

    #[test]
    fn what_is_not_a_kernel_says_so() {
        let check = |image: &[u8], expected: &str| {
            let said = load_image(&ram(), image).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        };
        check(b"", "neither");
        check(b"#!/bin/sh\n", "neither");
        check(&[0x1f, 0x8b, 8, 0], "gzip-compressed");
        check(b"\x7fELF", "header");
        check(&bzimage()[..4095], "truncated: 4095 bytes of 4096");
        check(&bzimage()[..0x220], "truncated");
        let mut old = bzimage();
        old[0x206] = 4;
        check(&old, "no 64-bit entry point");
        let mut huge = bzimage();
        huge[0x263] = 0x7f;
        check(&huge, "needs guest memory up to");
    }

    /// Whatever a file holds, loading it returns.
    #[test]
    fn corrupted_kernels_never_panic() {
        let whole = bzimage();
        for at in (0..0x280).chain([1023, 1024]) {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = whole.clone();
                image[at] = value;
                let _ = load_image(&ram(), &image);
                let _ = load_image(&ram(), &image[..at]);
            }
        }
    }

    #[test]
    fn the_initramfs_lies_above_the_kernel() {
        let ram = ram();
        let kernel = load_image(&ram, &bzimage()).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, &[5; 5000]).unwrap();
        let loaded = load_initramfs(&ram, file.path(), &kernel).unwrap();
        assert_eq!(loaded.address.0, MIN_MEMORY_BYTES - 8192);
        assert_eq!(loaded.bytes, 5000);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(loaded.address.0 + 4999)).unwrap(), 5);
        file.as_file().set_len(MIN_MEMORY_BYTES).unwrap();
        assert!(matches!(
            load_initramfs(&ram, file.path(), &kernel),
            Err(BootError::InitramfsDoesNotFit { .. })
        ));
    }
}
