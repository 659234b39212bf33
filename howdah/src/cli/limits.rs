//! What a VM may take of this host, and which CPU it is shown.

use std::{fmt, str::FromStr};

use clap::Args;
use serde::{Deserialize, Serialize};
use vmm::{CpuTemplate, Rate, Rates};

use crate::failure::{Exit, Failure};

const BYTES_PER_MIB: u64 = 1 << 20;
const BYTES_PER_MBIT: u64 = 125_000;
/// What the VM's process needs besides the guest's memory, at the least.
const OVERHEAD_MIB: u64 = 32;

/// Limits of one VM. They are kept with it, and go along when it is handed off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    /// CPU time of the whole VM, in CPUs: 1.5 is one and a half (cgroup v2); 0 lifts the limit
    #[arg(long, value_name = "CPUS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_max: Option<Cpus>,
    /// Memory of the whole VM, the VMM's included (cgroup v2): more, and the kernel ends it; 0 lifts
    /// the limit
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_max_mib: Option<u32>,
    /// Disk throughput, reads and writes together; 0 lifts the limit
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk_mib_per_s: Option<u32>,
    /// Disk requests a second; 0 lifts the limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk_iops: Option<u32>,
    /// Network throughput in each direction, in Mbit/s; 0 lifts the limit
    #[arg(long, value_name = "MBPS", value_parser = clap::value_parser!(u32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) net_mbps: Option<u32>,
    /// Frames a second in each direction; 0 lifts the limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) net_frames_per_s: Option<u32>,
}

impl Limits {
    /// These, and where nothing is said what was said before. Zero is no limit.
    pub(crate) fn over(self, old: Self) -> Self {
        fn lifted<T: Copy + Default + PartialEq>(new: Option<T>, old: Option<T>) -> Option<T> {
            new.or(old).filter(|value| *value != T::default())
        }
        Self {
            cpu_max: lifted(self.cpu_max, old.cpu_max),
            memory_max_mib: lifted(self.memory_max_mib, old.memory_max_mib),
            disk_mib_per_s: lifted(self.disk_mib_per_s, old.disk_mib_per_s),
            disk_iops: lifted(self.disk_iops, old.disk_iops),
            net_mbps: lifted(self.net_mbps, old.net_mbps),
            net_frames_per_s: lifted(self.net_frames_per_s, old.net_frames_per_s),
        }
    }

    /// Whether nothing is limited.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the kernel must hold the VM's process to some of it.
    pub(crate) fn need_cgroup(&self) -> bool {
        self.cpu_max.is_some() || self.memory_max_mib.is_some()
    }

    /// What the devices are held to.
    pub(crate) fn rates(&self) -> Rates {
        let times = |value: Option<u32>, unit| value.map(|value| u64::from(value) * unit);
        let rate = |bytes_per_s, operations: Option<u32>| Rate {
            bytes_per_s,
            operations_per_s: operations.map(u64::from),
        };
        Rates {
            disk: rate(times(self.disk_mib_per_s, BYTES_PER_MIB), self.disk_iops),
            net: rate(times(self.net_mbps, BYTES_PER_MBIT), self.net_frames_per_s),
        }
    }

    /// Says no to limits under which no guest of this size could live.
    pub(crate) fn check(&self, memory_mib: u64) -> Result<(), Failure> {
        let least = memory_mib + OVERHEAD_MIB;
        match self.memory_max_mib {
            Some(most) if u64::from(most) < least => {
                let why = format!(
                    "{most} MiB are less than the guest's {memory_mib} MiB and what the VMM needs: the \
                     kernel would end the VM"
                );
                let way_out = format!("allow {least} MiB or more");
                Err(Failure::new(Exit::Usage, "--memory-max-mib", why, way_out))
            }
            _ => Ok(()),
        }
    }
}

/// CPU time in thousandths of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Cpus(u32);

impl Cpus {
    /// The kernel takes no smaller quota.
    const LEAST_MILLI: u32 = 10;
    const MOST_MILLI: u32 = 1_024_000;

    /// Thousandths of a CPU.
    pub(crate) fn milli(self) -> u32 {
        self.0
    }
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let milli = text.parse::<f64>().ok().map(|cpus| (cpus * 1000.0).round());
        let milli = milli.filter(|milli| {
            *milli == 0.0
                || (f64::from(Self::LEAST_MILLI)..=f64::from(Self::MOST_MILLI)).contains(milli)
        });
        milli.map(|milli| Self(milli as u32)).ok_or_else(|| {
            "a number of CPUs from 0.01 to 1024, as in 1.5; or 0 for no limit".into()
        })
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (f64::from(self.0) / 1000.0).fmt(f)
    }
}

impl From<Cpus> for String {
    fn from(cpus: Cpus) -> Self {
        cpus.to_string()
    }
}

impl TryFrom<String> for Cpus {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Which CPU a guest that boots is shown, as users say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Cpu(pub(crate) CpuTemplate);

impl FromStr for Cpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl From<Cpu> for String {
    fn from(cpu: Cpu) -> Self {
        cpu.0.name().into()
    }
}

impl TryFrom<String> for Cpu {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_counts_and_zero_lifts() {
        let some = |n: u32| Some(n);
        let old = Limits {
            cpu_max: "1.5".parse().ok(),
            disk_iops: some(100),
            net_mbps: some(10),
            ..Limits::default()
        };
        let new = Limits { disk_iops: some(0), net_mbps: some(20), ..Limits::default() };
        let both = new.over(old);
        assert_eq!((both.cpu_max, both.disk_iops, both.net_mbps), (old.cpu_max, None, some(20)));
        assert_eq!(both.rates().net.bytes_per_s, Some(2_500_000));
        assert!(both.need_cgroup() && !new.need_cgroup());
        let none = Limits { cpu_max: Some(Cpus(0)), net_mbps: some(0), ..Limits::default() };
        assert!(none.over(both).is_none());
        let text = serde_json::to_string(&both).unwrap();
        assert_eq!(text, r#"{"cpu_max":"1.5","net_mbps":20}"#);
        assert_eq!(serde_json::from_str::<Limits>(&text).unwrap(), both);
    }

    #[test]
    fn cpus_are_counted_in_thousandths() {
        assert_eq!("0.25".parse(), Ok(Cpus(250)));
        assert_eq!(Cpus(1500).to_string(), "1.5");
        for wrong in ["", "-1", "0.001", "2000", "NaN", "inf", "two"] {
            assert!(wrong.parse::<Cpus>().unwrap_err().contains("1.5"), "{wrong}");
        }
    }

    #[test]
    fn a_guest_must_fit_its_limit() {
        let limits = Limits { memory_max_mib: Some(520), ..Limits::default() };
        limits.check(256).unwrap();
        assert!(limits.check(512).unwrap_err().message.contains("544 MiB"));
    }
}
