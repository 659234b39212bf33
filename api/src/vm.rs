//! VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a VM does, or what its record allows where no process has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Its machine is being built.
    Starting,
    /// The guest runs.
    Running,
    /// A user paused the guest.
    Paused,
    /// The guest is paused while it is written to a file.
    Saving,
    /// The guest runs, and what it changes is recorded.
    Recording,
    /// The guest is being sent to a peer.
    HandingOff,
    /// Committed to a peer that has not confirmed.
    InDoubt,
    /// The guest is coming in.
    Receiving,
    /// Its process is about to end.
    Stopping,
    /// A process has it and says nothing.
    #[serde(rename = "not answering")]
    NotAnswering,
    /// No process has it; it may be started.
    Stopped,
    /// A crash cut a handoff short.
    Interrupted,
    /// It runs at a peer.
    HandedOff,
    /// It was received whole, and its source has not committed.
    Prepared,
    /// It was not received.
    Declined,
    /// Its creation or reception did not finish.
    Unfinished,
    /// Its files cannot be read.
    Damaged,
}

impl VmState {
    /// The word for people, the same as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saving => "saving",
            Self::Recording => "recording",
            Self::HandingOff => "handing-off",
            Self::InDoubt => "in-doubt",
            Self::Receiving => "receiving",
            Self::Stopping => "stopping",
            Self::NotAnswering => "not answering",
            Self::Stopped => "stopped",
            Self::Interrupted => "interrupted",
            Self::HandedOff => "handed-off",
            Self::Prepared => "prepared",
            Self::Declined => "declined",
            Self::Unfinished => "unfinished",
            Self::Damaged => "damaged",
        }
    }
}

/// All that is known of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: VmState,
    /// Its process, if it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// The durable record of who may run it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
    /// How its machine is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<VmConfig>,
    /// The report of its last handoff; only where one VM is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub last_report: Option<serde_json::Value>,
    /// What is kept of a VM that was handed off, for its way back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_bytes: Option<u64>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// How a VM's process stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    /// The process.
    pub pid: u32,
    /// What it is doing.
    pub phase: VmState,
    /// The ownership record, for people.
    pub ownership: String,
    /// The epoch of the record.
    pub epoch: u64,
    /// The handoff under way, either direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<HandoffProgress>,
}

/// How a handoff goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HandoffProgress {
    /// The other side.
    pub peer: String,
    /// What is being done, in a word.
    pub stage: String,
    /// The round, from 1.
    pub round: u32,
    /// Bytes on the link so far.
    pub sent_bytes: u64,
    /// Guest bytes still to be looked at in this round.
    pub remaining_bytes: u64,
    /// Bytes a second on the link, lately.
    pub rate_bytes_per_s: u64,
    /// What a cutover now would cost.
    pub predicted_downtime_ms: Option<u64>,
}

/// Who may run a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Record {
    /// The VM's identity, the same wherever it runs.
    pub vm_id: String,
    /// How often it has changed hands.
    pub epoch: u64,
    /// The record, for people.
    pub ownership: String,
    /// Whether it may run here.
    pub may_run: bool,
}

/// How a VM's machine is built on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmConfig {
    /// Version of the file that holds it.
    pub version: u32,
    /// The base, by its id.
    pub base: String,
    /// Guest memory.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// The host's TAP device for the guest's network.
    pub tap: Option<String>,
    /// The guest's MAC address.
    pub mac: Option<String>,
    /// Appended to the base's kernel command line.
    pub append: String,
    /// Which CPU the guest is shown when it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// The network that it is in, if the cloudlet manages that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Attachment>,
    /// What it may take of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Whether the next start goes on from the base's memory.
    #[serde(default)]
    pub from_memory: bool,
    /// Whether memory is kept that the guest reports free.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_free_pages: bool,
}

/// A VM's place in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// Its addresses, as in `10.77.0.0/24`.
    pub subnet: String,
    /// The guest's address, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Ports of the host that lead to the guest, as in `8080:80/tcp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<String>,
}

/// What a VM may take of its host. Zero lifts a limit; what is not said stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// CPU time of the whole VM, in CPUs: `1.5` is one and a half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(0|[1-9][0-9]{0,2})(\\.[0-9]{0,2}[1-9])?$")]
    pub cpu_max: Option<String>,
    /// Memory of the whole VM, the VMM's included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max_mib: Option<u32>,
    /// Disk throughput, reads and writes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib_per_s: Option<u32>,
    /// Disk requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_iops: Option<u32>,
    /// Network throughput in each direction, in Mbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_mbps: Option<u32>,
    /// Frames a second in each direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_frames_per_s: Option<u32>,
}

/// A VM to be created and run, or one that is there to be run again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRun {
    /// Its name.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")]
    pub name: String,
    /// Base to create it from, name or id; not needed for a VM that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128)]
    pub base: Option<String>,
    /// Guest memory; 512 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 32, maximum = 1048576)]
    pub memory_mib: Option<u64>,
    /// Virtual CPUs; 1 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 64)]
    pub vcpus: Option<u8>,
    /// TAP device of the host for the guest's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
    pub tap: Option<String>,
    /// Network of the cloudlet that the guest is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]{1,12}$")]
    pub network: Option<String>,
    /// The guest's address in the network; a free one, unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = Ipv4)]
    pub address: Option<String>,
    /// Ports of the host that lead to the guest, `HOST:GUEST` or `HOST:GUEST/udp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 64, value_type = Option<Vec<PublishedPorts>>)]
    pub publish: Option<Vec<String>>,
    /// MAC address of the guest; made from its name unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[0-9a-f][26ae](:[0-9a-f]{2}){5}$")]
    pub mac: Option<String>,
    /// Text to append to the base's kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[ -~]{0,1024}$")]
    pub append: Option<String>,
    /// Which CPU the guest is shown when it boots: `v2`, `v3` or `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(v2|v3|host)$")]
    pub cpu: Option<String>,
    /// What it may take of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Boot the kernel even if the base has memory to go on from.
    #[serde(default)]
    pub cold: bool,
    /// Do not take back memory that the guest reports free.
    #[serde(default)]
    pub keep_free_pages: bool,
    /// Do not confine the VM's process.
    #[serde(default)]
    pub no_jail: bool,
    /// Whom the VM's process becomes, `USER` or `USER:GROUP`; what the daemon is set to unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub run_as: Option<String>,
}

/// A port of the host and one of the guest.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}(/(tcp|udp))?$", value_type = String)]
pub(crate) struct PublishedPorts(#[allow(dead_code)] String);

/// How a guest came to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// What it began with: `kernel`, `base-memory` or `file`.
    pub from: String,
    /// From the start of the process until the guest ran.
    pub started_ms: u64,
}

/// A VM that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmRunning {
    /// Its name.
    pub vm: String,
    /// What it does now.
    pub state: VmState,
    /// How it came to.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Started>,
}

/// A handoff.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HandoffSpec {
    /// The peer: its name, its `HOST:PORT`, or `NAME@HOST:PORT`.
    #[schema(min_length = 1, max_length = 320)]
    pub peer: String,
    /// Without TLS, to whoever answers at `HOST:PORT`.
    #[serde(default)]
    pub plain: bool,
    /// Compare hashes of all of RAM and disk at cutover.
    #[serde(default)]
    pub audit: bool,
    /// `total`, `downtime=MS` or `deadline=S`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(total|downtime=[1-9][0-9]{0,5}|deadline=[1-9][0-9]{0,4})$")]
    pub objective: Option<String>,
    /// Slow the guest down if it changes its memory faster than the link can send.
    #[serde(default)]
    pub throttle: bool,
    /// What may be kept here of memory and disk after the VM moved; 1024 unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1073741824)]
    pub keep_mib: Option<u64>,
    /// How batches are compressed; `auto` unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        pattern = "^(auto|none|lz4|zstd:(-[1-7]|[1-9]|1[0-9]|2[0-2])|xz:[0-9]|gzip:[1-9]|bzip2:[1-9])$"
    )]
    pub mode: Option<String>,
    /// Threads that compress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub workers: Option<u8>,
}
