//! `howdah identity` and `howdah peer`: who this cloudlet is, and whom it knows.

use howdah_api::{Peer, PeerSpec};
use serde::Serialize;

use crate::{
    cli::{PeerAddArgs, PeerCommand},
    cloudlet::Cloudlet,
    home::VmName,
    output::{Output, table},
    peers::{Rights, now},
};

const DAY_S: u64 = 24 * 60 * 60;

/// Runs a `howdah peer` command.
pub(crate) fn run(command: PeerCommand, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    match command {
        PeerCommand::Add(args) => {
            let (name, spec) = described(args);
            let peer = cloudlet.put_peer(&name, spec)?;
            output.done(&peer, |peer| {
                format!("peer {} may {}", peer.name, Rights::from(peer.rights))
            });
        }
        PeerCommand::Ls => {
            let peers = cloudlet.peers()?;
            output.list(&peers, |peer| peer.name.clone(), list);
        }
        PeerCommand::Ping { peer } => super::ping::run(&peer, cloudlet, output)?,
        PeerCommand::Rm { name } => {
            let peer = cloudlet.remove_peer(&name)?;
            output.done(&peer, |peer| format!("peer {} removed", peer.name));
        }
    }
    Ok(())
}

/// Runs `howdah identity`.
pub(crate) fn show_identity(cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Shown {
        key: String,
    }
    let shown = Shown { key: cloudlet.key()? };
    output.result(&shown, |shown| shown.key.clone());
    Ok(())
}

fn described(args: PeerAddArgs) -> (VmName, PeerSpec) {
    let PeerAddArgs { name, key, address, api, may, bases, for_days } = args;
    let until = for_days.map(|days| now().saturating_add(u64::from(days) * DAY_S));
    let rights = Some(may.into());
    (name, PeerSpec { key: key.to_string(), address, api, rights, bases, until })
}

fn list(peers: &[Peer]) -> String {
    let now = now();
    let rows: Vec<_> = peers
        .iter()
        .map(|peer| {
            let until = match peer.until {
                None => "ever".to_owned(),
                Some(until) if until <= now => "over".to_owned(),
                Some(until) => format!("{} days", (until - now).div_ceil(DAY_S)),
            };
            [
                peer.name.clone(),
                peer.address.clone().unwrap_or_else(|| "-".into()),
                Rights::from(peer.rights).to_string(),
                peer.bases.as_ref().map_or_else(|| "all".into(), |bases| bases.join(",")),
                until,
                peer.key.clone(),
            ]
        })
        .collect();
    table(["NAME", "ADDRESS", "MAY", "BASES", "FOR", "KEY"], &rows)
}
