//! Who goes first when the host runs out of memory.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
};

/// How much likelier than others a reception is to be ended for its memory, in thousandths of the
/// host's memory.
const EXPENDABLE: i32 = 800;

/// How likely this process is to be ended for its memory, before it says that it is expendable.
#[derive(Debug)]
pub(super) struct Ordinary {
    /// Kept open: a process that is confined does not find it any more.
    file: File,
    score: i32,
}

impl Ordinary {
    /// Looks. Without /proc nothing comes of it.
    pub(super) fn open() -> Option<Self> {
        let opened = Self::read("/proc/self/oom_score_adj");
        let opened = opened.inspect_err(|error| {
            tracing::debug!(%error, "cannot step back when memory is short");
        });
        opened.ok()
    }

    fn read(path: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut text = String::new();
        (&mut file).take(32).read_to_string(&mut text)?;
        Ok(Self { file, score: text.trim().parse().map_err(io::Error::other)? })
    }

    /// Steps back. To be done without privileges: what a privileged process sets, an unprivileged one
    /// cannot take back.
    pub(super) fn step_back(mut self) -> Option<Expendable> {
        let stepped = self.set(self.score.max(EXPENDABLE));
        stepped.map(|()| Expendable(self)).ok()
    }

    fn set(&mut self, score: i32) -> io::Result<()> {
        self.file.rewind()?;
        // One write: the kernel takes each as a whole.
        self.file.write_all(score.to_string().as_bytes())
    }
}

/// While this lives, the kernel ends this process before others when memory is short: a reception
/// that dies costs nothing, since its source goes on; a VM that dies here costs its guest's memory.
#[derive(Debug)]
pub(super) struct Expendable(Ordinary);

impl Drop for Expendable {
    fn drop(&mut self) {
        let score = self.0.score;
        if let Err(error) = self.0.set(score) {
            tracing::warn!(%error, "this VM stays the first to be ended when memory is short");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_as_long_as_it_is_wanted() {
        let score = || std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
        let before = score();
        let Some(expendable) = Ordinary::open().and_then(Ordinary::step_back) else { return };
        assert_eq!(score().trim().parse::<i32>().unwrap(), EXPENDABLE);
        drop(expendable);
        assert_eq!(score(), before);
    }
}
