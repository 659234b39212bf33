//! The directory in which an import makes a base.
//!
//! It is called after what is imported, so that an import which was killed is found by the next
//! one of the same files, which goes on with it. An import that *fails* takes its directory away:
//! the space may be what it lacked.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{
    Store, StoreError, TMP,
    ledger::{self, Ledger},
};
use crate::{
    base::{MANIFEST_FILE, Part},
    files,
};

/// How the directories that can be gone on with are called: this, and the import's key.
const RESUME: &str = "resume-";
const LEDGER: &str = "ledger";
/// How long an interrupted import is kept.
const KEPT: Duration = Duration::from_secs(3 * 24 * 3600);

/// A directory under `tmp/` that is gone when this value is, unless it was renamed away or left. The
/// path of one that was left is empty.
#[derive(Debug)]
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    fn leave(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// A base in the making.
#[derive(Debug)]
pub(super) struct Workshop {
    // The directory goes before the lock on its ledger does.
    dir: Scratch,
    pub(super) ledger: Ledger,
}

impl Workshop {
    /// Goes on with an interrupted import of the same files, or begins a new one.
    pub(super) fn enter(
        store: &Store,
        key: &[u8; 32],
        parts: &[(Part, u64)],
    ) -> Result<Self, StoreError> {
        let resumed = store.dir.join(TMP).join(format!("{RESUME}{}", hex::encode(key)));
        if let Some(workshop) = Self::claim(resumed, key, parts)? {
            return Ok(workshop);
        }
        // The same files are being imported by someone else right now.
        let own = store.tmp_path("import");
        let vanished = || io::Error::from(io::ErrorKind::NotFound);
        Self::claim(own.clone(), key, parts)?
            .ok_or_else(|| StoreError::io("creating", &own)(vanished()))
    }

    fn claim(
        dir: PathBuf,
        key: &[u8; 32],
        parts: &[(Part, u64)],
    ) -> Result<Option<Self>, StoreError> {
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(StoreError::io("creating", &dir)(error));
            }
            _ => {}
        }
        let path = dir.join(LEDGER);
        let opened = Ledger::open(&path, key, parts).map_err(StoreError::io("opening", &path))?;
        let Some(ledger) = opened else { return Ok(None) };
        let mut workshop = Self { dir: Scratch(dir), ledger };
        let is_whole = |part| {
            let meta = fs::metadata(workshop.dir.0.join(Part::file_name(part)));
            let bytes = parts.iter().find(|(known, _)| *known == part).map(|(_, bytes)| *bytes);
            meta.ok().map(|meta| meta.len()) == bytes
        };
        if !workshop.ledger.parts().all(is_whole) {
            workshop.ledger.restart(key).map_err(StoreError::io("writing", &path))?;
        }
        if workshop.ledger.parts().next().is_some() {
            tracing::info!(dir = %workshop.dir.0.display(), "going on with an interrupted import");
        }
        Ok(Some(workshop))
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Opens the file that a part is copied to.
    pub(super) fn part_file(&self, part: Part) -> Result<File, StoreError> {
        let path = self.dir.0.join(part.file_name());
        let open = || {
            // One that was finished before the interruption is read-only.
            match fs::set_permissions(&path, Permissions::from_mode(0o644)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)
        };
        let file = open().map_err(StoreError::io("opening", &path))?;
        // A ledger that is durable must not speak of a file that is not there.
        for dir in [self.dir(), self.dir().parent().unwrap_or(Path::new("/"))] {
            files::sync_dir(dir).map_err(StoreError::io("syncing", dir))?;
        }
        Ok(file)
    }

    /// Leaves the directory to the next try.
    pub(super) fn leave(self) {
        self.dir.leave();
    }

    /// Ends the work: returns the directory, under a name that no other import looks at, durable
    /// and with nothing in it but the base.
    pub(super) fn finish(mut self, store: &Store) -> Result<Scratch, StoreError> {
        let own = store.tmp_path("import");
        fs::rename(&self.dir.0, &own).map_err(StoreError::io("renaming", &self.dir.0))?;
        self.dir.0 = own;
        let path = self.dir.0.join(LEDGER);
        fs::remove_file(&path).map_err(StoreError::io("removing", &path))?;
        files::sync_dir(&self.dir.0).map_err(StoreError::io("syncing", &self.dir.0))?;
        Ok(self.dir)
    }
}

/// Of directories in `tmp/` that a crash left, the one worth keeping: the latest interrupted
/// import with anything done, if it is not too old.
pub(super) fn worth_keeping(left: &[PathBuf]) -> Option<&PathBuf> {
    let age_of = |path: &PathBuf| {
        let name = path.file_name()?.to_str()?;
        let meta = fs::metadata(path.join(LEDGER)).ok()?;
        // A reception has a manifest from the begin, and what came of a slab counts too.
        let done = meta.len() > ledger::HEADER_BYTES as u64 || path.join(MANIFEST_FILE).exists();
        let age = SystemTime::now().duration_since(meta.modified().ok()?).unwrap_or_default();
        (name.starts_with(RESUME) && done && age < KEPT).then_some(age)
    };
    left.iter().filter_map(|path| Some((age_of(path)?, path))).min().map(|(_, path)| path)
}

/// Makes a file that was filled read-only and durable.
pub(super) fn seal(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o444))?;
    file.sync_all()
}

/// Creates a file, fills it and seals it. One that an interrupted import left there is replaced.
pub(super) fn write_file(
    path: &Path,
    fill: impl FnOnce(&File) -> io::Result<()>,
) -> Result<(), StoreError> {
    let write = || {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        fill(&file)?;
        seal(&file)
    };
    write().map_err(StoreError::io("writing", path))
}
