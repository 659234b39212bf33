//! What a failed command tells its user: one line, and an exit code that a script can act on.

use std::{fmt, io, path::Path};

use serde::{Deserialize, Serialize};

/// Exit codes. Documented in `docs/cli.md`; scripts rely on them, so numbers never change meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub(crate) enum Exit {
    /// Something failed that has no code of its own.
    Failed = 1,
    /// Wrong flags or arguments.
    Usage = 2,
    /// No such VM, base, file or peer.
    NotFound = 3,
    /// The VM is in a state that does not allow the command.
    Conflict = 4,
    /// This host cannot run VMs, or lacks a device the VM needs.
    Host = 5,
    /// Data on disk is not what it should be.
    Corrupt = 6,
    /// The handoff did not happen: the guest goes on at the source.
    NotMoved = 7,
    /// The handoff is committed and the peer has not confirmed: retried until it does.
    InDoubt = 8,
    /// The user cancelled.
    Cancelled = 9,
}

/// One clear line: what failed, why, and the way out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// What the process exits with.
    pub(crate) exit: Exit,
    /// The line, without the leading `howdah: `.
    pub(crate) message: String,
    /// The report of a handoff that did not happen, as far as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) report: Option<serde_json::Value>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// `what: why; way_out`, on one line whatever the parts hold.
    pub(crate) fn new(
        exit: Exit,
        what: impl fmt::Display,
        why: impl fmt::Display,
        way_out: impl fmt::Display,
    ) -> Self {
        Self::line(exit, &format!("{what}: {why}; {way_out}"))
    }

    /// A failure whose `why` already says the way out.
    pub(crate) fn plain(exit: Exit, what: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::line(exit, &format!("{what}: {why}"))
    }

    /// A whole line.
    pub(crate) fn line(exit: Exit, text: &str) -> Self {
        Self { exit, message: one_line(text), report: None }
    }

    /// A file operation that failed.
    pub(crate) fn file(what: &str, path: &Path, error: &io::Error) -> Self {
        let (exit, way_out) = match error.kind() {
            io::ErrorKind::NotFound => (Exit::NotFound, "check the path"),
            io::ErrorKind::PermissionDenied => {
                (Exit::Failed, "run as a user who may, or choose another path")
            }
            io::ErrorKind::StorageFull => (Exit::Failed, "make room on that file system"),
            _ => (Exit::Failed, "check the path and the file system"),
        };
        Self::new(exit, format_args!("{what} {}", path.display()), error, way_out)
    }
}

/// What to print and exit with for any error that reached `main`.
pub(crate) fn describe(error: &anyhow::Error) -> Failure {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.clone(),
        None => Failure::line(Exit::Failed, &format!("{error:#}")),
    }
}

/// Runs `work` so that a panic in it becomes a failure that its caller can tell: whoever waits for
/// the result of a thread must not wait forever for one that is gone.
pub(crate) fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, Failure> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|_| {
        let why = "a defect of this program ended it; nothing was decided that is not on disk";
        Failure::new(Exit::Failed, what, why, "report it with the VM's vm.log")
    })
}

/// Folds whitespace, so that text from elsewhere cannot break "one line" nor drive the terminal.
pub(crate) fn one_line(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_stays_on_one_line() {
        let failure = Failure::new(Exit::Failed, "a\nb", "c\r\n\x1b[2Jd", "e");
        assert_eq!(failure.to_string(), "a b: c [2Jd; e");
    }

    #[test]
    fn a_panic_becomes_a_failure() {
        assert_eq!(guarded("a", || 1).unwrap(), 1);
        assert!(guarded("a", || panic!("b")).unwrap_err().message.starts_with("a: "));
    }

    #[test]
    fn other_errors_show_their_chain() {
        let error = anyhow::anyhow!("inner").context("outer");
        let failure = describe(&error);
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Failed, "outer: inner"));
    }
}
