//! What can be said of the daemon: its settings, as flags. The configuration file and the environment
//! have the same ones (`crate::config`).

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};

use super::{JailArgs, ReceiveArgs, WaitArgs};
use crate::{jail::RunAs, net::NetworkName};

#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    /// Configuration file [default: HOME/howdah.toml, else /etc/howdah/howdah.toml, if there is one]
    #[arg(long, env = "HOWDAH_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every setting of the daemon: its value, where that comes from, and what it means
    Show(Box<ServeArgs>),
    /// Print a configuration file with every setting, all of them commented out
    Example,
}

/// Every setting of the daemon. The first word of a name is its section in the file: `api_socket` is
/// `socket` in `[api]`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Settings {
    /// Unix socket to listen on [default: HOME/api.sock]
    #[arg(long, env = "HOWDAH_API_SOCKET", value_name = "FILE")]
    pub(crate) api_socket: Option<PathBuf>,
    /// Mode of that socket, in octal: whoever may connect is an operator of this cloudlet
    #[arg(long, env = "HOWDAH_API_SOCKET_MODE", default_value = "600", value_name = "MODE", value_parser = mode)]
    pub(crate) api_socket_mode: u32,
    /// Group of that socket, for a mode that lets a group in [default: the daemon's]
    #[arg(long, env = "HOWDAH_API_SOCKET_GROUP", value_name = "GROUP")]
    pub(crate) api_socket_group: Option<String>,
    /// Address and port where peers that may (`peer add --may observe`, `operate`) use the API, over TLS [default:
    /// nowhere]
    #[arg(long, env = "HOWDAH_API_LISTEN", value_name = "ADDR:PORT")]
    pub(crate) api_listen: Option<SocketAddr>,
    /// Address and port to listen on for VMs that peers hand off to this cloudlet [default: none come]
    #[arg(long, env = "HOWDAH_RECEIVE_LISTEN", value_name = "ADDR:PORT")]
    pub(crate) receive_listen: Option<SocketAddr>,
    /// Take links without TLS, of anyone, and no others: for a network that you trust
    #[arg(long, env = "HOWDAH_RECEIVE_PLAIN", value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub(crate) receive_plain: bool,
    /// TAP device of this host for the networks of guests that come in
    #[arg(long, env = "HOWDAH_RECEIVE_TAP", value_name = "DEVICE")]
    pub(crate) receive_tap: Option<String>,
    /// Network of this cloudlet that guests that come in are in
    #[arg(
        long,
        env = "HOWDAH_RECEIVE_NETWORK",
        value_name = "NAME",
        conflicts_with = "receive_tap"
    )]
    pub(crate) receive_network: Option<NetworkName>,
    /// Disk space that must stay free after a VM was received
    #[arg(long, env = "HOWDAH_RECEIVE_MIN_FREE_MIB", default_value_t = 64, value_name = "MIB")]
    pub(crate) receive_min_free_mib: u64,
    /// What bases that peers push may make of the store, all bases counted [default: what is free]
    #[arg(long, env = "HOWDAH_RECEIVE_BASE_QUOTA_GIB", value_name = "GIB")]
    pub(crate) receive_base_quota_gib: Option<u64>,
    /// Threads that decode what comes, for each VM [default: one for each core, at most 4]
    #[arg(long, env = "HOWDAH_RECEIVE_WORKERS", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) receive_workers: Option<u8>,
    /// A link on which nothing was heard for so long is given up; the source makes another
    /// [default: 10]
    #[arg(long, env = "HOWDAH_RECEIVE_LINK_TIMEOUT_S", value_name = "S", value_parser = clap::value_parser!(u64).range(2..=600))]
    pub(crate) receive_link_timeout_s: Option<u64>,
    /// How long what came of a VM is kept for a source whose link broke [default: 140]
    #[arg(long, env = "HOWDAH_RECEIVE_WAIT_FOR_S", value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) receive_wait_for_s: Option<u64>,
    /// Do not confine the processes of VMs: to find out whether that is what makes something fail
    #[arg(long, env = "HOWDAH_VM_NO_JAIL", value_name = "BOOL", action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    pub(crate) vm_no_jail: bool,
    /// Whom the processes of VMs become when root starts them [default: root without capabilities]
    #[arg(long, env = "HOWDAH_RUN_AS", value_name = "USER[:GROUP]")]
    pub(crate) vm_run_as: Option<RunAs>,
}

impl Settings {
    /// How the processes of VMs are confined.
    pub(crate) fn jail(&self) -> JailArgs {
        JailArgs { no_jail: self.vm_no_jail, run_as: self.vm_run_as.clone() }
    }

    /// How VMs are received, if they are.
    pub(crate) fn receive(&self) -> Option<ReceiveArgs> {
        Some(ReceiveArgs {
            listen: self.receive_listen?,
            plain: self.receive_plain,
            tap: self.receive_tap.clone(),
            network: self.receive_network.clone(),
            once: false,
            min_free_mib: self.receive_min_free_mib,
            base_quota_gib: self.receive_base_quota_gib,
            workers: self.receive_workers,
            jail: self.jail(),
            wait: WaitArgs {
                link_timeout_s: self.receive_link_timeout_s,
                wait_for_s: self.receive_wait_for_s,
            },
        })
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "a mode is three octal digits, like 660".into())
}
