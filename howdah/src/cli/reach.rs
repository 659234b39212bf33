//! Which commands can be about another cloudlet.

use super::{BaseCommand, Cli, Command, VmCommand};
use crate::failure::{Exit, Failure};

/// What a command works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// A cloudlet, by its API: this one or another.
    Cloudlet,
    /// This host; why.
    Host(&'static str),
    /// Nothing that a cloudlet has a part in.
    Nothing,
}

const FILES: &str = "it works on files of the host that it is typed on";
const TERMINAL: &str = "it is done where the VM's process is";
const HOST: &str = "it is about the host that it is typed on";

impl Command {
    fn reach(&self) -> Reach {
        match self {
            Self::Base(command) => match command {
                BaseCommand::Import(_) | BaseCommand::Build(_) => Reach::Host(FILES),
                BaseCommand::Ls
                | BaseCommand::Push(_)
                | BaseCommand::Pull(_)
                | BaseCommand::Verify { .. }
                | BaseCommand::Gc(_)
                | BaseCommand::Rm { .. } => Reach::Cloudlet,
            },
            Self::Vm(command) => match command {
                VmCommand::Run(args) if args.detach => Reach::Cloudlet,
                VmCommand::Run(_) => {
                    Reach::Host("in the foreground it is the VM itself (--detach runs it there)")
                }
                VmCommand::Ls
                | VmCommand::Inspect(_)
                | VmCommand::Pause(_)
                | VmCommand::Resume(_)
                | VmCommand::Stop { .. }
                | VmCommand::Rm(_) => Reach::Cloudlet,
                VmCommand::Console(_) | VmCommand::Logs(_) => Reach::Host(TERMINAL),
                VmCommand::ExportDisk { .. } => Reach::Host(FILES),
                VmCommand::Takeover { .. } => Reach::Host(HOST),
            },
            Self::Peer(_) | Self::Identity | Self::Handoff(_) => Reach::Cloudlet,
            Self::Save(_) | Self::Restore(_) | Self::Trace(_) => Reach::Host(FILES),
            Self::Network(_)
            | Self::Serve(_)
            | Self::Config(_)
            | Self::Receive(_)
            | Self::Recover(_)
            | Self::Doctor => Reach::Host(HOST),
            Self::Overlay(_)
            | Self::Report(_)
            | Self::Completion { .. }
            | Self::Man { .. }
            | Self::RestoreProcess(_)
            | Self::VmProcess(_)
            | Self::ReceiveProcess(_) => Reach::Nothing,
        }
    }
}

impl Cli {
    /// The other cloudlet that the command is about, if it is about one.
    pub(crate) fn elsewhere(&self) -> Result<Option<&str>, Failure> {
        let Some(peer) = self.cloudlet.as_deref().filter(|peer| !peer.is_empty()) else {
            return Ok(None);
        };
        match self.command.reach() {
            Reach::Cloudlet => Ok(Some(peer)),
            Reach::Nothing => Ok(None),
            Reach::Host(why) => {
                let what = format!("--cloudlet {peer} (HOWDAH_CLOUDLET)");
                let way_out = "type it there, and leave that out";
                Err(Failure::new(Exit::Usage, what, why, way_out))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn what_is_about_a_host_is_done_there() {
        let elsewhere = |words: &str| {
            let cli = Cli::try_parse_from(words.split(' ')).unwrap();
            cli.elsewhere().map(|peer| peer.map(str::to_owned))
        };
        let b = Ok(Some("b".to_owned()));
        assert_eq!(elsewhere("howdah --cloudlet b vm ls"), b);
        assert_eq!(elsewhere("howdah vm run a --base x --detach --cloudlet b"), b);
        for words in ["vm run a --base x", "serve", "save a f", "vm console a", "doctor"] {
            let refused = elsewhere(&format!("howdah --cloudlet b {words}")).unwrap_err();
            assert_eq!(refused.exit, Exit::Usage, "{words}");
        }
        assert_eq!(elsewhere("howdah --cloudlet b report f"), Ok(None));
        assert_eq!(elsewhere("howdah --cloudlet= serve"), Ok(None), "nothing is said");
    }
}
