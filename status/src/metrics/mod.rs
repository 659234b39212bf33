//! A cloudlet's metrics, as Prometheus reads them.

mod text;

use howdah_api::{State, Vm, VmState};
use serde_json::Value;
pub use text::CONTENT_TYPE;
use text::Text;

use crate::{
    Snapshot, Tally,
    tally::{KINDS, kind_name},
};

/// All states, so that each has a series always.
const STATES: [VmState; 17] = [
    VmState::Starting,
    VmState::Running,
    VmState::Paused,
    VmState::Saving,
    VmState::Recording,
    VmState::HandingOff,
    VmState::InDoubt,
    VmState::Receiving,
    VmState::Stopping,
    VmState::NotAnswering,
    VmState::Stopped,
    VmState::Interrupted,
    VmState::HandedOff,
    VmState::Prepared,
    VmState::Declined,
    VmState::Unfinished,
    VmState::Damaged,
];

/// The metrics of a cloudlet, in Prometheus' text format.
pub fn render(seen: &Snapshot, tally: &Tally) -> String {
    let mut text = Text::default();
    host(&mut text, seen);
    vms(&mut text, seen);
    processes(&mut text, seen);
    under_way(&mut text, seen);
    last(&mut text, seen);
    happened(&mut text, seen, tally);
    text.into_string()
}

fn host(text: &mut Text, seen: &Snapshot) {
    let host = &seen.host;
    text.gauge("howdah_build_info", "The version of the daemon, as a label; always 1.")
        .with(&[("version", &host.version)], 1);
    text.gauge("howdah_uptime_seconds", "For how long the daemon has run.")
        .is(host.uptime_ms as f64 / 1000.0);
    text.gauge("howdah_host_kvm_usable", "Whether VMs can be run here.")
        .is(u8::from(host.kvm.usable));
    text.gauge("howdah_host_cpus", "Processors of the host.").is(host.cpus);
    text.gauge("howdah_host_memory_bytes", "Memory of the host.").is(host.memory_bytes);
    text.gauge("howdah_host_memory_available_bytes", "Memory that can be used without swapping.")
        .is(host.memory_available_bytes);
    text.gauge("howdah_home_size_bytes", "The file system that holds bases and VMs.")
        .is(host.disk.total_bytes);
    text.gauge("howdah_home_free_bytes", "What is free there.").is(host.disk.free_bytes);
    text.gauge("howdah_receiving", "Whether the daemon listens for VMs of peers.")
        .is(u8::from(host.receive.is_some()));
    text.gauge("howdah_peers", "Cloudlets that are known.").is(seen.peers.len());
    text.gauge("howdah_bases", "Bases in the store.").is(seen.bases.len());
    let unusable = seen.bases.iter().filter(|base| base.error.is_some()).count();
    text.gauge("howdah_bases_unusable", "Bases that cannot be read.").is(unusable);
}

fn vms(text: &mut Text, seen: &Snapshot) {
    let mut family = text.gauge("howdah_vms", "VMs, by state.");
    for state in STATES {
        let count = seen.vms.iter().filter(|vm| vm.state == state).count();
        family.with(&[("state", state.name())], count);
    }
    let mut family = text.gauge("howdah_vm_up", "Whether the guest runs here.");
    for vm in &seen.vms {
        let up = matches!(vm.state, VmState::Running | VmState::Recording | VmState::HandingOff);
        family.with(&[("vm", &vm.name)], u8::from(up));
    }
    let mut family = text.gauge("howdah_vm_problems", "What is wrong with a VM, counted.");
    for vm in &seen.vms {
        family.with(&[("vm", &vm.name)], vm.problems.len());
    }
    let mut family = text.gauge("howdah_vm_epoch", "How often a VM has changed hands.");
    for (vm, record) in seen.vms.iter().filter_map(|vm| Some((vm, vm.record.as_ref()?))) {
        family.with(&[("vm", &vm.name)], record.epoch);
    }
    let mut family = text.gauge("howdah_vm_memory_bytes", "Memory of the guest.");
    for (vm, config) in seen.vms.iter().filter_map(|vm| Some((vm, vm.config.as_ref()?))) {
        family.with(&[("vm", &vm.name)], config.memory_mib.saturating_mul(1 << 20));
    }
    let mut family = text.gauge("howdah_vm_vcpus", "Virtual CPUs of the guest.");
    for (vm, config) in seen.vms.iter().filter_map(|vm| Some((vm, vm.config.as_ref()?))) {
        family.with(&[("vm", &vm.name)], config.vcpus);
    }
    let mut family =
        text.gauge("howdah_vm_kept_bytes", "What is kept of a VM that left, for its way back.");
    for (vm, kept) in seen.vms.iter().filter_map(|vm| Some((vm, vm.kept_bytes?))) {
        family.with(&[("vm", &vm.name)], kept);
    }
}

fn processes(text: &mut Text, seen: &Snapshot) {
    let with_usage = || seen.vms.iter().filter_map(|vm| seen.usage_of(&vm.name));
    let mut family =
        text.gauge("howdah_vm_resident_bytes", "Memory of a VM's process that is in RAM.");
    for usage in with_usage() {
        family.with(&[("vm", &usage.vm)], usage.resident_bytes);
    }
    let mut family = text.counter(
        "howdah_vm_cpu_seconds_total",
        "Processor time of a VM's process, its guest's included.",
    );
    for usage in with_usage() {
        family.with(&[("vm", &usage.vm)], usage.cpu_s);
    }
    let mut family = text.gauge("howdah_vm_threads", "Threads of a VM's process.");
    for usage in with_usage() {
        family.with(&[("vm", &usage.vm)], usage.threads);
    }
}

/// Handoffs that go on now, in either direction.
fn under_way(text: &mut Text, seen: &Snapshot) {
    let going: Vec<_> = seen
        .vms
        .iter()
        .filter_map(|vm| Some((vm, vm.process.as_ref()?.progress.as_ref()?)))
        .collect();
    let labels = |vm: &Vm| {
        let receiving = vm.state == VmState::Receiving;
        [("vm", vm.name.clone()), ("direction", if receiving { "in" } else { "out" }.to_owned())]
    };
    type Value = fn(&howdah_api::HandoffProgress) -> Option<f64>;
    let families: [(&str, &str, Value); 5] = [
        ("howdah_handoff_sent_bytes", "Bytes on the link so far.", |p| Some(p.sent_bytes as f64)),
        (
            "howdah_handoff_remaining_bytes",
            "Guest bytes still to be looked at in this round.",
            |p| Some(p.remaining_bytes as f64),
        ),
        ("howdah_handoff_rate_bytes_per_second", "Bytes a second on the link, lately.", |p| {
            Some(p.rate_bytes_per_s as f64)
        }),
        ("howdah_handoff_round", "The round, from 1.", |p| Some(f64::from(p.round))),
        ("howdah_handoff_predicted_downtime_seconds", "What a cutover now would cost.", |p| {
            p.predicted_downtime_ms.map(|ms| ms as f64 / 1000.0)
        }),
    ];
    for (name, help, value) in families {
        let mut family = text.gauge(name, help);
        for (vm, progress) in &going {
            let labels = labels(vm);
            let labels = labels.each_ref().map(|(name, value)| (*name, value.as_str()));
            if let Some(value) = value(progress) {
                family.with(&labels, value);
            }
        }
    }
}

/// The last handoff of each VM from here, whoever asked for it and whenever that was.
fn last(text: &mut Text, seen: &Snapshot) {
    let reports: Vec<_> =
        seen.vms.iter().filter_map(|vm| Some((vm, vm.last_report.as_ref()?))).collect();
    let families = [
        ("howdah_last_handoff_seconds", "total_ms", 1000.0, "How long the last handoff took."),
        (
            "howdah_last_handoff_downtime_seconds",
            "downtime_ms",
            1000.0,
            "For how long the guest stood still in it.",
        ),
        ("howdah_last_handoff_bytes", "bytes_on_link", 1.0, "Bytes of it on the link, both ways."),
        ("howdah_last_handoff_utilisation_ratio", "utilisation", 1.0, "How busy it kept the link."),
    ];
    for (name, key, per, help) in families {
        let mut family = text.gauge(name, help);
        for (vm, report) in &reports {
            if let Some(value) = report.get(key).and_then(Value::as_f64) {
                family.with(&[("vm", &vm.name)], value / per);
            }
        }
    }
}

/// What happened since the daemon started.
fn happened(text: &mut Text, seen: &Snapshot, tally: &Tally) {
    let mut family = text.gauge("howdah_operations_running", "Operations that go on, by kind.");
    for kind in KINDS {
        let running = |o: &&howdah_api::Operation| o.kind == kind && o.state == State::Running;
        let count = seen.operations.iter().filter(running).count();
        family.with(&[("kind", kind_name(kind))], count);
    }
    let mut family =
        text.counter("howdah_operations_ended_total", "Operations that ended, by kind and how.");
    for ((kind, state), count) in &tally.ended {
        family.with(&[("kind", kind), ("state", state)], count);
    }
    let mut family = text.counter("howdah_receptions_total", "What the listener for peers did.");
    for (event, count) in &tally.receptions {
        family.with(&[("event", event)], count);
    }
    text.counter(
        "howdah_handoff_bytes_total",
        "Bytes of ended handoffs on their links, both ways.",
    )
    .is(tally.handoff_bytes);
    text.histogram(
        "howdah_handoff_downtime_seconds",
        "Pauses of guests that moved.",
        &tally.downtime,
    );
    text.histogram("howdah_handoff_seconds", "How long handoffs took.", &tally.duration);
    text.counter(
        "howdah_events_lost_total",
        "Events that were not counted, because there were too many.",
    )
    .is(tally.events_lost);
}

#[cfg(test)]
mod tests;
