//! Base VMs: what a cloudlet holds before any guest arrives.
//!
//! A *base* is a disk image with the kernel and initramfs that boot it, perhaps a snapshot of a
//! guest's memory that saves the boot, a manifest that names the root of every part, and a chunk
//! index that finds a part's chunk by its hash. Bases live in a [`store::Store`]; a VM's disk is an
//! [`overlay::Overlay`] over its base's disk.
//!
//! ```text
//! Store ── get ──> Base ── manifest, parts, chunk(Place), lookup(ChunkHash) -> Place
//!                   ▲
//!                   └── Overlay: one VM's disk = base | data | zero, chunk by chunk
//! ```
//!
//! Goals: content addressed and verifiable; nothing here grows with the size of a disk except
//! mapped files and one byte a chunk of a running VM's overlay. Non-goals: networks, KVM, who owns
//! a VM. The bytes on disk are described in `docs/formats.md`.

pub mod base;
pub mod chunk;
pub mod image;
pub mod index;
pub mod manifest;
pub mod overlay;
pub mod store;

mod files;
mod format;
mod in_order;
mod mapped;
mod scan;

pub use base::{Base, BaseError, BaseId, Part, Place};
pub use chunk::{CHUNK_SIZE, Chunk, ChunkHash};
pub use files::data_extent;
pub use format::FormatError;
pub use manifest::{MachineInfo, Manifest, MemoryInfo, PartInfo, PartRoot};
pub use overlay::{ChunkState, Overlay, OverlayError};
pub use store::{ImportSpec, MemorySpec, Store, StoreError};
