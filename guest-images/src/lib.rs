//! Base VMs: what a cloudlet holds before any guest arrives.
//!
//! A *base* is a disk image with the kernel and initramfs that boot it, a manifest that names
//! the root of every part, and a chunk index that finds a part's chunk by its hash. Bases live in
//! a [`store::Store`]; a VM's disk is an [`overlay::Overlay`] over its base's disk.
//!
//! Goals: content addressed and verifiable; nothing here grows with the size of a disk except
//! mapped files. Non-goals: networks, KVM, who owns a VM.

pub mod base;
pub mod chunk;
pub mod overlay;
pub mod store;

pub use base::{Base, BaseId, Part, Place};
pub use chunk::{CHUNK_SIZE, Chunk, ChunkHash};
