//! Model-specific registers: which are saved, and how they are read and written in chunks.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};

use super::{StateError, kvm};
use crate::{host::Host, vcpu::Vcpu};

/// Most registers of one vCPU that a saved state may hold.
pub(super) const MAX_SAVED: usize = 1024;

/// Set through the TSC offset.
pub(super) const MSR_TSC: u32 = 0x10;
/// Restored after the TSC, by itself.
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Saved whether KVM lists them or not: the older ones it forgets are the memory types.
const EXTRA: &[u32] = &[
    0x1a0, // IA32_MISC_ENABLE
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, // Variable memory types.
    0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f, //
    0x250, 0x258, 0x259, // Fixed memory types.
    0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, //
    0x277, // IA32_PAT
    0x2ff, // Default memory type.
];

/// Not saved: (first, last, why).
const LEFT_OUT: &[(u32, u32, &str)] = &[
    (MSR_TSC, MSR_TSC, "TSC offset"),
    (MSR_TSC_DEADLINE, MSR_TSC_DEADLINE, "restored by itself"),
    // Writing it makes KVM write the wall clock into guest RAM, which has been verified already. The
    // guest writes it itself whenever it wants to know.
    (0x11, 0x11, "kvmclock wall clock, old"),
    (0x4b56_4d00, 0x4b56_4d00, "kvmclock wall clock"),
    // Hidden from the guest by CPUID.
    (0xc1, 0xc8, "performance counters"),
    (0x186, 0x18d, "performance counters"),
    (0x309, 0x30c, "performance counters"),
    (0x345, 0x345, "performance counters"),
    (0x38d, 0x390, "performance counters"),
    (0x3f1, 0x3f1, "performance counters"),
    (0x480, 0x493, "VMX"),
    (0x4c1, 0x4c8, "performance counters"),
    (0x4000_0000, 0x4000_01ff, "Hyper-V"),
    (0x4b56_4d02, 0x4b56_4d02, "async page faults"),
    (0x4b56_4d06, 0x4b56_4d07, "async page faults"),
    (0xc000_0300, 0xc000_0303, "performance counters"),
    (0xc001_0000, 0xc001_0007, "performance counters"),
    (0xc001_0200, 0xc001_020b, "performance counters"),
];

fn left_out(index: u32) -> bool {
    LEFT_OUT.iter().any(|(first, last, _)| (*first..=*last).contains(&index))
}

/// The registers to save on this host.
pub(super) fn saved_indices(host: &Host) -> Result<Vec<u32>, StateError> {
    let listed = host.kvm().get_msr_index_list().map_err(kvm("list of MSRs", None))?;
    let mut indices: Vec<u32> = listed.as_slice().iter().chain(EXTRA).copied().collect();
    indices.sort_unstable();
    indices.dedup();
    indices.retain(|index| !left_out(*index));
    Ok(indices)
}

fn wrap(entries: &[kvm_msr_entry], vcpu: u8) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries)
        .map_err(|_| kvm("MSRs", Some(vcpu))(kvm_ioctls::Error::new(libc::ENOMEM)))
}

/// Reads registers. One that KVM lists and will not read has no value for this guest: it is left
/// out.
pub(super) fn read(vcpu: &Vcpu, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let asked: Vec<kvm_msr_entry> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = wrap(&asked, vcpu.id)?;
        let count = vcpu.fd.get_msrs(&mut msrs).map_err(kvm("MSRs", Some(vcpu.id)))?;
        // KVM stops at the first that it will not read.
        let read = count.min(chunk.len());
        values.extend(msrs.as_slice().iter().take(read));
        let unreadable = usize::from(read < chunk.len());
        rest = rest.get(read + unreadable..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes registers. One that KVM will not write must have the right value already.
pub(super) fn write(vcpu: &Vcpu, values: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = wrap(chunk, vcpu.id)?;
        let count = vcpu.fd.set_msrs(&msrs).map_err(kvm("MSRs", Some(vcpu.id)))?;
        let written = count.min(chunk.len());
        if let Some(refused) = chunk.get(written) {
            let (index, value) = (refused.index, refused.data);
            let now = read(vcpu, &[index])?;
            if now.first().map(|entry| entry.data) != Some(value) {
                return Err(StateError::Msr { vcpu: vcpu.id, index, value });
            }
        }
        let refused = usize::from(written < chunk.len());
        rest = rest.get(written + refused..).unwrap_or_default();
    }
    Ok(())
}

/// Drops what must not be written whatever a peer says.
pub(super) fn trusted(values: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    values.iter().filter(|entry| !left_out(entry.index)).copied().collect()
}
