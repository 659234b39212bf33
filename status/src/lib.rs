//! What a cloudlet shows of itself: metrics for Prometheus, and a page for people.
//!
//! ```text
//! the daemon ── Snapshot, Tally ─┬─► metrics::render ─► GET /metrics
//!                                └─► page::render ────► GET /
//! ```
//!
//! Both are pure functions of what the API says anyway, so that they are tested without a cloudlet and
//! can tell nothing that the API does not. A [`Snapshot`] is how things are; a [`Tally`] is what has
//! happened since the daemon started, counted from its events.
//!
//! Goals: names and units that stay (`howdah_*`, seconds and bytes); series that do not come and go with
//! what happens to be so; a page that needs no script to be read. Non-goals: to change anything, history
//! (Prometheus keeps it), charts of single handoffs (`howdah report` makes those).

#![forbid(unsafe_code)]

pub mod metrics;
pub mod page;
mod tally;
mod units;

pub use tally::{Bounds, Histogram, Tally};

use howdah_api::{Base, Host, Operation, Peer, Vm};

/// How a cloudlet is.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its host and its daemon.
    pub host: Host,
    /// Its VMs; `last_report` is used where it is there.
    pub vms: Vec<Vm>,
    /// Its bases.
    pub bases: Vec<Base>,
    /// The cloudlets that it knows.
    pub peers: Vec<Peer>,
    /// What takes long, newest first.
    pub operations: Vec<Operation>,
    /// What processes of VMs use of the host.
    pub usage: Vec<Usage>,
}

impl Snapshot {
    /// What the process of a VM uses, if it lives.
    fn usage_of(&self, vm: &str) -> Option<&Usage> {
        self.usage.iter().find(|usage| usage.vm == vm)
    }
}

/// What the process of a VM uses of the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// The VM.
    pub vm: String,
    /// Memory that is its own or shared, in RAM.
    pub resident_bytes: u64,
    /// Processor time of all its threads, the guest's included.
    pub cpu_s: f64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Reads what `/proc/PID/stat` says of a process; `None` if that is not what it says.
    ///
    /// `page_bytes` and `ticks_per_s` are the host's (`sysconf`).
    pub fn parse(vm: &str, stat: &str, page_bytes: u64, ticks_per_s: u64) -> Option<Self> {
        // The name, in parentheses, may hold anything: fields are counted from behind it.
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        let ticks = number(11)?.saturating_add(number(12)?);
        Some(Self {
            vm: vm.to_owned(),
            resident_bytes: number(21)?.saturating_mul(page_bytes),
            cpu_s: ticks as f64 / ticks_per_s.max(1) as f64,
            threads: number(17)?,
        })
    }
}

#[cfg(test)]
mod samples;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_it_is_called() {
        let stat = "71 (how) dah) S 1 71 71 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 100 2000000 512 18446744073709551615 1 1";
        let usage = Usage::parse("web", stat, 4096, 100).unwrap();
        assert_eq!((usage.resident_bytes, usage.cpu_s, usage.threads), (512 * 4096, 3.0, 9));
        assert_eq!(Usage::parse("web", "71 (x) S 1", 4096, 100), None);
        assert_eq!(Usage::parse("web", "", 4096, 100), None);
    }
}
