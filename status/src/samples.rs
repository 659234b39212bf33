//! A cloudlet for tests.

use howdah_api::{
    Base, Disk, HandoffProgress, Host, Kind, Kvm, Operation, Peer, Process, Progress, Receiving,
    Record, Rights, State, Vm, VmConfig, VmState,
};
use serde_json::json;

use crate::{Snapshot, Usage};

pub(crate) const BYTES_ON_LINK: u64 = 8_400_000;

fn host() -> Host {
    Host {
        version: "0.1.0".into(),
        key: "howdah:abc".into(),
        home: "/var/lib/howdah".into(),
        pid: 700,
        uptime_ms: 7_500_000,
        hostname: "cloudlet-a".into(),
        kernel: "6.12.9".into(),
        cpus: 8,
        memory_bytes: 16 << 30,
        memory_available_bytes: 11 << 30,
        disk: Disk { total_bytes: 100 << 30, free_bytes: 60 << 30 },
        kvm: Kvm { usable: true, hardware: true, why_not: None },
        receive: Some(Receiving { address: "10.0.0.1:7070".into(), plain: false }),
        api: None,
    }
}

/// Read as a client reads it: what is new in it has a default.
fn config() -> VmConfig {
    let config = json!({
        "version": 2, "base": "ab".repeat(32), "memory_mib": 512, "vcpus": 2, "tap": "tap0",
        "mac": "02:00:00:00:00:01", "append": "",
    });
    serde_json::from_value(config).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn vm(name: &str, state: VmState) -> Vm {
    let alive = matches!(state, VmState::Running | VmState::HandingOff);
    let progress = (state == VmState::HandingOff).then(|| HandoffProgress {
        peer: "b@10.0.0.2:7070".into(),
        stage: "sending".into(),
        round: 2,
        sent_bytes: 6 << 20,
        remaining_bytes: 12 << 20,
        rate_bytes_per_s: 1_200_000,
        predicted_downtime_ms: Some(140),
    });
    Vm {
        name: name.into(),
        state,
        process: alive.then(|| Process {
            pid: 71,
            phase: state,
            ownership: "owner".into(),
            epoch: 3,
            progress,
        }),
        record: Some(Record {
            vm_id: "01".repeat(16),
            epoch: 3,
            ownership: "owner of epoch 3".into(),
            may_run: true,
        }),
        config: Some(config()),
        last_report: None,
        kept_bytes: None,
        problems: Vec::new(),
    }
}

/// A handoff that is over, and went well.
pub(crate) fn moved() -> Operation {
    Operation {
        id: "op-1".into(),
        kind: Kind::Handoff,
        subject: "db".into(),
        peer: Some("b".into()),
        state: State::Done,
        progress: Progress { done_bytes: 8 << 20, total_bytes: 8 << 20, rate_bytes_per_s: 0 },
        handoff: None,
        started_at_ms: 1_795_000_000_000,
        ended_at_ms: Some(1_795_000_009_400),
        result: Some(json!({
            "handoff": "5e".repeat(16), "outcome": "moved", "total_ms": 9400.0,
            "downtime_ms": 120.4, "bytes_on_link": BYTES_ON_LINK, "utilisation": 0.97,
        })),
        error: None,
    }
}

pub(crate) fn snapshot() -> Snapshot {
    let web = vm("web", VmState::HandingOff);
    let running = Operation {
        id: "op-2".into(),
        subject: "web".into(),
        state: State::Running,
        progress: Progress {
            done_bytes: 6 << 20,
            total_bytes: 18 << 20,
            rate_bytes_per_s: 1_200_000,
        },
        handoff: web.process.as_ref().and_then(|process| process.progress.clone()),
        ended_at_ms: None,
        result: None,
        ..moved()
    };
    let mut gone = vm("db", VmState::HandedOff);
    gone.kept_bytes = Some(30 << 20);
    gone.last_report = moved().result;
    let mut damaged = vm("old", VmState::Damaged);
    damaged.problems = vec!["VM old: ownership: 3 bytes are missing".into()];
    let base = Base {
        id: "ab".repeat(32),
        names: vec!["edge".into()],
        disk_bytes: Some(2 << 30),
        memory_bytes: Some(512 << 20),
        error: None,
    };
    Snapshot {
        host: host(),
        vms: vec![gone, damaged, web, vm("worker", VmState::Running)],
        bases: vec![base],
        peers: vec![Peer {
            name: "b".into(),
            key: "howdah:xyz".into(),
            address: Some("10.0.0.2:7070".into()),
            api: None,
            rights: Rights {
                send: true,
                receive: true,
                push: false,
                pull: false,
                observe: false,
                operate: true,
            },
            bases: None,
            until: None,
        }],
        operations: vec![running, moved()],
        usage: vec![Usage { vm: "web".into(), resident_bytes: 300 << 20, cpu_s: 12.5, threads: 9 }],
    }
}
