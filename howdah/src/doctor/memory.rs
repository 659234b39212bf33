//! Memory for guests: what is there, and what huge pages do to it.

use super::{Finding, read};
use crate::output::bytes;

/// Less than this runs no guest worth moving.
const LEAST_BYTES: u64 = 256 << 20;
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

pub(super) fn look() -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(meminfo) = read("/proc/meminfo") {
        findings.extend(available(&meminfo));
        findings.extend(reserved(&meminfo));
    }
    findings.extend(read(TRANSPARENT).map(|modes| transparent(&modes)));
    findings
}

/// A line of /proc/meminfo, as it stands there.
fn number(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn available(meminfo: &str) -> Option<Finding> {
    const CHECK: &str = "memory";
    let free = number(meminfo, "MemAvailable")?.saturating_mul(1024);
    let says = format!("{} available for guests", bytes(free));
    if free >= LEAST_BYTES {
        return Some(Finding::ok(CHECK, says));
    }
    let mend = "end what is not needed: `ps aux --sort=-rss | head` shows what takes most";
    Some(Finding::warning(CHECK, says).mended_by(mend))
}

/// Pages that were set aside as huge are lost to guests: their memory is of small pages.
fn reserved(meminfo: &str) -> Option<Finding> {
    let free = number(meminfo, "HugePages_Free")?;
    let lost = free.saturating_mul(number(meminfo, "Hugepagesize")?.saturating_mul(1024));
    if lost == 0 {
        return Some(Finding::ok("hugepages", "none set aside: all memory can be guests'"));
    }
    let says = format!("{} are set aside as huge pages, which guests cannot have", bytes(lost));
    Some(Finding::warning("hugepages", says).mended_by("sysctl -w vm.nr_hugepages=0"))
}

/// Changes are found and sent page by page; a guest's memory asks not to be of huge pages while it
/// moves, so that any mode is right. `never` costs a guest speed that it could have.
fn transparent(modes: &str) -> Finding {
    const CHECK: &str = "thp";
    if modes.contains("[never]") {
        return Finding::note(
            CHECK,
            "transparent huge pages are off: guests with much memory are slower",
        )
        .mended_by(format!("echo madvise > {TRANSPARENT}"));
    }
    Finding::ok(CHECK, format!("transparent huge pages: {modes}"))
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    const MEMINFO: &str = "MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\nHugePages_Total: 4\n\
                           HugePages_Free: 4\nHugepagesize: 2048 kB\n";

    #[test]
    fn memory_is_judged() {
        assert_eq!(available(MEMINFO).unwrap().verdict, Verdict::Ok);
        assert_eq!(available("MemAvailable: 1000 kB").unwrap().verdict, Verdict::Warning);
        assert_eq!(available("nothing"), None);
        let lost = reserved(MEMINFO).unwrap();
        assert!(lost.verdict == Verdict::Warning && lost.says.contains("8.0 MiB"), "{lost:?}");
        assert_eq!(transparent("always madvise [never]").verdict, Verdict::Note);
        assert_eq!(transparent("always [madvise] never").verdict, Verdict::Ok);
    }
}
