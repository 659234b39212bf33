//! The parts of the page, from what is most urgent to what changes least.

use howdah_api::{HandoffProgress, Operation, Rights, State, Vm};
use maud::{Markup, html};
use serde_json::Value;

use super::{
    MOST_ENDED,
    bits::{cell, operation_state, short, table, vm_state},
};
use crate::{
    Snapshot,
    tally::kind_name,
    units::{bytes, time},
};

/// The host, in a few numbers.
pub(super) fn host(seen: &Snapshot) -> Markup {
    let host = &seen.host;
    let running = seen.vms.iter().filter(|vm| vm.process.is_some()).count();
    html! {
        dl.tiles {
            div { dt { "VMs" } dd { (running) " running" small { "of " (seen.vms.len()) } } }
            div { dt { "Memory" } dd { (bytes(host.memory_available_bytes)) " free" small { "of " (bytes(host.memory_bytes)) } } }
            div { dt { "Disk" } dd { (bytes(host.disk.free_bytes)) " free" small { "of " (bytes(host.disk.total_bytes)) } } }
            div {
                dt { "Receives at" }
                dd {
                    @match &host.receive {
                        Some(receive) => {
                            (receive.address)
                            @if receive.plain { small.flag { "without TLS" } }
                        }
                        None => { "nowhere" small { "no listener is set up" } }
                    }
                }
            }
            div {
                dt { "KVM" }
                dd {
                    @if !host.kvm.usable { span.bad { "not usable" } }
                    @else if host.kvm.hardware { "usable" }
                    @else { span.flag { "interpreted" } }
                    small { (host.kvm.why_not.as_deref().unwrap_or(&host.kernel)) }
                }
            }
            div { dt { "Daemon" } dd { (time(host.uptime_ms as f64)) small { "process " (host.pid) } } }
        }
        p.muted { "Key " code { (host.key) } }
    }
}

/// Handoffs that go on now.
pub(super) fn under_way(seen: &Snapshot) -> Markup {
    let going: Vec<(&Vm, &HandoffProgress)> = seen
        .vms
        .iter()
        .filter_map(|vm| Some((vm, vm.process.as_ref()?.progress.as_ref()?)))
        .collect();
    html! {
        @if !going.is_empty() {
            h2 { "Handoffs under way" }
            @for (vm, progress) in going { (handoff(seen, vm, progress)) }
        }
    }
}

fn handoff(seen: &Snapshot, vm: &Vm, progress: &HandoffProgress) -> Markup {
    let operation = seen
        .operations
        .iter()
        .find(|operation| operation.subject == vm.name && operation.state == State::Running);
    // Of the operation, if there is one: it knows how much there was to do in all.
    let (done, total) = match operation.map(|operation| operation.progress) {
        Some(p) if p.total_bytes > 0 => (p.done_bytes.min(p.total_bytes), p.total_bytes),
        _ => (progress.sent_bytes, progress.sent_bytes.saturating_add(progress.remaining_bytes)),
    };
    html! {
        div.card {
            h3 { (vm.name) " → " (progress.peer) }
            progress max=(total.max(1)) value=(done) aria-label={ "Handoff of " (vm.name) } {}
            ul.facts {
                li { (progress.stage) }
                @if progress.round > 0 { li { "round " (progress.round) } }
                li { (bytes(progress.sent_bytes)) " sent" }
                li { (bytes(progress.remaining_bytes)) " remaining" }
                li { (bytes(progress.rate_bytes_per_s)) "/s" }
                @if let Some(ms) = progress.predicted_downtime_ms { li { "downtime would be " (time(ms as f64)) } }
            }
        }
    }
}

/// VMs.
pub(super) fn vms(seen: &Snapshot) -> Markup {
    let columns = [
        ("Name", true),
        ("State", true),
        ("Machine", false),
        ("In use", false),
        ("Ownership", true),
        ("Last handoff", false),
    ];
    let rows = seen.vms.iter().map(|vm| vm_row(seen, vm)).collect();
    table("VMs", &columns, rows, "No VMs: `howdah vm run NAME --base BASE` makes one.")
}

fn vm_row(seen: &Snapshot, vm: &Vm) -> Markup {
    let machine = vm.config.as_ref().map(|config| {
        html! { (config.vcpus) " vCPU" small { (bytes(config.memory_mib.saturating_mul(1 << 20))) } }
    });
    let used = seen.usage_of(&vm.name).map(|usage| {
        html! { (bytes(usage.resident_bytes)) small { (time(usage.cpu_s * 1000.0)) " of CPU" } }
    });
    let ownership = html! {
        @if let Some(record) = &vm.record { (record.ownership) small { "epoch " (record.epoch) } } @else { "-" }
        @if let Some(kept) = vm.kept_bytes { small { "keeps " (bytes(kept)) " for its way back" } }
        @for problem in &vm.problems { small.bad { (problem) } }
    };
    let none = html! { "-" };
    html! {
        th scope="row" { (vm.name) }
        (cell("State", true, &vm_state(vm.state)))
        (cell("Machine", false, machine.as_ref().unwrap_or(&none)))
        (cell("In use", false, used.as_ref().unwrap_or(&none)))
        (cell("Ownership", true, &ownership))
        (cell("Last handoff", false, &vm.last_report.as_ref().map_or(none, report)))
    }
}

/// What a report says in two lines.
fn report(report: &Value) -> Markup {
    let number = |key: &str| report.get(key).and_then(Value::as_f64);
    let trace = report.get("handoff").and_then(Value::as_str);
    html! {
        @match (number("total_ms"), number("downtime_ms")) {
            (Some(total), Some(down)) => { (time(total)) ", " (time(down)) " down" }
            (Some(total), None) => { "not moved, after " (time(total)) }
            _ => { "-" }
        }
        @if let Some(sent) = number("bytes_on_link") { small { (bytes(sent as u64)) " on the link" } }
        @if let Some(trace) = trace { small { "trace " code title=(trace) { (short(trace)) } } }
    }
}

/// What takes long: all that goes on, and the last of what is over.
pub(super) fn operations(seen: &Snapshot) -> Markup {
    let mut ended = 0;
    let shown = seen.operations.iter().filter(|operation| {
        ended += usize::from(operation.state.is_over());
        !operation.state.is_over() || ended <= MOST_ENDED
    });
    let columns = [("What", true), ("State", true), ("Took", false), ("What came of it", true)];
    let rows = shown.map(operation_row).collect();
    table("Operations", &columns, rows, "None since the daemon started.")
}

fn operation_row(operation: &Operation) -> Markup {
    let took = operation.ended_at_ms.map(|end| end.saturating_sub(operation.started_at_ms));
    let outcome = html! {
        @if let Some(error) = &operation.error { small.bad { (error) } }
        @else if let Some(result) = operation.result.as_ref().filter(|_| operation.kind == howdah_api::Kind::Handoff) { (report(result)) }
        @else if operation.progress.total_bytes > 0 {
            (bytes(operation.progress.done_bytes)) " of " (bytes(operation.progress.total_bytes))
        } @else { "-" }
    };
    html! {
        th scope="row" {
            (kind_name(operation.kind)) " " (operation.subject)
            @if let Some(peer) = &operation.peer { " → " (peer) }
        }
        (cell("State", true, &operation_state(operation.state)))
        (cell("Took", false, &html! { (took.map_or("-".to_owned(), |ms| time(ms as f64))) }))
        (cell("What came of it", true, &outcome))
    }
}

/// Cloudlets that are known.
pub(super) fn peers(seen: &Snapshot) -> Markup {
    let columns =
        [("Name", true), ("Address", true), ("May", true), ("Bases", true), ("Key", true)];
    let rows = seen.peers.iter().map(|peer| {
        let Rights { send, receive, push, pull, observe, operate } = peer.rights;
        let rights = [
            (send, "send"),
            (receive, "receive"),
            (push, "push"),
            (pull, "pull"),
            (observe, "observe"),
            (operate, "operate"),
        ];
        let may: Vec<_> = rights.iter().filter(|(has, _)| *has).map(|(_, word)| *word).collect();
        let may = if may.is_empty() { "nothing".to_owned() } else { may.join(", ") };
        let bases = peer.bases.as_ref().map_or("all".to_owned(), |bases| bases.join(", "));
        html! {
            th scope="row" { (peer.name) }
            (cell("Address", true, &html! { (peer.address.as_deref().unwrap_or("-")) }))
            (cell("May", true, &html! { (may) }))
            (cell("Bases", true, &html! { (bases) }))
            (cell("Key", true, &html! { code { (peer.key) } }))
        }
    });
    table("Peers", &columns, rows.collect(), "None: `howdah peer add NAME KEY` makes one known.")
}

/// What VMs start from.
pub(super) fn bases(seen: &Snapshot) -> Markup {
    let columns = [("Name", true), ("Id", true), ("Memory", false), ("Disk", false)];
    let rows = seen.bases.iter().map(|base| {
        let size = |n: Option<u64>| html! { (n.map_or("-".to_owned(), bytes)) };
        html! {
            th scope="row" {
                @if base.names.is_empty() { "-" } @else { (base.names.join(", ")) }
            }
            (cell("Id", true, &html! {
                code title=(base.id) { (short(&base.id)) }
                @if let Some(error) = &base.error { small.bad { (error) } }
            }))
            (cell("Memory", false, &size(base.memory_bytes)))
            (cell("Disk", false, &size(base.disk_bytes)))
        }
    });
    table(
        "Bases",
        &columns,
        rows.collect(),
        "None: `howdah base import` or `howdah base pull` brings one.",
    )
}
