//! Where everything is in the guest's physical address space, port space and interrupt space.
//!
//! ```text
//! 0x0000_0000  real-mode data, zero page, boot page tables, command line      RAM
//! 0x0009_fc00  EBDA and BIOS area; ACPI tables at 0xe_0000                     RAM, reserved in e820
//! 0x0010_0000  kernel at 16 MiB, initramfs as high as fits below the window    RAM
//! 0xd000_0000  device window: virtio-mmio slots, IOAPIC, LAPIC, KVM's TSS      no RAM
//! 0x1_0000_0000  the rest of RAM
//! ```
//!
//! The layout is part of what a saved machine state means: changing it needs a new state version
//! ([`crate::state::VERSION`]).

/// Where the device window begins: RAM below it, none inside it.
pub const MMIO_WINDOW_START: u64 = 0xd000_0000;
/// Where the device window ends and high RAM begins.
pub const MMIO_WINDOW_END: u64 = 1 << 32;

/// Least guest memory: room for a Debian kernel, unpacked, and its initramfs.
pub const MIN_MEMORY_BYTES: u64 = 32 << 20;
/// Most guest memory.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Most vCPUs: APIC ids stay below 255, so that the guest needs no x2APIC.
pub const MAX_VCPUS: u8 = 64;

/// Address of virtio-mmio slot 0.
pub const VIRTIO_MMIO_START: u64 = MMIO_WINDOW_START;
/// Distance of slots. One page each, so that a slot never shares a page with another.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Bytes of a slot that the device answers.
pub const VIRTIO_MMIO_SIZE: u64 = 0x200;
/// Interrupt of slot 0; slot n has this plus n.
pub const VIRTIO_GSI_START: u32 = 5;
/// How many slots there are: the IOAPIC has 24 pins.
pub const VIRTIO_SLOTS: usize = 8;

/// Guest-physical address of virtio-mmio slot `slot`.
pub const fn virtio_mmio_address(slot: usize) -> u64 {
    VIRTIO_MMIO_START + slot as u64 * VIRTIO_MMIO_STRIDE
}

/// Interrupt line of virtio-mmio slot `slot`.
pub const fn virtio_gsi(slot: usize) -> u32 {
    VIRTIO_GSI_START + slot as u32
}

/// First port of the serial console, COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// How many ports COM1 has.
pub const COM1_PORTS: u16 = 8;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;

/// First port of the i8042 keyboard controller; 0xfe written to [`I8042_COMMAND_PORT`] resets.
pub const I8042_PORT: u16 = 0x60;
/// How many ports the i8042 answers, from [`I8042_PORT`] on.
pub const I8042_PORTS: u16 = 5;
/// The i8042's command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// ACPI sleep control register: one byte; SLP_EN is bit 5, SLP_TYP bits 2 to 4.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register: one byte, WAK_STS is bit 7.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register: one byte, [`ACPI_RESET_VALUE`] resets.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// How many ports the ACPI power device has, from [`ACPI_SLEEP_CONTROL_PORT`] on.
pub const ACPI_PORTS: u16 = 3;
/// What the guest writes to [`ACPI_RESET_PORT`] to reset.
pub const ACPI_RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off), as `\_S5` tells the guest.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;

/// IOAPIC registers.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Three pages that KVM uses as a task state segment on Intel.
pub const KVM_TSS_ADDRESS: usize = 0xfffb_d000;
/// One page that KVM uses as an identity map on Intel.
pub const KVM_IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Boot GDT.
pub const BOOT_GDT: u64 = 0x500;
/// Boot IDT: empty.
pub const BOOT_IDT: u64 = 0x540;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Boot page tables: PML4, then PDPT, then page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its terminating zero: what x86 kernels accept.
pub const CMDLINE_MAX: usize = 2048;
/// First byte that e820 does not give to the guest in low memory: the extended BIOS data area.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables, RSDP first: where guests search for one without being told.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Where a CPU goes to start over in real mode. ACPI tables end before it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where high memory begins, and with it RAM that e820 gives to the guest again.
pub const HIMEM_START: u64 = 0x10_0000;
/// Where a bzImage is loaded: its preferred address.
pub const KERNEL_LOAD: u64 = 0x100_0000;
