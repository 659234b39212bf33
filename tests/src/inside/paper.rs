//! Runs of the evaluation inside the lab host, one after the other.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{
    burst,
    kernel_log::{self, Mark},
    narrator::Narrator,
    peers, runner,
    stores::Stores,
};
use crate::{
    paper::{
        plan::{Plan, Run, Selection, System, Variant},
        record::{Record, Witness},
    },
    results::Outcome,
    say,
    scenario::{ClientPlan, Expect, LegLimits, Peer, Place, Scenario, Side, Step, VmPlan},
};

/// Where records are left for the lab outside, one file a run.
pub(crate) const RECORDS: &str = "/out/paper";

/// How long the guest is watched after the handoff: longer than silence counts as the handoff's.
const AFTER_S: f64 = 3.0;

/// Makes the runs of these names; returns the exit status for the lab outside.
pub(crate) fn run(plan: &Path, selection: &Selection, names: &[String]) -> Result<i32> {
    let plan = Plan::load(plan)?;
    let all = plan.runs(selection)?;
    fs::create_dir_all(RECORDS).with_context(|| format!("cannot make {RECORDS}"))?;
    let mut failed = 0;
    let mut stores = None;
    for name in names {
        let run = all.iter().find(|run| run.name() == *name);
        let run = run.with_context(|| format!("no run {name} in the plan"))?;
        let record = make(run, &mut stores)?;
        failed += i32::from(record.error.is_some());
        keep(name, &record)?;
        say(&record.line());
    }
    Ok(i32::from(failed > 0))
}

fn make(run: &Run, stores: &mut Option<Stores>) -> Result<Record> {
    let name = run.name();
    let logs = Path::new(RECORDS).join(&name);
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let mut record = Record::begin(run);
    let mark = Mark::now()?;
    let began = Instant::now();
    let result = measured(run, &mut record).and_then(|()| match run.variant.system {
        System::Qemu => peers::run(run, &logs, &mut record),
        System::Howdah => howdah(run, stores, &mut record),
    });
    if let Err(error) = result {
        record.error = Some(format!("{error:#}"));
    }
    if record.error.is_some() {
        let lost = mark.lost_since(&format!("paper/{name}"))?;
        record.host_fault = match lost {
            Some(lost) => Some(lost),
            None => record.host_fault.take().or(kernel_log::guest_lost(&format!("paper/{name}"))?),
        };
    }
    record.run_ms = Some(began.elapsed().as_millis() as u64);
    Ok(record)
}

/// States what the link really carries.
fn measured(run: &Run, record: &mut Record) -> Result<()> {
    let rate = burst::measure(run.link.at_first()).context("measuring the link")?;
    record.measured_rate_bytes_per_s = Some(rate);
    Ok(())
}

/// A run with howdah is a scenario like those of `lab run`, with all its checks.
fn howdah(run: &Run, stores: &mut Option<Stores>, record: &mut Record) -> Result<()> {
    let scenario = scenario(run)?;
    let logs = PathBuf::from("/out/import");
    // Bases are built once a lab host; all runs in one have the same guest.
    let stores = match stores {
        Some(stores) => stores,
        none => none.insert(Stores::import(std::slice::from_ref(&scenario), &logs)?),
    };
    let outcome = runner::run(&scenario, stores, Narrator::new(false));
    let flags = flags(&run.variant)?.join(" ");
    record.commands = vec![
        "howdah vm run guest --base base-with-memory --tap tap0 --detach".into(),
        "howdah receive --listen 10.77.0.2:7070 --tap tap0".into(),
        format!("howdah handoff guest 10.77.0.2:7070 {flags}").trim().to_owned(),
    ];
    record.versions = json!({ "howdah": env!("CARGO_PKG_VERSION") });
    note(&outcome, record);
    Ok(())
}

fn note(outcome: &Outcome, record: &mut Record) {
    record.host_fault.clone_from(&outcome.host_fault);
    if !outcome.passed {
        record.error = Some(outcome.complaints().join("; "));
    }
    let Some(leg) = outcome.legs.first() else { return };
    record.finished = leg.ended == Expect::Moved;
    record.bytes_on_link = Some(leg.link_counter_bytes);
    record.report = leg.report.clone();
    if !record.finished {
        return;
    }
    record.total_ms = leg.total_ms;
    record.downtime_ms = leg.downtime_ms;
    record.downtime_by = leg.downtime_ms.map(|_| Witness::Hypervisor);
    record.client_gap_ms = leg.client_gap_ms;
    record.requests.clone_from(&leg.requests);
    record.offline_encoder_bytes = leg.encoded.as_ref().map(|encoded| encoded.bytes);
}

/// What howdah is told for a variant.
fn flags(variant: &Variant) -> Result<Vec<String>> {
    match variant.name.split_once(':') {
        None if variant.name == "default" => Ok(Vec::new()),
        Some(("static", mode)) => Ok(vec!["--mode".into(), mode.into()]),
        _ => bail!("howdah/{}: use default or static:MODE", variant.name),
    }
}

fn scenario(run: &Run) -> Result<Scenario> {
    let application = &run.application;
    let mut steps = vec![Step::Start {}];
    steps.extend(application.before.iter().cloned());
    steps.push(Step::Handoff {
        from: Side::A,
        to: Side::B,
        audit: false,
        expect: Expect::Moved,
        says: None,
        background: false,
        peer: Peer::Howdah,
        without: Vec::new(),
        delta: None,
        flags: flags(&run.variant)?,
        encode: false,
        within_s: Some(run.bound_s),
        limits: LegLimits::default(),
    });
    steps.push(Step::Wait { seconds: AFTER_S });
    if run.encode {
        // It pauses the guest: not before the silence around the handoff has been measured.
        steps.push(Step::Encode {});
    }
    Ok(Scenario {
        // Its name is that of the directory of its logs.
        name: format!("paper/{}", run.name()),
        description: format!("{} moves over {}", application.name, run.link.name),
        link: run.link.plan(),
        vm: VmPlan {
            image: application.image.clone(),
            memory_mib: application.memory_mib,
            vcpus: application.vcpus,
            append: String::new(),
            base_memory: true,
        },
        cloudlet_b: Default::default(),
        client: ClientPlan { interval_ms: application.probe_ms },
        steps,
        ends_on: Place::B,
        limits: Default::default(),
    })
}

fn keep(name: &str, record: &Record) -> Result<()> {
    let path = Path::new(RECORDS).join(format!("{name}.json"));
    fs::write(&path, serde_json::to_vec_pretty(record)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_of_howdah_become_its_flags() {
        let flags_of = |name: &str| {
            let variant = Variant { system: System::Howdah, name: name.into() };
            flags(&variant).map_err(|error| error.to_string())
        };
        assert_eq!(flags_of("default").unwrap(), [""; 0]);
        assert_eq!(flags_of("static:zstd:3").unwrap(), ["--mode", "zstd:3"]);
        assert!(flags_of("statik").unwrap_err().contains("static:MODE"));
    }
}
