//! The zero page: what a boot loader tells the kernel.

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    BootError,
    kernel::{LoadedInitramfs, LoadedKernel},
};
use crate::{
    layout::{CMDLINE, EBDA_START, HIMEM_START, ZERO_PAGE},
    memory::GuestRam,
};

const BOOT_FLAG: u16 = 0xaa55;
const SETUP_MAGIC: u32 = 0x5372_6448;
/// A boot loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// What an ELF kernel, which has no header to say so, is aligned to.
const ELF_KERNEL_ALIGN: u32 = 0x100_0000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn write(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    initramfs: Option<LoadedInitramfs>,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    match kernel.header {
        Some(header) => params.hdr = header,
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = SETUP_MAGIC;
            params.hdr.kernel_alignment = ELF_KERNEL_ALIGN;
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some(initramfs) = initramfs {
        // Both are below 2 GiB: `load_initramfs` saw to it.
        params.hdr.ramdisk_image = initramfs.address.0 as u32;
        params.hdr.ramdisk_size = initramfs.bytes as u32;
    }
    params.acpi_rsdp_addr = rsdp.0;
    let map = e820(ram);
    params.e820_entries = map.len() as u8;
    params.e820_table.get_mut(..map.len()).ok_or(BootError::TooManyRegions)?.copy_from_slice(&map);
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, ram).map_err(|_| BootError::TooManyRegions)
}

/// What is RAM: all of it but the BIOS area, which holds the ACPI tables.
fn e820(ram: &GuestRam) -> Vec<boot_e820_entry> {
    let mut map = vec![
        boot_e820_entry { addr: 0, size: EBDA_START, r#type: E820_RAM },
        boot_e820_entry { addr: EBDA_START, size: HIMEM_START - EBDA_START, r#type: E820_RESERVED },
    ];
    for region in ram.iter() {
        let start = region.start_addr().0.max(HIMEM_START);
        let end = region.start_addr().0 + region.len();
        map.push(boot_e820_entry { addr: start, size: end - start, r#type: E820_RAM });
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::{layout::MMIO_WINDOW_START, memory};

    #[test]
    fn the_kernel_is_told_of_all_ram_but_the_bios_area() {
        let ram = memory::allocate(5 << 30).unwrap();
        let kernel = LoadedKernel { entry: GuestAddress(0), end: 0, header: None };
        let initramfs = LoadedInitramfs { address: GuestAddress(0x4000_0000), bytes: 77 };
        write(&ram, &kernel, Some(initramfs), GuestAddress(0xe_0000)).unwrap();
        let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!(params.e820_entries, 4);
        let table = params.e820_table;
        let entry = |n: usize| {
            let e = table[n];
            (e.addr, e.size, e.r#type)
        };
        assert_eq!(entry(0), (0, 0x9_fc00, 1));
        assert_eq!(entry(1), (0x9_fc00, 0x6_0400, 2));
        assert_eq!(entry(2), (0x10_0000, MMIO_WINDOW_START - 0x10_0000, 1));
        assert_eq!(entry(3), (1 << 32, (5 << 30) - MMIO_WINDOW_START, 1));
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 77);
    }
}
