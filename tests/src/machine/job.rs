//! What the lab tells its host to do, and what the host tells back.
//!
//! The job travels as a file in the initramfs; reports come back as JSON lines on a virtio-serial
//! port of their own, so that a command's output stays clean.

use serde::{Deserialize, Serialize};

/// Where the job is in the initramfs.
pub(crate) const JOB_PATH: &str = "/lab/job.json";

/// Names of the virtio-serial ports.
pub(crate) const PORT_REPORT: &str = "lab.report";
/// The command's standard output.
pub(crate) const PORT_STDOUT: &str = "lab.stdout";
/// The command's standard error.
pub(crate) const PORT_STDERR: &str = "lab.stderr";

/// The 9p tag of the directory that takes what the command leaves in `/out`.
pub(crate) const OUT_TAG: &str = "out";

/// One command for a lab host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    /// Modules to load, as paths in the initramfs, in this order.
    pub(crate) modules: Vec<String>,
    /// Modules of which a failure to load is no error: they need hardware that may be missing.
    pub(crate) optional_modules: Vec<String>,
    /// Directories that come over 9p.
    pub(crate) shares: Vec<Share>,
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
    /// Extra environment.
    pub(crate) env: Vec<(String, String)>,
}

/// A directory of the machine outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Share {
    /// Its 9p mount tag.
    pub(crate) tag: String,
    /// Where the command finds it.
    pub(crate) at: String,
    /// Whether it is copied into the host's memory (a private, writable copy) or only mounted,
    /// read-only.
    pub(crate) copy: bool,
}

/// What a lab host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// The host is up and about to run the command.
    Up {
        /// Milliseconds since its kernel started.
        uptime_ms: u64,
        /// Kernel release.
        kernel: String,
        /// Whether `/dev/kvm` is there.
        kvm: bool,
    },
    /// The command ended.
    Exit {
        /// Its exit status; 128 + N when signal N ended it.
        status: i32,
    },
    /// The host could not run the command.
    Failed {
        /// Why.
        problem: String,
    },
}
