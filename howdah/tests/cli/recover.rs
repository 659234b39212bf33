//! `howdah recover`: what a crash left undecided.

use handoff::ownership::{Epoch, HandoffId, Journal, Record, State, VmId};

use crate::common::Cloudlet;

/// A VM's directory with this record, and a disk.
fn vm(cloudlet: &Cloudlet, name: &str, state: State) {
    let data = cloudlet.file(&format!("home/vms/{name}/disk.data"), b"data");
    let record = Record { vm: VmId([1; 16]), epoch: Epoch(2), state };
    Journal::open(data.with_file_name("ownership")).unwrap().write(record).unwrap();
}

/// Nobody listens there.
fn peer() -> String {
    "127.0.0.1:1".into()
}

#[test]
fn each_vm_is_settled_as_far_as_it_can_be() {
    let cloudlet = Cloudlet::new();
    cloudlet.line("recover").ok();
    let handoff = HandoffId([2; 16]);
    vm(&cloudlet, "back", State::HandingOff { handoff, peer: peer() });
    vm(&cloudlet, "cut", State::Receiving { handoff, peer: peer() });
    vm(&cloudlet, "moved", State::Released { handoff, peer: peer() });
    let ran = cloudlet.line("--json recover").ok();
    let verdicts: Vec<_> = ran
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| format!("{} {}", vm["vm"], vm["verdict"]).replace('"', ""))
        .collect();
    assert_eq!(verdicts, ["back may-run", "cut never-here", "moved gone"]);
    // What never came whole is no disk; what may be a visit stays.
    let disk = |name: &str| cloudlet.path(&format!("home/vms/{name}/disk.data")).exists();
    assert!(disk("back") && !disk("cut") && disk("moved"));
    let seen = cloudlet.line("--json vm inspect cut").ok().json();
    assert_eq!(seen["state"], "declined");
}

#[test]
fn a_peer_that_cannot_be_asked_leaves_it_in_doubt() {
    let cloudlet = Cloudlet::new();
    let root = handoff::StateRoot([3; 32]);
    vm(&cloudlet, "doubt", State::Committed { handoff: HandoffId([2; 16]), peer: peer(), root });
    cloudlet.line("recover doubt").fails(8, &["doubt", "not settled", "takeover"]);
    cloudlet.line("recover doubt --peer 127.0.0.1:2").fails(8, &["doubt"]);
    cloudlet.line("vm takeover doubt --reason gone").ok();
    let ran = cloudlet.line("recover doubt").ok();
    assert!(ran.stdout.contains("may-run"), "{ran:?}");
    cloudlet.line("recover nobody").fails(3, &["nobody"]);
}
