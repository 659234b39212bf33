//! What the engine costs, against the least that its work can cost: `make bench`.
//!
//! Each benchmark measures something and its reference in turns, several times, on the same data in
//! the same run: what ratio comes out depends little on the machine. Stages are measured by CPU
//! time, so that a busy machine does not spoil them; what several threads do together by the best of several
//! runs. `docs/bench.md` says what each figure means. Exits with an error when a ratio is not within
//! its bound.

mod adaptive;
mod codecs;
mod contents;
mod cut;
mod guest;
mod hand_off;
mod harness;
mod link;
mod memory;
mod pipeline;
mod sink;
mod stages;
mod tls;
mod utilisation;
mod world;

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};

use harness::{Outcome, Side};

/// Measures a handoff and its stages.
#[derive(Parser)]
struct Args {
    /// What this process is for another that measures.
    #[command(subcommand)]
    part: Option<Part>,
    /// Where the results go.
    #[arg(long, default_value = "target/bench/engine.json")]
    report: PathBuf,
    /// Only these groups. Give it several times for several.
    #[arg(long, value_enum)]
    only: Vec<Group>,
    /// MiB of the base's disk and of its memory: more than the caches hold.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// How often each is measured.
    #[arg(long, default_value_t = 9)]
    runs: usize,
}

/// What a process can be for one that measures.
#[derive(clap::Subcommand)]
enum Part {
    /// One end of a handoff.
    #[command(subcommand, hide = true)]
    End(memory::End),
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Stages on chunks against memcmp, BLAKE3 and zstd.
    Stages,
    /// The compress stage against the codecs, in every mode.
    Codecs,
    /// The whole pipeline against its slowest stage, in every mode.
    Pipeline,
    /// Two workers against one.
    Workers,
    /// Stages at once against one after the other.
    Serial,
    /// What a handoff takes of memory, in every mode.
    Memory,
    /// How full links of 5 to 100 Mbps are.
    Utilisation,
    /// What bounds links of 1 and 10 Gbps.
    FastLinks,
    /// What TLS adds to a handoff's time.
    Tls,
    /// The engine's own choice of mode against every fixed one.
    Adaptive,
    /// The same on links that change.
    Changing,
    /// What a link that is cut for 30 s costs.
    Cut,
}

/// Takes an outcome as soon as there is one.
type Tell<'a> = dyn FnMut(Outcome) -> anyhow::Result<()> + 'a;

impl Group {
    fn run(self, args: &Args, tell: &mut Tell<'_>) -> anyhow::Result<()> {
        match self {
            Self::Codecs => codecs::stage(args.runs, tell),
            Self::Pipeline => pipeline::whole(tell),
            Self::Workers => pipeline::workers(tell),
            Self::Serial => pipeline::serial(tell),
            Self::Memory => memory::beyond_ram(tell),
            Self::Adaptive => adaptive::steady(tell),
            Self::Changing => adaptive::changing(tell),
            Self::Cut => cut::costs(tell),
            Self::Utilisation => utilisation::slow_links(tell),
            Self::FastLinks => utilisation::fast_links(tell),
            Self::Tls => tls::total_time(tell),
            Self::Stages => {
                let dir = args.report.parent().context("the report needs a directory")?;
                let world = world::World::new(dir, args.mib << 20)?;
                tell(stages::unchanged(&world, args.runs)?)?;
                tell(stages::hash_and_look_up(&world, args.runs)?)?;
                tell(stages::delta_in_vain(&world, args.runs)?)
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    // As the product does.
    handoff::heap::give_back_large_blocks();
    let args = Args::parse();
    if let Some(Part::End(end)) = &args.part {
        return memory::end(end);
    }
    let dir = args.report.parent().context("the report needs a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let mut outcomes = Vec::new();
    let mut failed = Vec::new();
    for group in Group::value_variants() {
        if !args.only.is_empty() && !args.only.contains(group) {
            continue;
        }
        let done = group.run(&args, &mut |outcome| {
            print(&outcome);
            outcomes.push(outcome);
            // Each time: a run that is cut short has told what it knew.
            let json = serde_json::to_string_pretty(&outcomes)?;
            fs::write(&args.report, json + "\n")
                .with_context(|| format!("writing {}", args.report.display()))
        });
        // What can be measured besides is.
        if let Err(e) = done {
            failed.push(format!("{group:?} could not be measured: {e:#}"));
        }
    }
    let missed = outcomes.iter().filter(|o| !o.met).map(|o| o.name.clone());
    failed.extend(missed.map(|name| format!("{name} is not within its bound")));
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

#[allow(clippy::print_stdout)]
fn print(o: &Outcome) {
    let (scale, unit) = match o.unit {
        "bytes/s" => (1e-6, "MB/s"),
        "bytes" => (1e-6, "MB"),
        unit => (1.0, unit),
    };
    let verdict = match (o.side, o.met) {
        (Side::Stated, _) => "stated".to_owned(),
        (Side::AtLeast, met) => format!("at least {:.2} {}", o.bound, said(met)),
        (Side::AtMost, met) => format!("at most {:.2} {}", o.bound, said(met)),
    };
    println!(
        "{:<32} {:>9.1} {unit}, {} {:>9.1} {unit}: ratio {:.3}, {verdict}",
        o.name,
        o.value * scale,
        o.reference_name,
        o.reference * scale,
        o.ratio,
    );
}

fn said(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}
