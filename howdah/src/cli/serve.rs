//! What can be said of the daemon.

use std::path::PathBuf;

use clap::Args;

use super::JailArgs;

#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen [default: HOME/api.sock]
    #[arg(long, env = "HOWDAH_API_SOCKET", value_name = "FILE")]
    pub(crate) socket: Option<PathBuf>,
    /// Mode of the socket, in octal: who may connect is an operator of this cloudlet
    #[arg(long, env = "HOWDAH_API_SOCKET_MODE", default_value = "600", value_name = "MODE", value_parser = mode)]
    pub(crate) socket_mode: u32,
    #[command(flatten)]
    pub(crate) jail: JailArgs,
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "a mode is three octal digits, like 660".into())
}
