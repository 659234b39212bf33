//! The directory in which a cloudlet keeps its bases.
//!
//! ```text
//! DIR/bases/<id>/{manifest.json, disk.raw, kernel, initramfs, memory.raw, machine, index}
//! DIR/names/<name>         holds the id
//! DIR/tmp/                 imports and removals under way
//! DIR/lock                 locked shared while one of those is under way
//! ```
//!
//! A base appears under `bases/` by one rename, complete and durable, and never changes after that.
//! What a crash leaves in `tmp/` is deleted by the next import that finds no other under way,
//! except for the latest interrupted import: the next one of the same files goes on with it.

mod import;
mod ledger;
mod reception;
#[cfg(test)]
pub(crate) mod tests;
mod verify;
mod workshop;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::fcntl::FlockArg;

pub use self::{
    import::{ImportSpec, MemorySpec},
    reception::{Hashed, RECEIVED_SLAB_CHUNKS, Reception, ReceptionError},
    verify::{MAX_NAMED_CHUNKS, Problem},
};
use crate::{
    base::{Base, BaseError, BaseId, MANIFEST_FILE, Part},
    files::{self, Lock},
    format::FormatError,
    manifest::ManifestError,
};

const BASES: &str = "bases";
const NAMES: &str = "names";
const TMP: &str = "tmp";
const LOCK: &str = "lock";

/// The longest name of a base.
pub const MAX_NAME_BYTES: usize = 64;
/// The shortest prefix of an id that stands for it.
pub const MIN_PREFIX_CHARS: usize = 4;
/// The longest name file that is read: an id and a newline are 65 bytes.
const MAX_NAME_FILE_BYTES: u64 = 80;

/// What a store can say no to.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// A base cannot be opened.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A name that no base can have.
    #[error(
        "{name:?} cannot name a base: use 1 to 64 of a-z A-Z 0-9 . _ -, the first a letter or digit, and no whole id"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Nothing is called that.
    #[error("no base {which:?} in {dir}; {}", known(.names))]
    NotFound {
        /// What was asked for.
        which: String,
        /// The store.
        dir: PathBuf,
        /// The names that there are.
        names: Vec<String>,
    },
    /// More than one base is called that.
    #[error("{which:?} is the beginning of {} ids ({} and {}): give more of it", .ids.len(), .ids[0], .ids[1])]
    Ambiguous {
        /// The prefix.
        which: String,
        /// The ids that begin with it: at least two.
        ids: Vec<BaseId>,
    },
    /// A name's file does not hold an id.
    #[error("{path} holds no base id: remove it and import the base again")]
    DamagedName {
        /// The file.
        path: PathBuf,
    },
    /// The base cannot be removed now.
    #[error("base {id} is {holder}: stop what uses it first")]
    InUse {
        /// The base.
        id: BaseId,
        /// Who uses it.
        holder: String,
    },
    /// A file given for import is something else.
    #[error("{path} {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: FormatError,
    },
    /// A file given for import is no regular file.
    #[error("{path} is a {kind}: give the {part} as a regular file")]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
        /// What it was given as.
        part: Part,
    },
    /// A size or the command line is impossible.
    #[error("{path}: {source}")]
    Content {
        /// The file it comes from; for the command line, the disk it belongs to.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// A source file changed while it was copied.
    #[error("{path} was written to while it was imported: stop what uses it, then import again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

fn known(names: &[String]) -> String {
    match names {
        [] => "the store has no named bases: `howdah base import` makes one".to_owned(),
        names => format!("there are: {}", names.join(", ")),
    }
}

impl StoreError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// How far an import or a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The part at work.
    pub part: Part,
    /// Bytes of it that are done.
    pub done_bytes: u64,
    /// Bytes that it has.
    pub total_bytes: u64,
}

/// One base, as a list shows it.
#[derive(Debug)]
pub struct Listed {
    /// Its id.
    pub id: BaseId,
    /// Its names, sorted.
    pub names: Vec<String>,
    /// The base, or why it cannot be opened.
    pub base: Result<Base, BaseError>,
}

/// A directory of bases.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the store in `dir`, and makes it if there is none.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        for name in [BASES, NAMES, TMP] {
            let path = dir.join(name);
            // A store that exists may be read-only, and is then used without asking to write.
            if !path.is_dir() {
                fs::create_dir_all(&path).map_err(StoreError::io("creating", &path))?;
            }
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every base, by id, with its names. A damaged base is listed with what is wrong with it.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let mut names_of: BTreeMap<BaseId, Vec<String>> = BTreeMap::new();
        for name in self.names()? {
            // A name that is removed or damaged right now names nothing.
            if let Ok(Some(id)) = self.named(&name) {
                names_of.entry(id).or_default().push(name);
            }
        }
        let listed = |id| Listed {
            id,
            names: names_of.remove(&id).unwrap_or_default(),
            base: Base::open(&self.base_dir(&id)),
        };
        Ok(self.ids()?.into_iter().map(listed).collect())
    }

    /// Opens a base by its name, its id, or a prefix of its id that only one base has.
    pub fn get(&self, which: &str) -> Result<Base, StoreError> {
        Ok(Base::open(&self.base_dir(&self.resolve(which)?))?)
    }

    /// Opens the base with this id.
    pub fn get_id(&self, id: &BaseId) -> Result<Base, StoreError> {
        if !self.contains(id) {
            return Err(self.not_found(&id.to_string()));
        }
        Ok(Base::open(&self.base_dir(id))?)
    }

    /// Whether the store has a base with this id, damaged or not.
    pub fn contains(&self, id: &BaseId) -> bool {
        self.base_dir(id).is_dir()
    }

    /// The id that a name, an id or a prefix of an id stands for. A name goes first.
    pub fn resolve(&self, which: &str) -> Result<BaseId, StoreError> {
        if is_name(which)
            && let Some(id) = self.named(which)?
        {
            return Ok(id);
        }
        let wanted = which.to_ascii_lowercase();
        let hex = wanted.len() >= MIN_PREFIX_CHARS && wanted.bytes().all(|b| b.is_ascii_hexdigit());
        let mut ids = if hex { self.ids()? } else { Vec::new() };
        ids.retain(|id| id.to_string().starts_with(&wanted));
        match ids.as_slice() {
            [] => Err(self.not_found(which)),
            [id] => Ok(*id),
            _ => Err(StoreError::Ambiguous { which: which.to_owned(), ids }),
        }
    }

    /// Removes a base and its names. Refused while any process has it open.
    pub fn remove(&self, id: &BaseId) -> Result<(), StoreError> {
        let _under_way = self.begin()?;
        let dir = self.base_dir(id);
        if !dir.is_dir() {
            return Err(self.not_found(&id.to_string()));
        }
        // Held until the base is gone from its place. A base too damaged to have a manifest cannot
        // be in use.
        let _mine = match File::open(dir.join(MANIFEST_FILE)) {
            Ok(manifest) => Some(exclusive(manifest, id, &dir)?),
            Err(_) => None,
        };
        for name in self.names()? {
            if matches!(self.named(&name), Ok(Some(named)) if named == *id) {
                let path = self.dir.join(NAMES).join(name);
                fs::remove_file(&path).map_err(StoreError::io("removing", &path))?;
            }
        }
        let gone = self.tmp_path("removed");
        fs::rename(&dir, &gone).map_err(StoreError::io("removing", &dir))?;
        self.sync(BASES)?;
        fs::remove_dir_all(&gone).map_err(StoreError::io("removing", &gone))
    }

    /// Gives a base a name, which it takes from another base if need be.
    pub fn name(&self, name: &str, id: &BaseId) -> Result<(), StoreError> {
        check_name(name)?;
        if !self.contains(id) {
            return Err(self.not_found(&id.to_string()));
        }
        let _under_way = self.begin()?;
        let tmp = self.tmp_path("name");
        let written = File::create(&tmp).and_then(|mut file| {
            file.write_all(format!("{id}\n").as_bytes())?;
            file.sync_all()
        });
        written.map_err(StoreError::io("writing", &tmp))?;
        let path = self.dir.join(NAMES).join(name);
        fs::rename(&tmp, &path).map_err(StoreError::io("writing", &path))?;
        self.sync(NAMES)
    }

    /// The id that a name stands for, if there is such a name.
    pub fn resolve_name(&self, name: &str) -> Result<Option<BaseId>, StoreError> {
        check_name(name)?;
        self.named(name)
    }

    /// Where a base is, or would be.
    pub fn base_path(&self, id: &BaseId) -> PathBuf {
        self.base_dir(id)
    }

    /// Whether a base could be removed now: [`StoreError::InUse`] while any process has it open.
    pub fn in_use(&self, id: &BaseId) -> Result<(), StoreError> {
        let dir = self.base_dir(id);
        match File::open(dir.join(MANIFEST_FILE)) {
            Ok(manifest) => exclusive(manifest, id, &dir).map(drop),
            Err(_) => Ok(()),
        }
    }

    /// Where a part of a base is, or would be.
    pub fn part_path(&self, id: &BaseId, part: Part) -> PathBuf {
        self.base_dir(id).join(part.file_name())
    }

    fn base_dir(&self, id: &BaseId) -> PathBuf {
        self.dir.join(BASES).join(id.to_string())
    }

    /// A path under `tmp/` that nobody else uses.
    fn tmp_path(&self, what: &str) -> PathBuf {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Process numbers come again, after a reboot soon; the time tells them apart.
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        self.dir.join(TMP).join(format!("{what}-{}-{count}-{time:x}", std::process::id()))
    }

    fn sync(&self, name: &str) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        files::sync_dir(&path).map_err(StoreError::io("syncing", &path))
    }

    /// Says that something of ours is in `tmp/`, after cleaning up if nobody else says so.
    fn begin(&self) -> Result<Lock, StoreError> {
        let path = self.dir.join(LOCK);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StoreError::io("opening", &path))?;
        // Whoever has the lock to itself knows that what is in `tmp/` was left by a crash. Between
        // the two kinds of lock another process may clean up: nothing of ours is there yet.
        let retry = file.try_clone().map_err(StoreError::io("opening", &path))?;
        match Lock::take(file, FlockArg::LockExclusiveNonblock) {
            Ok(alone) => {
                self.clean_up();
                alone.change(FlockArg::LockShared)
            }
            Err(_) => Lock::take(retry, FlockArg::LockShared),
        }
        .map_err(StoreError::io("locking", &path))
    }

    fn clean_up(&self) {
        let Ok(left) = fs::read_dir(self.dir.join(TMP)) else { return };
        let left: Vec<PathBuf> = left.flatten().map(|entry| entry.path()).collect();
        let kept = workshop::worth_keeping(&left);
        for path in left.iter().filter(|path| Some(*path) != kept) {
            let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
            let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            match removed {
                Ok(()) => tracing::info!(path = %path.display(), "removed what a crash left"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot clean up"),
            }
        }
    }

    /// The id that a name's file holds; nothing if there is no such name.
    fn named(&self, name: &str) -> Result<Option<BaseId>, StoreError> {
        let path = self.dir.join(NAMES).join(name);
        let text = match files::read_small(&path, MAX_NAME_FILE_BYTES) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Vec::new(),
            Err(error) => return Err(StoreError::io("reading", &path)(error)),
        };
        let id = std::str::from_utf8(&text).ok().and_then(|text| text.trim_end().parse().ok());
        id.map(Some).ok_or(StoreError::DamagedName { path })
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let mut names = self.entries(NAMES)?;
        names.retain(|name| is_name(name));
        names.sort_unstable();
        Ok(names)
    }

    fn ids(&self) -> Result<Vec<BaseId>, StoreError> {
        let mut ids: Vec<BaseId> =
            self.entries(BASES)?.iter().filter_map(|name| name.parse().ok()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn entries(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let path = self.dir.join(name);
        let read = || -> io::Result<Vec<String>> {
            let names = fs::read_dir(&path)?
                .map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
            names.collect()
        };
        read().map_err(StoreError::io("listing", &path))
    }

    fn not_found(&self, which: &str) -> StoreError {
        let names = self.names().unwrap_or_default();
        StoreError::NotFound { which: which.to_owned(), dir: self.dir.clone(), names }
    }
}

/// Locks a base's manifest against being opened.
fn exclusive(manifest: File, id: &BaseId, dir: &Path) -> Result<Lock, StoreError> {
    Lock::take(manifest, FlockArg::LockExclusiveNonblock).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => StoreError::InUse { id: *id, holder: source.to_string() },
        _ => StoreError::io("locking", dir)(source),
    })
}

/// Whether a base can be called that.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    name.len() <= MAX_NAME_BYTES
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(plain)
        && name.parse::<BaseId>().is_err()
}

fn check_name(name: &str) -> Result<(), StoreError> {
    if is_name(name) { Ok(()) } else { Err(StoreError::Name { name: name.to_owned() }) }
}
