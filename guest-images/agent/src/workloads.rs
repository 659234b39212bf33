//! Programs of the image that are started when told to, and say how far they are.
//!
//! A workload is an executable in [`PROGRAMS`]. It gets one argument: the file in which it keeps
//! the number of steps that it has done.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

const PROGRAMS: &str = "/usr/lib/howdah/workloads";
/// Not on the disk: progress is no state that a guest wants to keep.
const PROGRESS: &str = "/run/workloads";
const MAX_NAME_BYTES: usize = 32;

/// A workload's name: lowercase letters, digits and hyphens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name(String);

/// Why something is no name.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is no workload's name: lowercase letters, digits and hyphens")]
pub(crate) struct NameError(String);

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = (1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(plain);
        if good { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

/// Why a workload does not run.
#[derive(Debug, Error)]
pub(crate) enum WorkloadError {
    #[error("this image has no workload {0}")]
    Unknown(String),
    #[error("workload {0} runs already")]
    Running(String),
    #[error("workload {0} was not started")]
    NotStarted(String),
    #[error("workload {name} ended with {status}: {last_line}")]
    Ended { name: String, status: String, last_line: String },
    #[error("workload {name}: {source}")]
    Io { name: String, source: io::Error },
}

/// Those that were started.
#[derive(Default)]
pub(crate) struct Workloads {
    started: Mutex<BTreeMap<Name, Child>>,
}

impl Workloads {
    /// Starts one.
    pub(crate) fn start(&self, name: &Name) -> Result<(), WorkloadError> {
        self.start_in(name, Path::new(PROGRAMS), Path::new(PROGRESS))
    }

    fn start_in(&self, name: &Name, programs: &Path, files: &Path) -> Result<(), WorkloadError> {
        let failed = |source| WorkloadError::Io { name: name.0.clone(), source };
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(child) = started.get_mut(name)
            && child.try_wait().map_err(failed)?.is_none()
        {
            return Err(WorkloadError::Running(name.0.clone()));
        }
        let program = programs.join(&name.0);
        if !program.is_file() {
            return Err(WorkloadError::Unknown(name.0.clone()));
        }
        fs::create_dir_all(files).map_err(failed)?;
        let progress = files.join(&name.0);
        fs::write(&progress, "0\n").map_err(failed)?;
        let log = File::create(progress.with_extension("log")).map_err(failed)?;
        let child = Command::new(program)
            .arg(&progress)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        started.insert(name.clone(), child);
        Ok(())
    }

    /// How many steps it has done; one that ended is an error.
    pub(crate) fn progress(&self, name: &Name) -> Result<u64, WorkloadError> {
        self.progress_in(name, Path::new(PROGRESS))
    }

    fn progress_in(&self, name: &Name, files: &Path) -> Result<u64, WorkloadError> {
        let failed = |source| WorkloadError::Io { name: name.0.clone(), source };
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        let child = started.get_mut(name).ok_or(WorkloadError::NotStarted(name.0.clone()))?;
        let file = files.join(&name.0);
        if let Some(status) = child.try_wait().map_err(failed)? {
            let log = fs::read(file.with_extension("log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            return Err(WorkloadError::Ended {
                name: name.0.clone(),
                status: status.to_string(),
                last_line: log.lines().last().unwrap_or("it said nothing").to_owned(),
            });
        }
        let text = fs::read_to_string(&file).map_err(failed)?;
        let bad = || failed(io::Error::new(io::ErrorKind::InvalidData, "no number as progress"));
        text.trim().parse().map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    fn program(dir: &Path, name: &str, script: &str) -> Name {
        let file = dir.join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        name.parse().unwrap()
    }

    fn until<T>(mut found: impl FnMut() -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = found() {
                return found;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "it never came");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_workload_says_how_far_it_is_and_its_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, workloads) = (dir.path(), Workloads::default());
        // It ends when told to by a file, so that nothing is left behind.
        let script =
            "echo 7 >\"$1\"; until [ -e \"$1.end\" ]; do sleep 0.01; done; echo tired; exit 3";
        let name = program(dir, "walker", script);
        assert!(matches!(workloads.progress_in(&name, dir), Err(WorkloadError::NotStarted(_))));
        let files = dir.join("run");
        workloads.start_in(&name, dir, &files).unwrap();
        assert!(matches!(workloads.start_in(&name, dir, &files), Err(WorkloadError::Running(_))));
        until(|| workloads.progress_in(&name, &files).ok().filter(|count| *count == 7));
        fs::write(files.join("walker.end"), "").unwrap();
        let ended = until(|| workloads.progress_in(&name, &files).err());
        assert_eq!(ended.to_string(), "workload walker ended with exit status: 3: tired");
    }

    #[test]
    fn names_are_plain_and_known() {
        for bad in ["", "a/b", "..", "A", "x".repeat(33).as_str()] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
        let name: Name = "no-such".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = Workloads::default().start_in(&name, dir.path(), dir.path()).unwrap_err();
        assert_eq!(error.to_string(), "this image has no workload no-such");
    }
}
