//! What the process of a VM can still do.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{common::Ran, guests::Site};

/// The process of the VM `a`, and what `vm run` said. `None` where there is no KVM.
fn running(flags: &str) -> Option<(Site, u64, Ran)> {
    let site = Site::new()?;
    site.cold_base();
    let ran = site.0.line(&format!("vm run a --base cold --memory-mib 32 --detach {flags}")).ok();
    site.counts_beyond("a", "aaaaaaaa");
    let pid = fs::read_to_string(site.0.home().join("vms/a/lock")).unwrap();
    Some((site, pid.trim().parse().unwrap(), ran))
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_default().trim().to_owned()
}

/// Name, and number of filters, of each thread.
fn threads(pid: u64) -> BTreeSet<(String, u32)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of = |task: PathBuf| {
        let status = fs::read_to_string(task.join("status")).ok()?;
        assert_eq!(field(&status, "Seccomp"), "2", "{status}");
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{status}");
        Some((field(&status, "Name"), field(&status, "Seccomp_filters").parse().unwrap_or(0)))
    };
    tasks.filter_map(|task| of(task.unwrap().path())).collect()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
}

#[test]
fn a_vms_process_has_no_rights_that_it_does_not_need() {
    let Some((site, pid, _)) = running("") else { return };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
    if is_root() {
        assert_eq!(field(&status, "CapBnd"), "0000000000000000");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    // Those that face the guest are held to more than the rest.
    let threads = threads(pid);
    let filters = |name: &str| threads.iter().find(|(n, _)| n == name).unwrap().1;
    let main: u32 = field(&status, "Seccomp_filters").parse().unwrap();
    assert!(filters("vcpu") > main && filters("virtio-block") > main, "{threads:?}");
    // Nothing that it did so far was refused.
    let log = fs::read_to_string(site.0.home().join("vms/a/vm.log")).unwrap_or_default();
    assert!(!log.contains("jail"), "{log}");
}

#[test]
fn root_shows_a_vm_its_own_files_only() {
    if !is_root() {
        return eprintln!("skipped: only root can make a root directory");
    }
    let Some((site, pid, _)) = running("") else { return };
    let inside = |path: &Path| {
        let below = path.strip_prefix("/").unwrap();
        PathBuf::from(format!("/proc/{pid}/root")).join(below)
    };
    let same = |file: &str| {
        fs::read_link(format!("/proc/{pid}/ns/{file}")).unwrap()
            == fs::read_link(format!("/proc/self/ns/{file}")).unwrap()
    };
    let log = fs::read_to_string(site.0.home().join("vms/a/vm.log")).unwrap_or_default();
    if log.contains("namespaces") {
        return eprintln!("skipped: {log}");
    }
    assert!(!same("mnt") && !same("ipc") && !same("uts") && same("net"));
    let vm = site.0.home().join("vms/a");
    assert!(inside(&vm).join("ownership").is_file());
    assert!(inside(&site.0.home().join("store")).is_dir());
    for hidden in ["/bin", "/usr", "/root", "/sys", "/etc/passwd", "/proc/1", "/dev/net/tun"] {
        assert!(!inside(Path::new(hidden)).exists(), "{hidden}");
    }
    let listed = |path: &Path| -> BTreeSet<_> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(listed(&inside(vm.parent().unwrap())), ["a".into()].into());
    // Outside all is as it was.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(vm.to_str().unwrap()), "{mounts}");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    for mount in mounts.lines() {
        let mut words = mount.split_whitespace();
        let (at, options) = (words.nth(1).unwrap(), words.nth(1).unwrap());
        let writable = options.split(',').any(|option| option == "rw");
        let may_be = Path::new(at) == vm || at.starts_with("/dev/");
        assert!(!writable || may_be, "{mount}");
    }
}

#[test]
fn without_a_jail_there_is_none() {
    let Some((_site, pid, _)) = running("--no-jail") else { return };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert_eq!(field(&status, "Seccomp"), field(&own_status(), "Seccomp"));
    assert_eq!(field(&status, "CapEff"), field(&own_status(), "CapEff"));
}

fn own_status() -> String {
    fs::read_to_string("/proc/self/status").unwrap()
}

#[test]
fn users_that_do_not_exist_are_wrong_usage() {
    let Some(site) = Site::new() else { return };
    site.cold_base();
    let run = "vm run a --base cold --detach --run-as";
    site.0.line(&format!("{run} no-such-user")).fails(2, &["no-such-user"]);
    site.0.line(&format!("{run} root")).fails(2, &["root"]);
}
