//! What there is to see of a guest that does not answer: whether its vCPUs run, and whether packets
//! reach it and leave it. Taken while its VM is still there; afterwards nobody can tell a guest that
//! spins from one that sleeps for ever or from a device that has lost its interrupt.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result};

use super::{
    net::TAP,
    product::{HOLDERS, processes_of},
};
use crate::scenario::Side;

/// How long the guest is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Ticks of /proc/PID/stat in a second, on every Linux of x86-64 and arm64.
const TICKS_PER_S: f64 = 100.0;

/// The state of every VM's process, in a few words.
pub(crate) fn picture() -> String {
    let sides = [Side::A, Side::B];
    let words: Vec<String> = sides
        .iter()
        .flat_map(|side| look(*side).unwrap_or_else(|error| vec![format!("{error:#}")]))
        .collect();
    if words.is_empty() { "no VM's process is left".to_owned() } else { words.join("; ") }
}

/// What the VM processes of one cloudlet do.
fn look(side: Side) -> Result<Vec<String>> {
    let pids = processes_of(side, &HOLDERS)?;
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    let packets = || -> Result<(u64, u64)> {
        side.namespace().within(|| {
            let text = fs::read_to_string("/proc/thread-self/net/dev").context("no counters")?;
            packets_of(&text, TAP).context("the TAP device is gone")
        })
    };
    let before: Vec<_> = pids.iter().flat_map(|pid| threads(*pid)).collect();
    let (from_before, to_before) = packets()?;
    thread::sleep(LOOK);
    let (from_after, to_after) = packets()?;
    let letter = side.letter();
    let mut words = vec![format!(
        "{letter}: {} packets from the guest and {} to it in {} s",
        from_after.saturating_sub(from_before),
        to_after.saturating_sub(to_before),
        LOOK.as_secs(),
    )];
    for (pid, tid, name, ticks) in pids.iter().flat_map(|pid| threads(*pid)) {
        let was = before.iter().find(|old| old.1 == tid).map_or(0, |old| old.3);
        let busy = (ticks.saturating_sub(was)) as f64 / TICKS_PER_S / LOOK.as_secs_f64();
        if busy > 0.005 || name.starts_with("vcpu") {
            words.push(format!("{letter}: {name} of {pid} runs {:.0} % of the time", busy * 100.0));
        }
    }
    Ok(words)
}

/// Process, thread, its name and its CPU time in ticks. A thread that ends meanwhile is left out.
fn threads(pid: i32) -> Vec<(i32, i32, String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| {
            let tid = task.file_name().to_string_lossy().parse().ok()?;
            let (name, ticks) = cpu_of(&fs::read_to_string(task.path().join("stat")).ok()?)?;
            Some((pid, tid, name, ticks))
        })
        .collect()
}

/// A thread's name and its CPU time in ticks, from /proc/PID/task/TID/stat.
fn cpu_of(stat: &str) -> Option<(String, u64)> {
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = tail.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((name, user + system))
}

/// Packets that came out of a TAP device's guest and that were given to it, from /proc/net/dev.
fn packets_of(table: &str, tap: &str) -> Option<(u64, u64)> {
    let counters = table.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == tap).then_some(counters)
    })?;
    let mut fields = counters.split_whitespace();
    let from = fields.nth(1)?.parse().ok()?;
    let to = fields.nth(7)?.parse().ok()?;
    Some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_time_is_read_whatever_its_name() {
        let stat = "7 (vcpu 0) (x)) S 1 1 1 0 -1 64 10 0 0 0 31 11 0 0 20 0 9 0 1";
        assert_eq!(cpu_of(stat), Some(("vcpu 0) (x)".to_owned(), 42)));
        assert_eq!(cpu_of("7 (vcpu) S 1"), None);
    }

    #[test]
    fn packets_are_counted_both_ways() {
        let table = "Inter-|   Receive\n  lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                     tap0: 100 5 0 0 0 0 0 0 200 6 0 0 0 0 0 0\n";
        assert_eq!(packets_of(table, "tap0"), Some((5, 6)));
        assert_eq!(packets_of(table, "tap1"), None);
    }
}
