//! Whether this host runs guests, and how fast.

use vmm::host::{Host, HostCheck, HostError};

use super::{Finding, read};

const CHECK: &str = "kvm";
const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

pub(super) fn look() -> Vec<Finding> {
    let mut findings = match HostCheck::run() {
        Ok(host) => opened(&host),
        Err(error) => vec![unusable(&error)],
    };
    if let Ok(hardware) = HostCheck::has_hardware_virtualisation() {
        findings.push(virtualisation(hardware));
    }
    if let Some(source) = read(CLOCKSOURCE) {
        findings.push(clocksource(&source));
    }
    findings
}

fn opened(host: &Host) -> Vec<Finding> {
    let mut findings = vec![match host.kvm().create_vm() {
        Ok(_) => {
            let says = format!("/dev/kvm works, up to {} vCPUs a VM", host.max_vcpus);
            Finding::ok(CHECK, says)
        }
        Err(error) => not_made(std::io::Error::from_raw_os_error(error.errno())),
    }];
    findings.push(if host.tsc_scaling {
        Finding::ok("tsc-scaling", "guests of hosts with another TSC rate can come here")
    } else {
        Finding::note(
            "tsc-scaling",
            "this CPU cannot scale the TSC: a guest can come only from a host with the same TSC rate",
        )
    });
    findings.push(if host.clock_realtime {
        Finding::ok("kvm-clock", "a guest's clock is set against wall time after a handoff")
    } else {
        Finding::note(
            "kvm-clock",
            "without KVM_CLOCK_REALTIME (Linux 5.16) a guest's clock is late by the downtime after a handoff",
        )
    });
    findings
}

fn not_made(error: std::io::Error) -> Finding {
    let finding = Finding::broken(CHECK, format!("/dev/kvm opens, and makes no VM: {error}"));
    match error.raw_os_error() {
        Some(nix::libc::EBUSY) => {
            finding.mended_by("unload the other hypervisor, for instance `modprobe -r vboxdrv`")
        }
        Some(nix::libc::ENOMEM) => finding.mended_by("free memory: `free -m` shows what is left"),
        _ => finding.mended_by("`dmesg | grep -i kvm` says what the kernel met"),
    }
}

fn unusable(error: &HostError) -> Finding {
    // The text of an error has its way out behind a colon; here that is a line of its own.
    let (says, mend) = match error {
        HostError::NoDevice => (
            "/dev/kvm does not exist".to_owned(),
            "modprobe kvm_intel || modprobe kvm_amd (if neither loads: enable virtualisation in the \
             firmware, or nested virtualisation in the hypervisor around this host)",
        ),
        HostError::Permission => (
            "/dev/kvm: permission denied".to_owned(),
            "sudo usermod -aG kvm $USER, then log in again",
        ),
        HostError::ApiVersion(_) | HostError::Missing(_) => {
            (error.to_string(), "install a newer kernel: apt-get install linux-image-amd64")
        }
        _ => (error.to_string(), "`dmesg | grep -i kvm` says what the kernel met"),
    };
    Finding::broken(CHECK, says).mended_by(mend)
}

fn virtualisation(hardware: bool) -> Finding {
    const CHECK: &str = "virtualisation";
    if hardware {
        return Finding::ok(CHECK, "the CPU runs guests by itself (svm or vmx)");
    }
    let says =
        "the CPU shows neither svm nor vmx: guests are interpreted, about a thousand times slower";
    Finding::warning(CHECK, says).mended_by(
        "enable virtualisation in the firmware, or nested virtualisation in the hypervisor around this host",
    )
}

fn clocksource(source: &str) -> Finding {
    const CHECK: &str = "clocksource";
    if matches!(source, "tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page") {
        return Finding::ok(CHECK, format!("the host's clock is {source}"));
    }
    let says = format!(
        "the host's clock is {source}: its kernel does not trust the TSC, and guests' clocks rest on it"
    );
    Finding::warning(CHECK, says).mended_by(
        "`dmesg | grep -i tsc` says why; a firmware update, or tsc=reliable on the kernel's command line",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn what_is_missing_is_mended_by_a_command() {
        for (error, holds) in [
            (HostError::NoDevice, "modprobe"),
            (HostError::Permission, "usermod"),
            (HostError::Missing(vec!["KVM_CAP_IRQFD"]), "linux-image"),
        ] {
            let finding = unusable(&error);
            assert_eq!(finding.verdict, Verdict::Broken);
            assert!(finding.mend.as_ref().is_some_and(|m| m.contains(holds)), "{finding:?}");
        }
        let busy = not_made(std::io::Error::from_raw_os_error(nix::libc::EBUSY));
        assert!(busy.mend.is_some_and(|mend| mend.contains("hypervisor")));
    }

    #[test]
    fn a_slow_host_is_warned_of() {
        assert_eq!(virtualisation(false).verdict, Verdict::Warning);
        assert_eq!(clocksource("tsc").verdict, Verdict::Ok);
        assert_eq!(clocksource("hpet").verdict, Verdict::Warning);
    }
}
