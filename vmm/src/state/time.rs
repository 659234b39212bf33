//! The TSC across a move: it goes on as if it had ticked all the while.
//!
//! Saved is one pair: the guest's TSC and the wall time at which it had that value. The target
//! computes what the TSC must be now and gives all vCPUs the one offset that makes it so; writing
//! the TSC of each vCPU instead would make them differ by the time between the writes, and KVM would
//! stop trusting its master clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_device_attr, kvm_msr_entry,
};
use serde::{Deserialize, Serialize};

use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::{StateError, kvm, msrs::MSR_TSC};
use crate::vcpu::Vcpu;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// How often the pair is read to find one that no other thread delayed.
const READINGS: usize = 8;
/// A guest that stood still longer than this came out of a base or a file, or else the clocks of two
/// hosts disagree.
const SUSPICIOUS: Duration = Duration::from_secs(300);

/// The guest's TSC and the time at which it had that value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeState {
    /// The TSC of vCPU 0.
    pub tsc: u64,
    /// Wall time, nanoseconds since 1970.
    pub realtime_ns: u64,
}

pub(super) fn wall_clock_ns() -> Result<u64, StateError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| StateError::WallClock)?;
    u64::try_from(since.as_nanos()).map_err(|_| StateError::WallClock)
}

fn read_tsc(vcpu: &Vcpu) -> Result<u64, StateError> {
    let failed = kvm("TSC", Some(vcpu.id));
    let entry = kvm_msr_entry { index: MSR_TSC, ..Default::default() };
    let mut msrs =
        Msrs::from_entries(&[entry]).map_err(|_| failed(kvm_ioctls::Error::new(libc::ENOMEM)))?;
    let count = vcpu.fd.get_msrs(&mut msrs).map_err(&failed)?;
    match msrs.as_slice() {
        [entry] if count == 1 => Ok(entry.data),
        _ => Err(failed(kvm_ioctls::Error::new(libc::EIO))),
    }
}

/// What the TSC must read `elapsed_ns` after it read `tsc`.
fn tsc_after(tsc: u64, elapsed_ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(elapsed_ns) * u128::from(khz) / 1_000_000;
    tsc.wrapping_add(ticks as u64)
}

impl TimeState {
    /// Reads the pair, as close together as this host manages.
    pub(super) fn now(vcpu: &Vcpu) -> Result<Self, StateError> {
        let mut best: Option<(u64, Self)> = None;
        for _ in 0..READINGS {
            let before = wall_clock_ns()?;
            let tsc = read_tsc(vcpu)?;
            let window = wall_clock_ns()?.saturating_sub(before);
            let reading = Self { tsc, realtime_ns: before + window / 2 };
            if best.is_none_or(|(narrowest, _)| window < narrowest) {
                best = Some((window, reading));
            }
        }
        best.map(|(_, reading)| reading).ok_or(StateError::WallClock)
    }

    /// Sets rate and offset of all vCPUs' TSC, so that it has gone on ticking.
    pub(super) fn restore_tsc(&self, vcpus: &[Vcpu], khz: u32) -> Result<(), StateError> {
        let Some(first) = vcpus.first() else { return Ok(()) };
        for vcpu in vcpus {
            let failed = kvm("TSC rate", Some(vcpu.id));
            if vcpu.fd.get_tsc_khz().map_err(&failed)? != khz {
                vcpu.fd.set_tsc_khz(khz).map_err(&failed)?;
            }
        }
        set_offset(first, 0)?;
        // With offset 0 the guest's TSC is the host's, scaled: the offset is the difference to what
        // it must read at that same moment.
        let host = Self::now(first)?;
        let elapsed = host.realtime_ns.saturating_sub(self.realtime_ns);
        if host.realtime_ns < self.realtime_ns {
            let behind = Duration::from_nanos(self.realtime_ns - host.realtime_ns);
            tracing::warn!(
                ?behind,
                "this host's clock is behind the guest's: synchronise the hosts"
            );
        } else if Duration::from_nanos(elapsed) > SUSPICIOUS {
            let away = Duration::from_nanos(elapsed);
            tracing::info!(?away, "the guest's clocks are set forward by the time it was away");
        }
        let offset = tsc_after(self.tsc, elapsed, khz).wrapping_sub(host.tsc);
        vcpus.iter().try_for_each(|vcpu| set_offset(vcpu, offset))
    }
}

fn set_offset(vcpu: &Vcpu, offset: u64) -> Result<(), StateError> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: &raw const offset as u64,
        flags: 0,
    };
    // kvm-ioctls has this call for vCPUs of other architectures only.
    // SAFETY: the descriptor is a vCPU's, the request is the one that takes a `kvm_device_attr`, and
    // the eight bytes it points to live until the call returns.
    let result = unsafe { ioctl_with_ref(&vcpu.fd, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 {
        return Ok(());
    }
    Err(kvm("TSC offset", Some(vcpu.id))(kvm_ioctls::Error::last()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_goes_on() {
        assert_eq!(tsc_after(1000, 0, 2_000_000), 1000);
        assert_eq!(tsc_after(1000, 1_000_000_000, 2_000_000), 2_000_001_000);
        // Years, and a TSC about to wrap.
        assert_eq!(tsc_after(u64::MAX, 500, 2_000_000), 999);
        let years = 100 * 365 * 86_400 * 1_000_000_000;
        assert_eq!(tsc_after(0, years, 4_000_000), years * 4);
    }
}
