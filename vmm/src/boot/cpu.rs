//! How the first vCPU starts: long mode, flat segments, low 4 GiB mapped one to one.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::{
    layout::{
        ACPI_RESET_PORT, ACPI_RESET_VALUE, BOOT_GDT, BOOT_IDT, BOOT_PAGE_TABLES, BOOT_STACK,
        RESET_VECTOR, ZERO_PAGE,
    },
    memory::GuestRam,
};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// x87 control word after FNINIT.
const FPU_CONTROL: u16 = 0x37f;
/// MXCSR after reset.
const MXCSR: u32 = 0x1f80;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7;
const APIC_MODE_NMI: u32 = 4;

const PAGE_BYTES: u64 = 0x1000;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
/// Page directories: 1 GiB each, so that all of low memory is mapped.
const PAGE_DIRECTORIES: u64 = 4;

/// GDT: selectors 0x10 (code) and 0x18 (data) as the boot protocol asks, 0x20 a task state segment.
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TSS: u16 = 0x20;

/// The state in which the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootCpu {
    /// Its first instruction.
    pub entry: GuestAddress,
}

/// Real-mode code at the reset vector, for kernels that restart by jumping there: asks for a reset
/// through the ACPI register, then halts.
const RESET_CODE: [u8; 9] = [
    0xba,
    ACPI_RESET_PORT as u8,
    (ACPI_RESET_PORT >> 8) as u8, // mov dx, port
    0xb0,
    ACPI_RESET_VALUE, // mov al, value
    0xee,             // out dx, al
    0xf4,             // hlt
    0xeb,
    0xfd, // jmp to hlt
];

/// Writes GDT, IDT, page tables and the reset vector.
pub(super) fn write_tables(ram: &GuestRam) -> Result<(), BootError> {
    ram.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))?;
    for (n, entry) in GDT.iter().enumerate() {
        ram.write_obj(*entry, GuestAddress(BOOT_GDT + n as u64 * 8))?;
    }
    ram.write_obj(0u64, GuestAddress(BOOT_IDT))?;

    let pml4 = BOOT_PAGE_TABLES;
    let pdpt = pml4 + PAGE_BYTES;
    ram.write_obj(pdpt | PAGE_PRESENT_WRITABLE, GuestAddress(pml4))?;
    for directory in 0..PAGE_DIRECTORIES {
        let table = pdpt + (directory + 1) * PAGE_BYTES;
        ram.write_obj(table | PAGE_PRESENT_WRITABLE, GuestAddress(pdpt + directory * 8))?;
        for entry in 0..512 {
            let maps = (directory * 512 + entry) * LARGE_PAGE_BYTES;
            ram.write_obj(
                maps | PAGE_PRESENT_WRITABLE | PAGE_LARGE,
                GuestAddress(table + entry * 8),
            )?;
        }
    }
    Ok(())
}

impl BootCpu {
    /// Gives the state to a vCPU whose CPUID is set.
    pub fn apply(self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        sregs.cs = segment(SELECTOR_CODE);
        let data = segment(SELECTOR_DATA);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(SELECTOR_TSS);
        sregs.gdt.base = BOOT_GDT;
        sregs.gdt.limit = size_of_val(&GDT) as u16 - 1;
        sregs.idt.base = BOOT_IDT;
        sregs.idt.limit = size_of::<u64>() as u16 - 1;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = BOOT_PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs {
            rip: self.entry.0,
            rsi: ZERO_PAGE,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        })
    }
}

/// What every vCPU has after reset and KVM does not give: FPU, memory types, interrupt wiring.
///
/// `xcr0` are all extended states of its CPUID. They are switched on from the start, not only when
/// the guest does it: a host that is itself a guest may run on a hypervisor that does not tell KVM of
/// the guest's XSETBV (QEMU's emulated SVM), and KVM would then lose the guest's vector registers.
pub fn setup_vcpu(vcpu: &VcpuFd, xcr0: Option<u64>) -> Result<(), kvm_ioctls::Error> {
    if let Some(value) = xcr0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = value;
        vcpu.set_xcrs(&xcrs)?;
    }
    vcpu.set_fpu(&kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() })?;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = [
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&msrs).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    if vcpu.set_msrs(&msrs)? != msrs.as_slice().len() {
        return Err(kvm_ioctls::Error::new(libc::EINVAL));
    }
    setup_lapic(vcpu)
}

/// Wires LINT0 to the PIC and LINT1 to NMI, as firmware does.
fn setup_lapic(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
        // The delivery mode is in bits 8 to 10, so in the register's second byte.
        let byte = &mut lapic.regs[register + 1];
        *byte = (*byte as u8 & !7 | mode as u8) as _;
    }
    vcpu.set_lapic(&lapic)
}

/// What the CPU would load from the boot GDT.
fn segment(selector: u16) -> kvm_segment {
    let entry = GDT[usize::from(selector / 8)];
    let bit = |at: u32| (entry >> at & 1) as u8;
    let granular = bit(55) == 1;
    let limit = (entry & 0xffff | entry >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: entry >> 16 & 0xff_ffff | entry >> 32 & 0xff00_0000,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (entry >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (entry >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{layout::MIN_MEMORY_BYTES, memory};

    #[test]
    fn segments_are_what_the_gdt_says() {
        let code = segment(SELECTOR_CODE);
        assert_eq!((code.base, code.limit, code.type_), (0, 0xffff_ffff, 0xb));
        assert_eq!((code.l, code.db, code.s, code.present), (1, 0, 1, 1));
        let data = segment(SELECTOR_DATA);
        assert_eq!((data.l, data.db, data.g, data.type_), (0, 1, 1, 3));
        let tss = segment(SELECTOR_TSS);
        assert_eq!((tss.s, tss.type_, tss.present), (0, 0xb, 1));
    }

    #[test]
    fn low_memory_is_mapped_one_to_one() {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        write_tables(&ram).unwrap();
        let read = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0, 0x1234_5678, 0x100_0200, 0xffff_f000u64] {
            let pdpt = read(BOOT_PAGE_TABLES) & !0xfff;
            let directory = read(pdpt + (address >> 30) * 8) & !0xfff;
            let entry = read(directory + (address >> 21 & 0x1ff) * 8);
            assert_eq!(entry & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(entry & 0x83, 0x83);
        }
    }
}
