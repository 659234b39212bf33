//! One base: manifest, disk, kernel, initramfs, memory and the chunk index over them.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};

use crate::{
    chunk::{Chunk, ChunkHash},
    files::{self, Lock},
    index::{Index, IndexError, PartRoots},
    manifest::{Manifest, ManifestError, PartInfo},
    mapped::{self, MappedPart},
};

/// The manifest's name in a base directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The index's name in a base directory.
pub const INDEX_FILE: &str = "index";
/// The machine state's name in the directory of a base with memory.
pub const MACHINE_FILE: &str = "machine";
/// The longest manifest file that is read: far above any real one.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;

/// The identity of a base: BLAKE3 of its canonical manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BaseId(pub [u8; 32]);

impl fmt::Display for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BaseId({})", hex::encode(&self.0[..6]))
    }
}

impl FromStr for BaseId {
    type Err = hex::FromHexError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut id = [0; 32];
        hex::decode_to_slice(s, &mut id)?;
        Ok(Self(id))
    }
}

/// A part of a base whose chunks both ends hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Part {
    /// The disk image.
    Disk = 0,
    /// The kernel image as it is loaded.
    Kernel = 1,
    /// The initramfs.
    Initramfs = 2,
    /// The guest's memory at the moment of the snapshot. Chunk *n* is RAM chunk *n*, counted
    /// without the hole below 4 GiB.
    Memory = 3,
}

impl Part {
    /// Every part, in the order in which the index prefers them.
    pub const ALL: [Self; 4] = [Self::Disk, Self::Kernel, Self::Initramfs, Self::Memory];

    /// The part's file in a base directory.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Disk => "disk.raw",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Memory => "memory.raw",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Memory => "memory",
        })
    }
}

/// A byte that names no [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no part of a base has number {0}")]
pub struct UnknownPart(pub u8);

impl TryFrom<u8> for Part {
    type Error = UnknownPart;

    fn try_from(byte: u8) -> Result<Self, UnknownPart> {
        Self::ALL.into_iter().find(|part| *part as u8 == byte).ok_or(UnknownPart(byte))
    }
}

/// Where a chunk's content can be found in a base. Named on the wire instead of a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The part that holds it.
    pub part: Part,
    /// The chunk's number in that part. A part's last chunk is padded with zeros.
    pub index: u64,
}

/// Why a base cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A file cannot be opened, read or locked.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The manifest is damaged or not for this build.
    #[error("{path}: {source}")]
    Manifest {
        /// The manifest's path.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// The manifest describes another base than the directory's name says.
    #[error(
        "{dir}: the manifest there is that of base {found}: it was changed or moved; remove the directory and import the base again"
    )]
    WrongId {
        /// The base's directory.
        dir: PathBuf,
        /// The id of the manifest in it.
        found: BaseId,
    },
    /// A part is longer or shorter than the manifest says.
    #[error(
        "{path} has {found} bytes, the manifest says {expected}: the base is damaged; remove it and import it again"
    )]
    PartLength {
        /// The part's file.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        expected: u64,
    },
    /// The index is damaged or belongs to another base.
    #[error("{path}: {source}; remove the base and import it again")]
    Index {
        /// The index's path.
        path: PathBuf,
        /// What is wrong with it.
        source: IndexError,
    },
}

impl BaseError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// An open base. Its files are immutable; it is shared freely between threads.
///
/// While it is open, its store will not remove it.
#[derive(Debug)]
pub struct Base {
    id: BaseId,
    dir: PathBuf,
    manifest: Manifest,
    disk: MappedPart,
    kernel: MappedPart,
    initramfs: Option<MappedPart>,
    memory: Option<MappedPart>,
    machine: Option<File>,
    index: Index,
    _in_use: Lock,
}

impl Base {
    /// Opens the base in `dir`, whose last component must be its id.
    ///
    /// Checks the manifest against the id, each part's length and the index's header: enough to
    /// refuse what is truncated or foreign, at no cost that grows with the disk.
    /// [`Store::verify`](crate::store::Store::verify) reads everything.
    pub fn open(dir: &Path) -> Result<Self, BaseError> {
        let manifest_path = dir.join(MANIFEST_FILE);
        let file = File::open(&manifest_path).map_err(BaseError::io("opening", &manifest_path))?;
        let in_use = Lock::take(file, FlockArg::LockSharedNonblock)
            .map_err(BaseError::io("locking", &manifest_path))?;
        let manifest = read_manifest(&manifest_path)?;
        let id = manifest.id();
        if dir.file_name().and_then(|name| name.to_str()) != Some(id.to_string().as_str()) {
            return Err(BaseError::WrongId { dir: dir.to_owned(), found: id });
        }
        let open =
            |part: Part, info: &PartInfo| MappedPart::open(&dir.join(part.file_name()), info.bytes);
        let open_some = |part| manifest.part(part).map(|info| open(part, info)).transpose();
        let disk = open(Part::Disk, &manifest.disk)?;
        let kernel = open(Part::Kernel, &manifest.kernel)?;
        let initramfs = open_some(Part::Initramfs)?;
        let memory = open_some(Part::Memory)?;
        let machine = manifest.memory.as_ref().map(|memory| memory.machine.bytes);
        let machine =
            machine.map(|bytes| mapped::open_exact(&dir.join(MACHINE_FILE), bytes)).transpose()?;
        let index_path = dir.join(INDEX_FILE);
        let index = Index::open(&index_path, &PartRoots::of(&manifest))
            .map_err(|source| BaseError::Index { path: index_path, source })?;
        let dir = dir.to_owned();
        Ok(Self {
            id,
            dir,
            manifest,
            disk,
            kernel,
            initramfs,
            memory,
            machine,
            index,
            _in_use: in_use,
        })
    }

    /// The base's identity.
    pub fn id(&self) -> BaseId {
        self.id
    }

    /// What it is made of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The directory that holds it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The disk image, open for reading.
    pub fn disk_file(&self) -> &File {
        self.disk.file()
    }

    /// The memory snapshot, open for reading, if the base has one: what a VM maps privately as its
    /// RAM.
    pub fn memory_file(&self) -> Option<&File> {
        self.memory.as_ref().map(MappedPart::file)
    }

    /// The machine state that belongs to the memory, if the base has one. What it means is the
    /// VMM's business; that it is what the manifest names is checked here, and what is not is an
    /// error of kind [`io::ErrorKind::InvalidData`].
    pub fn machine(&self) -> io::Result<Option<Vec<u8>>> {
        let (Some(file), Some(memory)) = (&self.machine, &self.manifest.memory) else {
            return Ok(None);
        };
        let info = &memory.machine;
        // The manifest bounds the length far below what fits an address.
        let mut bytes = vec![0; info.bytes as usize];
        file.read_exact_at(&mut bytes, 0)?;
        if blake3::hash(&bytes).as_bytes() != &info.hash {
            let path = self.dir.join(MACHINE_FILE);
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} is not what the manifest names: the base is damaged; remove it and \
                     import it again",
                    path.display()
                ),
            ));
        }
        Ok(Some(bytes))
    }

    /// How many different chunks its index knows: how much can be found in it.
    pub fn indexed_chunks(&self) -> u64 {
        self.index.len()
    }

    /// The kernel's path.
    pub fn kernel_path(&self) -> PathBuf {
        self.dir.join(Part::Kernel.file_name())
    }

    /// The initramfs's path, if the base has one.
    pub fn initramfs_path(&self) -> Option<PathBuf> {
        self.initramfs.as_ref().map(|_| self.dir.join(Part::Initramfs.file_name()))
    }

    /// Length of the disk in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.manifest.disk.bytes
    }

    /// How many chunks the disk has.
    pub fn disk_chunks(&self) -> u64 {
        self.manifest.disk.chunks()
    }

    /// How many chunks `part` has; zero for a part that this base does not have.
    pub fn part_chunks(&self, part: Part) -> u64 {
        self.manifest.part(part).map_or(0, |info| info.chunks())
    }

    /// The chunk at `place`, in place: no copy and no system call. A part's last chunk is padded
    /// with zeros; nothing for a place outside the base.
    ///
    /// The bytes are those of a mapped, immutable file. One that was truncated before the base was
    /// opened did not open; one truncated since, which no store does, or one that its disk cannot
    /// read, ends the process with SIGBUS instead of giving wrong bytes.
    pub fn chunk(&self, place: Place) -> Option<&Chunk> {
        self.part_map(place.part)?.chunk(place.index)
    }

    /// Copies the chunk at `place`, as [`Base::chunk`] shows it; a place outside the base is an
    /// error of kind [`io::ErrorKind::InvalidInput`].
    pub fn read(&self, place: Place, into: &mut Chunk) -> io::Result<()> {
        let Some(chunk) = self.chunk(place) else {
            let Place { part, index } = place;
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("base {} has no {part} chunk {index}", self.id),
            ));
        };
        *into = *chunk;
        Ok(())
    }

    /// Reads a byte range of the disk; what lies past its end reads as zeros.
    pub fn read_disk_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let there = self.disk_bytes().saturating_sub(offset).min(into.len() as u64) as usize;
        let (inside, outside) = into.split_at_mut(there);
        self.disk_file().read_exact_at(inside, offset)?;
        outside.fill(0);
        Ok(())
    }

    /// Where this base holds a chunk with that hash.
    ///
    /// The place is always inside the base. On a damaged index a lookup may miss, or name a place
    /// with other content: what the place holds is proved by hashing it, as the state root of a
    /// handoff does.
    pub fn lookup(&self, hash: &ChunkHash) -> Option<Place> {
        self.index.find(hash).filter(|place| place.index < self.part_chunks(place.part))
    }

    /// [`Base::lookup`] for many hashes at once, which is faster than one after the other:
    /// `places[i]` becomes the answer for `hashes[i]`. What is beyond the shorter of the two is
    /// left alone.
    pub fn lookup_batch(&self, hashes: &[ChunkHash], places: &mut [Option<Place>]) {
        self.index.find_batch(hashes, places);
        for place in places.iter_mut().take(hashes.len()) {
            *place = place.filter(|place| place.index < self.part_chunks(place.part));
        }
    }

    /// The chunk index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The chunk index's path.
    pub fn index_path(&self) -> PathBuf {
        self.dir.join(INDEX_FILE)
    }

    /// A part's open file.
    pub(crate) fn part_file(&self, part: Part) -> Option<&File> {
        self.part_map(part).map(MappedPart::file)
    }

    fn part_map(&self, part: Part) -> Option<&MappedPart> {
        match part {
            Part::Disk => Some(&self.disk),
            Part::Kernel => Some(&self.kernel),
            Part::Initramfs => self.initramfs.as_ref(),
            Part::Memory => self.memory.as_ref(),
        }
    }
}

/// Reads and checks a manifest file.
pub(crate) fn read_manifest(path: &Path) -> Result<Manifest, BaseError> {
    let json =
        files::read_small(path, MAX_MANIFEST_BYTES).map_err(BaseError::io("reading", path))?;
    Manifest::parse(&json).map_err(|source| BaseError::Manifest { path: path.to_owned(), source })
}
