//! What a handoff takes of memory besides the guest's RAM.
//!
//! Source and target are processes of their own, so that neither counts for the other. The guest's
//! RAM is made when it is read at the source, and a file in memory at the target: what is left of
//! *anonymous* memory is the handoff's, with heap and stacks.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Subcommand;
use guest_images::CHUNK_SIZE;
use handoff::{
    adapt::ModeChoice,
    tcp::{TcpConnect, accept_tcp},
};
use serde_json::json;

use crate::{
    Tell, contents,
    guest::{Contents, Still},
    hand_off::{Far, Plan, Road, near_end, no_bases, scratch, take},
    harness::{Outcome, Side},
    pipeline::options,
};

/// What a handoff may take.
const BOUND_BYTES: f64 = (64 << 20) as f64;
/// Guests that are tried, in GiB.
const GUESTS_GIB: [u64; 2] = [1, 8];
/// What such a guest changed, spread over all of its RAM: more than any cache of sent chunks holds.
const CHANGED_BYTES: u64 = 48 << 20;
/// The same of one that changed much.
const MUCH_CHANGED_BYTES: u64 = 1 << 30;
/// As many as there are by default where there are enough cores.
const WORKERS: usize = 4;
/// How often it is looked.
const EVERY: Duration = Duration::from_millis(2);

/// One end of a handoff.
#[derive(Subcommand)]
pub(crate) enum End {
    /// Sends a guest.
    Source {
        /// Where to.
        address: String,
        /// In which mode.
        choice: ModeChoice,
        /// The guest's RAM.
        ram_bytes: u64,
        /// What it changed of it.
        changed_bytes: u64,
    },
    /// Takes one guest and says first where it listens.
    Target,
}

/// In every mode, at both ends, for guests of several sizes.
pub(crate) fn beyond_ram(tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let statics = handoff::stage::Mode::STATIC.iter().map(|mode| ModeChoice::Fixed(*mode));
    let choices: Vec<_> = [ModeChoice::Auto].into_iter().chain(statics).collect();
    for gib in GUESTS_GIB {
        for choice in &choices {
            measure(&format!("{choice}_{gib}gib"), *choice, gib, CHANGED_BYTES)?
                .into_iter()
                .try_for_each(&mut *tell)?;
        }
    }
    let gib = GUESTS_GIB[1];
    let name = format!("auto_{gib}gib_much_changed");
    measure(&name, ModeChoice::Auto, gib, MUCH_CHANGED_BYTES)?
        .into_iter()
        .try_for_each(&mut *tell)?;
    Ok(())
}

fn measure(
    name: &str,
    choice: ModeChoice,
    gib: u64,
    changed_bytes: u64,
) -> anyhow::Result<[Outcome; 2]> {
    let binary = std::env::current_exe()?;
    let start = |args: &[String]| {
        Command::new(&binary).arg("end").args(args).stdout(Stdio::piped()).spawn()
    };
    let mut target = Ended(start(&["target".into()])?);
    let mut lines = BufReader::new(target.0.stdout.take().context("no output")?).lines();
    let address = lines.next().context("the target says nothing")??;
    let args = [
        "source".into(),
        address,
        choice.to_string(),
        (gib << 30).to_string(),
        changed_bytes.to_string(),
    ];
    let source = start(&args)?.wait_with_output()?;
    ensure!(source.status.success(), "the source failed at {name}");
    let at_source: u64 = String::from_utf8_lossy(&source.stdout).trim().parse()?;
    let at_target: u64 = lines.next().context("the target ended")??.trim().parse()?;
    Ok([("source", at_source), ("target", at_target)].map(|(end, peak)| {
        let reference = ("bound", BOUND_BYTES);
        let name = format!("memory_{end}_{name}");
        Outcome::of("memory", name, ("bytes", peak as f64), reference, (Side::AtMost, 1.0))
            .with(json!({ "guest_gib": gib, "changed_bytes": changed_bytes, "workers": WORKERS }))
    }))
}

/// A process that does not outlive this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It has ended by itself if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What such a process does: its part of a handoff, then it says its peak.
#[allow(clippy::print_stdout)]
pub(crate) fn end(end: &End) -> anyhow::Result<()> {
    let (over, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                peak.fetch_max(anonymous_bytes().unwrap_or(u64::MAX), Relaxed);
                thread::sleep(EVERY);
            }
        });
        let done = hand_over(end);
        over.store(true, Relaxed);
        done
    })?;
    println!("{}", peak.load(Relaxed));
    Ok(())
}

#[allow(clippy::print_stdout)]
fn hand_over(end: &End) -> anyhow::Result<()> {
    let (dir, mut plan) = (scratch()?, Plan::new(Road::Loopback, Far::Target));
    match end {
        End::Target => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            println!("{}", listener.local_addr()?);
            plan.receive.workers = WORKERS;
            take(accept_tcp(&listener)?, &plan, &no_bases(), dir.path())
        }
        End::Source { address, choice, ram_bytes, changed_bytes } => {
            let chunk = CHUNK_SIZE as u64;
            let contents = Contents::Made(contents::ROWS, changed_bytes / chunk);
            let mut guest = Still::new(ram_bytes / chunk, contents);
            plan.send.pipeline = options(*choice, WORKERS);
            let mut connect = TcpConnect::new(address.clone());
            let ran = near_end(&mut guest, &no_bases(), &mut connect, &plan, dir.path())?;
            if !ran.moved {
                bail!("given up");
            }
            Ok(())
        }
    }
}

/// This process's anonymous memory.
fn anonymous_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
