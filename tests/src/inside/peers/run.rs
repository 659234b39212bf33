//! One run of the evaluation with QEMU: two QEMUs, a guest, its client, a migration.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Error, Result, bail};
use howdah_apps::summary::Requests;
use serde_json::{Value, json};

use super::{
    disk,
    migrate::{Ended, Migration},
    qemu::{Qemu, Role, Setup},
    variant::Variant,
};
use crate::{
    inside::{
        application::UnderWay,
        changer::Changer,
        guest::{self, Client, Vitals},
        measure,
        net::Network,
        runner::monotonic_ns,
        stores::IMAGES,
    },
    paper::{
        plan::{Application, Run},
        record::{Record, Witness},
    },
    scenario::{Side, Step},
};

/// The lab host's memory for what peers need.
const DIR: &str = "/run/peers";
/// How long a guest may take to boot, firmware included.
const BOOT: Duration = Duration::from_secs(300);
/// How long the guest is watched after the move.
const AFTER: Duration = Duration::from_secs(3);
/// Silence just before and after a move counts as its own.
const AROUND_NS: i64 = 2_000_000_000;
/// What is kept of a run besides its record.
const LOGS: [&str; 4] = ["a-console.log", "b-console.log", "a-qemu.log", "b-qemu.log"];

/// Makes the run; what it finds goes into the record.
pub(crate) fn run(run: &Run, logs: &Path, record: &mut Record) -> Result<()> {
    let variant = Variant::parse(&run.variant.name)?;
    let work = Path::new(DIR).join("run");
    // A directory that is not there is as it should be.
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let result = Peers::start(run, &work).and_then(|peers| peers.play(variant, logs, record));
    for name in LOGS {
        // A log that is not there was not written.
        let _ = fs::copy(work.join(name), logs.join(name));
    }
    let _ = fs::remove_dir_all(&work);
    result
}

/// Two QEMUs between which a guest moves.
struct Peers<'a> {
    run: &'a Run,
    source: Qemu,
    target: Qemu,
    network: Arc<Network>,
}

impl<'a> Peers<'a> {
    fn start(run: &'a Run, work: &Path) -> Result<Self> {
        let image = Path::new(IMAGES).join(&run.application.image);
        let base = disk::base(&image, &Path::new(DIR).join(&run.application.image))?;
        let network = Arc::new(Network::build(run.link.at_first())?);
        let setup = Setup { application: &run.application, image: &image, base: &base, work };
        let start = |side: Side, role| -> Result<Qemu> {
            let overlay: PathBuf = work.join(format!("{}-own.qcow2", side.letter()));
            disk::overlay(&base, &overlay)?;
            setup.start(side, role, &overlay)
        };
        let source = start(Side::A, Role::Source)?;
        let target = start(Side::B, Role::Target)?;
        Ok(Self { run, source, target, network })
    }

    fn play(mut self, variant: Variant, logs: &Path, record: &mut Record) -> Result<()> {
        record.commands = vec![self.source.command.clone(), self.target.command.clone()];
        record.versions = json!({ "qemu": version(&mut self.source)? });
        let (born, users) = self.begin(logs)?;
        let client = Client::start(self.run.application.probe_ms, logs)?;
        let bytes_before = self.network.link_bytes()?;
        let from_ns = monotonic_ns()?;
        let plan = self.run.link.plan();
        let changer =
            (!plan.changes.is_empty()).then(|| Changer::start(&plan, Arc::clone(&self.network)));
        let ended = Migration {
            source: &mut self.source.qmp,
            target: &mut self.target.qmp,
            variant,
            bound: Duration::from_secs_f64(self.run.bound_s),
        }
        .run();
        let to_ns = monotonic_ns()?;
        drop(changer);
        record.bytes_on_link = Some(self.network.link_bytes()?.saturating_sub(bytes_before));
        record.commands.extend(self.commands());
        record.peer = json!({ "events": self.events() });
        let ended = ended.map_err(|error| self.explained(error))?;
        note(&ended, record);
        if !ended.finished {
            return Ok(());
        }
        thread::sleep(AFTER);
        same_guest(&born, &guest::vitals()?)?;
        guest::ask("verify-records").context("the records on the disk that moved")?;
        if let Some(users) = users {
            let met = users.stop()?;
            let requests = Requests::around(&met.exchanges, met.reconnects, from_ns, to_ns);
            record.requests = Some(requests);
        }
        let watched = client.stop()?;
        let gap_ms = watched.longest_gap_ms(from_ns - AROUND_NS, to_ns + AROUND_NS);
        record.client_gap_ms = Some(gap_ms);
        Ok(())
    }

    /// Waits for the guest, and lets it do what comes before the move.
    fn begin(&mut self, logs: &Path) -> Result<(Vitals, Option<UnderWay>)> {
        let born = guest::wait_ready(BOOT).map_err(|error| self.explained(error))?;
        guest::set_clock()?;
        let users = before(&self.run.application, logs)?;
        Ok((born, users))
    }

    /// An error, with the end of a QEMU that brought it about.
    fn explained(&mut self, error: Error) -> Error {
        for (name, qemu) in [("source", &mut self.source), ("target", &mut self.target)] {
            if let Some(end) = qemu.end() {
                return error.context(format!("the {name}: {end}"));
            }
        }
        error
    }

    /// What both were told, in order for each.
    fn commands(&self) -> Vec<String> {
        let said = |side: Side, qemu: &Qemu| -> Vec<String> {
            let letter = side.letter();
            qemu.qmp.said().iter().map(|command| format!("{letter}: QMP {command}")).collect()
        };
        [said(Side::A, &self.source), said(Side::B, &self.target)].concat()
    }

    /// What both said, without what only tells that a job moved on.
    fn events(&self) -> Value {
        let of = |qemu: &Qemu| -> Vec<Value> {
            let events = qemu.qmp.history().iter();
            events
                .filter(|event| event.event != "JOB_STATUS_CHANGE")
                .map(|event| json!(event))
                .collect()
        };
        json!({ "source": of(&self.source), "target": of(&self.target) })
    }
}

/// Does what comes before the move; the application's client, if it has one.
fn before(application: &Application, logs: &Path) -> Result<Option<UnderWay>> {
    let mut users = None;
    for step in &application.before {
        match step {
            Step::Agent { command } => guest::ask(command).map(drop)?,
            Step::Wait { seconds } => thread::sleep(Duration::from_secs_f64(*seconds)),
            Step::Await { command, field, at_least, within_s } => {
                let within = Duration::from_secs_f64(*within_s);
                measure::wait_for(command, field, *at_least, within)?;
            }
            Step::Application(plan) => users = Some(UnderWay::start(plan, logs)?),
            other => bail!("{other:?} cannot come before a peer's move"),
        }
    }
    Ok(users)
}

fn note(ended: &Ended, record: &mut Record) {
    record.finished = ended.finished;
    record.total_ms = ended.total_ms;
    record.downtime_ms = ended.downtime_ms;
    record.downtime_by = ended.downtime_ms.map(|_| Witness::Hypervisor);
    if let Some(peer) = record.peer.as_object_mut() {
        peer.insert("figures".into(), ended.figures.clone());
        peer.insert("given_up".into(), json!(ended.given_up));
    }
}

/// Whether the guest at the target is the one that ran at the source.
fn same_guest(born: &Vitals, now: &Vitals) -> Result<()> {
    if (&born.boot_id, &born.nonce) != (&now.boot_id, &now.nonce) || now.counter < born.counter {
        bail!("another guest answers after the move: {now:?}, and it was {born:?}");
    }
    if now.ram_errors > born.ram_errors || now.write_errors > born.write_errors {
        bail!("the guest found damage after the move: {now:?}");
    }
    Ok(())
}

fn version(qemu: &mut Qemu) -> Result<String> {
    let version = qemu.qmp.query("query-version")?;
    let number = |name: &str| version.pointer(&format!("/qemu/{name}")).and_then(Value::as_i64);
    let numbers = ["major", "minor", "micro"].map(|name| number(name).unwrap_or(0).to_string());
    let package = version.get("package").and_then(Value::as_str).unwrap_or_default();
    Ok(format!("{} {package}", numbers.join(".")).trim().to_owned())
}
