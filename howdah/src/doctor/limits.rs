//! Limits on processes, files and memory maps.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::{Finding, read};

/// A daemon holds a few descriptors for each VM; a VM's process has fewer than this.
const FILES: u64 = 4096;
/// Threads of VMs count as processes: vCPUs, workers and devices, a dozen each.
const PROCESSES: u64 = 1024;
/// Files that may be locked, io_uring's rings among them on kernels before 5.12.
const LOCKED_BYTES: u64 = 1 << 20;

pub(super) fn look() -> Vec<Finding> {
    let hard = |resource| getrlimit(resource).map_or(u64::MAX, |(_, hard)| hard);
    let overcommit = read("/proc/sys/vm/overcommit_memory");
    let mut findings = vec![
        limit("files", hard(Resource::RLIMIT_NOFILE), FILES, "open files", "LimitNOFILE=65536"),
        limit(
            "processes",
            hard(Resource::RLIMIT_NPROC),
            PROCESSES,
            "threads",
            "LimitNPROC=infinity",
        ),
        limit(
            "locked",
            hard(Resource::RLIMIT_MEMLOCK),
            LOCKED_BYTES,
            "locked bytes",
            "LimitMEMLOCK=infinity",
        ),
    ];
    findings.extend(overcommit.map(|mode| overcommitted(&mode)));
    findings
}

fn limit(check: &str, hard: u64, enough: u64, of: &str, unit: &str) -> Finding {
    if hard == RLIM_INFINITY {
        return Finding::ok(check, format!("as many {of} as there is room for"));
    }
    if hard >= enough {
        return Finding::ok(check, format!("up to {hard} {of}"));
    }
    let says = format!("up to {hard} {of}, and a cloudlet with many VMs needs {enough}");
    Finding::warning(check, says)
        .mended_by(format!("{unit} in the unit, or a line in /etc/security/limits.conf"))
}

fn overcommitted(mode: &str) -> Finding {
    const CHECK: &str = "overcommit";
    if mode != "2" {
        return Finding::ok(CHECK, "guests' memory is taken as they touch it");
    }
    let says = "vm.overcommit_memory is 2: each VM counts with all of its memory when it starts, touched or not";
    Finding::warning(CHECK, says).mended_by("sysctl -w vm.overcommit_memory=0")
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn limits_are_judged() {
        let files = |hard| limit("files", hard, FILES, "open files", "LimitNOFILE=65536");
        assert_eq!(files(RLIM_INFINITY).verdict, Verdict::Ok);
        assert_eq!(files(FILES).verdict, Verdict::Ok);
        let low = files(1024);
        assert!(low.verdict == Verdict::Warning && low.mend.is_some_and(|m| m.contains("NOFILE")));
        assert_eq!(overcommitted("2").verdict, Verdict::Warning);
        assert_eq!(overcommitted("1").verdict, Verdict::Ok);
    }
}
