//! What the engine's stages cost, against the least that their work can cost: `make bench`.
//!
//! Each benchmark measures a stage and its reference in turns, several times, on the same data in
//! the same process, and compares the medians: what ratio comes out depends little on the machine.
//! The data is larger than the caches; the base is a real one, imported and mapped. Rates are per
//! second of CPU time, so that a busy machine does not spoil them. Exits with an error when a
//! ratio is below its bound.

mod harness;
mod stages;
mod world;

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::Parser;

use harness::Outcome;

/// Measures the stages of a handoff.
#[derive(Parser)]
struct Args {
    /// Where the results go.
    #[arg(long, default_value = "target/bench/engine.json")]
    report: PathBuf,
    /// MiB of the base's disk and of its memory: more than the caches hold.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// How often each is measured.
    #[arg(long, default_value_t = 9)]
    runs: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let dir = args.report.parent().context("the report needs a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let world = world::World::new(dir, args.mib << 20)?;
    let outcomes = [
        stages::unchanged(&world, args.runs)?,
        stages::hash_and_look_up(&world, args.runs)?,
        stages::delta_in_vain(&world, args.runs)?,
    ];
    print_table(&outcomes);
    let json = serde_json::to_string_pretty(&outcomes)?;
    fs::write(&args.report, json + "\n")
        .with_context(|| format!("writing {}", args.report.display()))?;
    let missed: Vec<_> = outcomes.iter().filter(|o| !o.met).map(|o| o.name).collect();
    if !missed.is_empty() {
        bail!("below the bound: {}", missed.join(", "));
    }
    Ok(())
}

#[allow(clippy::print_stdout)]
fn print_table(outcomes: &[Outcome]) {
    for o in outcomes {
        let verdict = if o.met { "met" } else { "MISSED" };
        println!(
            "{:<20} {:>7.0} MB/s, {} {:>7.0} MB/s: ratio {:.2}, bound {:.2} {verdict}",
            o.name,
            o.value / 1e6,
            o.reference_name,
            o.reference / 1e6,
            o.ratio,
            o.bound,
        );
    }
}
