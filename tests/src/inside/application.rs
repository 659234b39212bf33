//! An application in the guest, and its client outside, which asks it until the end.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use howdah_apps::{
    record::{Exchange, Fate, Line, Record},
    summary::{Counts, Requests},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    guest,
    net::{CLIENT, GUEST},
};
use crate::{results::Outcome, scenario::ApplicationPlan};

/// Where the lab puts the client.
pub(crate) const CLIENT_PROGRAM: &str = "/usr/local/bin/howdah-app";
/// What the client writes, in the scenario's directory of logs.
pub(crate) const REQUESTS: &str = "application.jsonl";
/// What it writes while it runs: not below /out, which is a 9p mount that each line would wait for.
const REQUESTS_LIVE: &str = "/run/application.jsonl";
/// How long the client may take to sum up; it waits for outstanding answers itself.
const SUMMARY: Duration = Duration::from_secs(60);

/// A client that asks an application.
pub(crate) struct UnderWay {
    child: Child,
    requests: PathBuf,
    log: PathBuf,
}

impl UnderWay {
    /// Has the guest's agent start the application, starts its client, and waits until so many
    /// answers came.
    pub(crate) fn start(plan: &ApplicationPlan, logs: &Path) -> Result<Self> {
        guest::ask(&format!("start {}", plan.workload()))?;
        let mut client = Self::ask(plan, logs)?;
        let started = Instant::now();
        let within = Duration::from_secs_f64(plan.within_s);
        while client.answers()? < plan.warm_up {
            if let Some(status) = client.child.try_wait()? {
                bail!("the client of {} ended ({status}): {}", plan.name, client.said());
            }
            if started.elapsed() > within {
                let progress = guest::ask_once(&format!("progress {}", plan.workload()));
                bail!(
                    "{} gave {} of {} answers within {} s; its progress in the guest: {}",
                    plan.name,
                    client.answers()?,
                    plan.warm_up,
                    plan.within_s,
                    progress.map_or_else(|error| format!("{error:#}"), |value| value.to_string()),
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(client)
    }

    /// Starts the client alone.
    fn ask(plan: &ApplicationPlan, logs: &Path) -> Result<Self> {
        let log = logs.join("application.log");
        let out = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let _ = fs::remove_file(REQUESTS_LIVE);
        let child = CLIENT
            .command(Path::new(CLIENT_PROGRAM))?
            .args(["client", "--application", plan.name.name()])
            .args(["--address", &GUEST.to_string(), "--jsonl", REQUESTS_LIVE])
            .args(["--rate-hz", &plan.rate_hz.to_string()])
            .args(["--outstanding", &plan.outstanding.to_string()])
            .args(["--seed", &plan.seed.to_string()])
            .args(["--connect-s", &plan.within_s.to_string()])
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot run {CLIENT_PROGRAM}"))?;
        Ok(Self { child, requests: logs.join(REQUESTS), log })
    }

    fn answers(&self) -> Result<u64> {
        let file = match File::open(REQUESTS_LIVE) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error).context("cannot read the client's requests"),
        };
        let mut answers = 0;
        for line in BufReader::new(file).lines() {
            // The last one may not be whole yet.
            let line = serde_json::from_str(&line?);
            let answered = |one: &Exchange| one.fate == Fate::Answered;
            answers += u64::from(matches!(&line, Ok(Line::Request(one)) if answered(one)));
        }
        Ok(answers)
    }

    fn said(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        said.lines().last().unwrap_or("it said nothing").to_owned()
    }

    /// Stops the client and reads what it found.
    pub(crate) fn stop(mut self) -> Result<Record> {
        // One that ended by itself says why.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if started.elapsed() > SUMMARY {
                let _ = self.child.kill();
                break self.child.wait()?;
            }
            thread::sleep(Duration::from_millis(20));
        };
        fs::copy(REQUESTS_LIVE, &self.requests).context("the client left no requests")?;
        if !status.success() {
            bail!("the application's client ended with {status}: {}", self.said());
        }
        Ok(Record::read(&self.requests)?)
    }
}

/// Notes what each handoff did to the application's users, and checks that none lost anything.
pub(crate) fn conclude(outcome: &mut Outcome, record: &Record, lives: bool) {
    let Record { run, exchanges, reconnects, .. } = record;
    outcome.application = Some(run.application);
    for leg in &mut outcome.legs {
        let (from, to) = leg.window_ns;
        leg.requests = Some(Requests::around(exchanges, *reconnects, from, to));
    }
    let Counts { sent, answered, failed, lost, wrong } = Counts::of(exchanges);
    let last = outcome.legs.last().map_or(i64::MIN, |leg| leg.window_ns.1);
    let since = exchanges.iter().filter(|one| one.answered_monotonic_ns > Some(last)).count();
    if lives {
        outcome.check(
            "requests",
            sent > 0 && answered == sent && *reconnects == 0 && since > 0,
            format!(
                "{answered} of {sent} answered, {failed} failed, {lost} lost, {reconnects} \
                 connections broke; {since} answers since the last handoff, {wrong} of all not as \
                 the picture calls for"
            ),
        );
    }
}
