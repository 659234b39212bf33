//! The CPU that the guest sees: what KVM supports, less what cannot be moved, with topology.
//!
//! Left out, because a machine state that holds it cannot be carried to another host in full:
//! nested virtualisation (VMX, SVM), performance counters, asynchronous page faults and waking halted
//! vCPUs by hypercall (a wake-up that the source owes never comes from the target: KVM does not give
//! the kick of a vCPU that is about to halt, and one that waits for a lock with interrupts off then
//! waits for ever), APERF/MPERF. The invariant-TSC bit is left out so
//! that Linux keeps time by kvmclock, which the target corrects exactly, and not by a TSC whose
//! rate differs between hosts by some parts per million.

use kvm_bindings::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2 as Entry,
};

/// Which register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// The register's value in `entry`.
    pub fn of(self, entry: &Entry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    pub(crate) fn of_mut(self, entry: &mut Entry) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

const BASIC_FEATURES: u32 = 1;
const CACHES_INTEL: u32 = 4;
const MONITOR: u32 = 5;
const POWER: u32 = 6;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const XSAVE: u32 = 0xd;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_POWER: u32 = 0x8000_0007;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE: u32 = 0x8000_0022;

const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_XSAVE: u32 = 1 << 26;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;

/// Feature bits that are never offered: (leaf, sub-leaf, register, bits).
const HIDDEN: &[(u32, u32, Register, u32)] = &[
    // MONITOR, VMX, PDCM.
    (BASIC_FEATURES, 0, Ecx, 1 << 3 | 1 << 5 | 1 << 15),
    // Turbo, HWP and hardware feedback; APERF/MPERF.
    (POWER, 0, Eax, !(1 << 2)),
    (POWER, 0, Ecx, u32::MAX),
    // Async page faults, by exit, by interrupt; waking by hypercall; extended MSI destinations.
    (KVM_FEATURES, 0, Eax, 1 << 4 | 1 << 7 | 1 << 10 | 1 << 14 | 1 << 15),
    // SVM, IBS, core, northbridge and cache performance counters.
    (AMD_FEATURES, 0, Ecx, 1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28),
    // Invariant TSC.
    (AMD_POWER, 0, Edx, 1 << 8),
];

/// Leaves that read as zero.
const EMPTY: &[u32] = &[MONITOR, PERFORMANCE, AMD_SVM, AMD_PERFORMANCE];

/// Leaves whose bits are features: what the guest has, the host must have.
/// (leaf, sub-leaf, register)
pub(crate) const FEATURES: &[(u32, u32, Register)] = &[
    (BASIC_FEATURES, 0, Ecx),
    (BASIC_FEATURES, 0, Edx),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (7, 1, Edx),
    (7, 2, Edx),
    (0xd, 0, Eax),
    (0xd, 0, Edx),
    (0xd, 1, Eax),
    (0xd, 1, Ecx),
    (KVM_FEATURES, 0, Eax),
    (AMD_FEATURES, 0, Ecx),
    (AMD_FEATURES, 0, Edx),
    (AMD_SIZES, 0, Ebx),
    (0x8000_0021, 0, Eax),
];

/// Bits in [`FEATURES`] that depend on the number of vCPUs, not on the host.
pub(crate) fn is_topology(leaf: u32, register: Register, bit: u32) -> bool {
    // HTT, CMP_LEGACY.
    matches!((leaf, register, bit), (BASIC_FEATURES, Edx, 28) | (AMD_FEATURES, Ecx, 1))
}

/// Looks an entry up.
pub fn find(table: &[Entry], leaf: u32, index: u32) -> Option<&Entry> {
    table.iter().find(|e| e.function == leaf && e.index == index)
}

/// The table for a machine of `vcpus`, from what KVM supports on this host. The same for every
/// vCPU but for what [`for_vcpu`] adds.
pub fn table(supported: &[Entry], vcpus: u8, tsc_deadline: bool) -> Vec<Entry> {
    let mut table: Vec<Entry> = supported
        .iter()
        .filter(|e| !matches!(e.function, TOPOLOGY | TOPOLOGY_V2))
        .copied()
        .collect();
    for entry in &mut table {
        if EMPTY.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        for &(leaf, index, register, bits) in HIDDEN {
            if (entry.function, entry.index) == (leaf, index) {
                *register.of_mut(entry) &= !bits;
            }
        }
        adjust(entry, vcpus, tsc_deadline);
    }
    let highest_basic = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if highest_basic >= TOPOLOGY {
        table.extend(topology(vcpus));
    }
    table.truncate(KVM_MAX_CPUID_ENTRIES);
    table
}

/// What follows from the machine's shape: one socket of single-threaded cores.
fn adjust(entry: &mut Entry, vcpus: u8, tsc_deadline: bool) {
    let more = u32::from(vcpus.max(1)) - 1;
    match entry.function {
        BASIC_FEATURES => {
            entry.ebx = (entry.ebx & 0xff00) | u32::from(vcpus) << 16;
            entry.ecx |= ECX1_HYPERVISOR;
            entry.ecx &= !ECX1_TSC_DEADLINE;
            if tsc_deadline {
                entry.ecx |= ECX1_TSC_DEADLINE;
            }
            entry.edx &= !EDX1_HTT;
            if vcpus > 1 {
                entry.edx |= EDX1_HTT;
            }
        }
        CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { more } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | more.min(63) << 26;
        }
        AMD_FEATURES => {
            entry.ecx &= !(1 << 1);
            if vcpus > 1 {
                entry.ecx |= 1 << 1;
            }
        }
        AMD_SIZES => entry.ecx = (entry.ecx & !0xf0ff) | more | apic_id_bits(vcpus) << 12,
        AMD_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { more } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        // Every Linux guest finds KVM's features right behind the signature.
        KVM_SIGNATURE => entry.eax = KVM_FEATURES,
        _ => {}
    }
}

/// Bits of the APIC id that tell cores apart.
fn apic_id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus.max(1)).next_power_of_two().trailing_zeros()
}

/// Extended topology: one thread a core, all cores in one package.
fn topology(vcpus: u8) -> [Entry; 3] {
    const LEVEL_SMT: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let level = |index, shift, count, kind: u32| Entry {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        ..Entry::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, apic_id_bits(vcpus), u32::from(vcpus), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// The table as vCPU `id` sees it: with its own APIC id.
pub fn for_vcpu(table: &[Entry], id: u8) -> Vec<Entry> {
    let apic_id = u32::from(id);
    let mut table = table.to_vec();
    for entry in &mut table {
        match entry.function {
            BASIC_FEATURES => entry.ebx = (entry.ebx & 0x00ff_ffff) | apic_id << 24,
            TOPOLOGY | TOPOLOGY_V2 => entry.edx = apic_id,
            AMD_TOPOLOGY => {
                entry.eax = apic_id;
                // Core number; one thread a core.
                entry.ebx = apic_id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    table
}

/// The vendor's twelve letters.
pub fn vendor(table: &[Entry]) -> Option<String> {
    let leaf = find(table, 0, 0)?;
    let bytes: Vec<u8> =
        [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|register| register.to_le_bytes()).collect();
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// All extended states that the CPU has, as XCR0 names them; `None` without XSAVE.
pub fn xcr0(table: &[Entry]) -> Option<u64> {
    let has_xsave = find(table, BASIC_FEATURES, 0)?.ecx & ECX1_XSAVE != 0;
    let leaf = find(table, XSAVE, 0).filter(|_| has_xsave)?;
    Some(u64::from(leaf.eax) | u64::from(leaf.edx) << 32)
}

/// Bits of a guest-physical address.
pub fn physical_bits(table: &[Entry]) -> u32 {
    find(table, AMD_SIZES, 0).map_or(36, |e| e.eax & 0xff)
}

/// What people call a feature bit, where they have a name for it.
pub fn feature_name(leaf: u32, index: u32, register: Register, bit: u32) -> Option<&'static str> {
    Some(match (leaf, index, register, bit) {
        (1, 0, Ecx, 0) => "SSE3",
        (1, 0, Ecx, 1) => "PCLMULQDQ",
        (1, 0, Ecx, 9) => "SSSE3",
        (1, 0, Ecx, 12) => "FMA",
        (1, 0, Ecx, 13) => "CMPXCHG16B",
        (1, 0, Ecx, 17) => "PCID",
        (1, 0, Ecx, 19) => "SSE4.1",
        (1, 0, Ecx, 20) => "SSE4.2",
        (1, 0, Ecx, 21) => "x2APIC",
        (1, 0, Ecx, 22) => "MOVBE",
        (1, 0, Ecx, 23) => "POPCNT",
        (1, 0, Ecx, 24) => "TSC deadline timer",
        (1, 0, Ecx, 25) => "AES",
        (1, 0, Ecx, 26) => "XSAVE",
        (1, 0, Ecx, 28) => "AVX",
        (1, 0, Ecx, 29) => "F16C",
        (1, 0, Ecx, 30) => "RDRAND",
        (7, 0, Ebx, 0) => "FSGSBASE",
        (7, 0, Ebx, 3) => "BMI1",
        (7, 0, Ebx, 5) => "AVX2",
        (7, 0, Ebx, 7) => "SMEP",
        (7, 0, Ebx, 8) => "BMI2",
        (7, 0, Ebx, 9) => "ERMS",
        (7, 0, Ebx, 10) => "INVPCID",
        (7, 0, Ebx, 16) => "AVX512F",
        (7, 0, Ebx, 17) => "AVX512DQ",
        (7, 0, Ebx, 18) => "RDSEED",
        (7, 0, Ebx, 19) => "ADX",
        (7, 0, Ebx, 20) => "SMAP",
        (7, 0, Ebx, 29) => "SHA",
        (7, 0, Ebx, 30) => "AVX512BW",
        (7, 0, Ebx, 31) => "AVX512VL",
        (7, 0, Ecx, 2) => "UMIP",
        (7, 0, Ecx, 3) => "PKU",
        (7, 0, Ecx, 9) => "VAES",
        (7, 0, Ecx, 16) => "LA57",
        (7, 0, Ecx, 22) => "RDPID",
        (7, 0, Edx, 4) => "FSRM",
        (7, 0, Edx, 24) => "AMX-TILE",
        (7, 0, Edx, 26) => "IBRS/IBPB",
        (7, 0, Edx, 27) => "STIBP",
        (7, 0, Edx, 29) => "ARCH_CAPABILITIES",
        (7, 0, Edx, 31) => "SSBD",
        (0xd, 1, Eax, 0) => "XSAVEOPT",
        (0xd, 1, Eax, 1) => "XSAVEC",
        (0xd, 1, Eax, 3) => "XSAVES",
        (KVM_FEATURES, 0, Eax, 3) => "kvmclock",
        (KVM_FEATURES, 0, Eax, 5) => "KVM steal time",
        (KVM_FEATURES, 0, Eax, 6) => "KVM PV EOI",
        (KVM_FEATURES, 0, Eax, 7) => "KVM PV unhalt",
        (KVM_FEATURES, 0, Eax, 24) => "stable kvmclock",
        (AMD_FEATURES, 0, Ecx, 5) => "LZCNT",
        (AMD_FEATURES, 0, Ecx, 6) => "SSE4a",
        (AMD_FEATURES, 0, Ecx, 22) => "TOPOEXT",
        (AMD_FEATURES, 0, Edx, 20) => "NX",
        (AMD_FEATURES, 0, Edx, 26) => "1 GiB pages",
        (AMD_FEATURES, 0, Edx, 27) => "RDTSCP",
        (AMD_FEATURES, 0, Edx, 29) => "long mode",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> Entry {
        let [eax, ebx, ecx, edx] = registers;
        Entry { function, eax, ebx, ecx, edx, ..Entry::default() }
    }

    fn supported() -> Vec<Entry> {
        vec![
            entry(
                0,
                [
                    0x1f,
                    u32::from_le_bytes(*b"Auth"),
                    u32::from_le_bytes(*b"cAMD"),
                    u32::from_le_bytes(*b"enti"),
                ],
            ),
            entry(1, [0xf00, 0x0808_0800, 1 << 5 | 1 << 15 | 1, EDX1_HTT | 1]),
            entry(0xa, [7, 7, 7, 7]),
            entry(0xb, [9, 9, 9, 9]),
            entry(KVM_FEATURES, [1 << 3 | 1 << 4 | 1 << 7 | 1 << 14, 0, 0, 0]),
            entry(AMD_FEATURES, [0, 0, 1 << 2 | 1 << 22, 1 << 29]),
            entry(AMD_POWER, [0, 0, 0, 1 << 8]),
            entry(AMD_SIZES, [0x3028, 0, 0x7007, 0]),
            entry(AMD_TOPOLOGY, [1, 2, 3, 4]),
        ]
    }

    #[test]
    fn what_cannot_move_is_hidden() {
        let table = table(&supported(), 2, true);
        assert_eq!(vendor(&table).as_deref(), Some("AuthenticAMD"));
        let basic = find(&table, 1, 0).unwrap();
        assert_eq!(basic.ecx, 1 | ECX1_TSC_DEADLINE | ECX1_HYPERVISOR);
        assert_eq!(basic.ebx, 0x0002_0800);
        assert_eq!(find(&table, 0xa, 0).unwrap().eax, 0);
        assert_eq!(find(&table, KVM_FEATURES, 0).unwrap().eax, 1 << 3);
        assert_eq!(find(&table, AMD_FEATURES, 0).unwrap().ecx, 1 << 22 | 1 << 1);
        assert_eq!(find(&table, AMD_POWER, 0).unwrap().edx, 0);
        assert_eq!(find(&table, AMD_SIZES, 0).unwrap().ecx, 1 | 1 << 12);
        assert_eq!(physical_bits(&table), 40);
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let table = table(&supported(), 3, false);
        for id in 0..3 {
            let table = for_vcpu(&table, id);
            assert_eq!(find(&table, 1, 0).unwrap().ebx >> 24, u32::from(id));
            let core = find(&table, TOPOLOGY, 1).unwrap();
            assert_eq!((core.eax, core.ebx, core.edx), (2, 3, u32::from(id)));
            assert_eq!(find(&table, AMD_TOPOLOGY, 0).unwrap().eax, u32::from(id));
        }
        assert_eq!(find(&table, 1, 0).unwrap().ecx & ECX1_TSC_DEADLINE, 0);
    }
}
