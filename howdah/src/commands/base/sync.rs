//! `howdah base push`, `pull`, `gc`, and `verify --heal`: what is said of them.

use std::{io::IsTerminal, sync::atomic::AtomicBool, time::Duration};

use guest_images::CHUNK_SIZE;
use howdah_api::{
    BaseHeal, BaseMoved, BasePull, BasePush, BasesCollected, BasesGc, Client, ClientError,
    Operation,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    bases::{self, Watch},
    cli::{BaseGcArgs, BasePushArgs},
    cloudlet::{Cloudlet, follow},
    commands::interrupt::Interrupts,
    failure::Failure,
    output::{Output, bytes, table},
};

/// Runs `howdah base push`.
pub(super) fn push(args: &BasePushArgs, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let BasePushArgs { name, peer, called } = args;
    let asked = BasePush { peer: peer.clone(), called: called.clone() };
    let begin = |daemon: &Client| daemon.push_base(name, &asked);
    let moved = moved(output, "sending", cloudlet, begin, |watch| {
        bases::push(cloudlet.home(), name, called.as_deref(), peer, watch)
    })?;
    output.done(&moved, |moved| match moved.already {
        true => format!("peer {} has base {} already", moved.peer, moved.id),
        false => told(moved, "pushed"),
    });
    Ok(())
}

/// Runs `howdah base pull`.
pub(super) fn pull(args: &BasePushArgs, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let BasePushArgs { name, peer, called } = args;
    let asked = BasePull { peer: peer.clone(), called: called.clone() };
    let begin = |daemon: &Client| daemon.pull_base(name, &asked);
    let moved = moved(output, "fetching", cloudlet, begin, |watch| {
        bases::pull(cloudlet.home(), name, called.as_deref(), peer, watch)
    })?;
    output.done(&moved, |moved| match moved.already {
        true => format!("base {} was here already", moved.id),
        false => told(moved, "pulled"),
    });
    Ok(())
}

/// Mends a base of which `damage` is known.
pub(super) fn heal(
    name: &str,
    damage: &Failure,
    peer: &str,
    cloudlet: &Cloudlet,
    output: Output,
) -> anyhow::Result<()> {
    output.note(&format!("{damage}; fetching what is damaged from {peer}"));
    let asked = BaseHeal { peer: peer.to_owned() };
    let begin = |daemon: &Client| daemon.heal_base(name, &asked);
    let moved = moved(output, "healing", cloudlet, begin, |watch| {
        bases::heal(cloudlet.home(), name, peer, watch)
    })?;
    output.done(&moved, |moved| told(moved, "healed"));
    Ok(())
}

/// Runs `howdah base gc`.
pub(super) fn gc(args: &BaseGcArgs, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let asked = BasesGc { named: args.named, dry_run: args.dry_run };
    let collected = cloudlet.collect_bases(asked)?;
    output.done(&collected, collection);
    Ok(())
}

fn collection(collected: &BasesCollected) -> String {
    let verb = if collected.dry_run { "would be removed" } else { "removed" };
    let rows: Vec<_> = collected
        .bases
        .iter()
        .map(|base| {
            let names = if base.names.is_empty() { "-".into() } else { base.names.join(",") };
            let fate = match &base.kept {
                Some(why) => format!("kept: {why}"),
                None => verb.into(),
            };
            [names, base.id.chars().take(16).collect(), bytes(base.bytes), fate]
        })
        .collect();
    let freed = format!(
        "{} {}",
        bytes(collected.freed_bytes),
        if collected.dry_run { "would be freed" } else { "freed" }
    );
    if rows.is_empty() {
        freed
    } else {
        table(["NAME", "ID", "ON DISK", ""], &rows) + "\n" + &freed
    }
}

fn told(moved: &BaseMoved, verb: &str) -> String {
    let data = |chunks: u64| bytes(chunks * CHUNK_SIZE as u64);
    let name = moved.name.as_ref().map(|name| format!(" as {name}")).unwrap_or_default();
    let mut text = format!(
        "{verb} base {}{name}: {} of contents in {} on the link, {:.1} s",
        moved.id,
        data(moved.chunks_on_link),
        bytes(moved.sent_bytes + moved.received_bytes),
        moved.seconds,
    );
    for (chunks, from) in
        [(moved.chunks_local, "from here"), (moved.chunks_resumed, "from an earlier try")]
    {
        if let Some(chunks) = chunks.filter(|chunks| *chunks > 0) {
            text += &format!(", {} {from}", data(chunks));
        }
    }
    text
}

/// Has a base moved, by the daemon if one answers, and shows how far it is.
fn moved(
    output: Output,
    what: &'static str,
    cloudlet: &Cloudlet,
    begin: impl FnOnce(&Client) -> Result<Operation, ClientError>,
    directly: impl FnOnce(Watch<'_>) -> Result<BaseMoved, Failure>,
) -> anyhow::Result<BaseMoved> {
    let Some(daemon) = cloudlet.daemon() else {
        let bar = bar(output, what);
        // Ctrl-C ends this process, and what came stays.
        let never = AtomicBool::new(false);
        let mut progress = |now: base_sync::Progress| show(&bar, now.done_bytes, now.total_bytes);
        let done = directly(Watch { cancel: &never, progress: &mut progress });
        bar.finish_and_clear();
        return Ok(done?);
    };
    // Before anything is begun: its threads must not take the signals.
    let interrupts = Interrupts::take()?;
    let begun = begin(daemon).map_err(Failure::from)?;
    let (client, id) = (daemon.clone(), begun.id.clone());
    interrupts.tell(output, None, |_| {}, move || Ok(client.cancel(&id).map(drop)?));
    let bar = bar(output, what);
    let done = follow(daemon, begun, |operation| {
        show(&bar, operation.progress.done_bytes, operation.progress.total_bytes);
    });
    bar.finish_and_clear();
    Ok(serde_json::from_value(done?)?)
}

/// A bar on a terminal, nothing elsewhere.
fn bar(output: Output, what: &'static str) -> ProgressBar {
    let shown = !output.is_json() && !output.is_quiet() && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn show(bar: &ProgressBar, done_bytes: u64, total_bytes: u64) {
    bar.set_length(total_bytes.max(done_bytes));
    bar.set_position(done_bytes);
}
