//! What can be typed: the grammar of the command line, and one line for what cannot.

#[cfg(test)]
mod documented;
mod limits;
mod link;
mod network;
mod peer;
mod pipeline;
mod reach;
mod report;
mod serve;
mod trace;

use std::{ffi::OsString, net::SocketAddr, path::PathBuf};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
};
pub(crate) use limits::{Cpu, Limits};
pub(crate) use link::{LinkArgs, WaitArgs};
pub(crate) use network::{AttachArgs, NetworkAddArgs, NetworkCommand};
pub(crate) use peer::{PeerAddArgs, PeerCommand};
pub(crate) use pipeline::{CompressArgs, PipelineArgs};
pub(crate) use report::ReportArgs;
pub(crate) use serve::{ConfigCommand, ServeArgs, Settings};
pub(crate) use trace::{PlayArgs, RecordArgs, TakeArgs, TraceCommand};

use handoff::{engine::CommitMode, order::Sequence, policy::Objective, stage::DeltaMode};
use serde::{Deserialize, Serialize};

use crate::{
    failure::{Exit, Failure},
    home::VmName,
    jail::RunAs,
    logging,
    mac::Mac,
    net::NetworkName,
};

/// Where bases and VMs are kept unless said otherwise.
const DEFAULT_HOME: &str = "/var/lib/howdah";

/// Moves running Linux VMs between cloudlets, fast.
///
/// A VM is created from a base (a disk image with its kernel) that cloudlets hold beforehand. A
/// handoff sends what differs from the base, and the guest goes on at the peer: same memory, same
/// disk, no reboot.
#[derive(Debug, Parser)]
#[command(
    name = "howdah",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 not possible in this state, \
5 this host cannot, 6 damaged data, 7 not moved (the guest goes on here), 8 in doubt (committed, retried), 9 cancelled."
)]
pub(crate) struct Cli {
    /// Directory that holds this cloudlet's bases and VMs
    #[arg(long, global = true, env = "HOWDAH_HOME", default_value = DEFAULT_HOME, value_name = "DIR")]
    pub(crate) home: PathBuf,

    /// Ask this peer's API instead of this cloudlet: its name, or NAME@HOST:PORT
    ///
    /// It must let this cloudlet (`howdah peer add NAME KEY --may observe` or `operate`, there). Whatever works on
    /// files, devices or a terminal is done on its own host.
    #[arg(long, global = true, env = "HOWDAH_CLOUDLET", value_name = "PEER")]
    pub(crate) cloudlet: Option<String>,

    /// Print one JSON document on stdout instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Print results and errors only: no progress, no remarks, names instead of tables
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,

    /// Log more to stderr (a VM's own process: to its vm.log); twice for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Shape of logs
    #[arg(long, global = true, env = logging::VARIABLE, default_value_t, value_enum, value_name = "FORMAT")]
    pub(crate) log_format: logging::Format,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Command {
    /// Whether a VM may come to run in this process, which is then confined.
    pub(crate) fn is_confined(&self) -> bool {
        matches!(
            self,
            Self::Vm(VmCommand::Run(_))
                | Self::Restore(_)
                | Self::RestoreProcess(_)
                | Self::VmProcess(_)
                | Self::ReceiveProcess(_)
        )
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Manage bases: what VMs start from, and what peers need not be sent
    #[command(subcommand)]
    Base(BaseCommand),
    /// Manage the VMs of this cloudlet
    #[command(subcommand)]
    Vm(VmCommand),
    /// Manage the cloudlets that are known: who may hand VMs off to here, and receive VMs from here
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Manage the networks of this cloudlet's guests
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Show this cloudlet's key, which its peers pin
    ///
    /// The key pair is made when it is first needed, in HOME/identity. Whoever has that file is this
    /// cloudlet.
    Identity,
    /// Run this cloudlet's daemon: an HTTP API on a Unix socket
    ///
    /// VMs are processes of their own: they outlive the daemon, which finds them again. Commands go
    /// through it where it runs.
    Serve(Box<ServeArgs>),
    /// Look at the daemon's settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Wait for VMs that peers hand off to this cloudlet
    Receive(ReceiveArgs),
    /// Hand a running VM off to a peer
    ///
    /// The guest runs until the last moment and goes on at the peer. Ctrl-C gives the handoff up as
    /// long as it is not committed; the guest then goes on here.
    Handoff(HandoffArgs),
    /// Settle with the peers where VMs may run that a crash or a lost link left undecided
    ///
    /// Asks the peers of handoffs that were cut short how they ended, and notes it. Nothing is
    /// started: `howdah vm run` does the same for the one VM that it starts.
    Recover(RecoverArgs),
    /// Write a running or paused VM to a file, as what differs from its base
    ///
    /// The guest is paused while the file is written and then goes on, unless --stop. `howdah
    /// restore` makes a VM of the file wherever its base is held.
    Save(SaveArgs),
    /// Make a new VM of a saved one's file, and run it
    Restore(RestoreArgs),
    /// Look into files that `howdah save` wrote
    #[command(subcommand)]
    Overlay(OverlayCommand),
    /// Record what a guest changes, and move it again without KVM
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Make a page of reports: timelines, reduction by stage, tables, comparisons
    ///
    /// The page is one file that needs neither network nor script; with --csv there are tables too.
    Report(ReportArgs),
    /// Look for what would keep VMs from running or moving here, and say what mends it
    ///
    /// Changes nothing. Exits with 5 if handoffs cannot work on this host.
    Doctor,
    /// Print a shell's completions of this command line
    ///
    /// For bash: `howdah completion bash > /etc/bash_completion.d/howdah`.
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual: a page for each command
    Man {
        /// Directory to write them to; made if it is not there
        dir: PathBuf,
    },
    /// The process of a VM that is made of a file (started by `restore`)
    #[command(hide = true)]
    RestoreProcess(RestoreArgs),
    /// The process of one VM (started by other commands)
    #[command(hide = true)]
    VmProcess(VmProcessArgs),
    /// The process that receives one VM (started by `receive`)
    #[command(hide = true)]
    ReceiveProcess(ReceiveProcessArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BaseCommand {
    /// Import a disk image with its kernel
    Import(BaseImportArgs),
    /// Build a base from a recipe, and import it
    Build(BaseBuildArgs),
    /// List bases
    #[command(visible_alias = "list")]
    Ls,
    /// Give a base to a peer: what it lacks of it
    ///
    /// Chunks that the peer holds in any of its bases do not travel. A link that breaks costs what was
    /// under way: the same command goes on. The peer must let this cloudlet (`howdah peer add
    /// --may push`, there).
    Push(BasePushArgs),
    /// Fetch a base from a peer: what is lacking here
    ///
    /// As push, the other way round (`howdah peer add --may pull`, there). A name that exists here moves
    /// to what was fetched.
    Pull(BasePushArgs),
    /// Read all of a base and compare it with its manifest
    Verify {
        /// Name or id of the base
        name: String,
        /// If it is damaged, mend it with what this peer has of it
        #[arg(long, value_name = "PEER")]
        heal: Option<String>,
    },
    /// Remove the bases that nothing uses
    ///
    /// In use is what a VM is made from, what a process has open, and what has a name.
    Gc(BaseGcArgs),
    /// Remove a base that no VM uses
    Rm {
        /// Name or id of the base
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct BasePushArgs {
    /// Name or id of the base
    pub(crate) name: String,
    /// The peer: its name, its HOST:PORT, or NAME@HOST:PORT
    pub(crate) peer: String,
    /// What to call it where it comes to [default: as it is called where it comes from]
    #[arg(long = "as", value_name = "NAME")]
    pub(crate) called: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BaseGcArgs {
    /// Only say what would be removed
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Remove bases with a name too, if no VM is made from them and nothing has them open
    #[arg(long)]
    pub(crate) named: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BaseImportArgs {
    /// Name to give it; a name that exists moves to the new base
    pub(crate) name: String,
    /// A base's directory in the store of another cloudlet, or a copy of it: all it holds
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["disk", "oci", "kernel", "initramfs", "cmdline", "memory", "machine"]
    )]
    pub(crate) from: Option<PathBuf>,
    /// Disk image, raw or qcow2
    #[arg(long, value_name = "FILE", required_unless_present_any = ["from", "oci"])]
    pub(crate) disk: Option<PathBuf>,
    /// Container image: an OCI image layout, in a directory or a tar archive, or what `docker save`
    /// writes
    #[arg(long, value_name = "PATH", conflicts_with_all = ["disk", "memory", "machine"])]
    pub(crate) oci: Option<PathBuf>,
    /// Which of the images of --oci: its name, or the tag behind the colon
    #[arg(long = "ref", value_name = "NAME", requires = "oci", conflicts_with_all = ["disk", "from"])]
    pub(crate) reference: Option<String>,
    /// Size of the disk that is made of --oci, and so the most that its files may be [default: 4096]
    #[arg(
        long,
        value_name = "MIB",
        requires = "oci",
        conflicts_with_all = ["disk", "from"],
        value_parser = disk_mib()
    )]
    pub(crate) disk_mib: Option<u64>,
    /// Kernel: a bzImage or an ELF image [default: what the image's own boot loader starts]
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initramfs
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line that boots the disk [default: that of the image's own boot loader; with
    /// --kernel: console=ttyS0 root=/dev/vda rw; with --oci: what starts what the image is for]
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Memory of a base with memory: `memory.raw` of one that was built with --boot
    #[arg(long, value_name = "FILE", requires_all = ["machine", "kernel"])]
    pub(crate) memory: Option<PathBuf>,
    /// The machine that belongs to --memory: the file `machine` beside it
    #[arg(long, value_name = "FILE", requires = "memory")]
    pub(crate) machine: Option<PathBuf>,
}

/// A base is built of files, or, with memory, by booting a guest of it.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("origin").required(true))]
#[command(group = clap::ArgGroup::new("booted").multiple(true))]
pub(crate) struct BaseBuildArgs {
    /// A recipe's directory, or its name below --recipes
    #[arg(group = "origin")]
    pub(crate) recipe: Option<String>,
    /// Boot this base, which has no memory, and make one with memory of it; implies --boot
    #[arg(long, value_name = "BASE", groups = ["origin", "booted"], requires = "name")]
    pub(crate) from: Option<String>,
    /// Name to give the base [default: the recipe's]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Directory of recipes
    #[arg(long, env = "HOWDAH_RECIPES", value_name = "DIR")]
    pub(crate) recipes: Option<PathBuf>,
    /// Boot the guest, wait until it says that it is ready, and take its memory into the base
    ///
    /// VMs of such a base start in less than a second, and a handoff sends only what they changed
    /// since.
    #[arg(long, group = "booted")]
    pub(crate) boot: bool,
    #[command(flatten)]
    pub(crate) boots: BootArgs,
}

/// The machine that a base with memory is built with, and that VMs of it have.
#[derive(Clone, Debug, Args)]
pub(crate) struct BootArgs {
    /// Guest memory of VMs of this base [default: 512]
    #[arg(long, value_parser = memory_mib(), value_name = "MIB", requires = "booted")]
    pub(crate) memory_mib: Option<u64>,
    /// Virtual CPUs of VMs of this base [default: 1]
    #[arg(long, value_parser = vcpus(), requires = "booted")]
    pub(crate) vcpus: Option<u8>,
    /// Which CPU VMs of this base are shown: host, v2 or v3 (x86-64-v2, -v3) [default: host]
    #[arg(long, value_name = "CPU", requires = "booted")]
    pub(crate) cpu: Option<Cpu>,
    /// TAP device to boot with: VMs of this base then have a network device
    #[arg(long, value_name = "DEVICE", requires = "booted")]
    pub(crate) tap: Option<String>,
    /// MAC address of VMs of this base, with --tap [default: made from the base's name]
    #[arg(long, requires = "tap")]
    pub(crate) mac: Option<Mac>,
    /// Text to append to the kernel command line; becomes part of the base
    #[arg(long, value_name = "TEXT", requires = "booted")]
    pub(crate) append: Option<String>,
    /// The guest is ready when its serial console shows a line with this text
    #[arg(long, default_value = READY_TEXT, value_name = "TEXT", requires = "booted")]
    pub(crate) ready: String,
    /// How long the guest may take to get ready
    #[arg(long, default_value_t = 300, value_name = "S", requires = "booted")]
    pub(crate) timeout_s: u64,
    /// How long the guest's disk must be quiet before the snapshot is taken
    #[arg(long, default_value_t = 2, value_name = "S", requires = "booted")]
    pub(crate) settle_s: u64,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
}

/// What a guest says on its serial console when its workload is up.
pub(crate) const READY_TEXT: &str = "howdah: ready";

/// What a disk that is made of an image may have.
fn disk_mib() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(8..=4 << 20)
}

fn memory_mib() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(32..=1 << 20)
}

fn vcpus() -> impl clap::builder::TypedValueParser<Value = u8> {
    clap::value_parser!(u8).range(1..=64)
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM from a base and run it, or start a stopped one again
    ///
    /// A VM of a base with memory goes on from that memory, with the base's memory size, vCPUs, MAC
    /// address and kernel command line. One that was stopped boots: its disk has moved on.
    /// A VM that was handed off is not started; the message says where it went. In the foreground
    /// the serial console is on stdout and Ctrl-C stops the VM.
    Run(Box<VmRunArgs>),
    /// List VMs
    #[command(visible_alias = "list")]
    Ls,
    /// Show all that is known of a VM
    Inspect(VmArg),
    /// Attach to the serial console; Ctrl-] leaves
    Console(VmArg),
    /// Show what a VM's process had to say, or what its guest printed
    Logs(VmLogsArgs),
    /// Stop the vCPUs, keep everything
    Pause(VmArg),
    /// Let a paused VM go on
    Resume(VmArg),
    /// Flush the disk and end the VM
    ///
    /// The guest is not asked to shut down (there is no power button yet): it sees a power cut
    /// after its last flush. Shut it down from inside to be gentle.
    Stop {
        #[command(flatten)]
        vm: VmArg,
        /// End it even while a handoff is under way
        #[arg(long)]
        force: bool,
    },
    /// Remove a stopped VM with its disk
    Rm(VmArg),
    /// Write the disk of a stopped or paused VM, flattened, to a raw image
    ExportDisk {
        #[command(flatten)]
        vm: VmArg,
        /// File to write
        file: PathBuf,
    },
    /// Take a VM whose peer is gone for good, although it may have run there
    ///
    /// Only for when the peer cannot be asked any more: should it come back, it finds the higher
    /// epoch and stays down, and what the guest did there is lost. The VM boots from its disk.
    Takeover {
        #[command(flatten)]
        vm: VmArg,
        /// Why; kept in the VM's ownership record
        #[arg(long)]
        reason: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct VmArg {
    /// Name of the VM
    pub(crate) name: VmName,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct VmRunArgs {
    /// Name of the VM
    pub(crate) name: VmName,
    /// Base to create it from: name or id
    #[arg(long)]
    pub(crate) base: Option<String>,
    /// Guest memory [default: 512]
    #[arg(long, value_parser = memory_mib(), value_name = "MIB")]
    pub(crate) memory_mib: Option<u64>,
    /// Virtual CPUs [default: 1]
    #[arg(long, value_parser = vcpus())]
    pub(crate) vcpus: Option<u8>,
    /// TAP device of this host for the guest's network
    #[arg(long, value_name = "DEVICE")]
    pub(crate) tap: Option<String>,
    #[command(flatten)]
    pub(crate) attach: AttachArgs,
    /// MAC address of the guest [default: made from its name]
    #[arg(long)]
    pub(crate) mac: Option<Mac>,
    /// Text to append to the base's kernel command line
    #[arg(long, value_name = "TEXT")]
    pub(crate) append: Option<String>,
    /// Which CPU the guest is shown when it boots: host, v2 or v3 (x86-64-v2, -v3) [default: host]
    ///
    /// A guest of a template can be handed off to every host of that level. What a guest that goes on
    /// from its base's memory is shown was decided when the base was built.
    #[arg(long, value_name = "CPU")]
    pub(crate) cpu: Option<Cpu>,
    #[command(flatten)]
    pub(crate) limits: Limits,
    /// Boot the kernel even if the base has memory to go on from
    #[arg(long)]
    pub(crate) cold: bool,
    /// Do not take back memory that the guest reports free: to measure what that is worth
    #[arg(long)]
    pub(crate) keep_free_pages: bool,
    /// Run it in the background; return when the guest runs
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VmLogsArgs {
    /// Name of the VM
    pub(crate) name: VmName,
    /// Show what is added, until the VM's process ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// The last lines only
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) lines: Option<usize>,
    /// The guest's serial console instead of the log of the VM's process
    #[arg(long)]
    pub(crate) console: bool,
}

impl VmRunArgs {
    /// Whether a network device is asked for.
    pub(crate) fn has_network(&self) -> bool {
        self.tap.is_some() || self.attach.network.is_some()
    }
}

/// How the process of a VM is confined.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct JailArgs {
    /// Do not confine the VM's process: to find out whether that is what makes something fail
    #[arg(long)]
    pub(crate) no_jail: bool,
    /// Whom the VM's process becomes when root starts it [default: root without capabilities]
    #[arg(long, env = "HOWDAH_RUN_AS", value_name = "USER[:GROUP]")]
    pub(crate) run_as: Option<RunAs>,
}

impl JailArgs {
    /// The same, to be typed.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if self.no_jail {
            words.push("--no-jail".into());
        }
        if let Some(user) = &self.run_as {
            words.extend(["--run-as".into(), user.into()]);
        }
        words
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Address and port to listen on
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDR:PORT")]
    pub(crate) listen: SocketAddr,
    /// Take links without TLS, of anyone, and no others: for a network that you trust
    #[arg(long)]
    pub(crate) plain: bool,
    /// TAP device of this host for the received guest's network
    #[arg(long, value_name = "DEVICE")]
    pub(crate) tap: Option<String>,
    /// Network of this cloudlet that received guests are in
    #[arg(long, value_name = "NAME", conflicts_with = "tap")]
    pub(crate) network: Option<NetworkName>,
    /// End when one VM was received or refused
    #[arg(long)]
    pub(crate) once: bool,
    /// Disk space that must stay free after a VM was received
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    pub(crate) min_free_mib: u64,
    /// What bases that peers push may make of the store, all bases counted [default: what is free]
    #[arg(long, value_name = "GIB")]
    pub(crate) base_quota_gib: Option<u64>,
    /// Threads that decode what comes, for each VM [default: one for each core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) workers: Option<u8>,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct HandoffArgs {
    /// Name of the VM
    pub(crate) vm: VmName,
    /// The peer: its name, its HOST:PORT, or NAME@HOST:PORT
    #[arg(required_unless_present = "cancel", value_name = "PEER")]
    pub(crate) peer: Option<String>,
    /// Without TLS, to whoever answers at HOST:PORT: for a network that you trust
    #[arg(long)]
    pub(crate) plain: bool,
    /// Compare hashes of all of RAM and disk at cutover (adds to the downtime)
    #[arg(long)]
    pub(crate) audit: bool,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    /// What may be kept here of memory and disk after the VM moved, so that its way back is short;
    /// 0 keeps nothing
    #[arg(long, default_value_t = crate::control::DEFAULT_KEEP_MIB, value_name = "MIB")]
    pub(crate) keep_mib: u64,
    #[command(flatten)]
    pub(crate) encode: EncodeArgs,
    #[command(flatten)]
    pub(crate) pipeline: PipelineArgs,
    #[command(flatten)]
    pub(crate) link: LinkArgs,
    /// Give up the handoff of this VM that is under way
    #[arg(long, conflicts_with_all = ["peer", "plain", "audit", "objective", "throttle", "order", "commit", "keep_mib", "without", "delta", "mode", "batch_kib", "workers", "cpu_share", "link_timeout_s", "retry_for_s", "retry_paused_s", "retry_ms", "max_mbps", "dscp"])]
    pub(crate) cancel: bool,
}

/// What a handoff is to be good at.
#[derive(Clone, Debug, Args)]
pub(crate) struct PaceArgs {
    /// What the handoff is to be good at: total, downtime=MS or deadline=S
    ///
    /// `total` is the least total time; `downtime=MS` goes on sending what the guest changes until
    /// the pause will be that short, if it can be; `deadline=S` is over after S seconds, if the link
    /// allows it at all, with the least downtime that leaves.
    #[arg(long, default_value_t, value_name = "OBJECTIVE")]
    pub(crate) objective: Objective,
    /// Slow the guest down if it changes its memory faster than the link can send
    #[arg(long)]
    pub(crate) throttle: bool,
    /// In which order chunks are sent: random or ascending (for measuring what it is worth)
    #[arg(long, default_value_t, value_name = "ORDER")]
    pub(crate) order: Sequence,
    /// When to commit: early (right behind the last segment) or prepared (when the peer has said
    /// that it holds everything: a round trip more downtime)
    #[arg(long, default_value_t, value_name = "WHEN")]
    pub(crate) commit: CommitMode,
}

/// How what is sent is made small: for measuring what each means is worth.
#[derive(Clone, Debug, Args)]
pub(crate) struct EncodeArgs {
    /// Do without some of the means by which less is sent
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    pub(crate) without: Vec<Means>,
    /// How a chunk is encoded against what the target holds in its place: auto, none, xor or bsdiff
    ///
    /// `auto` does it where it pays, chunk by chunk; `xor` and `bsdiff` wherever it can be done.
    #[arg(long, default_value_t, value_name = "MODE")]
    pub(crate) delta: DeltaMode,
}

/// A means by which less is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Means {
    /// What the target holds in the same place is not sent
    Unchanged,
    /// Chunks that are the base's again are reset
    Reset,
    /// Zeros are named
    Zero,
    /// Contents of the base's disk and kernel are named
    BaseDisk,
    /// Contents of the base's memory are named
    BaseMemory,
    /// Contents of other bases that both hold are named
    OtherBases,
    /// Contents sent before in this handoff are named
    Seen,
    /// What the target kept of an earlier visit is built upon
    Known,
    /// Memory that the guest has free is not sent
    Free,
}

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// Names of the VMs [default: all that no process has]
    #[arg(value_name = "VM")]
    pub(crate) vms: Vec<VmName>,
    /// Where the peer listens now, if that is not where the VM's record says
    #[arg(long, value_name = "HOST:PORT", requires = "vms")]
    pub(crate) peer: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// Name of the VM
    pub(crate) vm: VmName,
    /// File to write
    pub(crate) file: PathBuf,
    /// End the VM when it is saved
    #[arg(long)]
    pub(crate) stop: bool,
    #[command(flatten)]
    pub(crate) encode: EncodeArgs,
    #[command(flatten)]
    pub(crate) compress: CompressArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RestoreArgs {
    /// File that `howdah save` wrote
    pub(crate) file: PathBuf,
    /// Name to give the VM
    #[arg(long)]
    pub(crate) name: VmName,
    /// TAP device of this host for the guest's network
    #[arg(long, value_name = "DEVICE")]
    pub(crate) tap: Option<String>,
    /// Disk space that must stay free
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    pub(crate) min_free_mib: u64,
    /// Run it in the background; return when the guest runs
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum OverlayCommand {
    /// Show what a file holds, by class, stage and space
    Inspect {
        /// File that `howdah save` wrote
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct VmProcessArgs {
    /// Name of the VM
    pub(crate) name: VmName,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveProcessArgs {
    /// Name of the VM
    pub(crate) name: VmName,
    /// TAP device
    #[arg(long)]
    pub(crate) tap: Option<String>,
    /// Network
    #[arg(long, conflicts_with = "tap")]
    pub(crate) network: Option<NetworkName>,
    /// Free disk space to keep
    #[arg(long)]
    pub(crate) min_free_mib: u64,
    /// Threads that decode
    #[arg(long)]
    pub(crate) workers: Option<u8>,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// Puts what clap says about a wrong command line into one line with a way out.
pub(crate) fn usage_failure(error: &clap::Error) -> Failure {
    let rendered = error.render().to_string();
    let what = rendered.split("\n\n").next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    let tip = rendered.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    let command = command_of(error).unwrap_or_else(|| "howdah".into());
    let tip = tip.map(|tip| format!("{tip}; ")).unwrap_or_default();
    Failure::line(Exit::Usage, &format!("{what}; {tip}`{command} --help` shows what there is"))
}

/// Whether clap only wants to show help or the version.
pub(crate) fn is_help(error: &clap::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    )
}

/// The subcommand that the wrong words belong to: the plain words of its usage line.
fn command_of(error: &clap::Error) -> Option<String> {
    let usage = error.context().find_map(|(kind, value)| match (kind, value) {
        (ContextKind::Usage, ContextValue::StyledStr(usage)) => Some(usage.to_string()),
        _ => None,
    })?;
    let words = usage.trim().trim_start_matches("Usage:").split_whitespace();
    let plain: Vec<_> =
        words.take_while(|w| w.starts_with(|c: char| c.is_ascii_lowercase())).collect();
    (!plain.is_empty()).then(|| plain.join(" "))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn failure(words: &str) -> String {
        let error = Cli::try_parse_from(words.split(' ')).unwrap_err();
        assert!(!is_help(&error));
        usage_failure(&error).message
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_words_get_one_line_with_a_way_out() {
        assert_eq!(
            failure("howdah base import a --kernel k"),
            "the following required arguments were not provided: --disk <FILE>; \
             `howdah base import --help` shows what there is"
        );
        let typo = failure("howdah vm ls --jsn");
        assert!(typo.contains("--jsn") && typo.contains("'--json'"), "{typo}");
        let name = failure("howdah vm stop ../etc");
        assert!(name.contains("../etc") && name.contains("starts with a letter"), "{name}");
    }

    #[test]
    fn a_base_is_built_of_one_thing() {
        let good = |words: &str| Cli::try_parse_from(words.split(' ')).unwrap();
        good("howdah base build minimal");
        good("howdah base build minimal --boot --memory-mib 256 --vcpus 2 --settle-s 1");
        good("howdah base build --from cold --name warm --tap t0 --ready login:");
        assert!(failure("howdah base build").contains("RECIPE"));
        let both = failure("howdah base build minimal --from cold --name warm");
        assert!(both.contains("cannot be used with"), "{both}");
        assert!(failure("howdah base build --from cold").contains("--name"));
        let unbooted = failure("howdah base build minimal --memory-mib 256");
        assert!(unbooted.contains("--boot"), "{unbooted}");
        assert!(
            failure("howdah base import a --disk d --kernel k --memory m").contains("--machine")
        );
    }

    #[test]
    fn means_are_the_engines() {
        let names: Vec<_> = Means::value_variants()
            .iter()
            .map(|means| means.to_possible_value().unwrap().get_name().to_owned())
            .collect();
        assert_eq!(names, handoff::stage::StageOptions::SWITCHES);
        let wrong = failure("howdah handoff a b:1 --without seen,thrift");
        assert!(wrong.contains("thrift") && wrong.contains("other-bases"), "{wrong}");
        for mode in DeltaMode::ALL {
            let words = ["howdah", "handoff", "a", "b:1", "--delta", mode.name()];
            Cli::try_parse_from(words).unwrap();
            let help = failure("howdah handoff a b:1 --delta magic");
            assert!(help.contains("magic") && help.contains(mode.name()), "{help}");
        }
    }

    #[test]
    fn cancel_needs_no_peer() {
        Cli::try_parse_from(["howdah", "handoff", "a", "--cancel"]).unwrap();
        Cli::try_parse_from(["howdah", "handoff", "a", "b:1", "--cancel"]).unwrap_err();
        assert!(failure("howdah handoff a").contains("PEER"));
    }
}
