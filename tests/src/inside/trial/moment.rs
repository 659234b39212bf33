//! The moment of a fault, and the fault.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    fault::{Hit, Moment},
    inside::{
        net::{Network, kill_all},
        product::{Cloudlet, HOLDERS, Running, VM, processes_of},
    },
    scenario::{Link, Side},
};

/// How long a handoff may take to reach a step.
const REACHED_WITHIN: Duration = Duration::from_secs(40);
/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// When a handoff is given up, after it was asked for.
const CANCEL_AFTER: Duration = Duration::from_millis(900);
/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(10);
/// The state of a process that SIGSTOP stopped, in /proc/PID/stat.
const STOPPED: char = 'T';

/// Whether the moment came.
pub(super) struct Reached {
    /// It did.
    pub(super) came: bool,
    /// How.
    pub(super) detail: String,
}

/// Waits for the moment; `usual` is what a handoff takes. A handoff that is over before a step was reached is a finding.
pub(super) fn wait_for(
    moment: &Moment,
    usual: Duration,
    asked: Instant,
    handoff: &mut Running,
) -> Result<Reached> {
    match moment {
        Moment::Part { permille } => {
            let at = usual.mul_f64(*permille as f64 / 1e3);
            thread::sleep(at.saturating_sub(asked.elapsed()));
            let detail = format!("{} ms after it was asked for", at.as_millis());
            Ok(Reached { came: true, detail })
        }
        Moment::Step { step, side, then_ms } => {
            while stopped(*side)?.is_empty() {
                // The target may reach its last steps after the source is done.
                let over = handoff.ended()? && asked.elapsed() > Duration::from_secs(5);
                if over || asked.elapsed() > REACHED_WITHIN {
                    let said = handoff.said();
                    return Ok(Reached {
                        came: false,
                        detail: format!("{step} was not reached: {}", said.trim()),
                    });
                }
                thread::sleep(LOOK_EVERY);
            }
            if *then_ms > 0 {
                resume_stopped()?;
                thread::sleep(Duration::from_millis(*then_ms));
            }
            let at = asked.elapsed().as_millis();
            Ok(Reached { came: true, detail: format!("{step} {at} ms after it was asked for") })
        }
    }
}

/// Does what is to be done.
pub(super) fn strike(hits: &[Hit], network: &Network) -> Result<()> {
    for hit in hits {
        match hit {
            Hit::CutLink => network.shape(Link { loss_percent: 100.0, ..Link::default() })?,
            Hit::KillProcess(side) => kill_holders(*side)?,
            Hit::KillCloudlet(side) => _ = kill_all(side.namespace())?,
        }
    }
    Ok(())
}

/// Lets every stopped process go on.
pub(super) fn resume_stopped() -> Result<()> {
    for side in [Side::A, Side::B] {
        for pid in stopped(side)? {
            // One that has just been killed need not go on.
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
    }
    Ok(())
}

/// Gives the handoff up a little later, as a user would: in the middle, if it is slow enough.
pub(super) fn cancel_soon(source: &Cloudlet) -> Result<()> {
    thread::sleep(CANCEL_AFTER);
    // It ends when the process that it asks goes on, or is killed.
    source.start_howdah(&["handoff", VM, "--cancel"], "cancel").map(drop)
}

/// Kills the process of the VM on a cloudlet, if there is one, and waits until it is gone.
fn kill_holders(side: Side) -> Result<()> {
    let started = Instant::now();
    loop {
        let holders = processes_of(side, &HOLDERS)?;
        if holders.is_empty() {
            return Ok(());
        }
        for pid in &holders {
            // One that has just ended is what was wanted.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        if started.elapsed() > DEATH {
            bail!("processes {holders:?} on {} do not die", side.letter());
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Processes of a cloudlet that are stopped.
fn stopped(side: Side) -> Result<Vec<i32>> {
    let mut found = side.namespace().processes()?;
    found.retain(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state_of(&stat) == Some(STOPPED)
    });
    Ok(found)
}

/// The state in a line of /proc/PID/stat: behind the name, which may hold anything.
fn state_of(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_stands_behind_the_name() {
        assert_eq!(state_of("17 (how) dah) T 1 17 17 0"), Some('T'));
        assert_eq!(state_of("17 (howdah) S 1"), Some('S'));
        assert_eq!(state_of(""), None);
    }
}
