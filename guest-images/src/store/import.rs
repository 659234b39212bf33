//! Making a base out of image files.

use std::{
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use super::{BASES, Progress, Store, StoreError, check_name};
use crate::{
    base::{Base, BaseId, INDEX_FILE, MACHINE_FILE, MANIFEST_FILE, Part},
    files,
    format::{self, HEAD_BYTES},
    index::{self, Entry, PartRoots},
    manifest::{self, ARCH, MachineInfo, Manifest, MemoryInfo, PartInfo},
    scan::{Scan, ScanError},
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

/// A directory under `tmp/` that is gone when this value is, unless it was renamed away.
struct Workshop(PathBuf);

impl Drop for Workshop {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Store {
    /// Imports a base and names it. The same files and command line give the same id, and a base
    /// that is there already is kept, unless it is damaged: then it is replaced.
    ///
    /// Sparse files stay sparse, and a file system that can share blocks between files does. On
    /// error, and on a crash, the store is as it was before.
    pub fn import(
        &self,
        spec: &ImportSpec,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<BaseId, StoreError> {
        check_name(&spec.name)?;
        manifest::check_cmdline(&spec.cmdline)
            .map_err(|source| StoreError::Content { path: spec.disk.clone(), source })?;
        // All sources are looked at before the first is copied: a wrong one is told at once.
        let disk = Source::open(Part::Disk, &spec.disk)?;
        let kernel = Source::open(Part::Kernel, &spec.kernel)?;
        let initramfs = spec.initramfs.as_deref().map(|path| Source::open(Part::Initramfs, path));
        let initramfs = initramfs.transpose()?;
        let memory = spec.memory.as_ref().map(|memory| {
            manifest::check_machine_length(memory.machine.len() as u64)
                .map_err(|source| StoreError::Content { path: memory.ram.clone(), source })?;
            Ok::<_, StoreError>((Source::open(Part::Memory, &memory.ram)?, &memory.machine))
        });
        let memory = memory.transpose()?;

        let under_way = self.begin()?;
        let workshop = Workshop(self.tmp_path("import"));
        fs::create_dir(&workshop.0).map_err(StoreError::io("creating", &workshop.0))?;
        let mut entries = Vec::new();
        let mut copy = |source: &Source| source.copy(&workshop.0, &mut entries, progress);
        let mut manifest = Manifest {
            version: manifest::MANIFEST_VERSION,
            arch: ARCH.to_owned(),
            disk: copy(&disk)?,
            kernel: copy(&kernel)?,
            initramfs: initramfs.as_ref().map(&mut copy).transpose()?,
            cmdline: spec.cmdline.clone(),
            memory: None,
        };
        if let Some((ram, machine)) = &memory {
            let info = MemoryInfo { ram: copy(ram)?, machine: MachineInfo::of(machine) };
            write_file(&workshop.0.join(MACHINE_FILE), |file| file.write_all_at(machine, 0))?;
            manifest.memory = Some(info);
            manifest.version = manifest::version_for(manifest.memory.as_ref());
        }
        index::sort(&mut entries);
        write_file(&workshop.0.join(INDEX_FILE), |file| {
            index::write(file, &PartRoots::of(&manifest), &entries)
        })?;
        drop(entries);
        let json = manifest
            .to_json()
            .map_err(|source| StoreError::Content { path: spec.disk.clone(), source })?;
        write_file(&workshop.0.join(MANIFEST_FILE), |file| file.write_all_at(&json, 0))?;
        files::sync_dir(&workshop.0).map_err(StoreError::io("syncing", &workshop.0))?;

        let id = manifest.id();
        self.place(&workshop.0, &id)?;
        drop(under_way);
        self.name(&spec.name, &id)?;
        Ok(id)
    }

    /// Moves a finished base to where it belongs.
    fn place(&self, finished: &Path, id: &BaseId) -> Result<(), StoreError> {
        let dir = self.base_dir(id);
        match fs::rename(finished, &dir) {
            Ok(()) => return self.sync(BASES),
            Err(error) if !dir.is_dir() => return Err(StoreError::io("creating", &dir)(error)),
            Err(_) => {}
        }
        let Err(damage) = Base::open(&dir) else { return Ok(()) };
        tracing::warn!(%id, %damage, "replacing a damaged base");
        let damaged = Workshop(self.tmp_path("damaged"));
        fs::rename(&dir, &damaged.0).map_err(StoreError::io("replacing", &dir))?;
        fs::rename(finished, &dir).map_err(StoreError::io("creating", &dir))?;
        self.sync(BASES)
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

    /// Copies the file into `dir`, durably, and hashes what was copied.
    fn copy(
        &self,
        dir: &Path,
        entries: &mut Vec<Entry>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PartInfo, StoreError> {
        let (part, bytes) = (self.part, self.seen.len());
        let to_path = dir.join(part.file_name());
        let mut info = None;
        write_file(&to_path, |to| {
            // A clone is the file at one instant: what is hashed then is the clone.
            let cloned = clone_blocks(&self.file, to) && to.metadata()?.len() == bytes;
            if !cloned {
                to.set_len(0)?;
                to.set_len(bytes)?;
            }
            let source = if cloned { to } else { &self.file };
            let copy = (!cloned).then_some(to);
            let mut report = |done_bytes| {
                progress(Progress { part, done_bytes, total_bytes: bytes });
            };
            let scanned = Scan { part, source, bytes, copy }.run(entries, &mut report);
            let unchanged = cloned || self.is_unchanged()?;
            info = Some(match scanned {
                Ok(root) if unchanged => Ok(PartInfo { bytes, root }),
                Ok(_) => Err(StoreError::Changed { path: self.path.to_owned() }),
                Err(ScanError::Read(error)) => Err(StoreError::io("reading", self.path)(error)),
                Err(ScanError::Write(error)) => return Err(error),
            });
            Ok(())
        })?;
        // `write_file` ran the closure to its end, or failed.
        info.unwrap_or_else(|| Err(StoreError::Changed { path: self.path.to_owned() }))
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

/// Creates a file, fills it, makes it durable and read-only.
fn write_file(path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), StoreError> {
    let write = || {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        fill(&file)?;
        file.set_permissions(Permissions::from_mode(0o444))?;
        file.sync_all()
    };
    write().map_err(StoreError::io("writing", path))
}

/// Lets `to` share all blocks of `from`; `false` where the file system cannot.
fn clone_blocks(from: &File, to: &File) -> bool {
    // SAFETY: both descriptors are open for the length of the call, and the request takes a
    // descriptor by value, no memory of ours.
    let status = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    status == 0
}
