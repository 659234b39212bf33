//! The TSC across a move: it goes on as if it had ticked all the while.
//!
//! Saved is one pair: the guest's TSC and the wall time at which it had that value. The target
//! computes what the TSC must be now and gives all vCPUs the one offset that makes it so; writing
//! the TSC of each vCPU instead would make them differ by the time between the writes, and KVM would
//! stop trusting its master clock.
//!
//! Wall times of two hosts are compared, and a host's clock may be stepped at any time. A guest that
//! comes from another host cannot have stood still longer than this host has waited for it: where the
//! wall clocks say otherwise they are not believed, and the guest's clocks go on from where they
//! stood. They are late then by the time that the guest stood still, which is little; set by the wall
//! clocks they could be wrong by hours.

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

/// Why two wall clocks do not say how long a guest stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ClocksDisagree {
    /// Now is before then.
    #[error("this host's clock is {0:?} behind the guest's")]
    Behind(Duration),
    /// More time has gone by than can have.
    #[error("by the clocks the guest stood still for {said:?}, and it was {at_most:?} at most")]
    TooLong {
        /// By the clocks.
        said: Duration,
        /// By what this host has measured.
        at_most: Duration,
    },
}

/// How long a guest stood still that was stopped at one wall time and goes on at another.
pub(super) fn away(
    stopped_ns: u64,
    now_ns: u64,
    at_most: Option<Duration>,
) -> Result<Duration, ClocksDisagree> {
    let Some(said) = now_ns.checked_sub(stopped_ns).map(Duration::from_nanos) else {
        return Err(ClocksDisagree::Behind(Duration::from_nanos(stopped_ns - now_ns)));
    };
    match at_most {
        Some(at_most) if said > at_most => Err(ClocksDisagree::TooLong { said, at_most }),
        _ => Ok(said),
    }
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
fn tsc_after(tsc: u64, elapsed: Duration, khz: u32) -> u64 {
    let ticks = elapsed.as_nanos() * u128::from(khz) / 1_000_000;
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

    /// Sets rate and offset of all vCPUs' TSC, so that it has gone on ticking. The guest stood still
    /// for so long at most, if that is known.
    pub(super) fn restore_tsc(
        &self,
        vcpus: &[Vcpu],
        khz: u32,
        at_most: Option<Duration>,
    ) -> Result<(), StateError> {
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
        let elapsed = match away(self.realtime_ns, host.realtime_ns, at_most) {
            Ok(away) if away > SUSPICIOUS => {
                tracing::info!(?away, "the guest's clocks are set forward by the time it was away");
                away
            }
            Ok(away) => away,
            Err(error) => {
                tracing::warn!(%error, "the guest's clocks go on from where they stood: \
                     synchronise the hosts' clocks");
                Duration::ZERO
            }
        };
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
        assert_eq!(tsc_after(1000, Duration::ZERO, 2_000_000), 1000);
        assert_eq!(tsc_after(1000, Duration::from_secs(1), 2_000_000), 2_000_001_000);
        // Years, and a TSC about to wrap.
        assert_eq!(tsc_after(u64::MAX, Duration::from_nanos(500), 2_000_000), 999);
        let years = 100 * 365 * 86_400;
        assert_eq!(tsc_after(0, Duration::from_secs(years), 4_000_000), years * 4_000_000_000);
    }

    /// Clocks of hosts that were stepped, or never were right.
    #[test]
    fn wall_clocks_are_believed_as_far_as_they_can_be_right() {
        let s = Duration::from_secs;
        let ns = |seconds: u64| seconds * 1_000_000_000;
        assert_eq!(away(ns(100), ns(103), None), Ok(s(3)));
        assert_eq!(away(ns(100), ns(103), Some(s(3))), Ok(s(3)));
        // A base that has lain for a year.
        let year = 365 * 86_400;
        assert_eq!(away(ns(100), ns(100 + year), None), Ok(s(year)));
        // A guest that was sent within five seconds, to a host whose clock is an hour ahead.
        let too_long = ClocksDisagree::TooLong { said: s(3600), at_most: s(5) };
        assert_eq!(away(ns(100), ns(3700), Some(s(5))), Err(too_long));
        // Behind, whether the time is known or not.
        for at_most in [None, Some(s(5))] {
            let behind = ClocksDisagree::Behind(s(60));
            assert_eq!(away(ns(100), ns(40), at_most), Err(behind));
        }
        assert!(away(u64::MAX, 0, None).is_err());
    }
}
