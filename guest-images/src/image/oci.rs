//! Images of containers as disks: an OCI image layout, in a directory or a tar archive of one, and what
//! `docker save` writes.
//!
//! ```text
//! Source ─► index ─► manifest ─► config ─────────────► Startup ─► /sbin/howdah-init
//! (blobs)                  └──► layers ─► tar ─► Tree ─────┴───► mkfs ─► disk
//!                                  └── contents, once places are known ──┘
//! ```
//!
//! Layers are read twice: first what files there are, until the last layer has said what is left of them, then the
//! contents, each to its place on the disk. Nothing else is written anywhere, and nothing is read of a blob before
//! all of it was compared with its digest. A registry would be one more `blob::Source`.

mod blob;
mod disk;
mod layer;
mod manifest;
mod startup;
mod tree;

use std::{fs::File, io, io::Read, path::Path};

use layer::Take;
use manifest::Parts;
use tree::Tree;

pub use blob::Digest;
pub use manifest::Process;
pub use startup::Startup;
pub use tree::TreeError;

use super::{
    mkfs::Label,
    tar::{Entry, Kind, TarError},
};
use crate::{FormatError, manifest::MAX_PART_BYTES};

/// What a file system counts as made at, so that the same image makes the same disk: the first second of 2026.
const MADE: u32 = 1_767_225_600;
/// What all layers unpack to, in disks, is at most so much; and some more for disks that are small.
const UNPACKED_DISKS: u64 = 4;
const UNPACKED_BYTES: u64 = 256 << 20;
/// Each layer is read three times.
const PASSES: u64 = 3;

/// Why an image is not taken. Reads well after its path.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// There is nothing that can be opened.
    #[error("opening it: {0}")]
    Open(#[source] io::Error),
    /// It cannot be read.
    #[error("reading it: {0}")]
    Read(#[source] io::Error),
    /// The disk cannot be written.
    #[error("writing its disk: {0}")]
    Write(#[source] io::Error),
    /// The content of an entry does not come. Inside of this module only.
    #[error("reading a file of it: {0}")]
    Content(#[source] io::Error),
    /// It is something else.
    #[error(
        "it is no OCI image: give a directory with an index.json (`skopeo copy ... oci:DIR`), a tar archive of one \
         (`podman save --format oci-archive`), or what `docker save` writes"
    )]
    NotOci,
    /// The archive is packed.
    #[error("it {0}")]
    Packed(FormatError),
    /// The archive cannot be read.
    #[error("{0}: fetch it again")]
    Archive(#[source] TarError),
    /// A document in it is none.
    #[error("its {name} is not what it should be: {error}")]
    Json {
        /// Which.
        name: String,
        /// Why.
        error: serde_json::Error,
    },
    /// A document in it is too long.
    #[error("its {name} has more than {most} bytes")]
    Document {
        /// Which.
        name: String,
        /// The most.
        most: u64,
    },
    /// It is for other machines.
    #[error("it is not for linux/{wanted}: it has {there}")]
    Platform {
        /// What this host is.
        wanted: &'static str,
        /// What it is for.
        there: String,
    },
    /// There are several images.
    #[error("it holds several images: say which with --ref: {0}")]
    Several(String),
    /// The image that is wanted is not there.
    #[error("it holds no image {name:?}: there are: {there}")]
    Name {
        /// What is wanted.
        name: String,
        /// What there is.
        there: String,
    },
    /// Indexes name indexes.
    #[error("its indexes lead to further indexes and to no image")]
    Depth,
    /// A blob is not there.
    #[error("its {0} is missing: copy the whole image again")]
    Missing(String),
    /// A blob has another length.
    #[error("its {blob} has {there} bytes and should have {said}: copy the image again")]
    Length {
        /// Which.
        blob: String,
        /// How long it is.
        there: u64,
        /// How long it should be.
        said: u64,
    },
    /// A blob has another content.
    #[error("its {0} does not have the content that its digest says: copy the image again")]
    Digest(String),
    /// A layer is something else.
    #[error(
        "a layer of it has the type {0:?}, and layers of files (tar, with gzip or zstd) are read"
    )]
    LayerType(String),
    /// Nobody makes so many.
    #[error("it has more than 256 layers")]
    Layers,
    /// Not each layer has a content.
    #[error("it has {layers} layers, and its configuration says the content of {contents}")]
    Count {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        contents: usize,
    },
    /// A layer cannot be read.
    #[error("its layer {layer}: {error}")]
    Layer {
        /// Which.
        layer: String,
        /// Why.
        error: TarError,
    },
    /// An entry has no place.
    #[error("it is not taken: {0}")]
    Tree(#[from] TreeError),
    /// A file cannot be kept as it is.
    #[error("its {path}: {why}")]
    File {
        /// Which.
        path: String,
        /// Why.
        why: String,
    },
    /// It unpacks to too much.
    #[error(
        "its layers unpack to far more than its disk has: a larger --disk-mib takes them if that is meant"
    )]
    Bomb,
    /// The disk is too small.
    #[error("its files need more than the {mib} MiB of its disk: say more with --disk-mib")]
    Full {
        /// What the disk has.
        mib: u64,
    },
    /// Somebody wrote to it.
    #[error("its layer {0} changed while it was read: try again when nobody writes to it")]
    Changed(usize),
    /// Nothing in it starts.
    #[error(
        "it cannot boot: it has neither /sbin/init nor /bin/sh, which would start what it is for; add a shell to the \
         image, or say with --cmdline which program starts: `console=ttyS0 root=/dev/vda rw init=/PROGRAM`"
    )]
    NoShell,
    /// Its configuration cannot be said to a shell.
    #[error("its configuration: {0}")]
    Process(String),
}

/// An image whose documents were read.
#[derive(Debug)]
pub struct Image {
    parts: Parts,
}

/// An image whose layers were put together, without their content.
#[derive(Debug)]
pub struct Merged {
    parts: Parts,
    tree: Tree,
    startup: Option<Startup>,
    disk_bytes: u64,
    /// What of all work is done, and all work.
    done_bytes: u64,
    total_bytes: u64,
}

/// Hears how many bytes are done, and of how many.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

impl Image {
    /// Finds the image at a path, or that with this name among those that are there, for this host.
    pub fn open(path: &Path, name: Option<&str>) -> Result<Self, OciError> {
        let source = blob::Source::open(path)?;
        Ok(Self { parts: manifest::choose(&source, name)? })
    }

    /// What others call the image's id.
    pub fn id(&self) -> Digest {
        self.parts.id
    }

    /// Verifies the layers and puts them together, for a disk of so many bytes.
    pub fn merge(self, disk_bytes: u64, progress: &mut Progress<'_>) -> Result<Merged, OciError> {
        let parts = self.parts;
        let all: u64 = parts.layers.iter().map(|layer| layer.blob.len()).sum();
        let total_bytes = all.saturating_mul(PASSES);
        let mut done_bytes = 0;
        for layer in &parts.layers {
            layer::verify(layer, &mut |bytes| progress(done_bytes + bytes, total_bytes))?;
            done_bytes += layer.blob.len();
        }
        let mut tree = Tree::new();
        let mut left = unpacked_bytes(disk_bytes);
        for (number, layer) in parts.layers.iter().enumerate() {
            tree.begin(number);
            let mut take = Grow { tree: &mut tree, disk_bytes };
            layer::read(layer, &mut left, &mut take, &mut |bytes| {
                progress(done_bytes + bytes, total_bytes);
            })?;
            done_bytes += layer.blob.len();
        }
        tree.begin(parts.layers.len());
        let startup = startup::add(&mut tree, &parts.process)?;
        Ok(Merged { parts, tree, startup, disk_bytes, done_bytes, total_bytes })
    }
}

impl Merged {
    /// What a guest of it runs; `None` if nothing in it can be started without being named.
    pub fn startup(&self) -> Option<&Startup> {
        self.startup.as_ref()
    }

    /// Whether it brings a kernel of its own.
    pub fn has_kernel(&self) -> bool {
        self.tree.names("/boot").any(|name| name.starts_with(b"vmlinuz"))
    }

    /// Extended attributes of its files that the disk will not have.
    pub fn left_out(&self) -> u64 {
        self.tree.left_out
    }

    /// Writes the disk to an empty file.
    pub fn write(mut self, to: &File, progress: &mut Progress<'_>) -> Result<(), OciError> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(self.parts.id.bytes().split_at(16).0);
        // A name-based one of whatever making (RFC 9562).
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let label = Label { uuid, made: MADE };
        let mut places = disk::write_tree(&mut self.tree, to, self.disk_bytes, label)?;
        let mut left = unpacked_bytes(self.disk_bytes);
        for (number, layer) in self.parts.layers.iter().enumerate() {
            let done = self.done_bytes;
            if let Some(mut fill) = disk::Fill::new(to, number, &mut places) {
                layer::read(layer, &mut left, &mut fill, &mut |bytes| {
                    progress(done + bytes, self.total_bytes);
                })?;
                fill.finish()?;
            }
            self.done_bytes += layer.blob.len();
            progress(self.done_bytes, self.total_bytes);
        }
        Ok(())
    }
}

/// What layers may unpack to. Some of it later layers replace.
fn unpacked_bytes(disk_bytes: u64) -> u64 {
    disk_bytes.min(MAX_PART_BYTES).saturating_mul(UNPACKED_DISKS) + UNPACKED_BYTES
}

/// Lets the tree grow by what a layer has.
struct Grow<'a> {
    tree: &'a mut Tree,
    disk_bytes: u64,
}

impl Take for Grow<'_> {
    fn take(&mut self, number: u64, entry: Entry, _: &mut dyn Read) -> Result<bool, OciError> {
        if matches!(entry.kind, Kind::File(bytes) if bytes > self.disk_bytes) {
            return Err(OciError::Full { mib: self.disk_bytes >> 20 });
        }
        self.tree.apply(entry, number)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
