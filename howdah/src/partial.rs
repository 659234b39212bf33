//! A file that is there when it is whole and durable, or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::{
    failure::{Exit, Failure},
    home::sync_parent,
};

/// A file under a name of its own, gone with this value unless it is finished.
pub(crate) struct Partial {
    path: PathBuf,
    file: File,
}

impl Partial {
    /// A file that is to be `path`, which does not exist yet.
    pub(crate) fn beside(path: &Path) -> Result<Self, Failure> {
        if path.exists() {
            let way_out = "name a file that does not";
            return Err(Failure::new(Exit::Failed, path.display(), "it exists", way_out));
        }
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}", std::process::id()));
        let partial = path.with_file_name(name);
        let mut options = OpenOptions::new();
        // Whoever reads it reads the guest's memory.
        let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = opened.map_err(|e| Failure::file("write", path, &e))?;
        Ok(Self { path: partial, file })
    }

    /// Where the bytes go.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Makes it durable, under its name.
    pub(crate) fn finish(self, path: &Path) -> Result<(), Failure> {
        let done = self
            .file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, path))
            .and_then(|()| sync_parent(path));
        done.map_err(|e: io::Error| Failure::file("write", path, &e))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After it was finished there is nothing of this name.
        let _ = fs::remove_file(&self.path);
    }
}
