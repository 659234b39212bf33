//! Networks of guests: TAP devices, bridges, and the right to make them.

use std::{fs::OpenOptions, io, path::Path};

use caps::{CapSet, Capability};

use super::{Finding, Verdict};

const TUN: &str = "/dev/net/tun";
const INTERFACES: &str = "/sys/class/net";

pub(super) fn look() -> Vec<Finding> {
    let opened = OpenOptions::new().read(true).write(true).open(TUN).map(drop);
    let may_make =
        caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false);
    let (taps, bridges) = (interfaces("tun_flags"), interfaces("bridge"));
    vec![tun(opened), devices(may_make, &taps, &bridges)]
}

/// Names of the interfaces that have this entry in /sys.
fn interfaces(entry: &str) -> Vec<String> {
    let Ok(all) = Path::new(INTERFACES).read_dir() else { return Vec::new() };
    let mut names: Vec<_> = all
        .filter_map(Result::ok)
        .filter(|found| found.path().join(entry).exists())
        .filter_map(|found| found.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn tun(opened: io::Result<()>) -> Finding {
    const CHECK: &str = "tun";
    let Err(error) = opened else {
        return Finding::ok(CHECK, "guests can have network devices");
    };
    // A guest without a network runs and moves: this is no reason to say that nothing works.
    let finding = Finding::warning(CHECK, format!("{TUN}: {error}: no guest can have a network"));
    match error.kind() {
        io::ErrorKind::PermissionDenied => finding.mended_by(format!("chmod 0666 {TUN}, as root")),
        _ => finding.mended_by("modprobe tun"),
    }
}

fn devices(may_make: bool, taps: &[String], bridges: &[String]) -> Finding {
    const CHECK: &str = "tap";
    let list = |names: &[String]| if names.is_empty() { "none".into() } else { names.join(", ") };
    let there = format!("TAP devices: {}; bridges: {}", list(taps), list(bridges));
    if may_make {
        return Finding::ok(CHECK, format!("bridges and TAP devices can be made; {there}"));
    }
    let says = format!("this user may make neither bridges nor TAP devices; {there}");
    let verdict = if taps.is_empty() { Verdict::Warning } else { Verdict::Note };
    Finding::new(CHECK, verdict, says)
        .mended_by("sudo ip tuntap add dev tap0 mode tap user $USER vnet_hdr, or run as root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_cannot_be_is_warned_of() {
        let denied = tun(Err(io::ErrorKind::PermissionDenied.into()));
        assert!(denied.verdict == Verdict::Warning && denied.mend.unwrap().contains("chmod"));
        assert!(tun(Err(io::ErrorKind::NotFound.into())).mend.unwrap().contains("modprobe"));
        assert_eq!(tun(Ok(())).verdict, Verdict::Ok);
    }

    #[test]
    fn devices_that_are_there_need_no_rights() {
        let tap = ["tap0".to_owned()];
        assert_eq!(devices(false, &tap, &[]).verdict, Verdict::Note);
        assert_eq!(devices(false, &[], &[]).verdict, Verdict::Warning);
        let made = devices(true, &tap, &["br0".to_owned()]);
        assert!(made.verdict == Verdict::Ok && made.says.contains("bridges: br0"), "{made:?}");
    }
}
