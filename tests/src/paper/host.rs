//! The machine that runs are made on, for their records.

use std::fs;

use super::record::Host;
use crate::machine::host::Accelerator;

/// This machine, with a lab host of so many CPUs.
pub(super) fn describe(cpus: u8) -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let emulated = Accelerator::detect() == Accelerator::Software;
    Host { cpu: model(&cpuinfo).unwrap_or("unknown").to_owned(), emulated, cpus }
}

fn model(cpuinfo: &str) -> Option<&str> {
    let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields
        .map(|(name, value)| (name.trim(), value.trim()))
        .find_map(|(name, value)| (name == "model name" && !value.is_empty()).then_some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_a_name() {
        let cpuinfo =
            "processor\t: 0\nmodel\t\t: 85\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n";
        assert_eq!(model(cpuinfo), Some("A CPU @ 2 GHz"));
        assert_eq!(model("processor: 0\n"), None);
    }
}
