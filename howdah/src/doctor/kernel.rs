//! The kernel: its version, and what of it is used.

use uring::{Need, Ring};

use super::{Finding, Verdict, read};

/// The oldest kernel that has everything.
const NEEDED: (u32, u32) = (5, 16);
/// From this on, what a guest changed is asked for with one call (PAGEMAP_SCAN).
const FASTER: (u32, u32) = (6, 7);
const URING_SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";
const SECCOMP: &str = "/proc/sys/kernel/seccomp/actions_avail";
const CONTROLLERS: &str = "/sys/fs/cgroup/cgroup.controllers";

pub(super) fn look() -> Vec<Finding> {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let all = [Need::Read, Need::Write, Need::Sync, Need::Punch];
    let ring = Ring::<()>::new(8, &all).map(drop).map_err(|e| e.to_string());
    let controllers = read(CONTROLLERS);
    vec![
        version(&release),
        io_uring(ring, read(URING_SWITCH).as_deref()),
        seccomp(read(SECCOMP).as_deref()),
        cgroups(controllers.as_deref()),
    ]
}

/// The first two numbers of a kernel's name.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn version(release: &str) -> Finding {
    const CHECK: &str = "kernel";
    let newer = "apt-get install linux-image-amd64, then reboot";
    match parse(release) {
        None => {
            Finding::note(CHECK, format!("{release:?} is no version that this program can read"))
        }
        Some(version) if version < NEEDED => {
            let says = format!("Linux {release} is older than {}.{}", NEEDED.0, NEEDED.1);
            Finding::broken(CHECK, says).mended_by(newer)
        }
        Some(version) if version < FASTER => {
            let says = format!(
                "Linux {release}: from {}.{} on, what a guest changed is found faster",
                FASTER.0, FASTER.1
            );
            Finding { mend: Some(newer.into()), ..Finding::new(CHECK, Verdict::Note, says) }
        }
        Some(_) => Finding::ok(CHECK, format!("Linux {release}")),
    }
}

fn io_uring(ring: Result<(), String>, switch: Option<&str>) -> Finding {
    const CHECK: &str = "io-uring";
    let Err(why) = ring else {
        return Finding::ok(CHECK, "works, with all operations that disks need");
    };
    let finding = Finding::broken(CHECK, why);
    match switch {
        Some("1" | "2") => finding.mended_by("sysctl -w kernel.io_uring_disabled=0"),
        _ => finding.mended_by(
            "allow io_uring_setup, io_uring_enter and io_uring_register in the sandbox around this \
             process, and raise `ulimit -l`",
        ),
    }
}

fn seccomp(actions: Option<&str>) -> Finding {
    const CHECK: &str = "seccomp";
    let has = |word| actions.is_some_and(|all| all.split_whitespace().any(|action| action == word));
    if has("trap") && has("kill_process") {
        return Finding::ok(CHECK, "VMs are confined by filters of system calls");
    }
    Finding::warning(CHECK, "this kernel has no filters of system calls: VMs cannot be confined")
        .mended_by(
            "boot a kernel with CONFIG_SECCOMP_FILTER=y, as Debian's has; until then --no-jail",
        )
}

fn cgroups(controllers: Option<&str>) -> Finding {
    const CHECK: &str = "cgroup";
    let Some(all) = controllers else {
        return Finding::note(
            CHECK,
            "no cgroup v2 here: VMs cannot be given limits of CPU and memory",
        )
        .mended_by("boot with systemd.unified_cgroup_hierarchy=1");
    };
    let missing: Vec<_> =
        ["cpu", "memory"].into_iter().filter(|name| !all.split(' ').any(|c| c == *name)).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, "cgroup v2, with limits of CPU and memory");
    }
    let says = format!("cgroup v2 without the controllers {}: no such limits", missing.join(", "));
    Finding::note(CHECK, says).mended_by("Delegate=yes in the unit that this runs in")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_version() {
        for (release, verdict) in [
            ("6.18.44-x", Verdict::Ok),
            ("6.7.0", Verdict::Ok),
            ("6.1.0-31-amd64", Verdict::Note),
            ("5.16", Verdict::Note),
            ("5.10.0-9", Verdict::Broken),
            ("4.19.0", Verdict::Broken),
            ("", Verdict::Note),
        ] {
            assert_eq!(version(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn a_ring_that_is_switched_off_is_switched_on() {
        let off = io_uring(Err("no".into()), Some("2"));
        assert_eq!(off.mend.as_deref(), Some("sysctl -w kernel.io_uring_disabled=0"));
        assert!(io_uring(Err("no".into()), Some("0")).mend.is_some_and(|m| m.contains("sandbox")));
        assert_eq!(io_uring(Ok(()), None).verdict, Verdict::Ok);
    }

    #[test]
    fn confinement_and_limits() {
        assert_eq!(seccomp(Some("kill_process kill_thread trap errno")).verdict, Verdict::Ok);
        assert_eq!(seccomp(None).verdict, Verdict::Warning);
        assert_eq!(cgroups(Some("cpuset cpu io memory pids")).verdict, Verdict::Ok);
        assert!(cgroups(Some("cpuset io")).says.contains("cpu, memory"));
        assert!(cgroups(None).mend.is_some());
    }
}
