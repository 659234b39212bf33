//! `lab run`: scenarios in a lab host, and their results outside.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    compare,
    exec::{DEFAULT_CPUS, Request},
    films,
    inside::{CLIENT_PROGRAM, IMAGES, OUTCOMES},
    machine::{host::Accelerator, image::Extra, qemu::HostLost, root::Root},
    results::Outcome,
    scenario::Scenario,
};

/// The programs under test, found beside the lab's own.
const PROGRAMS: [&str; 2] = ["howdah", "howdah-agent"];
/// What the product is to log; set for the lab, it is set in it.
const LOG_LEVEL: &str = "HOWDAH_LOG";
/// What an image directory holds.
const IMAGE_PARTS: [&str; 4] = ["kernel", "initramfs", "disk.raw", "cmdline"];
/// Time for the lab host and imports, whatever the number of scenarios.
pub(crate) const BASE_TIME: Duration = Duration::from_secs(180);

/// Arguments of `lab run`.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// Scenario files
    #[arg(required = true, value_name = "FILE.toml")]
    scenarios: Vec<PathBuf>,

    /// Tell what goes on while it goes on
    #[arg(long)]
    narrate: bool,

    /// Boot a lab host for each scenario, instead of one for all
    #[arg(long)]
    isolate: bool,

    /// Write the results to this file [default: target/lab/run.json]
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Directory of guest images [default: target/images]
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,

    /// Directory of howdah and howdah-agent [default: where this program is]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,

    /// Memory of the lab host
    #[arg(long, value_name = "N", default_value_t = 5120)]
    memory_mib: u32,

    /// CPUs of the lab host
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,

    /// End the lab host when a scenario takes longer than this
    #[arg(long, value_name = "N", default_value_t = 300)]
    timeout_s: u64,
}

/// A scenario and the file it came from.
struct Loaded {
    file: PathBuf,
    scenario: Scenario,
}

/// Runs the scenarios; 0 if all passed.
pub(crate) fn run(args: &RunArgs) -> Result<i32> {
    let root = Root::find()?;
    let loaded = load(&args.scenarios)?;
    let report = match &args.report {
        Some(file) => file.clone(),
        None => root.lab_dir()?.join("run.json"),
    };
    let boots: Vec<&[Loaded]> =
        if args.isolate { loaded.chunks(1).collect() } else { vec![&loaded] };
    let mut outcomes = Vec::new();
    for boot in boots {
        outcomes.extend(run_boot(args, &root, boot, args.cpus)?);
    }
    repeat_after_host_faults(args, &root, &loaded, &mut outcomes)?;
    hold_against_limits(&loaded, &mut outcomes);
    let json = serde_json::to_vec_pretty(&outcomes)?;
    fs::write(&report, json).with_context(|| format!("cannot write {}", report.display()))?;
    let failed = outcomes.iter().filter(|outcome| !outcome.passed).count();
    let mut out = io::stdout().lock();
    writeln!(out, "{} passed, {failed} failed", outcomes.len() - failed)?;
    Ok(i32::from(failed > 0))
}

/// How often a scenario is run again because the emulated lab host broke under it. Of some scenarios every
/// third run breaks that way, of most one in twenty (ADR 0006): with three repetitions hardly any is lost
/// to it, and what breaks every time is still a failure.
pub(crate) const MAX_REPEATS: usize = 3;

/// CPUs of the lab host in which a scenario is run for the last time: what breaks an emulated host
/// needs two. Not before, because one CPU takes twice as long and figures have bounds.
const SAFE_CPUS: u8 = 1;

/// CPUs of the lab host in a repetition, counted from 1.
pub(crate) fn cpus_in(repeat: usize, cpus: u8) -> u8 {
    if repeat < MAX_REPEATS { cpus } else { SAFE_CPUS }
}

/// Runs again, in a lab host of its own, each scenario under which the lab host broke.
/// Only an emulated host is forgiven: on real hardware a host that breaks is a finding.
fn repeat_after_host_faults(
    args: &RunArgs,
    root: &Root,
    loaded: &[Loaded],
    outcomes: &mut [Outcome],
) -> Result<()> {
    if Accelerator::detect() == Accelerator::Hardware {
        return Ok(());
    }
    for (one, outcome) in loaded.iter().zip(outcomes) {
        for repeat in 1..=MAX_REPEATS {
            let Some(fault) = outcome.host_fault.take() else { break };
            let name = &one.scenario.name;
            crate::say(&format!("again  {name}: the emulated lab host broke under it ({fault})"));
            keep_logs(&root.lab_dir()?, name, repeat);
            for mut next in
                run_boot(args, root, std::slice::from_ref(one), cpus_in(repeat, args.cpus))?
            {
                next.repeated_for = Some(fault.clone());
                *outcome = next;
            }
        }
    }
    Ok(())
}

/// Puts the logs of a scenario that broke where its repetition does not write over them: what a silent
/// guest said last is in its console's.
fn keep_logs(lab: &Path, name: &str, repeat: usize) {
    let kept = lab.join(format!("lost-{name}-{repeat}"));
    // Of an earlier run, if it is there; and a host that broke early has left no logs.
    let _ = fs::remove_dir_all(&kept);
    let _ = fs::rename(lab.join(name), &kept);
}

/// Compares figures, which may be of different scenarios, and says how they stand.
fn hold_against_limits(loaded: &[Loaded], outcomes: &mut [Outcome]) {
    let scenarios: Vec<&Scenario> = loaded.iter().map(|one| &one.scenario).collect();
    compare::compare(&scenarios, outcomes);
    for outcome in outcomes {
        for comparison in &outcome.compared {
            let word = match (comparison.is_bound(), comparison.holds) {
                (false, _) => "stated",
                (true, true) => "holds ",
                (true, false) => "FAILED",
            };
            let Outcome { name, .. } = outcome;
            crate::say(&format!("{word} {name}: {} {}", comparison.figure, comparison.detail()));
        }
    }
}

fn load(files: &[PathBuf]) -> Result<Vec<Loaded>> {
    let mut loaded: Vec<Loaded> = Vec::new();
    for file in files {
        let scenario = Scenario::load(file)?;
        if let Some(other) = loaded.iter().find(|other| other.scenario.name == scenario.name) {
            bail!(
                "{} and {} are both named {}: results would mix",
                other.file.display(),
                file.display(),
                scenario.name
            );
        }
        loaded.push(Loaded { file: file.clone(), scenario });
    }
    Ok(loaded)
}

/// Runs some scenarios in one lab host.
fn run_boot(args: &RunArgs, root: &Root, loaded: &[Loaded], cpus: u8) -> Result<Vec<Outcome>> {
    let out = root.lab_dir()?;
    clear(&out, loaded)?;
    let mut request = Request {
        command: vec!["/lab/lab".into(), "inside".into()],
        env: env::var(LOG_LEVEL).map(|level| (LOG_LEVEL.into(), level)).into_iter().collect(),
        extras: Vec::new(),
        shares: Vec::new(),
        out: out.clone(),
        memory_mib: args.memory_mib,
        cpus,
        timeout: BASE_TIME + Duration::from_secs(args.timeout_s) * loaded.len() as u32,
    };
    if args.narrate {
        request.command.push("--narrate".into());
    }
    add_programs(args.programs.as_deref(), &mut request)?;
    if loaded.iter().any(|one| one.scenario.application().is_some()) {
        add_program(args.programs.as_deref(), Path::new(CLIENT_PROGRAM), &mut request)?;
    }
    let names: Vec<&str> = loaded.iter().map(|one| one.scenario.vm.image.as_str()).collect();
    add_images(args.images.as_deref(), root, names, &mut request)?;
    for Loaded { file, scenario } in loaded {
        let to = format!("/lab/scenarios/{}.toml", scenario.name);
        request.extras.push(Extra::File { from: file.clone(), to: to.clone().into() });
        request.command.push(to);
    }
    let ended = request.run(root, io::stdout(), io::stderr());
    let problem = match &ended {
        Ok(_) => "the lab host ended before this scenario's result came".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    if let Err(error) = &ended {
        eprintln!("lab: {error:#}");
    }
    // Scenarios bound their own waits, so a host that was lost is not their doing.
    let lost = ended.as_ref().is_err_and(|error| error.is::<HostLost>());
    let outcome = |one: &Loaded| {
        let mut outcome = outcome_of(&out, &one.scenario.name, &problem, lost);
        films::check(&mut outcome, &out.join(&one.scenario.name));
        outcome
    };
    Ok(loaded.iter().map(outcome).collect())
}

/// Removes what an earlier run left, so that no old result passes for a new one.
fn clear(out: &Path, loaded: &[Loaded]) -> Result<()> {
    let own = loaded.iter().map(|one| out.join(&one.scenario.name));
    for dir in own.chain([outcomes_dir(out), out.join("import")]) {
        match fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
            }
        }
    }
    Ok(())
}

/// Where outcomes are found outside.
pub(crate) fn outcomes_dir(out: &Path) -> PathBuf {
    out.join(OUTCOMES.trim_start_matches("/out/"))
}

/// Reads a scenario's outcome; one that is not there is a failure.
fn outcome_of(out: &Path, name: &str, problem: &str, lost: bool) -> Outcome {
    let file = outcomes_dir(out).join(format!("{name}.json"));
    let read = fs::read(&file).ok().and_then(|json| serde_json::from_slice(&json).ok());
    read.unwrap_or_else(|| {
        let outcome = Outcome {
            name: name.into(),
            error: Some(problem.into()),
            host_fault: lost.then(|| problem.into()),
            ..Outcome::default()
        };
        crate::say(&outcome.line());
        outcome
    })
}

/// Puts the programs under test into the lab host.
pub(crate) fn add_programs(programs: Option<&Path>, request: &mut Request) -> Result<()> {
    PROGRAMS.into_iter().try_for_each(|name| {
        add_program(programs, &Path::new("/usr/local/bin").join(name), request)
    })
}

/// Puts one of our programs into the lab host.
pub(crate) fn add_program(programs: Option<&Path>, to: &Path, request: &mut Request) -> Result<()> {
    let dir = match programs {
        Some(dir) => dir.to_owned(),
        None => {
            let lab = env::current_exe().context("cannot tell which file this program is")?;
            lab.parent().context("this program is in no directory")?.to_owned()
        }
    };
    let from = dir.join(to.file_name().unwrap_or_default());
    if !from.is_file() {
        bail!(
            "{} is missing: build it with `cargo build --release`, or name another directory with \
             --programs",
            from.display()
        );
    }
    request.extras.push(Extra::File { from, to: to.to_owned() });
    Ok(())
}

/// Shows the guest images of these names to the lab host.
pub(crate) fn add_images(
    images: Option<&Path>,
    root: &Root,
    mut names: Vec<&str>,
    request: &mut Request,
) -> Result<()> {
    let images = images.map_or_else(|| root.path("target/images"), Path::to_owned);
    names.sort_unstable();
    names.dedup();
    for name in names {
        let dir = images.join(name);
        if let Some(part) = IMAGE_PARTS.iter().find(|part| !dir.join(part).is_file()) {
            bail!(
                "the guest image {} lacks {part}: `make images` builds it, --images names another \
                 directory",
                dir.display()
            );
        }
        request.share(&dir, &format!("{IMAGES}/{name}"), false)?;
    }
    Ok(())
}
