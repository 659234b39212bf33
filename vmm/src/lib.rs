//! One virtual machine on KVM. Knows nothing of networks or peers.

pub mod boot;
mod codec;
pub mod cpuid;
pub mod devices;
pub mod dirty;
pub mod handoff;
pub mod host;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod profile;
pub mod state;
mod vcpu;

pub use codec::CodecError;
pub use handoff::{AnyVm, IncomingVm, VmSource};
pub use host::HostCheck;
pub use machine::{MachineError, NetConfig, Paused, Running, TransitionError, Vm, VmConfig};
pub use profile::{HostProfile, MachineProfile};
pub use vcpu::VmEvent;
