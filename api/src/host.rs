//! The host that a daemon runs on.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A cloudlet's host, and its daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Version of howdah.
    pub version: String,
    /// The cloudlet's key, which peers pin.
    pub key: String,
    /// The daemon's home directory.
    pub home: String,
    /// The daemon's process.
    pub pid: u32,
    /// For how long the daemon has run.
    pub uptime_ms: u64,
    /// The host's name.
    pub hostname: String,
    /// The kernel's release.
    pub kernel: String,
    /// Processors that may be used.
    pub cpus: u32,
    /// Memory of the host.
    pub memory_bytes: u64,
    /// Memory that can be used without swapping.
    pub memory_available_bytes: u64,
    /// The file system with the home directory.
    pub disk: Disk,
    /// What VMs are run with.
    pub kvm: Kvm,
    /// The listener for peers, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive: Option<Receiving>,
    /// Where this API listens for peers, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
}

/// A file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its size.
    pub total_bytes: u64,
    /// What is free.
    pub free_bytes: u64,
}

/// Whether VMs can be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kvm {
    /// Whether they can.
    pub usable: bool,
    /// Whether the CPU runs guests itself; without it they are interpreted.
    pub hardware: bool,
    /// Why they cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// The listener for peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receiving {
    /// Where it listens.
    pub address: String,
    /// Whether links are without TLS.
    pub plain: bool,
}
