//! Carries a scenario through, step by step.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use super::{
    application,
    changer::Changer,
    checks, guest,
    guest::{Client, Unreachable, Vitals},
    measure,
    narrator::Narrator,
    net::{Network, kill_all},
    product::{Cloudlet, Ended, PORT, Running, VM},
    report, silence, sizes, state,
    stores::Stores,
    strangers::LaterVersion,
};
use crate::{
    results::{Leg, Outcome},
    scenario::{Expect, Link, Peer, Scenario, Side, Step},
};

/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(120);
/// How long a handoff may take unless its step says more.
const HANDOFF: Duration = Duration::from_secs(180);
/// How long bytes may take to come before a kill that waits for them.
const BYTES_COME: Duration = Duration::from_secs(60);
/// How long a target may take to say that it received a guest.
const TARGET_SAYS: Duration = Duration::from_secs(10);
/// howdah's exit status when the guest goes on at the source.
const EXIT_NOT_MOVED: i32 = 7;
/// The same, because a user gave the handoff up.
const EXIT_CANCELLED: i32 = 9;

/// A scenario under way.
pub(crate) struct Stage<'a> {
    /// What is to happen.
    pub(crate) scenario: &'a Scenario,
    /// What came of it.
    pub(crate) outcome: Outcome,
    /// Cloudlet A.
    pub(crate) a: Cloudlet,
    /// Cloudlet B.
    pub(crate) b: Cloudlet,
    /// Scratch directory, removed at the end.
    pub(crate) work: PathBuf,
    /// Where logs go.
    pub(crate) logs: PathBuf,
    /// The client, while it probes.
    pub(crate) client: Option<Client>,
    /// The application's client, while it asks.
    pub(crate) application: Option<application::UnderWay>,
    /// The vital signs at the start.
    pub(crate) born: Option<Vitals>,
    narrator: Narrator,
    network: Arc<Network>,
    link: Link,
    changer: Option<Changer>,
    receivers: Vec<(Side, Running)>,
    pending: Option<Pending>,
}

/// A handoff that runs.
struct Pending {
    running: Running,
    stranger: Option<LaterVersion>,
    from: Side,
    to: Side,
    audit: bool,
    encode: bool,
    within: Duration,
    expect: Expect,
    says: Option<String>,
    asked_ns: i64,
    bytes_before: u64,
    arrived_before: usize,
}

/// Runs a scenario; never fails, since failing is an outcome.
pub(crate) fn run(scenario: &Scenario, stores: &Stores, narrator: Narrator) -> Outcome {
    let started = Instant::now();
    let logs = Path::new("/out").join(&scenario.name);
    let work = Path::new("/run/scenario").join(&scenario.name);
    let mut outcome = match Stage::set(scenario, stores, logs, &work, narrator) {
        Ok(mut stage) => {
            let result = stage.play();
            stage.finish(result)
        }
        Err(error) => Outcome { error: Some(format!("{error:#}")), ..Outcome::default() },
    };
    // Left-overs only cost memory, and the next scenario has other directories.
    let _ = nix::mount::umount(&work.join("b"));
    let _ = fs::remove_dir_all(&work);
    outcome.name.clone_from(&scenario.name);
    outcome.scenario_ms = started.elapsed().as_millis() as u64;
    outcome.conclude();
    outcome
}

impl<'a> Stage<'a> {
    fn set(
        scenario: &'a Scenario,
        stores: &Stores,
        logs: PathBuf,
        work: &Path,
        narrator: Narrator,
    ) -> Result<Self> {
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let link = scenario.link.at_first();
        let network = Arc::new(Network::build(link)?);
        narrator.say(&format!(
            "two cloudlets, A and B, joined by a link of {} Mbps; a client reaches both",
            link.rate_mbps
        ));
        let homes = stores.furnish(scenario, work)?;
        let cloudlet = |side, home| Cloudlet::new(side, home, &logs);
        let [a, b] = homes;
        Ok(Self {
            scenario,
            outcome: Outcome::default(),
            a: cloudlet(Side::A, a),
            b: cloudlet(Side::B, b),
            work: work.to_owned(),
            logs: logs.clone(),
            client: None,
            application: None,
            born: None,
            narrator,
            network,
            link,
            changer: None,
            receivers: Vec::new(),
            pending: None,
        })
    }

    /// One of the cloudlets.
    pub(crate) fn cloudlet(&self, side: Side) -> &Cloudlet {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    fn play(&mut self) -> Result<()> {
        for (at, step) in self.scenario.steps.iter().enumerate() {
            self.step(step).with_context(|| format!("step {}", at + 1))?;
        }
        checks::run(self)
    }

    fn finish(mut self, result: Result<()>) -> Outcome {
        if let Err(error) = result {
            self.outcome.silent = error.is::<Unreachable>().then(silence::picture);
            self.outcome.error = Some(format!("{error:#}"));
        }
        if let Some(client) = self.client.take() {
            // Only for its file: the scenario has failed already.
            let _ = client.stop();
        }
        if let Some(application) = self.application.take() {
            let _ = application.stop();
        }
        for cloudlet in [&self.a, &self.b] {
            cloudlet.keep_logs();
        }
        self.changer = None;
        self.outcome.clone()
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Start {} => self.start(),
            Step::Wait { seconds } => {
                self.narrator.wait(Duration::from_secs_f64(*seconds));
                Ok(())
            }
            Step::Agent { command } => {
                self.narrator.say(&format!("the guest is told: {command}"));
                guest::ask(command).map(drop)
            }
            Step::Await { command, field, at_least, within_s } => {
                let within = Duration::from_secs_f64(*within_s);
                let took = measure::wait_for(command, field, *at_least, within)?;
                self.narrator.say(&format!(
                    "the guest: {command}: {field} reached {at_least} after {:.1} s",
                    took.as_secs_f64()
                ));
                Ok(())
            }
            Step::Measure { name, command, fields, times } => {
                for _ in 0..*times {
                    let values = measure::numbers(command, fields)?;
                    for (field, value) in fields.iter().zip(values) {
                        self.outcome.figure(format!("{name}.{field}"), value);
                    }
                }
                Ok(())
            }
            Step::Application(plan) => {
                self.narrator.say(&format!("somebody outside uses {} in the guest", plan.name));
                self.application = Some(application::UnderWay::start(plan, &self.logs)?);
                Ok(())
            }
            Step::Record { name, for_s, every_ms } => {
                self.narrator.say(&format!("what the guest changes is recorded for {for_s} s"));
                let file = self.logs.join(format!("{name}.trace"));
                let said = self.a.record(&file, *for_s, *every_ms)?;
                for figure in ["bytes", "changes", "changed_chunks", "duration_s"] {
                    let value = said.get(figure).and_then(Value::as_f64);
                    let value = value.with_context(|| format!("no {figure} of the trace"))?;
                    self.outcome.figure(format!("{name}.{figure}"), value);
                }
                Ok(())
            }
            Step::Sizes { name } => {
                for (figure, value) in sizes::take(&[&self.a, &self.b])? {
                    self.outcome.figure(format!("{name}.{figure}"), value);
                }
                Ok(())
            }
            Step::Repeat { .. } => bail!("a repetition that was not unrolled"),
            Step::Handoff { background, .. } => {
                self.hand_off(step)?;
                if *background { Ok(()) } else { self.finish_handoff() }
            }
            Step::Cancel {} => {
                let from = self.pending.as_ref().context("there is no handoff to give up")?.from;
                self.cloudlet(from).howdah(&["handoff", VM, "--cancel"]).map(drop)
            }
            Step::Encode {} => self.encode(),
            Step::Finish {} => self.finish_handoff(),
            Step::Kill { who, after_link_kib } => self.kill(*who, after_link_kib * 1024),
            Step::Cut {} => self.network.shape(Link { loss_percent: 100.0, ..self.link }),
            Step::Heal {} => self.network.shape(self.link),
            Step::Link { now } => {
                self.link = *now;
                self.network.shape(*now)
            }
            Step::Receive { on } => self.receive(*on),
        }
    }

    fn start(&mut self) -> Result<()> {
        let plan = &self.scenario.vm;
        self.narrator.say(&format!(
            "cloudlet A {} a guest: Debian's kernel, {} MiB, {} vCPU",
            if plan.base_memory { "resumes" } else { "boots" },
            plan.memory_mib,
            plan.vcpus
        ));
        self.a.meets(&self.b)?;
        self.b.meets(&self.a)?;
        self.receive(Side::A)?;
        let stranger = |step: &Step| matches!(step, Step::Handoff { peer: Peer::OtherVersion, .. });
        if !self.scenario.steps.iter().any(stranger) {
            self.receive(Side::B)?;
        }
        let asked = Instant::now();
        self.a.run_vm(plan)?;
        // A VM of a base with memory goes on; the others have a kernel to boot now.
        self.outcome.figure("vm_run_ms", asked.elapsed().as_secs_f64() * 1e3);
        let mut born = guest::wait_ready(BOOT)?;
        self.outcome.figure("answers_ms", asked.elapsed().as_secs_f64() * 1e3);
        if plan.base_memory {
            born = guest::renew()?;
        }
        guest::set_clock()?;
        self.narrator.say(&format!(
            "the guest runs on A: boot id {}, counter {}",
            born.boot_id, born.counter
        ));
        self.born = Some(born);
        self.client = Some(Client::start(self.scenario.client.interval_ms, &self.logs)?);
        Ok(())
    }

    fn receive(&mut self, side: Side) -> Result<()> {
        let running = self.cloudlet(side).receive()?;
        self.receivers.push((side, running));
        Ok(())
    }

    fn hand_off(&mut self, step: &Step) -> Result<()> {
        let Step::Handoff {
            from,
            to,
            audit,
            expect,
            says,
            peer,
            without,
            delta,
            flags,
            encode,
            within_s,
            ..
        } = step
        else {
            bail!("not a handoff");
        };
        let stranger = match peer {
            Peer::Howdah => None,
            Peer::OtherVersion => Some(LaterVersion::listen(*to)?),
        };
        if self.changer.is_none() && !self.scenario.link.changes.is_empty() {
            self.changer = Some(Changer::start(&self.scenario.link, Arc::clone(&self.network)));
        }
        let address = format!("{}:{PORT}", to.address());
        let mut args = vec!["handoff", VM, &address];
        if stranger.is_some() {
            args.push("--plain");
        }
        if *audit {
            args.push("--audit");
        }
        let without = without.join(",");
        if !without.is_empty() {
            args.extend(["--without", &without]);
        }
        if let Some(mode) = delta {
            args.extend(["--delta", mode]);
        }
        args.extend(flags.iter().map(String::as_str));
        if !self.narrator.talks() {
            args.insert(0, "--json");
        }
        self.narrator.say(&format!(
            "the guest is handed off from {} to {} while it runs",
            from.letter().to_uppercase(),
            to.letter().to_uppercase()
        ));
        let bytes_before = self.network.link_bytes()?;
        let name = format!("handoff-{}", self.outcome.legs.len() + 1);
        let asked_ns = monotonic_ns()?;
        let running = self.cloudlet(*from).start_howdah(&args, &name)?;
        self.pending = Some(Pending {
            running,
            stranger,
            from: *from,
            to: *to,
            audit: *audit,
            encode: *encode,
            within: within_s.map_or(HANDOFF, Duration::from_secs_f64),
            expect: *expect,
            says: says.clone(),
            asked_ns,
            bytes_before,
            arrived_before: self.arrivals(*to).len(),
        });
        Ok(())
    }

    fn finish_handoff(&mut self) -> Result<()> {
        let mut pending = self.pending.take().context("there is no handoff to finish")?;
        self.narrator.follow(&mut pending.running)?;
        let ended = pending.running.wait(pending.within)?;
        let over_ns = monotonic_ns()?;
        let outcome = match ended.status {
            Some(0) => Expect::Moved,
            Some(EXIT_NOT_MOVED | EXIT_CANCELLED) => Expect::Kept,
            _ => Expect::Killed,
        };
        let report = if outcome == Expect::Moved && self.narrator.talks() {
            self.cloudlet(pending.from).last_report()?
        } else {
            serde_json::from_str(&ended.stdout).unwrap_or(Value::Null)
        };
        let number = |key: &str| report::number(&report, key);
        // The source compared them already; here each side's own word counts.
        let theirs = match (pending.audit, outcome) {
            (true, Expect::Moved) => self.received(pending.to, pending.arrived_before)?,
            _ => Value::Null,
        };
        let leg = Leg {
            hashes: (report::audit_hash(&report), report::audit_hash(&theirs)),
            from: pending.from,
            to: pending.to,
            audit: pending.audit,
            ended: outcome,
            total_ms: number("total_ms"),
            downtime_ms: number("downtime_ms"),
            bytes_on_link: report::bytes_on_link(&report),
            rounds: report::rounds(&report),
            link_counter_bytes: self.network.link_bytes()?.saturating_sub(pending.bytes_before),
            client_gap_ms: None,
            requests: None,
            encoded: None,
            window_ns: (pending.asked_ns, over_ns),
            report,
        };
        self.narrator.leg(&leg);
        self.outcome.legs.push(leg);
        if pending.encode && outcome == Expect::Moved {
            self.encode()?;
        }
        judge(pending.expect, outcome, pending.says.as_deref(), &ended)?;
        pending.stranger.map_or(Ok(()), LaterVersion::finish)
    }

    /// Has the offline encoder look at the guest where the last handoff brought it.
    fn encode(&mut self) -> Result<()> {
        let leg = self.outcome.legs.last().context("the offline encoder: there was no handoff")?;
        let encoded =
            state::encode(self.cloudlet(leg.to), &self.work).context("the offline encoder")?;
        self.outcome.legs.last_mut().context("no handoff")?.encoded = Some(encoded);
        Ok(())
    }

    /// What the target said of the guest that it received.
    fn received(&self, side: Side, arrived_before: usize) -> Result<Value> {
        let started = Instant::now();
        loop {
            let arrivals = self.arrivals(side);
            if arrivals.len() > arrived_before {
                let last = arrivals.last().and_then(|event| event.get("details"));
                return Ok(last.cloned().unwrap_or(Value::Null));
            }
            if started.elapsed() > TARGET_SAYS {
                bail!("the target never said that it received the guest");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn arrivals(&self, side: Side) -> Vec<Value> {
        let own = self.receivers.iter().filter(|(on, _)| *on == side);
        let events = own.flat_map(|(_, running)| running.events());
        events
            .filter(|event| event.get("event").and_then(Value::as_str) == Some("received"))
            .collect()
    }

    fn kill(&mut self, who: Side, after_bytes: u64) -> Result<()> {
        let from = self.pending.as_ref().map_or(0, |pending| pending.bytes_before);
        let started = Instant::now();
        while after_bytes > 0 && self.network.link_bytes()?.saturating_sub(from) < after_bytes {
            if started.elapsed() > BYTES_COME {
                bail!("{after_bytes} bytes never went over the link");
            }
            thread::sleep(Duration::from_millis(5));
        }
        if let Some(pending) = &mut self.pending
            && pending.running.ended()?
        {
            bail!("the handoff was over before the kill: {}", pending.running.said().trim());
        }
        if kill_all(who.namespace())? == 0 {
            bail!("nothing ran on cloudlet {} that could be killed", who.letter());
        }
        Ok(())
    }
}

/// Whether a handoff ended as it should.
fn judge(expect: Expect, got: Expect, says: Option<&str>, ended: &Ended) -> Result<()> {
    if expect != got {
        bail!(
            "the handoff should have ended as {expect:?} and ended as {got:?} (exit status {:?}): {}",
            ended.status,
            ended.complaint()
        );
    }
    match says {
        Some(text) if !ended.complaint().contains(text) => {
            Err(anyhow!("the error should say {text:?} and says: {}", ended.complaint()))
        }
        _ => Ok(()),
    }
}

/// CLOCK_MONOTONIC, as the client reads it.
pub(crate) fn monotonic_ns() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("no monotonic clock")?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}
