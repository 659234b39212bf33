//! Every run with its figures, and how runs of the evaluation were made.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::bits::{fold, or_dash, table};
use crate::{
    chart::Data,
    run::{HostFacts, Run},
    units::{bytes, time},
};

/// More are shown only when they are asked for.
const MOST_SHOWN: usize = 12;

/// One row a run; none if there is one run only, whose figures are above.
pub(super) fn runs(runs: &[Run]) -> Option<Markup> {
    if runs.len() < 2 {
        return None;
    }
    let head = ["What", "Total", "Downtime", "Client's gap", "On the link", "Outcome", "File"];
    let mut data = Data::new(head);
    for run in runs {
        let facts = &run.facts;
        let outcome = match (facts.finished, &facts.error) {
            (true, _) => "moved".to_owned(),
            (false, Some(error)) => error.clone(),
            (false, None) => "not finished".to_owned(),
        };
        data.push([
            run.title(),
            or_dash(facts.total_ms, time),
            or_dash(facts.downtime_ms, time),
            or_dash(facts.client_gap_ms, time),
            or_dash(facts.bytes_on_link, |n| bytes(n as f64)),
            outcome,
            run.file.clone(),
        ]);
    }
    let table = table("All runs", &data);
    let many = format!("All {} runs", runs.len());
    Some(if runs.len() > MOST_SHOWN { fold(&many, table) } else { table })
}

/// Machines, versions and commands; none if nothing is known.
pub(super) fn section(runs: &[&Run]) -> Option<Markup> {
    let hosts: BTreeSet<&HostFacts> =
        runs.iter().filter_map(|run| run.facts.host.as_ref()).collect();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (program, version) in runs.iter().flat_map(|run| run.facts.versions.iter().flatten()) {
        versions.entry(program).or_default().insert(version);
    }
    let commands = commands(runs);
    if hosts.is_empty() && versions.is_empty() && commands.is_empty() {
        return None;
    }
    Some(html! {
        div class="card" {
            @for host in hosts { p { (machine(host)) } }
            @if let Some((first, last)) = taken(runs) {
                p class="note-text" { "Taken from " (first) " to " (last) "." }
            }
            @if !versions.is_empty() {
                ul {
                    @for (program, versions) in &versions {
                        li { (program) " " (versions.iter().copied().collect::<Vec<_>>().join(", ")) }
                    }
                }
            }
            @if !commands.is_empty() {
                (fold("Commands", html! {
                    @for (mover, commands) in &commands {
                        h4 { (mover) }
                        @for command in *commands { p { code { (command) } } }
                    }
                }))
            }
        }
    })
}

/// The first and the last moment at which runs say that they were taken.
fn taken<'a>(runs: &[&'a Run]) -> Option<(&'a str, &'a str)> {
    let times: BTreeSet<&str> =
        runs.iter().filter_map(|run| run.facts.taken_at.as_deref()).collect();
    Some((times.first()?, times.last()?))
}

fn machine(host: &HostFacts) -> String {
    let mut text = host.cpu.clone().unwrap_or_else(|| "A CPU that is not named".into());
    if let Some(cpus) = host.cpus {
        text += &format!(", {cpus} of them");
    }
    match host.emulated {
        Some(true) => text += ", KVM on an emulated CPU: times are longer than on metal",
        Some(false) => text += ", KVM on metal",
        None => {}
    }
    text + "."
}

/// The commands of the first run of each system and variant.
fn commands<'a>(runs: &[&'a Run]) -> BTreeMap<String, &'a [String]> {
    let mut commands = BTreeMap::new();
    for run in runs {
        let said = run.facts.commands.as_deref().filter(|said| !said.is_empty());
        if let Some(said) = said {
            let mover = format!("{} {}", run.facts.system, run.facts.variant);
            commands.entry(mover).or_insert(said);
        }
    }
    commands
}
