//! One virtual machine on KVM. Knows nothing of networks or peers.
//!
//! ```text
//!            boot: kernel, ACPI, zero page          state: everything but RAM and disk
//!                       \                             /
//!   handoff ──────── machine: Vm<Paused> <──> Vm<Running> ──── profile, cpuid, host
//!                     /        |           \
//!     dirty: what changed    vcpu: threads   devices: buses, serial, virtio-mmio
//!                     \        |           /
//!                      memory, layout: where everything is
//! ```
//!
//! Begin at [`machine`]. Goals: Debian's unmodified kernels; a paused machine that is complete, so
//! that it can go on elsewhere without noticing more than a gap in time; nothing that a guest or a
//! peer sends can make this program panic. Non-goals: firmware, PCI, devices that need either.

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
mod pagemap;
pub mod profile;
pub mod state;
pub mod template;
pub mod threads;
mod throttle;
mod vcpu;

pub use codec::CodecError;
pub use devices::virtio::{
    net::{Tap, TapError, gratuitous_arp},
    rate::Rate,
};
pub use handoff::{AnyVm, IncomingVm, VmSource};
pub use host::HostCheck;
pub use machine::{
    MachineError, MachineSnapshot, NetConfig, Paused, Rates, Running, TransitionError, Vm, VmConfig,
};
pub use profile::{HostProfile, MachineProfile};
pub use template::CpuTemplate;
pub use threads::{ThreadHook, ThreadKind};
pub use vcpu::VmEvent;
