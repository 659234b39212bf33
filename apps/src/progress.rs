//! How far a server is, for the guest's agent: a number in a file.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A file with the number of requests that were answered. The agent reads it at any time, so it is
/// replaced, never rewritten.
#[derive(Debug)]
pub struct Progress {
    file: PathBuf,
    next: PathBuf,
}

impl Progress {
    /// Progress that is kept in `file`.
    pub fn new(file: &Path) -> Self {
        let mut next = file.as_os_str().to_owned();
        next.push(".new");
        Self { file: file.to_owned(), next: next.into() }
    }

    /// Notes the number.
    pub fn note(&self, answered: u64) -> io::Result<()> {
        fs::write(&self.next, format!("{answered}\n"))?;
        fs::rename(&self.next, &self.file)
    }
}
