//! `lab faults`: kills and cuts in the middle of handoffs, in lab hosts, and their verdicts outside.

use std::{
    fs,
    hash::{BuildHasher, RandomState},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::{
    exec::{DEFAULT_CPUS, Request},
    fault::{Case, Choice, Seed, Verdict, cases},
    machine::{host::Accelerator, image::Extra, qemu::HostLost, root::Root},
    run::{BASE_TIME, MAX_REPEATS, add_images, add_programs, cpus_in, outcomes_dir},
    say,
};

/// The guest image of every case.
const IMAGE: &str = "minimal";
/// Where the lab host finds its cases.
const PLAN: &str = "/lab/faults.json";
/// The most that one case may take; most take a tenth of it.
const CASE_TIME: Duration = Duration::from_secs(240);

/// Arguments of `lab faults`.
#[derive(Args)]
pub(crate) struct FaultsArgs {
    /// All random moments follow from it, in hexadecimal [default: drawn, and said]
    #[arg(long)]
    seed: Option<Seed>,

    /// How many random moments
    #[arg(long, value_name = "N", default_value_t = 200)]
    random: u32,

    /// Only cases whose names begin so; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,

    /// How howdah is to commit, as its own flag takes it [default: its own way]
    #[arg(long, value_name = "WAY")]
    commit: Option<String>,

    /// Say which cases there are, and run none
    #[arg(long)]
    list: bool,

    /// Cases for one boot of the lab host
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,

    /// Write the results to this file [default: target/lab/fault-test.json]
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Directory of guest images [default: target/images]
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,

    /// Directory of howdah and howdah-agent [default: where this program is]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,

    /// Memory of the lab host
    #[arg(long, value_name = "N", default_value_t = 4096)]
    memory_mib: u32,

    /// CPUs of the lab host
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
}

/// All that a run yields.
#[derive(Serialize)]
struct Results<'a> {
    /// With it and a case's name that case is run again.
    seed: String,
    passed: usize,
    failed: usize,
    cases: &'a [Verdict],
}

/// Runs the cases; 0 if all passed.
pub(crate) fn run(args: &FaultsArgs) -> Result<i32> {
    let seed = args.seed.unwrap_or_else(|| Seed(RandomState::new().hash_one("seed")));
    let choice = Choice {
        seed: seed.0,
        random: args.random,
        only: args.only.clone(),
        commit: args.commit.clone(),
    };
    let cases = cases(&choice)?;
    if args.list {
        cases.iter().for_each(|case| say(&case.name));
        return Ok(0);
    }
    say(&format!("seed {seed}: `lab faults --seed {seed} --only NAME` runs one of them again"));
    let root = Root::find()?;
    let report = match &args.report {
        Some(file) => file.clone(),
        None => root.lab_dir()?.join("fault-test.json"),
    };
    let mut verdicts = Vec::new();
    for batch in cases.chunks(usize::from(args.batch)) {
        verdicts.extend(run_until_done(args, &root, batch)?);
        // What is known so far survives a run that is ended.
        write(&report, seed, &verdicts)?;
    }
    let failed = write(&report, seed, &verdicts)?;
    say(&format!("{} passed, {failed} failed", verdicts.len() - failed));
    Ok(i32::from(failed > 0))
}

fn write(report: &Path, seed: Seed, verdicts: &[Verdict]) -> Result<usize> {
    let failed = verdicts.iter().filter(|verdict| !verdict.passed).count();
    let passed = verdicts.len() - failed;
    let results = Results { seed: seed.to_string(), passed, failed, cases: verdicts };
    fs::write(report, serde_json::to_vec_pretty(&results)?)
        .with_context(|| format!("cannot write {}", report.display()))?;
    Ok(failed)
}

/// Runs cases, and again those under which an emulated lab host broke: the one that broke it and
/// those that it did not get to.
fn run_until_done(args: &FaultsArgs, root: &Root, cases: &[Case]) -> Result<Vec<Verdict>> {
    let mut verdicts = run_boot(args, root, cases, args.cpus)?;
    let forgiven = Accelerator::detect() == Accelerator::Software;
    for repeat in 1..=MAX_REPEATS {
        let broken = |verdict: &&Verdict| verdict.host_fault.is_some();
        let names: Vec<&str> =
            verdicts.iter().filter(broken).map(|verdict| verdict.name.as_str()).collect();
        if names.is_empty() || !forgiven {
            break;
        }
        say(&format!("again  {} cases: the emulated lab host broke under them", names.len()));
        let again: Vec<Case> =
            cases.iter().filter(|case| names.contains(&case.name.as_str())).cloned().collect();
        for mut next in run_boot(args, root, &again, cpus_in(repeat, args.cpus))? {
            let old = verdicts.iter_mut().find(|verdict| verdict.name == next.name);
            let Some(old) = old else { continue };
            next.repeated_for = old.host_fault.take();
            *old = next;
        }
    }
    Ok(verdicts)
}

/// Runs cases in one lab host.
fn run_boot(args: &FaultsArgs, root: &Root, cases: &[Case], cpus: u8) -> Result<Vec<Verdict>> {
    let out = root.lab_dir()?;
    for dir in [out.join("faults"), outcomes_dir(&out), out.join("import")] {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
            }
            _ => {}
        }
    }
    let plan = out.join("faults.json");
    fs::write(&plan, serde_json::to_vec(cases)?)
        .with_context(|| format!("cannot write {}", plan.display()))?;
    let mut request = Request {
        command: ["/lab/lab", "inside", "--faults", PLAN].map(str::to_owned).to_vec(),
        env: Vec::new(),
        extras: vec![Extra::File { from: plan, to: PLAN.into() }],
        shares: Vec::new(),
        out: out.clone(),
        memory_mib: args.memory_mib,
        cpus,
        timeout: BASE_TIME + CASE_TIME * cases.len() as u32,
    };
    add_programs(args.programs.as_deref(), &mut request)?;
    add_images(args.images.as_deref(), root, vec![IMAGE], &mut request)?;
    let ended = request.run(root, io::stdout(), io::stderr());
    let problem = match &ended {
        Ok(_) => "the lab host ended before this case's verdict came".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    if let Err(error) = &ended {
        eprintln!("lab: {error:#}");
    }
    // Cases bound their own waits, so a host that was lost is not their doing.
    let lost = ended.as_ref().is_err_and(|error| error.is::<HostLost>());
    Ok(cases.iter().map(|case| verdict_of(&out, case, &problem, lost)).collect())
}

/// Reads a case's verdict; one that is not there is a failure.
fn verdict_of(out: &Path, case: &Case, problem: &str, lost: bool) -> Verdict {
    let file = outcomes_dir(out).join(format!("{}.json", case.name));
    let read = fs::read(&file).ok().and_then(|json| serde_json::from_slice(&json).ok());
    read.unwrap_or_else(|| Verdict {
        name: case.name.clone(),
        case: Some(case.clone()),
        error: Some(problem.into()),
        host_fault: lost.then(|| problem.into()),
        ..Verdict::default()
    })
}
