//! The targets.

mod base;
mod bases;
mod batch;
mod frames;
mod image;
mod journal;
mod kernel;
mod machine;
mod manifest;
mod oci;
mod overlay;
mod payload;
mod ports;
mod receive;
mod report;
mod saved;
mod send;
mod table;
mod tls;
mod trace;
mod virtio;

/// Something that reads bytes from outside.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, that of its program and of the directory with its seeds.
    pub name: &'static str,
    /// Where the bytes come from in life.
    pub from: Origin,
    /// Does it all once; says whether the bytes were taken for what they claim to be, whole. Panics, in
    /// any thread, if anything that must hold does not.
    pub run: fn(&[u8]) -> bool,
    /// Inputs made by the product itself: there are always some, whatever formats become. At least
    /// the first is taken.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Longer inputs are not tried.
    pub max_len: usize,
}

/// Who wrote the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The other cloudlet.
    Peer,
    /// The guest.
    Guest,
    /// A file of this host or from another.
    File,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    tls::TARGET,
    frames::TARGET,
    payload::TARGET,
    batch::TARGET,
    receive::TARGET,
    send::TARGET,
    bases::TARGET,
    machine::TARGET,
    manifest::TARGET,
    base::TARGET,
    kernel::TARGET,
    image::QCOW2,
    image::DISK,
    oci::TARGET,
    overlay::TARGET,
    journal::TARGET,
    table::TARGET,
    saved::TARGET,
    trace::TARGET,
    report::TARGET,
    virtio::BLOCK,
    virtio::NET,
    virtio::BALLOON,
    virtio::RNG,
    ports::TARGET,
];

/// The target with this name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
