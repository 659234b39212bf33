//! `howdah identity` and `howdah peer`: who this cloudlet is, and whom it knows.

use serde::Serialize;

use crate::{
    cli::{PeerAddArgs, PeerCommand},
    home::Home,
    ops,
    output::{Output, table},
    peers::{Book, BookFile, Peer, identity, now},
};

const DAY_S: u64 = 24 * 60 * 60;

/// Runs a `howdah peer` command.
pub(crate) fn run(command: PeerCommand, home: &Home, output: Output) -> anyhow::Result<()> {
    let file = BookFile::of(home);
    match command {
        PeerCommand::Add(args) => {
            let peer = described(args);
            ops::peer::put(&peer, home)?;
            output.done(&peer, |peer| format!("peer {} may {}", peer.name, peer.rights));
        }
        PeerCommand::Ls => {
            let book = file.read()?;
            output.list(book.peers(), |peer| peer.name.clone(), |_| list(&book));
        }
        PeerCommand::Ping { peer } => super::ping::run(&peer, home, output)?,
        PeerCommand::Rm { name } => {
            let peer = file.change(home, |book| book.remove(&name))?;
            output.done(&peer, |peer| format!("peer {} removed", peer.name));
        }
    }
    Ok(())
}

/// Runs `howdah identity`.
pub(crate) fn show_identity(home: &Home, output: Output) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Shown {
        key: String,
    }
    let shown = Shown { key: identity(home)?.key().to_string() };
    output.result(&shown, |shown| shown.key.clone());
    Ok(())
}

fn described(args: PeerAddArgs) -> Peer {
    let PeerAddArgs { name, key, address, may, bases, for_days } = args;
    let until = for_days.map(|days| now().saturating_add(u64::from(days) * DAY_S));
    Peer { address, rights: may, bases, until, ..Peer::new(name, key) }
}

fn list(book: &Book) -> String {
    let now = now();
    let rows: Vec<_> = book
        .peers()
        .iter()
        .map(|peer| {
            let until = match peer.until {
                None => "ever".to_owned(),
                Some(_) if peer.is_over(now) => "over".to_owned(),
                Some(until) => format!("{} days", (until - now).div_ceil(DAY_S)),
            };
            [
                peer.name.to_string(),
                peer.address.clone().unwrap_or_else(|| "-".into()),
                peer.rights.to_string(),
                peer.bases.as_ref().map_or_else(|| "all".into(), |bases| bases.join(",")),
                until,
                peer.key.to_string(),
            ]
        })
        .collect();
    table(["NAME", "ADDRESS", "MAY", "BASES", "FOR", "KEY"], &rows)
}
