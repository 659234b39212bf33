//! What a peer, or a base, says of a machine: its profile, its state, a base's snapshot.
//!
//! Each is read whole and within bounds or not at all; what was read can be written, and says the
//! same. Values are not looked at here: KVM and the devices judge them (`virtio` restores the
//! latter). Input: what it is, and the blob.

use kvm_bindings::kvm_cpuid_entry2;
use vmm::{MachineProfile, MachineSnapshot, state::VmState};

use super::{Origin, Target};
use crate::input::{Input, Program};

pub(super) const TARGET: Target =
    Target { name: "machine", from: Origin::Peer, run, seeds, max_len: 32 << 10 };

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let what = input.u8() % 3;
    let blob = input.rest();
    match what {
        0 => {
            let Ok(profile) = MachineProfile::decode(blob) else { return false };
            let said = profile.encode().expect("what was read can be written");
            assert_eq!(MachineProfile::decode(&said).ok(), Some(profile));
        }
        1 => {
            let Ok(snapshot) = MachineSnapshot::decode(blob) else { return false };
            let said = snapshot.encode().expect("what was read can be written");
            assert_eq!(MachineSnapshot::decode(&said).ok(), Some(snapshot));
        }
        _ => {
            let Ok(state) = VmState::decode(blob, &machine()) else { return false };
            let said = state.encode().expect("what was read can be written");
            let again = VmState::decode(&said, &machine()).expect("what was written can be read");
            assert_eq!(again.encode().ok(), Some(said));
        }
    }
    true
}

/// A machine; that of the state among the committed seeds.
fn machine() -> MachineProfile {
    MachineProfile {
        vcpus: 1,
        memory_bytes: 64 << 20,
        disk: false,
        mac: None,
        cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: 7, ..Default::default() }],
        tsc_khz: 1_000_000,
        xsave_bytes: 4096,
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let profile = machine();
    let snapshot = MachineSnapshot { profile: profile.clone(), state: b"state".to_vec() };
    let blobs = [profile.encode(), snapshot.encode()];
    let numbered = (0..).zip(blobs.map(|blob| blob.expect("a sound machine")));
    numbered.map(|(what, blob)| Program::new().u8(what).bytes(&blob).finish()).collect()
}
