//! Fifty handoffs, there and back: nothing is lost, and nothing is left behind.
//!
//! In a process of its own, because it counts what the process has.
#![allow(clippy::unwrap_used)]

mod model;

use std::{fs, path::Path, time::Duration};

use handoff::sim::Fault;
use model::{
    Act, GEOMETRY, disk, ram,
    sites::{hand_off, sites},
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// Handoffs after which everything has been made that is made once.
const WARM_UP: u32 = 10;
const HANDOFFS: u32 = 50;
/// Memory that is used by chance: tables and codecs grow with what the guest wrote.
const SLACK_KIB: u64 = 1 << 10;

/// What this process and its files take.
#[derive(Debug)]
struct Taken {
    resident_kib: u64,
    threads: usize,
    descriptors: usize,
    files: usize,
    file_bytes: u64,
}

impl Taken {
    fn now(dir: &Path) -> Self {
        // Threads that have ended are gone a moment later.
        std::thread::sleep(Duration::from_millis(100));
        #[cfg(target_env = "gnu")]
        // SAFETY: gives free memory back to the system, which each thread's heap keeps some of.
        unsafe {
            libc::malloc_trim(0)
        };
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let files: Vec<u64> = fs::read_dir(dir)
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap().len())
            .collect();
        Self {
            resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
            threads: count("/proc/self/task"),
            descriptors: count("/proc/self/fd"),
            files: files.len(),
            file_bytes: files.iter().sum(),
        }
    }
}

fn count(dir: &str) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn fifty_handoffs_leave_nothing_behind() {
    // As the product does: large blocks go back to the system.
    handoff::heap::give_back_large_blocks();
    let dir = tempfile::tempdir().unwrap();
    let (mut here, mut there) = sites(dir.path());
    let mut rng = SmallRng::seed_from_u64(50);
    let mut before = None;
    for n in 1..=WARM_UP + HANDOFFS {
        for _ in 0..30 {
            let seed = rng.random_range(0..1000);
            here.memory().act(Act::Write(ram(rng.random_range(0..GEOMETRY.ram_chunks)), seed));
            here.memory().act(Act::Touch(disk(rng.random_range(0..GEOMETRY.disk_chunks)), n as u8));
        }
        let during = |rng: &mut SmallRng| {
            let index = rng.random_range(0..GEOMETRY.ram_chunks);
            Act::Write(ram(index), rng.random_range(0..1000))
        };
        let script: Vec<_> = (0..20).map(|_| during(&mut rng)).collect();
        here.memory().script = script.into();
        // Each fifth link breaks.
        let cut = Fault { cut_up: Some(rng.random_range(500..5000)), ..Fault::default() };
        let faults: &[Fault] = if n.is_multiple_of(5) { &[cut] } else { &[] };
        hand_off(&mut here, &mut there, faults, &[]).unwrap();
        std::mem::swap(&mut here, &mut there);
        if n == WARM_UP {
            before = Some(Taken::now(dir.path()));
        }
    }
    let (before, after) = (before.unwrap(), Taken::now(dir.path()));
    let said = format!("{before:?}, then {after:?}");
    assert!(after.resident_kib < before.resident_kib + SLACK_KIB, "{said}");
    assert!(after.threads <= before.threads, "{said}");
    assert!(after.descriptors <= before.descriptors, "{said}");
    assert_eq!(after.files, before.files, "{said}");
    assert!(after.file_bytes < before.file_bytes + 256, "{said}");
}
