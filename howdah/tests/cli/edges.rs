//! Handoffs that do not end well: each row of the table of that name in `docs/cli.md`, with real
//! processes. In the end the VM runs on exactly one side, or is stopped and can be run again, and
//! the message says which. They need /dev/kvm.

use std::{fs, path::PathBuf, process::Command, thread, time::Duration};

use nix::sys::signal::{Signal, kill};

use crate::{
    common::Ran,
    guests::{Site, wait_for},
    stage::{Gate, LARGE_CHUNKS, Receiver, Running, SOME_BYTES, await_gone},
};

/// What a VM's process had to say.
fn log_of(site: &Site, vm: &str) -> String {
    fs::read_to_string(site.0.home().join("vms").join(vm).join("vm.log")).unwrap_or_default()
}

/// A handoff that did not happen, and says why. (There is a line of progress before, now and then.)
fn refused(ran: &Ran, holds: &[&str]) {
    assert_eq!(ran.code, Some(7), "{ran:?}");
    let last = ran.stderr.lines().last().unwrap_or_default();
    holds.iter().for_each(|text| assert!(last.contains(text), "no {text:?} in {ran:?}"));
}

/// A VM `a` that runs here, a neighbour that listens, and a handoff that stands still in its middle.
struct Half {
    here: Site,
    there: Site,
    receiver: Receiver,
    gate: Gate,
    handoff: Running,
}

impl Half {
    /// `None`, and a word about it, where there is no KVM.
    fn way() -> Option<Self> {
        Self::way_with("")
    }

    fn way_with(flags: &str) -> Option<Self> {
        let here = Site::new()?;
        here.obedient_base();
        here.start_large("a");
        let there = here.neighbour();
        Some(Self::between(here, there, flags))
    }

    fn between(here: Site, there: Site, flags: &str) -> Self {
        let receiver = there.receiver(flags);
        let gate = Gate::after(SOME_BYTES, &receiver.address);
        let handoff = here.begin("a", &gate.address);
        receiver.await_event("receiving");
        gate.await_still();
        assert_eq!(here.state("a").as_deref(), Some("handing-off"));
        Self { here, there, receiver, gate, handoff }
    }

    /// The handoff failed, the guest goes on here, and nothing of it is left there.
    fn stays(self, holds: &[&str]) {
        self.gate.open();
        refused(&self.handoff.end(), holds);
        self.here.counts_on("a");
        assert_eq!(self.here.state("a").as_deref(), Some("running"));
        self.there.await_nothing_of("a");
    }

    /// It was only held up: the guest moves.
    fn moves(self) {
        self.gate.open();
        self.handoff.end().ok();
        self.there.counts_on("a");
        self.there.await_state("a", "running");
        assert_eq!(self.here.state("a").as_deref(), Some("handed-off"));
    }
}

#[test]
fn a_guest_that_ends_by_itself() {
    for (typed, word) in [("r", "start over"), ("o", "turned itself off"), ("x", "start over")] {
        let Some(half) = Half::way() else { return };
        let typing = half.here.type_into("a", typed);
        wait_for("the guest ends", || {
            log_of(&half.here, "a").contains("guest ended").then_some(())
        });
        half.gate.open();
        let ran = half.handoff.end();
        assert_eq!(ran.code, Some(7), "{ran:?}");
        for text in ["ended meanwhile", word, "howdah vm run a"] {
            assert!(ran.stderr.contains(text), "no {text:?} in {ran:?}");
        }
        drop(typing);
        half.here.await_state("a", "stopped");
        half.there.await_nothing_of("a");
        half.here.start("a");
    }
}

#[test]
fn the_sources_process_is_told_to_end() {
    let Some(half) = Half::way() else { return };
    let process = half.here.process("a");
    kill(process, Signal::SIGTERM).unwrap();
    // It is heard long before the rest of the guest could pass.
    thread::sleep(Duration::from_millis(300));
    half.gate.open();
    let ran = half.handoff.end();
    assert_eq!(ran.code, Some(7), "{ran:?}");
    assert!(ran.stderr.contains("told to end") && ran.stderr.contains("vm run a"), "{ran:?}");
    await_gone(process);
    half.here.await_state("a", "stopped");
    half.there.await_nothing_of("a");
    half.here.start("a");
}

#[test]
fn the_sources_process_is_killed() {
    let Some(half) = Half::way() else { return };
    kill(half.here.process("a"), Signal::SIGKILL).unwrap();
    let ran = half.handoff.end();
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("vm inspect a"), "{ran:?}");
    half.here.await_state("a", "interrupted");
    half.gate.open();
    half.here.start("a");
    assert_eq!(half.here.booted("a"), 3);
    half.there.await_nothing_of("a");
}

#[test]
fn the_targets_process_is_told_to_end() {
    let Some(half) = Half::way() else { return };
    kill(half.there.process("a"), Signal::SIGTERM).unwrap();
    let said = half.receiver.await_event("not-received");
    assert!(said["why"].as_str().unwrap().contains("ended before it ran"), "{said}");
    half.stays(&["goes on here"]);
}

/// As the kernel does where memory runs out.
#[test]
fn the_targets_process_is_killed() {
    let Some(half) = Half::way() else { return };
    let process = half.there.process("a");
    let score = fs::read_to_string(format!("/proc/{process}/oom_score_adj")).unwrap();
    assert_eq!(score.trim(), "800", "others would be killed first");
    kill(process, Signal::SIGKILL).unwrap();
    let said = half.receiver.await_event("not-received");
    let why = said["why"].as_str().unwrap();
    assert!(why.contains("SIGKILL") && why.contains("memory"), "{said}");
    half.stays(&["goes on here"]);
}

/// What comes in comes in without the listener; only a link that breaks then cannot be made again.
#[test]
fn the_listener_is_told_to_end() {
    let Some(half) = Half::way() else { return };
    half.receiver.signal(Signal::SIGTERM);
    half.moves();
}

#[test]
fn a_second_handoff_of_one_vm() {
    let Some(half) = Half::way() else { return };
    let other = half.here.neighbour();
    let second = other.receiver("");
    let line = format!("handoff a {} --plain", second.address);
    half.here.0.line(&line).fails(4, &["VM a", "being handed off"]);
    half.here.0.line("vm stop a").fails(4, &["being handed off"]);
    half.here.0.line("vm rm a").fails(4, &["VM a"]);
    half.here.0.line("save a file").fails(4, &["being handed off"]);
    half.moves();
    assert_eq!(other.state("a"), None);
}

/// What a source gave up without being able to say so does not stand in the way of its next try, nor in
/// the way of that to run.
#[test]
fn a_handoff_that_begins_anew() {
    let Some(half) = Half::way_with("--once") else { return };
    let Half { here, there, receiver, gate, handoff } = half;
    let before = there.process("a");
    here.0.line("handoff a --cancel").ok();
    assert_eq!(handoff.end().code, Some(9), "cancelled");
    // What it said at its end is lost with the link.
    drop(gate);
    here.counts_on("a");
    assert_eq!(there.state("a").as_deref(), Some("receiving"));
    here.0.line(&format!("handoff a {} --plain", receiver.address)).ok();
    await_gone(before);
    let said = receiver.await_event("not-received");
    assert!(said["why"].as_str().unwrap().contains("began anew"), "{said}");
    assert_eq!(said["superseded"], true, "{said}");
    // What was given up for it did not end the listener, which waits for one VM.
    receiver.await_event("received");
    there.counts_on("a");
    assert_eq!(there.state("a").as_deref(), Some("running"));
    assert_eq!(here.state("a").as_deref(), Some("handed-off"));
}

/// The last word of a source is lost with the link. It says it again when there is one, while its guest
/// runs on; nobody asks it to.
#[test]
fn a_handoff_whose_end_is_not_heard_at_first() {
    let Some(half) = Half::way() else { return };
    let Half { here, there, receiver, gate, handoff } = half;
    let before = there.process("a");
    here.0.line("handoff a --cancel").ok();
    assert_eq!(handoff.end().code, Some(9), "cancelled");
    assert_eq!(there.state("a").as_deref(), Some("receiving"));
    gate.break_links();
    let said = receiver.await_event("not-received");
    assert!(said["why"].as_str().unwrap().contains("the source aborted"), "{said}");
    assert_eq!(said["superseded"], serde_json::Value::Null, "{said}");
    await_gone(before);
    there.await_nothing_of("a");
    here.counts_on("a");
    assert_eq!(here.state("a").as_deref(), Some("running"));
    // The way is free.
    here.0.line(&format!("handoff a {} --plain", receiver.address)).ok();
    there.counts_on("a");
}

/// Of the same name is not the same.
#[test]
fn two_vms_of_one_name() {
    let Some(half) = Half::way() else { return };
    let third = half.here.neighbour();
    third.start("a");
    let line = format!("handoff a {} --plain", half.receiver.address);
    refused(&third.0.line(&line), &["goes on here", "VM a", "has it"]);
    third.counts_on("a");
    let receiver = Gate::after(u64::MAX, &half.receiver.address);
    half.moves();
    // And once it runs there.
    let line = format!("handoff a {} --plain", receiver.address);
    refused(&third.0.line(&line), &["goes on here", "VM a"]);
    third.counts_on("a");
}

#[test]
fn a_handoff_to_the_cloudlet_it_is_on() {
    let Some(here) = Site::new() else { return };
    here.obedient_base();
    here.start("a");
    let receiver = here.receiver("");
    let line = format!("handoff a {} --plain", receiver.address);
    refused(&here.0.line(&line), &["goes on here", "this very cloudlet", "--home"]);
    here.counts_on("a");
    assert_eq!(here.state("a").as_deref(), Some("running"));
}

#[test]
fn a_base_that_is_removed_meanwhile() {
    let Some(half) = Half::way() else { return };
    half.here.0.line("base rm cold").fails(4, &["cold", "VM a"]);
    half.there.0.line("base rm cold").fails(4, &["base"]);
    // Whoever goes round the command line finds out later: what is open stays open.
    let bases = half.there.0.home().join("store/bases");
    for base in fs::read_dir(&bases).unwrap() {
        fs::remove_dir_all(base.unwrap().path()).unwrap();
    }
    let Half { there, here, gate, handoff, receiver: _receiver } = half;
    gate.open();
    handoff.end().ok();
    there.counts_on("a");
    assert_eq!(here.state("a").as_deref(), Some("handed-off"));
    there.0.line("vm stop a").ok();
    let ran = there.0.line("vm run a --detach");
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stderr.contains("its base") && ran.stderr.contains("base import"), "{ran:?}");
    there.obedient_base();
    there.start("a");
}

/// Reading behind the end of a file fails as reading a bad block does.
#[test]
fn a_disk_that_cannot_be_read_at_the_source() {
    let Some(here) = Site::new() else { return };
    here.obedient_base();
    here.start("a");
    here.0.line("vm stop a").ok();
    here.fill_disk("a", 100);
    here.start("a");
    let data = here.0.home().join("vms/a/disk.data");
    fs::OpenOptions::new().write(true).open(data).unwrap().set_len(4096).unwrap();
    let there = here.neighbour();
    let receiver = there.receiver("");
    let line = format!("handoff a {} --plain", receiver.address);
    refused(&here.0.line(&line), &["goes on here", "disk.data"]);
    here.counts_on("a");
    there.await_nothing_of("a");
}

/// A file system of its own for a cloudlet, unmounted in the end.
struct Small(PathBuf);

impl Small {
    /// `None`, and a word about it, where this user may not mount one.
    fn over(home: PathBuf, mib: u64) -> Option<Self> {
        fs::create_dir_all(&home).unwrap();
        let size = format!("size={mib}m");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &size, "howdah-test"]).arg(&home).output();
        if mounted.is_ok_and(|ran| ran.status.success()) {
            return Some(Self(home));
        }
        eprintln!("skipped: a small file system cannot be mounted here");
        None
    }

    /// Leaves so much room.
    fn fill_up_to(&self, left: u64) {
        let found = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let free = found.blocks_available() * found.fragment_size();
        fs::write(self.0.join("filler"), vec![1; free.saturating_sub(left) as usize]).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// There was room when the offer came, and others took it since.
#[test]
fn a_disk_that_gets_full_at_the_target() {
    for (min_free, says) in [(0, "No space left"), (1, "--min-free-mib")] {
        let Some(here) = Site::new() else { return };
        here.obedient_base();
        here.start_large("a");
        let there = Site::new().unwrap();
        // Only the VMs: of bases, holes are read by mapping them, for which a tmpfs needs room.
        let Some(small) = Small::over(there.0.home().join("vms"), 32) else { return };
        there.obedient_base();
        let half = Half::between(here, there, &format!("--min-free-mib {min_free}"));
        let free = if min_free == 0 { 1 << 20 } else { LARGE_CHUNKS * 4096 + (512 << 10) };
        small.fill_up_to(free);
        half.stays(&["goes on here", says]);
    }
}

#[test]
fn a_target_without_room_from_the_start() {
    let Some(here) = Site::new() else { return };
    here.obedient_base();
    here.start("a");
    let there = here.neighbour();
    let free_mib = {
        let found = nix::sys::statvfs::statvfs(&there.0.home()).unwrap();
        (found.blocks_available() * found.fragment_size()) >> 20
    };
    let receiver = there.receiver(&format!("--min-free-mib {}", free_mib * 2));
    let line = format!("handoff a {} --plain", receiver.address);
    refused(&here.0.line(&line), &["goes on here", "free for the disk", "needs"]);
    here.counts_on("a");
    there.await_nothing_of("a");
    // Memory: no host has twice what it has.
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total: u64 = total.split_whitespace().next().unwrap().parse().unwrap();
    let large = format!("vm run large --base cold --memory-mib {} --detach", total / 1024 + 512);
    here.0.line(&large).ok();
    let receiver = there.receiver("");
    let line = format!("handoff large {} --plain", receiver.address);
    refused(&here.0.line(&line), &["goes on here", "free for memory", "needs"]);
    here.counts_on("large");
    there.await_nothing_of("large");
}
