//! The lab host: a QEMU machine in which KVM works, and one command run in it.

pub(crate) mod cpio;
pub(crate) mod host;
pub(crate) mod image;
pub(crate) mod job;
pub(crate) mod libraries;
pub(crate) mod modules;
pub(crate) mod qemu;
pub(crate) mod root;
