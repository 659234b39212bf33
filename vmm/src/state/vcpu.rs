//! One vCPU's state.

use guest_images::CHUNK_SIZE;
use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::{
    StateError, kvm,
    msrs::{self, MSR_TSC, MSR_TSC_DEADLINE},
};
use crate::vcpu::Vcpu;

/// Largest XSAVE area that is taken from outside: AMX needs 11 KiB.
const XSAVE_MAX_BYTES: usize = 4 * CHUNK_SIZE;
const WORD_BYTES: usize = size_of::<u32>();

/// LAPIC register of the timer's vector and mode.
const APIC_LVTT: usize = 0x320;
const LVTT_MODE: u32 = 0b11 << 17;
const LVTT_TSC_DEADLINE: u32 = 0b10 << 17;
const LVTT_MASKED: u32 = 1 << 16;

/// One vCPU, in the order in which it is saved and restored. Its CPUID is the machine's
/// ([`crate::profile::MachineProfile`]).
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    /// The timer's deadline; `None` where the host has no such timer.
    tsc_deadline: Option<u64>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    pub(super) fn save(
        vcpu: &Vcpu,
        xsave_bytes: usize,
        msr_indices: &[u32],
    ) -> Result<Self, StateError> {
        let (fd, id) = (&vcpu.fd, Some(vcpu.id));
        let mp_state = fd.get_mp_state().map_err(kvm("MP state", id))?;
        let regs = fd.get_regs().map_err(kvm("registers", id))?;
        let sregs = fd.get_sregs().map_err(kvm("system registers", id))?;
        let xsave = get_xsave(vcpu, xsave_bytes)?;
        let xcrs = fd.get_xcrs().map_err(kvm("XCRs", id))?;
        let debugregs = fd.get_debug_regs().map_err(kvm("debug registers", id))?;
        let lapic = fd.get_lapic().map_err(kvm("LAPIC", id))?;
        let msrs = msrs::read(vcpu, msr_indices)?;
        let tsc_deadline = get_deadline(vcpu, &lapic)?;
        let events = fd.get_vcpu_events().map_err(kvm("pending events", id))?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            msrs,
            tsc_deadline,
            events,
        })
    }

    /// Checks sizes before anything is believed.
    pub(super) fn check(&self) -> Result<(), StateError> {
        for (what, found, max) in [
            ("words of XSAVE state", self.xsave.len(), XSAVE_MAX_BYTES / WORD_BYTES),
            ("MSRs", self.msrs.len(), msrs::MAX_SAVED),
        ] {
            if found > max {
                return Err(StateError::TooMany { what, found, max });
            }
        }
        Ok(())
    }

    /// CPUID and TSC must have been set before: what KVM accepts here depends on them.
    pub(super) fn restore(&self, vcpu: &Vcpu, xsave_bytes: usize) -> Result<(), StateError> {
        let (fd, id) = (&vcpu.fd, Some(vcpu.id));
        fd.set_mp_state(self.mp_state).map_err(kvm("MP state", id))?;
        fd.set_regs(&self.regs).map_err(kvm("registers", id))?;
        // System registers bring the APIC's mode, so they come before the APIC.
        fd.set_sregs(&self.sregs).map_err(kvm("system registers", id))?;
        self.set_xsave(vcpu, xsave_bytes)?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("XCRs", id))?;
        fd.set_debug_regs(&self.debugregs).map_err(kvm("debug registers", id))?;
        fd.set_lapic(&self.lapic).map_err(kvm("LAPIC", id))?;
        msrs::write(vcpu, &msrs::trusted(&self.msrs))?;
        // The deadline only now: KVM ignores it before the LAPIC's timer is in deadline mode, and
        // takes it relative to the TSC.
        if let Some(data) = self.tsc_deadline {
            let deadline = kvm_msr_entry { index: MSR_TSC_DEADLINE, data, ..Default::default() };
            msrs::write(vcpu, &[deadline])?;
        }
        // Events last: setting the LAPIC clears some of them.
        fd.set_vcpu_events(&self.events).map_err(kvm("pending events", id))
    }

    fn set_xsave(&self, vcpu: &Vcpu, room: usize) -> Result<(), StateError> {
        let mut area = new_xsave(vcpu, room)?;
        let room_words = room.div_ceil(WORD_BYTES);
        // A larger area is fine as long as nothing is in what does not fit here.
        let used = self.xsave.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        if used > room_words {
            let (used, vcpu) = (used * WORD_BYTES, vcpu.id);
            return Err(StateError::Xsave { vcpu, used, room });
        }
        let mut words = self.xsave.iter().copied();
        // SAFETY: the area is plain words; no other reference to it exists.
        let header = unsafe { &mut area.as_mut_fam_struct().xsave.region };
        header.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
        area.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = from);
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave, and this program enables no
        // further extended state.
        unsafe { vcpu.fd.set_xsave2(&area) }.map_err(kvm("XSAVE state", Some(vcpu.id)))
    }
}

/// An empty area of the size that KVM reads and writes.
fn new_xsave(vcpu: &Vcpu, bytes: usize) -> Result<Xsave, StateError> {
    let extra = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(WORD_BYTES);
    Xsave::new(extra)
        .map_err(|_| kvm("XSAVE state", Some(vcpu.id))(kvm_ioctls::Error::new(libc::ENOMEM)))
}

fn get_xsave(vcpu: &Vcpu, bytes: usize) -> Result<Vec<u32>, StateError> {
    let failed = kvm("XSAVE state", Some(vcpu.id));
    if bytes <= size_of::<kvm_xsave>() {
        return Ok(vcpu.fd.get_xsave().map_err(failed)?.region.to_vec());
    }
    let mut area = new_xsave(vcpu, bytes)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave, and this program enables no further
    // extended state.
    unsafe { vcpu.fd.get_xsave2(&mut area) }.map_err(failed)?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

/// The timer's deadline.
///
/// KVM gives zero once the timer has expired, even if its interrupt has not been delivered yet;
/// restored as zero, the timer would be off and a tickless guest would wait for ever. A deadline
/// that lies in the past makes it fire at once, and one interrupt too many harms nobody.
fn get_deadline(vcpu: &Vcpu, lapic: &kvm_lapic_state) -> Result<Option<u64>, StateError> {
    let values = msrs::read(vcpu, &[MSR_TSC_DEADLINE, MSR_TSC])?;
    let value = |index| values.iter().find(|e| e.index == index).map(|e| e.data);
    Ok(match value(MSR_TSC_DEADLINE) {
        Some(0) if timer_is_armed(lapic) => value(MSR_TSC),
        deadline => deadline,
    })
}

fn timer_is_armed(lapic: &kvm_lapic_state) -> bool {
    let mut lvtt = [0; 4];
    lvtt.iter_mut().zip(&lapic.regs[APIC_LVTT..]).for_each(|(to, from)| *to = *from as u8);
    let lvtt = u32::from_le_bytes(lvtt);
    lvtt & LVTT_MODE == LVTT_TSC_DEADLINE && lvtt & LVTT_MASKED == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_timer_is_told_from_one_that_is_off() {
        let mut lapic = kvm_lapic_state::default();
        assert!(!timer_is_armed(&lapic));
        // Vector 0xec, deadline mode.
        let lvtt = (0xec | LVTT_TSC_DEADLINE).to_le_bytes();
        for (to, from) in lapic.regs[APIC_LVTT..].iter_mut().zip(lvtt) {
            *to = from as _;
        }
        assert!(timer_is_armed(&lapic));
        lapic.regs[APIC_LVTT + 2] |= 1;
        assert!(!timer_is_armed(&lapic), "masked");
    }
}
