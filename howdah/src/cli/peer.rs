//! What can be said of peers.

use clap::{Args, Subcommand};
use handoff::tls::PeerKey;

use crate::{home::VmName, peers::Rights};

#[derive(Debug, Subcommand)]
pub(crate) enum PeerCommand {
    /// Let a cloudlet in, by its key; or change what is said of one
    ///
    /// `howdah identity` on the other cloudlet shows its key. Get it on a way that nobody else can
    /// change: who has that key may do what is allowed here.
    Add(PeerAddArgs),
    /// List the cloudlets that are known, and what they may do
    #[command(visible_alias = "list")]
    Ls,
    /// Ask a cloudlet how it is, and tell which VMs could go there
    Ping {
        /// The peer: its name, its HOST:PORT, or NAME@HOST:PORT
        #[arg(value_name = "PEER")]
        peer: String,
    },
    /// Forget a cloudlet: its links are refused from now on
    Rm {
        /// Name of the peer
        name: VmName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PeerAddArgs {
    /// Name to give it here
    pub(crate) name: VmName,
    /// Its key: howdah:...
    pub(crate) key: PeerKey,
    /// Where its `howdah receive` listens
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) address: Option<String>,
    /// Where its daemon's API listens for peers (`howdah serve --api-listen`)
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) api: Option<String>,
    /// What it may do: send VMs to here, receive VMs from here, push bases to here, pull bases from here, observe
    /// this cloudlet by its API, operate it
    #[arg(long, default_value_t = Rights::VMS, value_name = "send,receive,push,pull,observe,operate")]
    pub(crate) may: Rights,
    /// Only these bases and VMs of them, by name or id [default: all]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub(crate) bases: Option<Vec<String>>,
    /// For so many days; then it can begin no handoff any more [default: for ever]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) for_days: Option<u32>,
}
