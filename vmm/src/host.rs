//! What a host must offer before a machine is tried on it.

use std::{io, path::PathBuf};

use kvm_ioctls::{Cap, Kvm};

/// The KVM API version that has been current since 2007.
const API_VERSION: i32 = 12;

/// Why this host cannot run machines.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node.
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_amd or kvm_intel); if that fails, enable virtualisation in the firmware, or nested virtualisation in the hypervisor this host runs in"
    )]
    NoDevice,
    /// Not allowed.
    #[error(
        "/dev/kvm: permission denied: add the user to group kvm (usermod -aG kvm USER) and log in again"
    )]
    Permission,
    /// Present, and not to be opened.
    #[error("cannot open /dev/kvm: {0}")]
    Open(#[source] io::Error),
    /// A KVM from another age.
    #[error("KVM speaks API version {0}, not {API_VERSION}: update the host's kernel")]
    ApiVersion(i32),
    /// Something is missing.
    #[error("the host's KVM lacks {}: a kernel of 5.16 or newer has all of it", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// Not everything can be asked for.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
}

/// Every capability that a machine uses, by the name that the kernel's documentation gives it.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
];

/// A host that has been found fit.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    /// Most vCPUs a machine may have.
    pub max_vcpus: usize,
    /// Bytes of a vCPU's XSAVE area.
    pub xsave_bytes: usize,
    /// Whether the local APIC has a TSC deadline timer.
    pub tsc_deadline: bool,
    /// Whether a guest's TSC may run at another rate than the host's.
    pub tsc_scaling: bool,
    /// Whether kvmclock can be set against wall time.
    pub clock_realtime: bool,
}

/// Checks a host and opens it.
#[derive(Clone, Copy, Debug)]
pub struct HostCheck;

impl HostCheck {
    /// Opens /dev/kvm and checks that everything a machine needs is there.
    pub fn run() -> Result<Host, HostError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::NoDevice,
            libc::EACCES | libc::EPERM => HostError::Permission,
            _ => HostError::Open(error.into()),
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HostError::ApiVersion(version));
        }
        let missing: Vec<_> = REQUIRED
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(HostError::Missing(missing));
        }
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let clock = u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        Ok(Host {
            max_vcpus: kvm.get_max_vcpus(),
            xsave_bytes: xsave2.max(size_of::<kvm_bindings::kvm_xsave>()),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            clock_realtime: clock & kvm_bindings::KVM_CLOCK_REALTIME != 0,
            kvm,
        })
    }

    /// Whether the CPU can run guests by itself, by the flags in /proc/cpuinfo. Where it cannot,
    /// /dev/kvm may still exist and interpret guests, a thousand times slower: say so to the user.
    pub fn has_hardware_virtualisation() -> Result<bool, HostError> {
        let path = PathBuf::from("/proc/cpuinfo");
        let text = std::fs::read_to_string(path).map_err(HostError::Open)?;
        Ok(text
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")))
    }
}

impl Host {
    /// The open device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        assert!(HostError::Permission.to_string().contains("group kvm"));
        let missing = HostError::Missing(vec!["KVM_CAP_A", "KVM_CAP_B"]).to_string();
        assert!(missing.contains("KVM_CAP_A, KVM_CAP_B"), "{missing}");
    }
}
