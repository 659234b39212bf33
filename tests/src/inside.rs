//! What runs inside the lab host: its first process, and the scenarios.

mod application;
mod burst;
mod changer;
mod checks;
mod copy;
mod guest;
pub(crate) mod init;
mod kernel_log;
mod measure;
mod namespace;
mod narrator;
mod net;
mod paper;
mod peers;
mod product;
mod report;
mod runner;
mod silence;
mod sizes;
mod state;
mod stores;
mod strangers;
mod trial;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use self::{kernel_log::Mark, narrator::Narrator, net::Network, stores::Stores};
use crate::{
    fault::Case,
    paper::plan::Selection,
    results::only_silent,
    say,
    scenario::{Link, Scenario},
};

pub(crate) use self::{
    application::{CLIENT_PROGRAM, REQUESTS},
    paper::RECORDS,
    stores::IMAGES,
};

/// Where outcomes are left for the lab outside, one file a scenario.
pub(crate) const OUTCOMES: &str = "/out/outcomes";

/// Arguments of `lab inside`: only the lab itself gives them.
#[derive(Args)]
pub(crate) struct InsideArgs {
    /// Tell what goes on
    #[arg(long)]
    narrate: bool,

    /// Scenario files
    scenarios: Vec<PathBuf>,

    /// A file with faults to try instead
    #[arg(long)]
    faults: Option<PathBuf>,

    /// A plan of the evaluation, of which to make runs instead
    #[arg(long)]
    paper: Option<PathBuf>,

    #[command(flatten)]
    selection: Selection,

    /// Names of these runs
    #[arg(long = "run")]
    runs: Vec<String>,
}

/// Runs scenarios; returns the exit status for the lab outside.
pub(crate) fn main(args: &InsideArgs) -> Result<i32> {
    if let Some(plan) = &args.faults {
        return try_faults(plan);
    }
    if let Some(plan) = &args.paper {
        return paper::run(plan, &args.selection, &args.runs);
    }
    let scenarios =
        args.scenarios.iter().map(|file| Scenario::load(file)).collect::<Result<Vec<_>>>()?;
    fs::create_dir_all(OUTCOMES).with_context(|| format!("cannot make {OUTCOMES}"))?;
    let narrator = Narrator::new(args.narrate);
    let stores = Stores::import(&scenarios, Path::new("/out/import"))?;
    let mut failed = 0;
    for scenario in &scenarios {
        narrator.say(&scenario.description);
        let mark = Mark::now()?;
        let mut outcome = runner::run(scenario, &stores, narrator);
        failed += i32::from(!outcome.passed);
        if !outcome.passed {
            let lost = mark.lost_since(&scenario.name)?;
            outcome.host_fault = match lost {
                Some(lost) => Some(lost),
                None => kernel_log::guest_lost(&scenario.name)?
                    .or_else(|| only_silent(outcome.silent.as_deref(), &outcome.checks)),
            };
        }
        keep(&outcome.name, &outcome)?;
        narrator.table(&outcome);
        say(&outcome.line());
        for complaint in outcome.complaints() {
            say(&format!("         {complaint}"));
        }
    }
    Ok(i32::from(failed > 0))
}

/// Tries the faults of a plan, one after the other.
fn try_faults(plan: &Path) -> Result<i32> {
    let text = fs::read(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let cases: Vec<Case> = serde_json::from_slice(&text).context("the plan is malformed")?;
    fs::create_dir_all(OUTCOMES).with_context(|| format!("cannot make {OUTCOMES}"))?;
    let scenario = trial::scenario()?;
    let stores = Stores::import(std::slice::from_ref(&scenario), Path::new("/out/import"))?;
    let network = Network::build(Link::default())?;
    let first = trial::run(&Case::undisturbed(), &scenario, &stores, &network, Duration::ZERO);
    // Without it the moments are wrong, but what must hold still must.
    let usual = Duration::from_secs_f64(first.total_ms.unwrap_or(1000.0) / 1e3);
    say(&format!("{}, handoff {:.1} s", first.line(), usual.as_secs_f64()));
    first.complaints().iter().for_each(|complaint| say(&format!("         {complaint}")));
    let mut failed = 0;
    for case in &cases {
        let verdict = trial::run(case, &scenario, &stores, &network, usual);
        failed += i32::from(!verdict.passed);
        keep(&verdict.name, &verdict)?;
        say(&verdict.line());
        for complaint in verdict.complaints() {
            say(&format!("         {complaint}"));
        }
    }
    Ok(i32::from(failed > 0))
}

fn keep(name: &str, outcome: &impl Serialize) -> Result<()> {
    let path = Path::new(OUTCOMES).join(format!("{name}.json"));
    fs::write(&path, serde_json::to_vec_pretty(outcome)?)
        .with_context(|| format!("cannot write {}", path.display()))
}
