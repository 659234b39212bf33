//! Where the lab keeps its files, and the lock that lets one lab run at a time.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// Paths in a checkout of the project.
pub(crate) struct Root {
    dir: PathBuf,
}

impl Root {
    /// The nearest directory above the current one that is a checkout.
    pub(crate) fn find() -> Result<Self> {
        let here = env::current_dir().context("cannot tell the current directory")?;
        for dir in here.ancestors() {
            if dir.join("tests/scenarios").is_dir() && dir.join("Cargo.toml").is_file() {
                return Ok(Self { dir: dir.to_owned() });
            }
        }
        bail!("{} is not inside a checkout of howdah: run the lab from one", here.display())
    }

    /// A path in the checkout.
    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.join(below)
    }

    /// The lab's own directory, made where missing.
    pub(crate) fn lab_dir(&self) -> Result<PathBuf> {
        let dir = self.path("target/lab");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }
}

/// Waits until no other lab runs: two at once ruin each other's timing.
pub(crate) fn lock(lab_dir: &Path) -> Result<Flock<File>> {
    let path = lab_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, _)) => file,
    };
    eprintln!("lab: another lab runs; waiting until it is done");
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {}", path.display()))
}
