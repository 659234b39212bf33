//! What a peer, or a base, says of a machine: its profile, its state, a base's snapshot; and what a peer
//! says of its host.
//!
//! Each is read whole and within bounds or not at all; what was read can be written, and says the
//! same. Values are not looked at here: KVM and the devices judge them (`virtio` restores the
//! latter). Input: what it is, and the blob.

use std::{io, sync::mpsc};

use kvm_bindings::kvm_cpuid_entry2;
use vmm::{
    HostCheck, HostProfile, MachineProfile, MachineSnapshot, ThreadHook, Vm, VmConfig,
    layout::MIN_MEMORY_BYTES, state::VmState,
};

use super::{Origin, Target, kernel};
use crate::{
    input::{Input, Program},
    scratch::Scratch,
};

/// Magic and version, before what they are of.
const HEADER_BYTES: usize = 10;

pub(super) const TARGET: Target =
    Target { name: "machine", from: Origin::Peer, run, seeds, max_len: 32 << 10 };

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let what = input.u8() % 4;
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
        2 => {
            // Any machine is the one that was announced: the state begins with it.
            let announced = blob.get(HEADER_BYTES..).map(postcard::take_from_bytes);
            let Some(Ok((announced, _))) = announced else { return false };
            let Ok(state) = VmState::decode(blob, &announced) else { return false };
            let said = state.encode().expect("what was read can be written");
            let again = VmState::decode(&said, &announced).expect("what was written can be read");
            assert_eq!(again.encode().ok(), Some(said));
        }
        _ => {
            let Ok(host) = serde_json::from_slice::<HostProfile>(blob) else { return false };
            let lacks = machine().check_compatible(&host).err();
            let _told = lacks.map(|lacks| lacks.to_string());
        }
    }
    true
}

/// A machine that nobody has.
fn machine() -> MachineProfile {
    MachineProfile {
        vcpus: 1,
        memory_bytes: MIN_MEMORY_BYTES,
        disk: false,
        mac: None,
        cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: 7, ..Default::default() }],
        tsc_khz: 1_000_000,
        xsave_bytes: 4096,
    }
}

/// The state of a machine of this host, if it has KVM; there is one from elsewhere among the committed
/// seeds.
fn state() -> Option<Vec<u8>> {
    HostCheck::run().ok()?;
    let scratch = Scratch::new();
    let (events, _) = mpsc::channel();
    let config = VmConfig {
        memory_bytes: MIN_MEMORY_BYTES,
        vcpus: 1,
        kernel: scratch.file("kernel", &kernel::elf()),
        initramfs: None,
        cmdline: String::new(),
        base_memory: None,
        disk: None,
        net: None,
        cpu: Default::default(),
        rates: Default::default(),
        keep_free_pages: false,
        console: Box::new(io::sink()),
        events,
        threads: ThreadHook::default(),
    };
    let mut vm = Vm::boot(config).ok()?;
    let mut state = VmState::decode(&vm.save().ok()?, vm.profile()).ok()?;
    // What this host's CPU has is nobody's business, and long.
    state.profile.cpuid = machine().cpuid;
    state.encode().ok()
}

/// A host, as one says what it is.
fn host() -> Vec<u8> {
    let host = serde_json::json!({
        "supported": machine().cpuid, "tsc_deadline": true, "tsc_khz": 1_000_000, "tsc_scaling": false,
        "xsave_bytes": 4096, "max_vcpus": 4,
    });
    host.to_string().into_bytes()
}

fn seeds() -> Vec<Vec<u8>> {
    let profile = machine();
    let snapshot = MachineSnapshot { profile: profile.clone(), state: b"state".to_vec() };
    let blobs = [profile.encode(), snapshot.encode()].map(|blob| blob.expect("a sound machine"));
    let numbered = (0..).zip(blobs.into_iter().chain(state()));
    numbered.chain([(3, host())]).map(seed).collect()
}

fn seed((what, blob): (u8, Vec<u8>)) -> Vec<u8> {
    Program::new().u8(what).bytes(&blob).finish()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_host_among_the_seeds_is_one() {
        assert!(super::run(&super::seed((3, super::host()))));
    }
}
