//! What can be said of networks.

use std::net::Ipv4Addr;

use clap::{Args, Subcommand};

use crate::net::{FORWARD_FOR_S, NetworkName, Published, Subnet};

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Make a network of guests: a bridge of this host, with the cloudlet as its gateway
    ///
    /// Give it the same name and subnet on every cloudlet that its guests move between: they keep
    /// their addresses, and find their gateway where it was.
    Add(NetworkAddArgs),
    /// List networks, and the VMs in them
    #[command(visible_alias = "list")]
    Ls,
    /// Remove a network that no VM is in
    Rm {
        /// Name of the network
        name: NetworkName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NetworkAddArgs {
    /// Name of the network
    pub(crate) name: NetworkName,
    /// Its addresses; the first is the cloudlet's own
    #[arg(long, value_name = "A.B.C.D/N")]
    pub(crate) subnet: Subnet,
    /// Let guests reach the world beyond, under this host's address
    #[arg(long)]
    pub(crate) nat: bool,
    /// How long traffic for a guest that left goes on to the cloudlet where it is; 0 is not at all
    #[arg(long, value_name = "S", default_value_t = FORWARD_FOR_S,
        value_parser = clap::value_parser!(u32).range(..=86_400))]
    pub(crate) forward_for_s: u32,
}

/// A VM's place in a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct AttachArgs {
    /// Network of this cloudlet that the guest is in (`howdah network ls`)
    #[arg(long, value_name = "NAME", conflicts_with = "tap")]
    pub(crate) network: Option<NetworkName>,
    /// The guest's address in the network [default: a free one, of a guest that boots]
    #[arg(long, value_name = "A.B.C.D")]
    pub(crate) address: Option<Ipv4Addr>,
    /// Ports of the host that lead to the guest: HOST:GUEST or HOST:GUEST/udp
    #[arg(long, value_name = "HOST:GUEST", value_delimiter = ',')]
    pub(crate) publish: Option<Vec<Published>>,
}
