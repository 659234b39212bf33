//! virtio-blk over a copy-on-write disk.

mod dirty;

pub use dirty::DiskDirty;
