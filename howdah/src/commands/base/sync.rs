//! `howdah base push`, `pull`, `gc`, and `verify --heal`: what is said of them.

use std::{io::IsTerminal, sync::atomic::AtomicBool, time::Duration};

use guest_images::CHUNK_SIZE;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    bases::{self, Collected, Moved, Watch},
    cli::{BaseGcArgs, BasePushArgs},
    failure::Failure,
    home::Home,
    output::{Output, bytes, table},
};

/// Runs `howdah base push`.
pub(super) fn push(args: &BasePushArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let BasePushArgs { name, peer, called } = args;
    let moved = watched(output, "sending", |watch| {
        bases::push(home, name, called.as_deref(), peer, watch)
    })?;
    output.done(&moved, |moved| match moved.already {
        true => format!("peer {} has base {} already", moved.peer, moved.id),
        false => told(moved, "pushed"),
    });
    Ok(())
}

/// Runs `howdah base pull`.
pub(super) fn pull(args: &BasePushArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let BasePushArgs { name, peer, called } = args;
    let moved = watched(output, "fetching", |watch| {
        bases::pull(home, name, called.as_deref(), peer, watch)
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
    home: &Home,
    output: Output,
) -> anyhow::Result<()> {
    output.note(&format!("{damage}; fetching what is damaged from {peer}"));
    let moved = watched(output, "healing", |watch| bases::heal(home, name, peer, watch))?;
    output.done(&moved, |moved| told(moved, "healed"));
    Ok(())
}

/// Runs `howdah base gc`.
pub(super) fn gc(args: &BaseGcArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let collected = bases::gc(home, args.named, args.dry_run)?;
    output.done(&collected, collection);
    Ok(())
}

fn collection(collected: &Collected) -> String {
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

fn told(moved: &Moved, verb: &str) -> String {
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

/// Shows progress on a terminal, nothing elsewhere. Ctrl-C ends the process; what came stays.
fn watched<T>(
    output: Output,
    what: &'static str,
    work: impl FnOnce(Watch<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let shown = !output.is_json() && !output.is_quiet() && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    let never = AtomicBool::new(false);
    let mut progress = |progress: base_sync::Progress| {
        bar.set_length(progress.total_bytes.max(progress.done_bytes));
        bar.set_position(progress.done_bytes);
    };
    let done = work(Watch { cancel: &never, progress: &mut progress });
    bar.finish_and_clear();
    done
}
