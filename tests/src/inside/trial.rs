//! One fault: a guest that works, a handoff, a kill or a cut at its moment, and what must hold after.

mod lives;
mod moment;
mod recovery;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use self::{
    lives::Lives,
    moment::{resume_stopped, strike, wait_for},
    recovery::{Settled, Source},
};
use super::{
    checks::{Records, is_clean, shut_down},
    guest::{self, Client, Unreachable},
    kernel_log::{self, Mark},
    net::{Network, kill_all},
    product::{Cloudlet, PORT, Running, VM},
    report,
    runner::monotonic_ns,
    silence,
    stores::Stores,
};
use crate::{
    fault::{Case, Hit, Moment, Verdict},
    results::only_silent,
    scenario::{Link, Scenario, Side},
};

/// The guest and the network of every case.
const PLAN: &str = "
name = 'faults'
description = 'a kill or a cut in the middle of a handoff'
ends_on = 'a'
steps = [{ do = 'start' }]
[vm]
memory_mib = 256
base_memory = true
";

/// What the guest does meanwhile: records that are fsynced, and RAM that is written.
const WORKLOAD: [&str; 2] = ["write on 50", "dirty 50 4"];
/// How long the guest may take to answer when it starts.
const STARTS: Duration = Duration::from_secs(60);
/// How long it works before it is handed off.
const WORKS: Duration = Duration::from_millis(300);
/// The client asks so often.
const PROBE_MS: u32 = 20;
/// From the return of the link or the process until the client has an answer from the guest, if its
/// RAM is still there; and until it is settled on which side it runs, if no handoff goes on meanwhile.
const RUNS_WITHIN: Duration = Duration::from_secs(10);
/// After which a peer of which nothing is heard counts as gone.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a guest that must boot may take to answer.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// A listener hands its environment to every process that it starts: one that takes over from a
/// process that was killed stops at the step again, and is let go again.
const LET_GO_EVERY: Duration = Duration::from_millis(50);
/// How long it is watched after that.
const WATCHED: Duration = Duration::from_millis(500);
/// How long `howdah handoff` may go on after both sides should have settled.
const HANDOFF_ENDS: Duration = Duration::from_secs(30);
/// The variable by which a process of howdah stops at a step.
const STEP_VARIABLE: &str = "HOWDAH_STEP";

/// The scenario that all cases are played in.
pub(super) fn scenario() -> Result<Scenario> {
    Scenario::parse(PLAN)
}

/// Runs a case; never fails, since failing is a verdict.
///
/// `usual` is how long a handoff takes that nothing disturbs.
pub(super) fn run(
    case: &Case,
    scenario: &Scenario,
    stores: &Stores,
    network: &Network,
    usual: Duration,
) -> Verdict {
    let started = Instant::now();
    let place = format!("faults/{}", case.name);
    let logs = Path::new("/out").join(&place);
    let work = Path::new("/run/scenario").join(&case.name);
    let mut verdict =
        Verdict { name: case.name.clone(), case: Some(case.clone()), ..Verdict::default() };
    let mark = Mark::now();
    let played = Trial::set(case, scenario, stores, network, &logs, &work).and_then(|mut trial| {
        let played = trial.play(&mut verdict, usual);
        if played.as_ref().is_err_and(|error| error.is::<Unreachable>()) {
            verdict.silent = Some(silence::picture());
        }
        trial.clear();
        played
    });
    if let Err(error) = played {
        verdict.error = Some(format!("{error:#}"));
    }
    verdict.conclude();
    if verdict.passed {
        // Thousands of logs that nobody needs.
        let _ = fs::remove_dir_all(&logs);
    } else {
        let lost = mark.and_then(|mark| mark.lost_since(&place)).ok().flatten();
        verdict.host_fault = lost
            .or_else(|| kernel_log::guest_lost(&place).ok().flatten())
            .or_else(|| only_silent(verdict.silent.as_deref(), &verdict.checks));
    }
    let _ = fs::remove_dir_all(&work);
    verdict.took_ms = started.elapsed().as_millis() as u64;
    verdict
}

/// A case under way.
struct Trial<'a> {
    case: &'a Case,
    scenario: &'a Scenario,
    network: &'a Network,
    a: Cloudlet,
    b: Cloudlet,
    work: PathBuf,
    began: Instant,
    client: Option<Client>,
    receivers: Vec<Running>,
}

impl<'a> Trial<'a> {
    fn set(
        case: &'a Case,
        scenario: &'a Scenario,
        stores: &Stores,
        network: &'a Network,
        logs: &Path,
        work: &Path,
    ) -> Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let [a, b] = stores.furnish(scenario, work)?;
        let mut trial = Self {
            case,
            scenario,
            network,
            a: Cloudlet::new(Side::A, a, logs),
            b: Cloudlet::new(Side::B, b, logs),
            work: work.to_owned(),
            began: Instant::now(),
            client: None,
            receivers: Vec::new(),
        };
        if let Moment::Step { step, side, .. } = &case.moment {
            trial.cloudlet_mut(*side).env = vec![(STEP_VARIABLE, format!("{step}:stop"))];
        }
        network.shape(trial.link())?;
        Ok(trial)
    }

    fn link(&self) -> Link {
        Link { rate_mbps: f64::from(self.case.rate_mbps), delay_ms: 2.0, loss_percent: 0.0 }
    }

    fn cloudlet(&self, side: Side) -> &Cloudlet {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// Whether the source's process lives: A's, where every guest begins.
    fn source(&self) -> Source {
        let killed = self.case.hits.iter().any(|hit| hit.kills() == Some(Side::A));
        if killed { Source::Killed } else { Source::Lives }
    }

    fn cloudlet_mut(&mut self, side: Side) -> &mut Cloudlet {
        match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        }
    }

    fn play(&mut self, verdict: &mut Verdict, usual: Duration) -> Result<()> {
        let played = self.hurt_and_heal(verdict, usual);
        if played.is_err() {
            for cloudlet in [&self.a, &self.b] {
                cloudlet.keep_logs();
            }
        }
        played?;
        if !verdict.checks.iter().all(|check| check.passed) {
            for cloudlet in [&self.a, &self.b] {
                cloudlet.keep_logs();
            }
        }
        Ok(())
    }

    fn hurt_and_heal(&mut self, verdict: &mut Verdict, usual: Duration) -> Result<()> {
        self.start()?;
        self.done(verdict, "start");
        let mut handoff = self.ask_for_handoff()?;
        let asked = Instant::now();
        if self.case.cancelled {
            moment::cancel_soon(&self.a)?;
        }
        let reached = wait_for(&self.case.moment, usual, asked, &mut handoff)?;
        verdict.check("moment-reached", reached.came, reached.detail);
        self.done(verdict, "moment");
        strike(&self.case.hits, self.network)?;
        let gone = Instant::now();
        while gone.elapsed() < Duration::from_millis(self.case.back_after_ms) {
            resume_stopped()?;
            thread::sleep(LET_GO_EVERY);
        }
        resume_stopped()?;
        for cloudlet in [&mut self.a, &mut self.b] {
            cloudlet.env.clear();
        }
        self.network.shape(self.link())?;
        let (returned, returned_ns) = (Instant::now(), monotonic_ns()?);
        self.done(verdict, "return");
        self.bring_back(verdict)?;
        let settled = recovery::settle(&self.a, &self.b, &mut handoff, self.source())?;
        let ended = handoff.wait(HANDOFF_ENDS)?;
        self.done(verdict, "settled");
        verdict.total_ms = serde_json::from_str(&ended.stdout)
            .ok()
            .filter(|_| ended.status == Some(0))
            .and_then(|report| report::number(&report, "total_ms"));
        verdict.handoff = Some(match ended.status {
            Some(0) => "0".to_owned(),
            status => format!("{status:?}: {}", ended.complaint()),
        });
        let home = self.judge_owner(verdict, &settled, returned, usual)?;
        self.judge_guest(verdict, home, returned_ns)
    }

    /// Notes that a part of the case is done.
    fn done(&self, verdict: &mut Verdict, part: &str) {
        verdict.done_ms.push((part.to_owned(), self.began.elapsed().as_millis() as u64));
    }

    /// Both cloudlets listen, the guest runs on A and works, the client watches it.
    fn start(&mut self) -> Result<()> {
        let (a, b) = (&self.a, &self.b);
        let receivers = thread::scope(|scope| {
            let listeners = [scope.spawn(|| a.receive()), scope.spawn(|| b.receive())];
            let met = [scope.spawn(|| a.meets(b)), scope.spawn(|| b.meets(a))];
            a.run_vm(&self.scenario.vm)?;
            for met in met {
                met.join().map_err(|_| anyhow!("an introduction panicked"))??;
            }
            let started = listeners.into_iter().map(|listener| {
                listener.join().map_err(|_| anyhow!("the start of a listener panicked"))?
            });
            started.collect::<Result<Vec<Running>>>()
        });
        self.receivers = receivers?;
        guest::wait_ready(STARTS)?;
        guest::renew()?;
        for command in WORKLOAD {
            guest::ask(command)?;
        }
        self.client = Some(Client::start(PROBE_MS, &self.a.logs)?);
        thread::sleep(WORKS);
        Ok(())
    }

    fn ask_for_handoff(&self) -> Result<Running> {
        let address = format!("{}:{PORT}", Side::B.address());
        let mut args = vec!["--json", "handoff", VM, &address];
        if let Some(commit) = &self.case.commit {
            args.extend(["--commit", commit]);
        }
        self.a.start_howdah(&args, "handoff")
    }

    /// What a person, or the cloudlet's own start, does after a process died.
    fn bring_back(&mut self, verdict: &mut Verdict) -> Result<()> {
        for hit in &self.case.hits {
            if let Hit::KillCloudlet(side) = hit {
                let receiver = self.cloudlet(*side).receive()?;
                self.receivers.push(receiver);
            }
        }
        let killed = self.case.hits.iter().filter_map(|hit| hit.kills());
        let killed: Vec<&Cloudlet> = killed.map(|side| self.cloudlet(side)).collect();
        let said = recovery::run_again(&killed)?;
        for (side, again) in said {
            let detail = format!("{}: {}", side.letter(), again.said);
            verdict.check(&format!("recovers-{}", side.letter()), again.settled, detail.clone());
            verdict.recovered.push(detail);
        }
        Ok(())
    }

    /// The guest runs on one side, soon, and on one only.
    fn judge_owner(
        &self,
        verdict: &mut Verdict,
        settled: &Settled,
        returned: Instant,
        usual: Duration,
    ) -> Result<Side> {
        verdict.check("never-two", !settled.ever_two, settled.detail.clone());
        verdict.check("one-owner", settled.home.is_some(), settled.detail.clone());
        let Some((home, since)) = settled.home else {
            bail!("the guest runs nowhere: {}", settled.detail);
        };
        let after = since.saturating_duration_since(returned);
        verdict.ran_on = Some(home);
        verdict.runs_after_ms = Some(after.as_millis() as u64);
        if !self.case.hits.is_empty() {
            // What was cut may have most of a handoff before it, with the guest running meanwhile.
            let mut within = RUNS_WITHIN + usual;
            // Of a process that dies behind a cut link nobody hears: it is found by its silence, and
            // the handoff begins anew, the guest running meanwhile.
            let hits = &self.case.hits;
            if hits.contains(&Hit::CutLink) && hits.iter().any(|hit| hit.kills().is_some()) {
                within += SILENCE;
            }
            let detail = format!("{:.1} s of {:.1} s", after.as_secs_f64(), within.as_secs_f64());
            verdict.check("runs-soon", after <= within, detail);
        }
        Ok(home)
    }

    /// It is the guest that was started, it works, and nothing that it was promised is lost.
    fn judge_guest(&mut self, verdict: &mut Verdict, home: Side, returned_ns: i64) -> Result<()> {
        let answers = guest::wait_ready(BOOTS_WITHIN)?;
        self.done(verdict, "answers");
        thread::sleep(WATCHED);
        let ram = guest::ask("verify-ram");
        let now = guest::vitals()?;
        verdict.check(
            "works",
            ram.is_ok() && now.ram_errors == 0 && now.write_errors == 0,
            format!("{} wrong pages, {} failed writes", now.ram_errors, now.write_errors),
        );
        verdict.check(
            "counts-on",
            now.counter > answers.counter && now.boot_id == answers.boot_id,
            format!("counter {}, then {}", answers.counter, now.counter),
        );
        let client = self.client.take().context("the client was never started")?;
        let watched = client.stop()?;
        verdict.client_gap_ms = Some(watched.longest_gap_ms(i64::MIN, i64::MAX));
        let lives = Lives::read(&self.a.logs.join("client.jsonl"))?;
        self.judge_lives(verdict, &lives, home);
        let after_ms = watched.first_after_ms(returned_ns);
        verdict.answers_after_ms = after_ms.map(|ms| ms as u64);
        let within = if verdict.rebooted { BOOTS_WITHIN } else { RUNS_WITHIN };
        verdict.check(
            "answers-soon",
            after_ms.is_some_and(|ms| ms <= within.as_secs_f64() * 1e3),
            format!("{:.1} s after the return", after_ms.unwrap_or(f64::NAN) / 1e3),
        );
        let twice = watched.summary.duplicates;
        verdict.check("answers-once", twice == 0, format!("{twice} probes answered twice"));
        let still = recovery::states(&self.a, &self.b)?;
        verdict.check("still-one-owner", still.home(self.source()) == Some(home), still.detail());
        self.judge_disk(verdict, home, lives.promised.max(now.durable_seq))
    }

    /// RAM is lost only with the process that held it, and no older guest comes back.
    fn judge_lives(&self, verdict: &mut Verdict, lives: &Lives, home: Side) {
        verdict.rebooted = lives.count > 1;
        let killed_here = self.case.hits.iter().any(|hit| hit.kills() == Some(home));
        let lost_with_reason = lives.count <= 1 + usize::from(killed_here);
        verdict.check(
            "ram-kept",
            lost_with_reason,
            format!("{} lives of the guest, which ended on {}", lives.count, home.letter()),
        );
        let detail = lives.broken.clone().unwrap_or("one guest after the other".into());
        verdict.check("nothing-back", lives.broken.is_none(), detail);
    }

    fn judge_disk(&self, verdict: &mut Verdict, home: Side, promised: u64) -> Result<()> {
        self.done(verdict, "judged");
        let cloudlet = self.cloudlet(home);
        let gently = shut_down(cloudlet)?;
        self.done(verdict, "shutdown");
        verdict.check(
            "shutdown",
            gently,
            if gently { "it powered off" } else { "it had to be stopped" },
        );
        let disk = self.work.join("disk.raw");
        cloudlet.howdah(&["vm", "export-disk", VM, &disk.to_string_lossy()])?;
        let (clean, detail) = is_clean(&disk)?;
        verdict.check("disk-clean", clean, detail);
        let found = Records::on(&disk, &self.work)?;
        verdict.check(
            "records",
            found.ok && found.last_seq >= promised,
            format!(
                "{promised} promised, {} on the disk{}",
                found.last_seq,
                found.first_error.map(|error| format!(", {error}")).unwrap_or_default()
            ),
        );
        Ok(())
    }

    /// Leaves the network as it was for the next case.
    fn clear(&mut self) {
        if let Some(client) = self.client.take() {
            // Only for its file: the case has failed already.
            let _ = client.stop();
        }
        // What cannot be killed shows in the next case, which then fails by name.
        let _ = resume_stopped();
        for side in [Side::A, Side::B] {
            let _ = kill_all(side.namespace());
        }
        self.receivers.clear();
    }
}
