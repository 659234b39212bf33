//! ACPI tables: how a stock kernel finds CPUs, interrupts, the console and virtio-mmio devices.
//!
//! Hardware-reduced ACPI 6: no fixed hardware, power-off and reset through three ports
//! ([`crate::devices::legacy`]). Debian's kernels look for virtio-mmio nowhere but in the DSDT
//! (`_HID` "LNRO0005").

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate},
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::{
    layout::{
        ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_S5_SLEEP_TYPE, ACPI_SLEEP_CONTROL_PORT,
        ACPI_SLEEP_STATUS_PORT, ACPI_TABLES, COM1_GSI, COM1_PORT, COM1_PORTS, IOAPIC_ADDRESS,
        LAPIC_ADDRESS, RESET_VECTOR, VIRTIO_MMIO_SIZE, virtio_gsi, virtio_mmio_address,
    },
    memory::GuestRam,
};

const OEM_ID: [u8; 6] = *b"HOWDAH";
const OEM_TABLE_ID: [u8; 8] = *b"HOWDAHVM";
const OEM_REVISION: u32 = 1;
/// Tables begin on 16-byte boundaries: the RSDP must, the others may.
const TABLE_ALIGN: u64 = 16;

/// IAPC_BOOT_ARCH: do not probe for VGA.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// IAPC_BOOT_ARCH: there is no CMOS clock; the time comes from kvmclock.
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables and returns the RSDP's address.
pub(super) fn write(ram: &GuestRam, vcpus: u8, slots: &[usize]) -> Result<GuestAddress, BootError> {
    let rsdp_at = ACPI_TABLES;
    let mut next = align(rsdp_at + Rsdp::len() as u64);
    let mut put = |bytes: &[u8]| -> Result<u64, BootError> {
        let at = next;
        let end = at + bytes.len() as u64;
        if end > RESET_VECTOR {
            return Err(BootError::AcpiTooLarge);
        }
        ram.write_slice(bytes, GuestAddress(at))?;
        next = align(end);
        Ok(at)
    };
    let dsdt = put(dsdt(slots).as_slice())?;
    let fadt = put(&bytes_of(&fadt(dsdt)))?;
    let madt = put(&bytes_of(&madt(vcpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes_of(&xsdt))?;
    ram.write_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp_at))?;
    Ok(GuestAddress(rsdp_at))
}

fn align(address: u64) -> u64 {
    address.next_multiple_of(TABLE_ALIGN)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // No fixed buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = port(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDRESS),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

fn dsdt(slots: &[usize]) -> Sdt {
    const HEADER_BYTES: u32 = 36;
    const REVISION: u8 = 6;
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let s5 = Package::new(vec![&ACPI_S5_SLEEP_TYPE, &ACPI_S5_SLEEP_TYPE, &0u8, &0u8]);
    let mut aml = bytes_of(&Name::new("_S5_".into(), &s5));
    com1(&mut aml);
    for &slot in slots {
        virtio(&mut aml, slot);
    }
    dsdt.append_slice(&aml);
    dsdt
}

fn com1(aml: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, COM1_GSI),
                    &IO::new(COM1_PORT, COM1_PORT, 1, COM1_PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn virtio(aml: &mut Vec<u8>, slot: usize) {
    // The window lies below 4 GiB: `layout` says so.
    let (base, len) = (virtio_mmio_address(slot) as u32, VIRTIO_MMIO_SIZE as u32);
    Device::new(
        Path::new(&format!("_SB_.VR{slot:02}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(slot as u8)),
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, len),
                    &Interrupt::new(true, true, false, false, virtio_gsi(slot)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layout::{MAX_VCPUS, MIN_MEMORY_BYTES, VIRTIO_SLOTS},
        memory,
    };

    fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(ram, at + 4, 4).try_into().unwrap());
        let table = read(ram, at, len as usize);
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        table
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_guest_can_walk_the_tables() {
        let ram = memory::allocate(MIN_MEMORY_BYTES).unwrap();
        let slots: Vec<usize> = (0..VIRTIO_SLOTS).collect();
        let rsdp = write(&ram, MAX_VCPUS, &slots).unwrap();
        let rsdp = read(&ram, rsdp.0, Rsdp::len());
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&ram, u64_at(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&ram, u64_at(&xsdt, 36));
        let madt = table(&ram, u64_at(&xsdt, 44));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(madt.len(), 44 + usize::from(MAX_VCPUS) * 8 + 12);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
        let dsdt = table(&ram, u64_at(&fadt, 140));
        let count = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
        assert_eq!(count, VIRTIO_SLOTS);
        assert!(dsdt.windows(4).any(|w| w == b"_S5_"));
    }
}
