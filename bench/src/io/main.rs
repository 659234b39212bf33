//! What io_uring brings, for the disk and for sockets, against plain system calls in the same run:
//! `cargo run --release --package howdah-bench --bin io`. ADR 0016 draws the conclusions.
//!
//! States figures and holds them to nothing: what pays depends on the kernel, the file system and the device.

mod disk;
mod net;

use std::{fs, path::PathBuf};

use anyhow::Context;
use clap::Parser;
use serde::Serialize;

/// Measures disk and sockets, by plain calls and by io_uring.
#[derive(Parser)]
struct Args {
    /// Where the results go; the disk that is measured is the one that this is on.
    #[arg(long, default_value = "target/bench/io.json")]
    report: PathBuf,
    /// MiB of the disk.
    #[arg(long, default_value_t = 128)]
    mib: u64,
    /// How often each is measured: the best counts.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

/// One way to do one thing.
#[derive(Debug, Serialize)]
struct Figure {
    /// What is done.
    what: String,
    /// By what means.
    by: &'static str,
    bytes_per_s: f64,
    /// CPU of all threads of this process, the kernel's workers for it among them.
    cpu_ms_per_gb: f64,
    /// System calls, where they are counted.
    calls_per_mb: Option<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let dir = args.report.parent().context("the report needs a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let mut figures = disk::measure(dir, args.mib << 20, args.runs)?;
    figures.extend(net::measure()?);
    print_table(&figures);
    let json = serde_json::to_string_pretty(&figures)?;
    fs::write(&args.report, json + "\n")
        .with_context(|| format!("writing {}", args.report.display()))
}

#[allow(clippy::print_stdout)]
fn print_table(figures: &[Figure]) {
    for f in figures {
        let calls = f.calls_per_mb.map_or(String::new(), |calls| format!("{calls:8.1} calls/MB"));
        println!(
            "{:<28} {:<28} {:>7.0} MB/s {:>7.0} ms CPU/GB {calls}",
            f.what,
            f.by,
            f.bytes_per_s / 1e6,
            f.cpu_ms_per_gb,
        );
    }
}

/// CPU time of the whole process, its kernel workers too.
fn cpu_s() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return 0.0 };
    let times = [usage.user_time(), usage.system_time()];
    times.iter().map(|t| t.tv_sec() as f64 + t.tv_usec() as f64 * 1e-6).sum()
}
