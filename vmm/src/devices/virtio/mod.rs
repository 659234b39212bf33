//! Virtio 1.2 devices over MMIO: one transport and one worker for every device.
//!
//! ```text
//!  vCPU ── register access ──> mmio ── commands ──> worker thread ──> VirtioBackend
//!  vCPU ── queue notify ── eventfd ───────────────────┘    │            (block, net, rng)
//!  KVM  <── irqfd ── interrupt <──────────────────────────┘
//! ```
//!
//! [`mmio`] holds what the driver configures and the status state machine; the worker owns the
//! queues and the backend from the moment the driver is ready until it resets the device;
//! [`queue`] turns descriptors that the guest wrote into [`queue::Chain`]s that lie in RAM.
//! A backend is only what is particular to its kind of device.
//!
//! Every write to guest RAM marks its pages, at the earliest when the bytes are there: that is what
//! the dirty set of a handoff relies on.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod device;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
mod timer;
mod worker;

pub use device::{DeviceContext, DeviceError, Progress, VirtioBackend};
pub use mmio::VirtioMmio;
pub use state::{TransportState, VirtioError};
