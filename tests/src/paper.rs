//! `lab paper`: the evaluation. Makes the runs of a plan that have not been made yet, in lab hosts, and
//! keeps a record of each; a page of them all comes last.
//!
//! A run that has its record is not made again, so that an evaluation can be ended and gone on with.

mod host;
mod peers;
pub(crate) mod plan;
pub(crate) mod record;

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use clap::Args;

use self::{
    plan::{Plan, Run, Selection, System},
    record::Record,
};
use crate::{
    exec::{DEFAULT_CPUS, Request},
    inside::{CLIENT_PROGRAM, RECORDS},
    machine::{host::Accelerator, image::Extra, root::Root},
    run::{BASE_TIME, MAX_REPEATS, add_images, add_program, add_programs, cpus_in},
    say,
};

/// Where the lab host finds the plan.
const PLAN: &str = "/lab/paper.toml";
/// Time for a run beside its bound: the guest's boot, its application's start, checks.
const BESIDE: Duration = Duration::from_secs(600);

/// Arguments of `lab paper`.
#[derive(Args)]
pub(crate) struct PaperArgs {
    /// The plan [default: tests/paper.toml]
    #[arg(value_name = "PLAN.toml")]
    plan: Option<PathBuf>,

    #[command(flatten)]
    selection: Selection,

    /// Say which runs there are and which are made, and make none
    #[arg(long)]
    list: bool,

    /// Make runs again whose records tell of an error
    #[arg(long)]
    failed_again: bool,

    /// Runs for one boot of the lab host
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,

    /// Where records and the page go [default: target/paper]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Directory of guest images [default: target/images]
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,

    /// Directory of howdah and howdah-agent [default: where this program is]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,

    /// Memory of the lab host
    #[arg(long, value_name = "N", default_value_t = 8192)]
    memory_mib: u32,

    /// CPUs of the lab host
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
}

/// Makes the runs; 0 if all of them have a record without an error.
pub(crate) fn run(args: &PaperArgs) -> Result<i32> {
    let root = Root::find()?;
    let plan_file = args.plan.clone().unwrap_or_else(|| root.path("tests/paper.toml"));
    let plan = Plan::load(&plan_file)?;
    let out = args.out.clone().unwrap_or_else(|| root.path("target/paper"));
    let book = Book { dir: out.join("runs"), failed_again: args.failed_again };
    fs::create_dir_all(&book.dir).with_context(|| format!("cannot make {}", book.dir.display()))?;
    let all = plan.runs(&args.selection)?;
    let mut pending: Vec<&Run> = Vec::new();
    for run in &all {
        let made = book.made(run)?;
        if args.list {
            say(&format!("{} {}", if made { "made " } else { "to do" }, run.name()));
        }
        if !made {
            pending.push(run);
        }
    }
    if args.list {
        return Ok(0);
    }
    say(&format!("{} runs, of which {} are made", all.len(), all.len() - pending.len()));
    let lab = Lab { args, root: &root, plan: &plan_file, book: &book };
    let failed = lab.make(pending)?;
    page(args, &book, &out)?;
    Ok(i32::from(failed > 0))
}

/// Where records are kept.
struct Book {
    dir: PathBuf,
    failed_again: bool,
}

impl Book {
    fn file(&self, run: &Run) -> PathBuf {
        self.dir.join(format!("{}.json", run.name()))
    }

    /// Whether a run has its record.
    fn made(&self, run: &Run) -> Result<bool> {
        let file = self.file(run);
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", file.display()));
            }
        };
        let record: Record = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is no record of a run: remove it, and the run is made again",
                file.display()
            )
        })?;
        // A bound that was raised gives a run that did not finish another try.
        let bounded = !record.finished && record.bound_s.is_some_and(|bound| bound < run.bound_s);
        Ok(!bounded && (record.error.is_none() || !self.failed_again))
    }

    /// Keeps a record; it is there as a whole or not at all.
    fn keep(&self, run: &Run, record: &Record) -> Result<()> {
        let (file, part) = (self.file(run), self.dir.join(".part"));
        fs::write(&part, serde_json::to_vec_pretty(record)?)
            .and_then(|()| fs::rename(&part, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// What makes runs.
struct Lab<'a> {
    args: &'a PaperArgs,
    root: &'a Root,
    plan: &'a Path,
    book: &'a Book,
}

impl Lab<'_> {
    /// Makes runs until each has a record or has been tried often enough; how many went wrong.
    fn make(&self, mut pending: Vec<&Run>) -> Result<usize> {
        let mut tried: BTreeMap<String, usize> = BTreeMap::new();
        let mut failed = self.drop_without_image(&mut pending);
        while let Some(first) = pending.first() {
            let tries = tried.get(&first.name()).copied().unwrap_or(0);
            // One that has gone wrong has a lab host of its own.
            let most = if tries == 0 { usize::from(self.args.batch) } else { 1 };
            let batch = next_batch(&mut pending, most);
            let records = self.boot(&batch, cpus_in(tries, self.args.cpus))?;
            let mut broke = false;
            let mut again = Vec::new();
            for (run, record) in batch.into_iter().zip(records) {
                if broke && record.is_none() {
                    // It stood behind the one under which the lab host broke.
                    again.push(run);
                    continue;
                }
                broke |= record.is_none();
                let tries = tried.entry(run.name()).or_default();
                *tries += 1;
                if may_be_made_again(record.as_ref()) && *tries <= MAX_REPEATS {
                    say(&format!("again  {}: an emulated lab host may be to blame", run.name()));
                    again.push(run);
                    continue;
                }
                failed += usize::from(record.as_ref().is_none_or(|one| one.error.is_some()));
                match record {
                    Some(record) => self.book.keep(run, &record)?,
                    None => say(&format!("FAILED {}: no record came of it", run.name())),
                }
            }
            pending.splice(..0, again);
        }
        Ok(failed)
    }

    /// Leaves out runs whose guest was not built; how many.
    fn drop_without_image(&self, pending: &mut Vec<&Run>) -> usize {
        let images = self.args.images.clone().unwrap_or_else(|| self.root.path("target/images"));
        let before = pending.len();
        let mut missing: BTreeMap<&str, usize> = BTreeMap::new();
        pending.retain(|run| {
            let image = run.application.image.as_str();
            let there = images.join(image).join("disk.raw").is_file();
            if !there {
                *missing.entry(image).or_default() += 1;
            }
            there
        });
        for (image, runs) in missing {
            say(&format!(
                "FAILED {runs} runs: the guest image {image} is not in {}",
                images.display()
            ));
        }
        before - pending.len()
    }

    /// Makes runs in one lab host; the records that came of it, in the order of the runs.
    fn boot(&self, runs: &[&Run], cpus: u8) -> Result<Vec<Option<Record>>> {
        let out = self.root.lab_dir()?;
        for dir in [out.join(RECORDS.trim_start_matches("/out/")), out.join("import")] {
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
                }
                _ => {}
            }
        }
        let request = self.request(runs, cpus, &out)?;
        let host = host::describe(cpus);
        if let Err(error) = request.run(self.root, io::stdout(), io::stderr()) {
            eprintln!("lab: {error:#}");
        }
        let taken_at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let records = runs.iter().map(|run| {
            let file = out.join(RECORDS.trim_start_matches("/out/")).join(run.name() + ".json");
            let text = fs::read(file).ok()?;
            let mut record: Record = serde_json::from_slice(&text).ok()?;
            record.host = Some(host.clone());
            record.taken_at = Some(taken_at.clone());
            Some(record)
        });
        Ok(records.collect())
    }

    fn request(&self, runs: &[&Run], cpus: u8, out: &Path) -> Result<Request> {
        let mut command: Vec<String> =
            ["/lab/lab", "inside", "--paper", PLAN].map(str::to_owned).to_vec();
        if self.args.selection.quick {
            command.push("--quick".into());
        }
        for table in &self.args.selection.tables {
            command.extend(["--table".into(), table.clone()]);
        }
        for run in runs {
            command.extend(["--run".into(), run.name()]);
        }
        let bounds = runs.iter().map(|run| Duration::from_secs_f64(run.bound_s) + BESIDE);
        let mut request = Request {
            command,
            env: Vec::new(),
            extras: vec![Extra::File { from: self.plan.to_owned(), to: PLAN.into() }],
            shares: Vec::new(),
            out: out.to_owned(),
            memory_mib: self.args.memory_mib,
            cpus,
            timeout: BASE_TIME + bounds.sum::<Duration>(),
        };
        let programs = self.args.programs.as_deref();
        add_programs(programs, &mut request)?;
        if runs.iter().any(|run| run.application.is_used()) {
            add_program(programs, Path::new(CLIENT_PROGRAM), &mut request)?;
        }
        let images = runs.iter().map(|run| run.application.image.as_str()).collect();
        add_images(self.args.images.as_deref(), self.root, images, &mut request)?;
        if runs.iter().any(|run| run.variant.system == System::Qemu) {
            peers::add_qemu(&mut request)?;
        }
        Ok(request)
    }
}

/// Whether a run has not come about for reasons that may be those of an emulated lab host. On hardware
/// an error is a finding.
fn may_be_made_again(record: Option<&Record>) -> bool {
    let wrong = record.is_none_or(|record| record.error.is_some() && !record.finished);
    wrong && Accelerator::detect() == Accelerator::Software
}

/// Takes the next runs for one lab host off the list: those with the guest of the first, so that its
/// base is made once.
fn next_batch<'a>(pending: &mut Vec<&'a Run>, most: usize) -> Vec<&'a Run> {
    let Some(first) = pending.first().copied() else { return Vec::new() };
    let mut batch = Vec::new();
    pending.retain(|run| {
        let taken = batch.len() < most && run.application == first.application;
        if taken {
            batch.push(*run);
        }
        !taken
    });
    batch
}

/// Makes the page of all records, by `howdah report`.
fn page(args: &PaperArgs, book: &Book, out: &Path) -> Result<()> {
    let dir = match &args.programs {
        Some(dir) => dir.clone(),
        None => env::current_exe()?.parent().context("this program is in no directory")?.into(),
    };
    let mut records: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&book.dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|suffix| suffix == "json") {
            records.push(path);
        }
    }
    if records.is_empty() {
        return Ok(());
    }
    records.sort();
    let page = out.join("report.html");
    let status = Command::new(dir.join("howdah"))
        .arg("report")
        .args(&records)
        .arg("--out")
        .arg(&page)
        .arg("--csv")
        .arg(out.join("csv"))
        .status()
        .context("cannot run howdah report")?;
    if status.success() {
        say(&format!("{} runs in {}", records.len(), page.display()));
    } else {
        say(&format!("howdah report ended with {status}; records are in {}", book.dir.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_with_one_guest_share_a_lab_host() {
        let plan = Path::new(env!("CARGO_MANIFEST_DIR")).join("paper.toml");
        let all = Plan::load(&plan).unwrap().runs(&Selection::default()).unwrap();
        let mut pending: Vec<&Run> = all.iter().collect();
        let mut batches = Vec::new();
        while !pending.is_empty() {
            batches.push(next_batch(&mut pending, 5));
        }
        assert_eq!(batches.iter().map(Vec::len).sum::<usize>(), all.len());
        for batch in &batches {
            assert!((1..=5).contains(&batch.len()));
            assert!(batch.iter().all(|run| run.application == batch[0].application));
        }
    }

    #[test]
    fn a_run_is_made_until_it_has_a_record_that_fits() {
        let dir = tempfile::tempdir().unwrap();
        let plan = Path::new(env!("CARGO_MANIFEST_DIR")).join("paper.toml");
        let runs = Plan::load(&plan).unwrap().runs(&Selection::default()).unwrap();
        let run = &runs[0];
        let book = |failed_again| Book { dir: dir.path().to_owned(), failed_again };
        assert!(!book(false).made(run).unwrap());
        let mut record = Record::begin(run);
        record.error = Some("the guest did not boot".into());
        book(false).keep(run, &record).unwrap();
        assert!(book(false).made(run).unwrap() && !book(true).made(run).unwrap());
        // Not finished within less than it has now.
        record.error = None;
        record.bound_s = Some(run.bound_s / 2.0);
        book(false).keep(run, &record).unwrap();
        assert!(!book(false).made(run).unwrap());
        record.finished = true;
        book(false).keep(run, &record).unwrap();
        assert!(book(false).made(run).unwrap());
        fs::write(book(false).file(run), b"{").unwrap();
        let error = book(false).made(run).unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
    }
}
