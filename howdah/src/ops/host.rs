//! The host: what the daemon and whoever looks after it need to know of it.

use std::fs;

use howdah_api as api;
use howdah_status::Usage;
use nix::{
    sys::{statvfs::statvfs, sysinfo::sysinfo, utsname::uname},
    unistd::{SysconfVar, sysconf},
};
use vmm::host::HostCheck;

use crate::home::Home;

/// The file system with the home directory; nothing is free where it cannot be asked.
pub(crate) fn disk(home: &Home) -> api::Disk {
    let Ok(stat) = statvfs(home.root()) else { return api::Disk::default() };
    let unit = stat.fragment_size();
    api::Disk {
        total_bytes: stat.blocks().saturating_mul(unit),
        free_bytes: stat.blocks_available().saturating_mul(unit),
    }
}

/// Whether VMs can be run.
pub(crate) fn kvm() -> api::Kvm {
    let hardware = matches!(HostCheck::has_hardware_virtualisation(), Ok(true));
    match HostCheck::run() {
        Ok(_) => api::Kvm { usable: true, hardware, why_not: None },
        Err(error) => api::Kvm { usable: false, hardware, why_not: Some(error.to_string()) },
    }
}

/// Memory of the host, and what can be used of it.
pub(crate) fn memory() -> (u64, u64) {
    let total = sysinfo().map_or(0, |info| info.ram_total());
    (total, available().unwrap_or_default())
}

fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// What the process of a VM uses of the host, if it lives.
pub(crate) fn usage(vm: &str, pid: u32) -> Option<Usage> {
    let unit = |variable| sysconf(variable).ok().flatten().and_then(|n| u64::try_from(n).ok());
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Usage::parse(vm, &stat, unit(SysconfVar::PAGE_SIZE)?, unit(SysconfVar::CLK_TCK)?)
}

/// The host's name and its kernel's release.
pub(crate) fn names() -> (String, String) {
    let Ok(names) = uname() else { return Default::default() };
    let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
    (text(names.nodename()), text(names.release()))
}
