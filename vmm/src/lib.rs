//! One virtual machine on KVM. Knows nothing of networks or peers.

pub mod boot;
mod codec;
pub mod cpuid;
pub mod devices;
pub mod host;
pub mod layout;
pub mod memory;
pub mod profile;

pub use codec::CodecError;
