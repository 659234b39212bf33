//! What a machine is, compared with what a host can be, before any data moves.

use std::fmt;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2 as CpuidEntry};
use serde::{Deserialize, Serialize};

use crate::{
    codec::{CodecError, Format},
    cpuid::{self, Register},
    host::{Host, HostError},
    layout::{MAX_MEMORY_BYTES, MAX_VCPUS, MIN_MEMORY_BYTES},
    template::{BelowTemplate, CpuTemplate},
};

const FORMAT: Format =
    Format { what: "machine profile", magic: b"HWDHPROF", version: 1, max_bytes: 64 << 10 };

/// How far, in parts per million, a guest's TSC may be from a host's without TSC scaling. What KVM
/// itself tolerates.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Leaf of the XSAVE areas.
const XSAVE_LEAF: u32 = 0xd;
/// Components of the XSAVE area: bits of XCR0 and IA32_XSS.
const XSAVE_COMPONENTS: std::ops::Range<u32> = 2..63;

/// What a machine is: fixed when it is made, carried along unchanged ever after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineProfile {
    /// How many vCPUs.
    pub vcpus: u8,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Whether there is a disk.
    pub disk: bool,
    /// The network device's address, if there is one.
    pub mac: Option<[u8; 6]>,
    /// CPUID, without what differs between vCPUs.
    pub cpuid: Vec<CpuidEntry>,
    /// Ticks of the TSC in a millisecond.
    pub tsc_khz: u32,
    /// Bytes of a vCPU's XSAVE area.
    pub xsave_bytes: u32,
}

/// What a host can be. Hosts tell each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostProfile {
    supported: Vec<CpuidEntry>,
    tsc_deadline: bool,
    tsc_khz: u32,
    tsc_scaling: bool,
    xsave_bytes: usize,
    max_vcpus: usize,
}

/// One thing that a host lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lack {
    /// A CPU of another make.
    Vendor {
        /// The machine's.
        machine: String,
        /// The host's.
        host: String,
    },
    /// A CPU feature.
    Feature {
        /// CPUID leaf.
        leaf: u32,
        /// CPUID sub-leaf.
        index: u32,
        /// Register.
        register: Register,
        /// Bit.
        bit: u32,
    },
    /// An XSAVE component that lies elsewhere, or is not there.
    XsaveComponent(u32),
    /// Fewer bits of physical address.
    PhysicalBits {
        /// The machine's.
        machine: u32,
        /// The host's.
        host: u32,
    },
    /// A TSC of another rate, and no way to scale it.
    TscRate {
        /// The machine's.
        machine_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// Too many vCPUs.
    Vcpus {
        /// The machine's.
        machine: u8,
        /// The host's.
        host: usize,
    },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { machine, host } => {
                write!(f, "the machine's CPU is {machine}, the host's is {host}")
            }
            &Self::Feature { leaf, index, register, bit } => {
                write!(f, "host lacks CPUID leaf {leaf:#x}.{index} {register:?} bit {bit}")?;
                match cpuid::feature_name(leaf, index, register, bit) {
                    Some(name) => write!(f, " ({name})"),
                    None => Ok(()),
                }
            }
            Self::XsaveComponent(n) => {
                write!(f, "the host's XSAVE area has component {n} elsewhere, or not at all")
            }
            Self::PhysicalBits { machine, host } => {
                write!(f, "the machine has {machine} bits of physical address, the host {host}")
            }
            Self::TscRate { machine_khz, host_khz } => write!(
                f,
                "the machine's TSC runs at {machine_khz} kHz, the host's at {host_khz} kHz and cannot be scaled"
            ),
            Self::Vcpus { machine, host } => {
                write!(f, "the machine has {machine} vCPUs, the host allows {host}")
            }
        }
    }
}

/// Everything that a host lacks for a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Lack::to_string).collect::<Vec<_>>().join("; "))]
pub struct Incompatible(pub Vec<Lack>);

/// Why a profile is refused before it is compared with anything.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It cannot be read.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// This host cannot give the CPU that was asked for.
    #[error(transparent)]
    Cpu(#[from] BelowTemplate),
    /// A number in it cannot be.
    #[error("machine profile: {what} of {value} cannot be (from {min} to {max})")]
    Range {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
}

impl MachineProfile {
    /// As bytes for a peer.
    pub fn encode(&self) -> Result<Vec<u8>, ProfileError> {
        Ok(FORMAT.encode(self)?)
    }

    /// From a peer's bytes.
    pub fn decode(blob: &[u8]) -> Result<Self, ProfileError> {
        let profile: Self = FORMAT.decode(blob)?;
        profile.validate()?;
        Ok(profile)
    }

    fn validate(&self) -> Result<(), ProfileError> {
        let cpuid_max = KVM_MAX_CPUID_ENTRIES as u64;
        for (what, value, min, max) in [
            ("a vCPU count", self.vcpus.into(), 1, MAX_VCPUS.into()),
            ("memory", self.memory_bytes, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES),
            ("a CPUID table length", self.cpuid.len() as u64, 1, cpuid_max),
            ("a TSC rate", self.tsc_khz.into(), 1, u32::MAX.into()),
        ] {
            if !(min..=max).contains(&value) {
                return Err(ProfileError::Range { what, value, min, max });
            }
        }
        Ok(())
    }

    /// Says everything that `host` lacks for this machine.
    pub fn check_compatible(&self, host: &HostProfile) -> Result<(), Incompatible> {
        let theirs = host.cpuid(self.vcpus);
        let mut lacks = Vec::new();
        let names = (cpuid::vendor(&self.cpuid), cpuid::vendor(&theirs));
        if let (machine, host) = names
            && machine != host
        {
            let name = Option::unwrap_or_default;
            lacks.push(Lack::Vendor { machine: name(machine), host: name(host) });
        }
        if usize::from(self.vcpus) > host.max_vcpus {
            lacks.push(Lack::Vcpus { machine: self.vcpus, host: host.max_vcpus });
        }
        self.compare_features(&theirs, &mut lacks);
        self.compare_xsave(&theirs, &mut lacks);
        let bits = (cpuid::physical_bits(&self.cpuid), cpuid::physical_bits(&theirs));
        if bits.0 > bits.1 {
            lacks.push(Lack::PhysicalBits { machine: bits.0, host: bits.1 });
        }
        if !host.can_give_tsc_rate(self.tsc_khz) {
            lacks.push(Lack::TscRate { machine_khz: self.tsc_khz, host_khz: host.tsc_khz });
        }
        if lacks.is_empty() { Ok(()) } else { Err(Incompatible(lacks)) }
    }

    fn compare_features(&self, theirs: &[CpuidEntry], lacks: &mut Vec<Lack>) {
        for &(leaf, index, register) in cpuid::FEATURES {
            let of = |table| cpuid::find(table, leaf, index).map_or(0, |e| register.of(e));
            let missing = of(&self.cpuid) & !of(theirs);
            let bits = (0..32).filter(|bit| missing >> bit & 1 == 1);
            lacks.extend(
                bits.filter(|bit| !cpuid::is_topology(leaf, register, *bit))
                    .map(|bit| Lack::Feature { leaf, index, register, bit }),
            );
        }
    }

    /// XSAVE's standard format has fixed places, and the saved area is in it.
    fn compare_xsave(&self, theirs: &[CpuidEntry], lacks: &mut Vec<Lack>) {
        for component in XSAVE_COMPONENTS {
            let Some(ours) = cpuid::find(&self.cpuid, XSAVE_LEAF, component) else { continue };
            let same = cpuid::find(theirs, XSAVE_LEAF, component)
                .is_some_and(|theirs| (theirs.eax, theirs.ebx) == (ours.eax, ours.ebx));
            if ours.eax != 0 && !same {
                lacks.push(Lack::XsaveComponent(component));
            }
        }
    }
}

impl HostProfile {
    /// Asks a host. Makes a VM for it, and drops it again.
    pub fn of(host: &Host) -> Result<Self, HostError> {
        let failed = |what| move |source| HostError::Kvm { what, source };
        let supported =
            host.kvm().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("CPUID"))?;
        let vm = host.kvm().create_vm().map_err(failed("create a VM"))?;
        // Only a vCPU tells its TSC's rate on all kernels. With a LAPIC, as every VM of ours has: for the
        // first vCPU without one KVM patches the host's kernel (kvm_has_noapic_vcpu), on all CPUs and
        // under all VMs that run, and for the end of the last one again.
        vm.create_irq_chip().map_err(failed("create the interrupt controllers"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            tsc_deadline: host.tsc_deadline,
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("TSC rate"))?,
            tsc_scaling: host.tsc_scaling,
            xsave_bytes: host.xsave_bytes,
            max_vcpus: host.max_vcpus,
        })
    }

    /// The best CPU for a machine that begins its life here.
    pub fn cpuid(&self, vcpus: u8) -> Vec<CpuidEntry> {
        cpuid::table(&self.supported, vcpus, self.tsc_deadline)
    }

    /// A profile for a machine that begins its life here, with this CPU.
    pub fn new_machine(
        &self,
        cpu: CpuTemplate,
        vcpus: u8,
        memory_bytes: u64,
        disk: bool,
        mac: Option<[u8; 6]>,
    ) -> Result<MachineProfile, ProfileError> {
        let mut cpuid = self.cpuid(vcpus);
        cpu.apply(&mut cpuid)?;
        let (value, max) = (memory_bytes, cpu.max_memory_bytes());
        if value > max {
            let (what, min) = ("memory under that CPU template", MIN_MEMORY_BYTES);
            return Err(ProfileError::Range { what, value, min, max });
        }
        let profile = MachineProfile {
            vcpus,
            memory_bytes,
            disk,
            mac,
            cpuid,
            tsc_khz: self.tsc_khz,
            xsave_bytes: u32::try_from(self.xsave_bytes).unwrap_or(u32::MAX),
        };
        profile.validate()?;
        Ok(profile)
    }

    fn can_give_tsc_rate(&self, khz: u32) -> bool {
        let difference = u64::from(self.tsc_khz.abs_diff(khz));
        self.tsc_scaling || difference * 1_000_000 <= u64::from(khz) * TSC_TOLERANCE_PPM
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, eax, ebx, ecx, edx, ..CpuidEntry::default() }
    }

    fn host() -> HostProfile {
        HostProfile {
            supported: vec![
                entry(0, 0, [0xd, 1, 2, 3]),
                entry(1, 0, [0, 0, 1 << 28, 1]),
                entry(7, 0, [0, 1 << 5, 0, 0]),
                entry(0xd, 0, [7, 0, 0, 0]),
                entry(0xd, 2, [256, 576, 0, 0]),
                entry(0x8000_0008, 0, [48, 0, 0, 0]),
            ],
            tsc_deadline: true,
            tsc_khz: 2_000_000,
            tsc_scaling: false,
            xsave_bytes: 4096,
            max_vcpus: 4,
        }
    }

    fn machine() -> MachineProfile {
        host().new_machine(CpuTemplate::Host, 2, 64 << 20, true, Some([2, 0, 0, 0, 0, 1])).unwrap()
    }

    #[test]
    fn a_machine_fits_where_it_was_made_and_on_a_better_host() {
        machine().check_compatible(&host()).unwrap();
        let mut better = host();
        better.supported[2].ebx |= 1 << 16;
        machine().check_compatible(&better).unwrap();
    }

    #[test]
    fn every_lack_is_named() {
        let mut worse = host();
        worse.supported[0].ebx = 9;
        worse.supported[2].ebx = 0;
        worse.supported[4].ebx = 832;
        worse.supported[5].eax = 40;
        worse.tsc_deadline = false;
        worse.tsc_khz = 2_001_000;
        worse.max_vcpus = 1;
        let said = machine().check_compatible(&worse).unwrap_err();
        assert_eq!(said.0.len(), 7, "{said}");
        let said = said.to_string();
        assert!(said.contains("host lacks CPUID leaf 0x7.0 Ebx bit 5 (AVX2)"), "{said}");
        assert!(said.contains("TSC deadline timer") && said.contains("2001000 kHz"), "{said}");
        worse = host();
        worse.tsc_khz = 2_000_400;
        machine().check_compatible(&worse).unwrap();
    }

    #[test]
    fn bytes_of_a_peer() {
        let blob = machine().encode().unwrap();
        assert_eq!(MachineProfile::decode(&blob).unwrap(), machine());
        for (len, _) in blob.iter().enumerate() {
            assert!(MachineProfile::decode(&blob[..len]).is_err());
        }
        let none = MachineProfile { vcpus: 0, ..machine() };
        assert!(MachineProfile::decode(&none.encode().unwrap()).is_err());
    }

    #[test]
    fn this_host_fits_itself() {
        let Ok(host) = crate::host::HostCheck::run() else { return };
        let profile = HostProfile::of(&host).unwrap();
        let machine = profile.new_machine(CpuTemplate::Host, 2, 64 << 20, true, None).unwrap();
        machine.check_compatible(&profile).unwrap();
    }
}
