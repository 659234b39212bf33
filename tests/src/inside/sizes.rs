//! What memory, descriptors and files the cloudlets take, to see whether that grows.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{
    product::{Cloudlet, HOLDERS, LISTENER, processes_of},
    stores::used_bytes,
};

/// Figures, by name: of all cloudlets together.
pub(super) fn take(cloudlets: &[&Cloudlet]) -> Result<[(&'static str, f64); 4]> {
    let (mut vms, mut listeners, mut descriptors, mut files) = (0, 0, 0, 0);
    for cloudlet in cloudlets {
        for pid in processes_of(cloudlet.side, &HOLDERS)? {
            vms += resident_kib(pid).unwrap_or(0);
        }
        for pid in processes_of(cloudlet.side, &[LISTENER])? {
            listeners += resident_kib(pid).unwrap_or(0);
            // A process that has just ended has none.
            descriptors += fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        }
        files += own_bytes(&cloudlet.home)? >> 10;
    }
    Ok([
        ("vm_kib", vms as f64),
        ("listener_kib", listeners as f64),
        ("descriptors", descriptors as f64),
        ("files_kib", files as f64),
    ])
}

/// What a home takes besides the store, which bases fill and handoffs leave alone.
fn own_bytes(home: &Path) -> Result<u64> {
    let vms = home.join("vms");
    if vms.is_dir() { used_bytes(&vms).context("the size of the VMs' files") } else { Ok(0) }
}

/// What a process holds of the memory; `None` once it has ended.
fn resident_kib(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_lives_holds_memory() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(resident_kib(own).is_some_and(|kib| kib > 100));
        assert_eq!(resident_kib(-1), None);
    }
}
