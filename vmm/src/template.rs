//! Baseline CPUs: what a guest may be shown so that it can go to older or newer hosts too.
//!
//! A guest that sees all that its first host has can only go to hosts that have all that. A template
//! cuts the table down to a level of the x86-64 psABI and what every host of that level, under any
//! kernel that runs this program, gives besides. What is cut is cut by a list of what stays: a
//! feature that no one has thought of yet is not shown.
//!
//! Exception: bits by which a guest defends itself against speculation (IBRS, STIBP, SSBD, MD_CLEAR,
//! their AMD counterparts) stay as the host has them. They come with microcode, not with a generation
//! of CPUs, and a guest that does not see them goes without.

use std::{fmt, str::FromStr};

use kvm_bindings::kvm_cpuid_entry2 as Entry;

use crate::{
    cpuid::{self, FEATURES, Register},
    layout::MAX_MEMORY_BYTES,
};

use Register::{Eax, Ebx, Ecx, Edx};

const BASIC_FEATURES: u32 = 1;
const EXTENDED_FEATURES: u32 = 7;
const XSAVE: u32 = 0xd;
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
/// The last basic and the last extended leaf that are shown.
const HIGHEST_BASIC: u32 = XSAVE;
const HIGHEST_EXTENDED: u32 = AMD_SIZES;
/// Physical addresses: what the least of the hosts have that are of either level and still in use.
const PHYSICAL_BITS: u32 = 39;
/// x87, SSE, AVX.
const XCR0_V3: u32 = 7;
const XCR0_AVX: u32 = 1 << 2;
/// Bytes of an XSAVE area with x87, SSE and AVX.
const XSAVE_BYTES_V3: u32 = 832;

/// Which CPU a new guest is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuTemplate {
    /// All that this host can move.
    #[default]
    Host,
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA, MOVBE besides.
    V3,
}

/// The bits that stay: (leaf, sub-leaf, register, bits in v2, bits in v3 besides). Of registers in
/// [`FEATURES`] that are not here none stays.
const SHOWN: &[(u32, u32, Register, u32, u32)] = &[
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC deadline, hypervisor. In v3 FMA, MOVBE,
    // XSAVE, OSXSAVE, AVX, F16C, and what all CPUs of that level have though it does not ask for it:
    // PCLMULQDQ, AES, RDRAND.
    (
        BASIC_FEATURES,
        0,
        Ecx,
        1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 24 | 1 << 31,
        1 << 1 | 1 << 12 | 1 << 22 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30,
    ),
    // FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH,
    // MMX, FXSR, SSE, SSE2, HTT.
    (BASIC_FEATURES, 0, Edx, 0x178b_fbff, 0),
    // In v3 FSGSBASE, BMI1, AVX2, SMEP, BMI2. Not INVPCID, ERMS, SMAP: there are hosts without.
    (EXTENDED_FEATURES, 0, Ebx, 0, 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8),
    // MD_CLEAR, IBRS and IBPB, STIBP, L1D_FLUSH, SSBD.
    (EXTENDED_FEATURES, 0, Edx, 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31, 0),
    (XSAVE, 0, Eax, 0, XCR0_V3),
    // kvmclock (old and new), no delays of I/O, steal time, end of interrupt, stable clock.
    (KVM_FEATURES, 0, Eax, 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24, 0),
    // LAHF, CMP_LEGACY; in v3 LZCNT.
    (AMD_FEATURES, 0, Ecx, 1 | 1 << 1, 1 << 5),
    // The copy of leaf 1 that AMD has; SYSCALL, NX, RDTSCP, long mode.
    (AMD_FEATURES, 0, Edx, 0x0183_fbff | 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29, 0),
    // IBPB, IBRS, STIBP, SSBD, VIRT_SSBD.
    (AMD_SIZES, 0, Ebx, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24 | 1 << 25, 0),
];

/// Bits without which a host is not of a level: (leaf, register, bits, level).
const NEEDED: &[(u32, Register, u32, CpuTemplate)] = &[
    (BASIC_FEATURES, Ecx, 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23, CpuTemplate::V2),
    (AMD_FEATURES, Ecx, 1, CpuTemplate::V2),
    (BASIC_FEATURES, Ecx, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29, CpuTemplate::V3),
    (EXTENDED_FEATURES, Ebx, 1 << 3 | 1 << 5 | 1 << 8, CpuTemplate::V3),
    (AMD_FEATURES, Ecx, 1 << 5, CpuTemplate::V3),
];

/// A host that is not of a template's level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host is not {template}: it lacks {}", .lacks.join(", "))]
pub struct BelowTemplate {
    /// The level.
    pub template: CpuTemplate,
    /// What is missing.
    pub lacks: Vec<String>,
}

impl CpuTemplate {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Host, Self::V2, Self::V3];

    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "v2",
            Self::V3 => "v3",
        }
    }

    /// The most memory that a machine with this CPU can have.
    pub fn max_memory_bytes(self) -> u64 {
        match self {
            Self::Host => MAX_MEMORY_BYTES,
            // Half of the addresses: the rest is the hole below 4 GiB, and devices.
            Self::V2 | Self::V3 => MAX_MEMORY_BYTES.min(1 << (PHYSICAL_BITS - 1)),
        }
    }

    /// The bits of a feature register that stay.
    fn shown(self, leaf: u32, index: u32, register: Register) -> u32 {
        let of = |row: &&(u32, u32, Register, u32, u32)| {
            (row.0, row.1, row.2) == (leaf, index, register)
        };
        let (v2, v3) = SHOWN.iter().find(of).map_or((0, 0), |&(.., v2, v3)| (v2, v3));
        match self {
            Self::Host => u32::MAX,
            Self::V2 => v2,
            Self::V3 => v2 | v3,
        }
    }

    /// Cuts a machine's table down to this CPU.
    pub fn apply(self, table: &mut Vec<Entry>) -> Result<(), BelowTemplate> {
        if self == Self::Host {
            return Ok(());
        }
        self.check(table)?;
        let most = |leaf: u32| match leaf {
            0..=0x3fff_ffff => HIGHEST_BASIC,
            0x8000_0000..=0xbfff_ffff => HIGHEST_EXTENDED,
            _ => u32::MAX,
        };
        table.retain(|entry| entry.function <= most(entry.function));
        table.retain(|entry| self.keeps_sub_leaf(entry));
        for entry in &mut *table {
            for &(leaf, index, register) in FEATURES {
                if (entry.function, entry.index) == (leaf, index) {
                    *register.of_mut(entry) &= self.shown(leaf, index, register);
                }
            }
            self.adjust(entry);
        }
        Ok(())
    }

    /// Whether a sub-leaf has something to say of this CPU.
    fn keeps_sub_leaf(self, entry: &Entry) -> bool {
        match (entry.function, entry.index) {
            (EXTENDED_FEATURES, index) => index == 0,
            // Of the components that have a place of their own, AVX only.
            (XSAVE, index) => self == Self::V3 && index <= 2,
            _ => true,
        }
    }

    /// What is no feature, and no other on another host of this level.
    fn adjust(self, entry: &mut Entry) {
        match (entry.function, entry.index) {
            (0, _) => {
                let highest = if self == Self::V3 { HIGHEST_BASIC } else { HIGHEST_BASIC - 1 };
                entry.eax = entry.eax.min(highest);
            }
            (EXTENDED_FEATURES, _) => entry.eax = 0,
            (XSAVE, 0) => (entry.ebx, entry.ecx) = (XSAVE_BYTES_V3, XSAVE_BYTES_V3),
            (XSAVE, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0000, _) => entry.eax = entry.eax.min(HIGHEST_EXTENDED),
            (AMD_SIZES, _) => {
                entry.eax = entry.eax & !0xff | (entry.eax & 0xff).min(PHYSICAL_BITS);
            }
            _ => {}
        }
    }

    /// Whether a host that supports all of `table` is of this level.
    fn check(self, table: &[Entry]) -> Result<(), BelowTemplate> {
        let levels = NEEDED.iter().filter(|row| row.3 == CpuTemplate::V2 || row.3 == self);
        let mut lacks = Vec::new();
        for &(leaf, register, bits, _) in levels {
            let has = cpuid::find(table, leaf, 0).map_or(0, |entry| register.of(entry));
            let missing = (0..32).filter(|bit| bits >> bit & 1 == 1 && has >> bit & 1 == 0);
            lacks.extend(missing.map(|bit| feature(leaf, 0, register, bit)));
        }
        let avx = cpuid::xcr0(table).is_some_and(|xcr0| xcr0 & u64::from(XCR0_AVX) != 0);
        if self == Self::V3 && !avx {
            lacks.push("the state of AVX in XSAVE".into());
        }
        if lacks.is_empty() { Ok(()) } else { Err(BelowTemplate { template: self, lacks }) }
    }

    /// What a machine has that this CPU does not: of a machine that exists already.
    pub fn excess(self, table: &[Entry]) -> Vec<String> {
        if self == Self::Host {
            return Vec::new();
        }
        let mut more = Vec::new();
        for &(leaf, index, register) in FEATURES {
            let has = cpuid::find(table, leaf, index).map_or(0, |entry| register.of(entry));
            let beyond = has & !self.shown(leaf, index, register);
            let bits = (0..32).filter(|bit| beyond >> bit & 1 == 1);
            let bits = bits.filter(|bit| !cpuid::is_topology(leaf, register, *bit));
            more.extend(bits.map(|bit| feature(leaf, index, register, bit)));
        }
        more
    }
}

fn feature(leaf: u32, index: u32, register: Register, bit: u32) -> String {
    let place = || format!("CPUID leaf {leaf:#x}.{index} {register:?} bit {bit}");
    cpuid::feature_name(leaf, index, register, bit).map_or_else(place, str::to_owned)
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        })
    }
}

impl FromStr for CpuTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL
            .into_iter()
            .find(|template| text == template.name() || text == template.to_string());
        found.ok_or_else(|| "one of host, v2, v3".into())
    }
}

#[cfg(test)]
#[path = "template/tests.rs"]
mod tests;
