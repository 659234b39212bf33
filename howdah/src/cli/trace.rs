//! The words of `howdah trace`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};
use handoff::adapt::ModeChoice;

use super::{EncodeArgs, PaceArgs};
use crate::home::VmName;

#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    /// Record what a running VM changes, and when
    ///
    /// The guest goes on; it is read now and then. A handoff, or another command that needs the VM,
    /// ends the recording with what it has, as Ctrl-C does. The file holds the guest's memory.
    Record(RecordArgs),
    /// Show what a trace holds: chunks, what they are, changes over time
    Show {
        /// File that `howdah trace record` wrote
        file: PathBuf,
        /// Stretches of time to show
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        windows: u32,
    },
    /// Hand the guest of a trace off by the real engine, and print the report
    ///
    /// Over a simulated link in this process, or with --to over a real one to `howdah trace take`.
    Play(PlayArgs),
    /// Receive a guest that `howdah trace play --to` sends, once
    Take(TakeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RecordArgs {
    /// Name of the VM
    pub(crate) vm: VmName,
    /// For how long
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) for_s: u64,
    /// How often to look at what changed
    #[arg(long, default_value_t = 100, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub(crate) every_ms: u64,
    /// End when different contents of chunks are more than this
    #[arg(long, default_value_t = 512, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=2048))]
    pub(crate) most_mib: u64,
    /// File to write
    #[arg(short, long = "output", value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct PlayArgs {
    /// File that `howdah trace record` wrote
    pub(crate) file: PathBuf,
    /// Send to a `howdah trace take` that listens there, and not over a simulated link
    #[arg(long, value_name = "PEER", conflicts_with_all = ["mbps", "delay_ms"])]
    pub(crate) to: Option<String>,
    /// Without TLS, to whoever answers there
    #[arg(long, requires = "to")]
    pub(crate) plain: bool,
    /// What the simulated link carries each way; RATE@S,RATE@S... for another rate from then on
    #[arg(long, default_value = "10", value_name = "RATES")]
    pub(crate) mbps: String,
    /// How long a byte is on its way each way
    #[arg(long, default_value_t = 0.0, value_name = "MS")]
    pub(crate) delay_ms: f64,
    /// Where in the trace the guest is when the handoff begins
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS")]
    pub(crate) from_s: f64,
    /// Leave the guest idle when the trace is over, and do not begin it again
    #[arg(long)]
    pub(crate) once: bool,
    #[command(flatten)]
    pub(crate) pipeline: PlayPipelineArgs,
    #[command(flatten)]
    pub(crate) pace: PaceArgs,
    #[command(flatten)]
    pub(crate) encode: EncodeArgs,
}

/// How the stages work.
#[derive(Clone, Debug, Args)]
pub(crate) struct PlayPipelineArgs {
    /// Threads that compress [default: one for each core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) workers: Option<u8>,
    /// How bodies are encoded: auto, none, lz4, zstd:N, xz:N, gzip:N or bzip2:N
    #[arg(long, default_value_t, value_name = "MODE")]
    pub(crate) mode: ModeChoice,
    /// One stage after the other, to measure what working at once brings
    #[arg(long)]
    pub(crate) serial: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TakeArgs {
    /// The file that the other end plays: bases are taken from it
    pub(crate) file: PathBuf,
    /// Address and port to listen on
    #[arg(long, default_value = "127.0.0.1:7071", value_name = "ADDR:PORT")]
    pub(crate) listen: SocketAddr,
    /// Without TLS, from whoever calls
    #[arg(long)]
    pub(crate) plain: bool,
    /// Threads that decode [default: one for each core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) workers: Option<u8>,
}
