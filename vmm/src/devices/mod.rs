//! Devices: the buses they hang on, the few legacy ports a PC needs, and virtio over MMIO.
//!
//! A device knows guest RAM and its own files; it knows neither KVM nor other devices. vCPU threads
//! reach devices through a [`bus::Bus`]; interrupts leave through event descriptors that the
//! machine gives to KVM.

pub mod bus;
pub(crate) mod complaints;
pub mod legacy;
pub mod serial;
pub mod virtio;
