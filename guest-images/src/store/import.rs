//! Making a base out of image files.

use std::{
    fs::{self, File, Metadata},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{
    BASES, Progress, Store, StoreError, check_name,
    ledger::{Known, Ledger},
    workshop::{Scratch, Workshop, seal, write_file},
};
use crate::{
    base::{Base, BaseId, INDEX_FILE, MACHINE_FILE, MANIFEST_FILE, Part},
    format::{self, HEAD_BYTES},
    index::{self, PartRoots},
    manifest::{self, ARCH, MachineInfo, Manifest, MemoryInfo, PartInfo},
    scan::{Scan, ScanError, slab_range, slabs},
};

/// What to make a base of.
#[derive(Clone, Debug)]
pub struct ImportSpec {
    /// The name it gets; a name that exists is moved to the new base.
    pub name: String,
    /// A raw disk image.
    pub disk: PathBuf,
    /// A bzImage or ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs, if any.
    pub initramfs: Option<PathBuf>,
    /// The kernel command line that boots the disk.
    pub cmdline: String,
    /// A snapshot of a guest that runs on this disk, if the base is to resume instead of boot.
    pub memory: Option<MemorySpec>,
}

/// A running guest, as it was when its disk was the base's.
#[derive(Clone, Debug)]
pub struct MemorySpec {
    /// Its RAM as one file, without the hole below 4 GiB.
    pub ram: PathBuf,
    /// The state of its machine, as its VMM writes it.
    pub machine: Vec<u8>,
}

impl Store {
    /// Imports a base and names it. The same files and command line give the same id, and a base
    /// that is there already is kept, unless it is damaged: then it is replaced.
    ///
    /// Sparse files stay sparse, and a file system that can share blocks between files does. On
    /// error, and on a crash, the store is as it was before; after a crash, the next import of the
    /// same files goes on where this one was.
    pub fn import(
        &self,
        spec: &ImportSpec,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<BaseId, StoreError> {
        check_name(&spec.name)?;
        manifest::check_cmdline(&spec.cmdline)
            .map_err(|source| StoreError::Content { path: spec.disk.clone(), source })?;
        // All sources are looked at before the first is copied: a wrong one is told at once.
        let sources = Sources::open(spec)?;
        let under_way = self.begin()?;
        let mut workshop = Workshop::enter(self, &sources.key(), &sources.lengths())?;
        let manifest = sources.make(spec, &mut workshop, progress)?;
        write_file(&workshop.dir().join(INDEX_FILE), |file| {
            let roots = PartRoots::of(&manifest);
            workshop.ledger.with_runs(|runs| index::build::write(file, &roots, runs))?
        })?;
        let json = manifest
            .to_json()
            .map_err(|source| StoreError::Content { path: spec.disk.clone(), source })?;
        write_file(&workshop.dir().join(MANIFEST_FILE), |file| file.write_all_at(&json, 0))?;
        let finished = workshop.finish(self)?;

        let id = manifest.id();
        self.place_base(&finished.0, &id, false)?;
        drop(under_way);
        self.name(&spec.name, &id)?;
        Ok(id)
    }

    /// Moves a finished base to where it belongs. One that is there stays, unless it does not open or is
    /// to be replaced; who has that open goes on with its files.
    pub(super) fn place_base(
        &self,
        finished: &Path,
        id: &BaseId,
        replace: bool,
    ) -> Result<(), StoreError> {
        let dir = self.base_dir(id);
        match fs::rename(finished, &dir) {
            Ok(()) => return self.sync(BASES),
            Err(error) if !dir.is_dir() => return Err(StoreError::io("creating", &dir)(error)),
            Err(_) => {}
        }
        match Base::open(&dir) {
            Ok(_) if !replace => return Ok(()),
            Ok(_) => tracing::warn!(%id, "replacing a damaged base"),
            Err(damage) => tracing::warn!(%id, %damage, "replacing a damaged base"),
        }
        let damaged = Scratch(self.tmp_path("damaged"));
        fs::rename(&dir, &damaged.0).map_err(StoreError::io("replacing", &dir))?;
        fs::rename(finished, &dir).map_err(StoreError::io("creating", &dir))?;
        self.sync(BASES)
    }
}

/// All files given for an import.
struct Sources<'a> {
    disk: Source<'a>,
    kernel: Source<'a>,
    initramfs: Option<Source<'a>>,
    memory: Option<(Source<'a>, &'a [u8])>,
}

impl<'a> Sources<'a> {
    fn open(spec: &'a ImportSpec) -> Result<Self, StoreError> {
        let initramfs = spec.initramfs.as_deref().map(|path| Source::open(Part::Initramfs, path));
        let memory = spec.memory.as_ref().map(|memory| {
            let machine = memory.machine.as_slice();
            manifest::check_machine_length(machine.len() as u64)
                .map_err(|source| StoreError::Content { path: memory.ram.clone(), source })?;
            Ok::<_, StoreError>((Source::open(Part::Memory, &memory.ram)?, machine))
        });
        Ok(Self {
            disk: Source::open(Part::Disk, &spec.disk)?,
            kernel: Source::open(Part::Kernel, &spec.kernel)?,
            initramfs: initramfs.transpose()?,
            memory: memory.transpose()?,
        })
    }

    fn all(&self) -> impl Iterator<Item = &Source<'a>> {
        let memory = self.memory.as_ref().map(|(ram, _)| ram);
        [&self.disk, &self.kernel].into_iter().chain(&self.initramfs).chain(memory)
    }

    fn lengths(&self) -> Vec<(Part, u64)> {
        self.all().map(|source| (source.part, source.seen.len())).collect()
    }

    /// Stands for these files with what is in them now: who writes to one changes it.
    fn key(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for source in self.all() {
            let meta = &source.seen;
            let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
            let numbers = [source.part as u64, meta.dev(), meta.ino(), meta.len()];
            let all = numbers.into_iter().chain(times.map(|time| time as u64));
            all.for_each(|number| {
                hasher.update(&number.to_le_bytes());
            });
        }
        *hasher.finalize().as_bytes()
    }

    /// Copies all parts and says what they are.
    fn make(
        &self,
        spec: &ImportSpec,
        workshop: &mut Workshop,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Manifest, StoreError> {
        let mut copy = |source: &Source| source.copy(workshop, progress);
        let disk = copy(&self.disk)?;
        let kernel = copy(&self.kernel)?;
        let initramfs = self.initramfs.as_ref().map(&mut copy).transpose()?;
        let ram = self.memory.as_ref().map(|(ram, _)| copy(ram)).transpose()?;
        let machine = self.memory.as_ref().map(|(_, machine)| *machine);
        if let Some(machine) = machine {
            let path = workshop.dir().join(MACHINE_FILE);
            write_file(&path, |file| file.write_all_at(machine, 0))?;
        }
        let memory = ram.zip(machine.map(MachineInfo::of));
        let memory = memory.map(|(ram, machine)| MemoryInfo { ram, machine });
        Ok(Manifest {
            version: manifest::version_for(memory.as_ref()),
            arch: ARCH.to_owned(),
            disk,
            kernel,
            initramfs,
            cmdline: spec.cmdline.clone(),
            memory,
        })
    }
}

/// A file given for import, looked at and open.
struct Source<'a> {
    part: Part,
    path: &'a Path,
    file: File,
    seen: Metadata,
}

impl<'a> Source<'a> {
    /// Opens a file and refuses it if it cannot be that part.
    fn open(part: Part, path: &'a Path) -> Result<Self, StoreError> {
        let seen = fs::metadata(path).map_err(StoreError::io("opening", path))?;
        let kind = seen.file_type();
        // Asked before the file is opened: opening a pipe would wait for its writer.
        if !kind.is_file() {
            let kind = match kind {
                kind if kind.is_dir() => "directory",
                kind if kind.is_block_device() => "block device",
                _ => "special file",
            };
            return Err(StoreError::NotAFile { path: path.to_owned(), kind, part });
        }
        let file = File::open(path).map_err(StoreError::io("opening", path))?;
        let seen = file.metadata().map_err(StoreError::io("opening", path))?;
        let head = read_head(&file).map_err(StoreError::io("reading", path))?;
        let checked = match part {
            Part::Disk => format::check_disk(&head),
            Part::Kernel => format::check_kernel(&head),
            Part::Initramfs | Part::Memory => Ok(()),
        };
        // The length after the format: a foreign image of odd length is a foreign image.
        checked.map_err(|source| StoreError::Format { path: path.to_owned(), source })?;
        manifest::check_length(part, seen.len())
            .map_err(|source| StoreError::Content { path: path.to_owned(), source })?;
        Ok(Self { part, path, file, seen })
    }

    /// Copies the file into the workshop, durably, and hashes what was copied. What an interrupted
    /// import did of it is taken as it is.
    fn copy(
        &self,
        workshop: &mut Workshop,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PartInfo, StoreError> {
        let to = workshop.part_file(self.part)?;
        let to_path = workshop.dir().join(self.part.file_name());
        let writing = || StoreError::io("writing", &to_path);
        let known = workshop.ledger.known(self.part).map_err(writing())?;
        let cloned = self.prepare(&to, &known, &mut workshop.ledger).map_err(writing())?;
        let (part, bytes) = (self.part, self.seen.len());
        let ledger = &mut workshop.ledger;
        let scan = Scan {
            part,
            source: if cloned { &to } else { &self.file },
            bytes,
            copy: (!cloned).then_some(&to),
            known: Some(&|slab| known.entries(slab)),
        };
        let scanned = scan.run(&mut |slab| {
            let done_bytes = slab_range(slab.number, bytes).end;
            if !slab.known {
                ledger.add(part, slab, &to)?;
            }
            progress(Progress { part, done_bytes, total_bytes: bytes });
            Ok(())
        });
        let root = scanned.map_err(|error| match error {
            ScanError::Read(error) => StoreError::io("reading", self.path)(error),
            ScanError::Write(error) => writing()(error),
        })?;
        if !cloned && !self.is_unchanged().map_err(StoreError::io("reading", self.path))? {
            return Err(StoreError::Changed { path: self.path.to_owned() });
        }
        seal(&to).and_then(|()| ledger.write_pending()).map_err(writing())?;
        Ok(PartInfo { bytes, root })
    }

    /// Makes the file ready to be copied to: a clone of the source where the file system can,
    /// otherwise holes wherever nothing is known to be copied. Whether it is a clone.
    fn prepare(&self, to: &File, known: &Known, ledger: &mut Ledger) -> io::Result<bool> {
        let bytes = self.seen.len();
        if ledger.is_cloned(self.part) {
            return Ok(true);
        }
        if known.is_empty() {
            to.set_len(0)?;
            // A clone is the file at one instant: what is hashed then is the clone.
            if clone_blocks(&self.file, to) && to.metadata()?.len() == bytes {
                to.sync_all()?;
                ledger.add_clone(self.part)?;
                return Ok(true);
            }
            to.set_len(0)?;
            to.set_len(bytes)?;
            return Ok(false);
        }
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for slab in (0..slabs(bytes)).filter(|slab| !known.has(*slab)) {
            let range = slab_range(slab, bytes);
            fallocate(to, mode, range.start as i64, (range.end - range.start) as i64)?;
        }
        Ok(false)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        let now = self.file.metadata()?;
        let stamp = |meta: &Metadata| (meta.len(), meta.mtime(), meta.mtime_nsec());
        Ok(stamp(&now) == stamp(&self.seen))
    }
}

fn read_head(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD_BYTES];
    let mut filled = 0;
    while filled < head.len() {
        match file.read_at(&mut head[filled..], filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(filled);
    Ok(head)
}

/// Lets `to` share all blocks of `from`; `false` where the file system cannot.
fn clone_blocks(from: &File, to: &File) -> bool {
    // SAFETY: both descriptors are open for the length of the call, and the request takes a
    // descriptor by value, no memory of ours.
    let status = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    status == 0
}
