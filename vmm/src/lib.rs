//! One virtual machine on KVM. Knows nothing of networks or peers.

pub mod boot;
pub mod devices;
pub mod layout;
pub mod memory;
