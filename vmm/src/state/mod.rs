//! A paused machine as bytes: everything but RAM and disk.
//!
//! The order of saving and restoring is that of the two functions `VmState::save` and
//! `VmState::restore`, and each step says why it stands where it stands. What comes from a peer is
//! plain data until KVM and the devices have accepted it; nothing in it may make this program
//! panic, allocate without bound, or wait.

mod chips;
mod msrs;
mod time;
mod vcpu;

use std::time::Duration;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

pub use chips::ChipState;
pub use time::TimeState;
pub use vcpu::VcpuState;

use crate::{
    codec::{CodecError, Format},
    devices::{serial::SerialState, virtio::TransportState},
    host::Host,
    layout::VIRTIO_SLOTS,
    profile::MachineProfile,
    vcpu::Vcpu,
};

/// Version of the saved state. Anything that changes what the bytes mean raises it: the fields
/// here, the layout, the devices' own states.
pub const VERSION: u16 = 2;

const FORMAT: Format =
    Format { what: "machine state", magic: b"HWDHVMST", version: VERSION, max_bytes: 8 << 20 };

/// Why a state cannot be saved or taken on.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The bytes are not a state.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// KVM refused a part.
    #[error("KVM: {what}{}: {source}", vcpu.map(|id| format!(" of vCPU {id}")).unwrap_or_default())]
    Kvm {
        /// What was read or written.
        what: &'static str,
        /// Whose, if a vCPU's.
        vcpu: Option<u8>,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM refused a model-specific register.
    #[error("KVM does not take MSR {index:#x} = {value:#x} of vCPU {vcpu}")]
    Msr {
        /// Whose.
        vcpu: u8,
        /// Which.
        index: u32,
        /// The value.
        value: u64,
    },
    /// A count in the state is not the machine's.
    #[error("machine state has {found} {what}, the machine has {expected}")]
    Count {
        /// Of what.
        what: &'static str,
        /// In the state.
        found: usize,
        /// In the machine.
        expected: usize,
    },
    /// A part of the state is larger than anything real.
    #[error("machine state has {found} {what}, more than {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// In the state.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The state is of another machine.
    #[error("the state is of another machine than the one that was announced")]
    OtherMachine,
    /// Extended register state that does not fit this host.
    #[error("vCPU {vcpu} uses {used} bytes of XSAVE state, this host has room for {room}")]
    Xsave {
        /// Whose.
        vcpu: u8,
        /// Bytes with something in them.
        used: usize,
        /// Bytes there.
        room: usize,
    },
    /// The host's clock cannot be read.
    #[error("the host's wall clock says a time before 1970: set it")]
    WallClock,
}

/// Names what KVM was asked for when it fails.
pub(crate) fn kvm(
    what: &'static str,
    vcpu: Option<u8>,
) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, vcpu, source }
}

/// The state of a virtio device, and the slot it is in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlotState {
    /// The slot.
    pub slot: u8,
    /// The device.
    pub state: TransportState,
}

/// The states of all devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceStates {
    /// The serial console.
    pub serial: SerialState,
    /// Virtio devices, by slot, ascending.
    pub virtio: Vec<SlotState>,
}

/// A paused machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    /// Which machine it is.
    pub profile: MachineProfile,
    /// When the guest stopped.
    pub time: TimeState,
    /// Its vCPUs, by id.
    pub vcpus: Vec<VcpuState>,
    /// What KVM emulates besides vCPUs.
    pub chips: ChipState,
    /// What this program emulates.
    pub devices: DeviceStates,
}

impl VmState {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        Ok(FORMAT.encode(self)?)
    }

    /// From bytes of a peer. Checks all counts; values are for KVM and the devices to accept.
    pub fn decode(blob: &[u8], expected: &MachineProfile) -> Result<Self, StateError> {
        let state: Self = FORMAT.decode(blob)?;
        if state.profile != *expected {
            return Err(StateError::OtherMachine);
        }
        let count = |what, found: usize, expected: usize| {
            if found == expected {
                Ok(())
            } else {
                Err(StateError::Count { what, found, expected })
            }
        };
        count("vCPUs", state.vcpus.len(), expected.vcpus.into())?;
        if state.devices.virtio.len() > VIRTIO_SLOTS {
            let (found, max) = (state.devices.virtio.len(), VIRTIO_SLOTS);
            return Err(StateError::TooMany { what: "virtio devices", found, max });
        }
        for vcpu in &state.vcpus {
            vcpu.check()?;
        }
        Ok(state)
    }

    /// Saves a machine whose vCPUs are stopped and whose devices have drained. Devices come first
    /// (`devices`), because draining may raise an interrupt.
    pub(crate) fn save(
        host: &Host,
        vm: &VmFd,
        vcpus: &[Vcpu],
        profile: MachineProfile,
        devices: DeviceStates,
    ) -> Result<Self, StateError> {
        let msrs = msrs::saved_indices(host)?;
        let states: Vec<VcpuState> = vcpus
            .iter()
            .map(|vcpu| VcpuState::save(vcpu, host.xsave_bytes, &msrs))
            .collect::<Result<_, _>>()?;
        // PIT and clock before the interrupt controllers that they interrupt.
        let chips = ChipState::save(vm)?;
        let first = vcpus.first().ok_or(StateError::Count {
            what: "vCPUs",
            found: 0,
            expected: profile.vcpus.into(),
        })?;
        let time = TimeState::now(first)?;
        Ok(Self { profile, time, vcpus: states, chips, devices })
    }

    /// Gives the state to a machine just made, but for its devices. The vCPUs must never have run. The
    /// guest stood still for so long at most, if that is known.
    pub(crate) fn restore(
        &self,
        host: &Host,
        vm: &VmFd,
        vcpus: &[Vcpu],
        at_most: Option<Duration>,
    ) -> Result<(), StateError> {
        // The TSC of all vCPUs before anything that is measured by it.
        self.time.restore_tsc(vcpus, self.profile.tsc_khz, at_most)?;
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu, host.xsave_bytes)?;
        }
        self.chips.restore(vm, host.clock_realtime, at_most)
    }
}
