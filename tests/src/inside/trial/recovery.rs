//! After the fault: what was killed is started again, and one side runs the guest.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use super::moment::resume_stopped;
use crate::{
    inside::{
        checks::ACTIVE,
        product::{Cloudlet, Running, VM},
    },
    scenario::Side,
};

/// How long a VM that is in doubt is asked for again.
const AGAIN_WITHIN: Duration = Duration::from_secs(40);
/// Between two times.
const AGAIN_EVERY: Duration = Duration::from_millis(300);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(120);
/// How long both sides may take to agree, for a verdict and not for a pass.
const SETTLES: Duration = Duration::from_secs(60);
/// How often they are asked.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// howdah's exit status where nothing of the VM is.
const NOT_FOUND: i32 = 3;
/// Where it runs elsewhere, or already.
const CONFLICT: i32 = 4;
/// Where its peer must be asked and does not answer yet.
const IN_DOUBT: i32 = 8;

/// What `howdah vm run` made of a VM whose process was killed.
pub(super) struct Again {
    /// Whether it runs here, or it is known that it must not.
    pub(super) settled: bool,
    /// The last word.
    pub(super) said: String,
}

/// Runs the VM again on these cloudlets, at once on all of them.
pub(super) fn run_again(on: &[&Cloudlet]) -> Result<Vec<(Side, Again)>> {
    thread::scope(|scope| {
        let asked: Vec<_> =
            on.iter().map(|cloudlet| (cloudlet.side, scope.spawn(|| run(cloudlet)))).collect();
        asked
            .into_iter()
            .map(|(side, thread)| {
                let again = thread.join().map_err(|_| anyhow!("a recovery panicked"))??;
                Ok((side, again))
            })
            .collect()
    })
}

fn run(cloudlet: &Cloudlet) -> Result<Again> {
    let started = Instant::now();
    loop {
        let running = cloudlet.start_howdah(&["vm", "run", VM, "--detach"], "vm-run-again")?;
        let ended = running.wait(ATTEMPT)?;
        let said = match ended.status {
            Some(0) => "runs".to_owned(),
            status => format!("{status:?}: {}", ended.complaint()),
        };
        match ended.status {
            Some(0 | NOT_FOUND | CONFLICT) => return Ok(Again { settled: true, said }),
            Some(IN_DOUBT) if started.elapsed() < AGAIN_WITHIN => thread::sleep(AGAIN_EVERY),
            _ => return Ok(Again { settled: false, said }),
        }
    }
}

/// What both sides say of their VMs at one time.
#[derive(Debug)]
pub(super) struct States {
    a: Vec<String>,
    b: Vec<String>,
}

impl States {
    /// Where the guest runs, if it runs on one side and the other has no part in it any more.
    pub(super) fn home(&self) -> Option<Side> {
        let only = |here: &[String], there: &[String]| {
            here.iter().any(|state| state == "running") && active(here) == 1 && active(there) == 0
        };
        match (only(&self.a, &self.b), only(&self.b, &self.a)) {
            (true, false) => Some(Side::A),
            (false, true) => Some(Side::B),
            _ => None,
        }
    }

    /// Whether both say that it runs.
    fn two(&self) -> bool {
        let runs = |states: &[String]| states.iter().any(|state| state == "running");
        runs(&self.a) && runs(&self.b)
    }

    /// In words.
    pub(super) fn detail(&self) -> String {
        format!("VMs on A: {:?}, on B: {:?}", self.a, self.b)
    }
}

fn active(states: &[String]) -> usize {
    states.iter().filter(|state| ACTIVE.contains(&state.as_str())).count()
}

/// Asks both sides, at once.
pub(super) fn states(a: &Cloudlet, b: &Cloudlet) -> Result<States> {
    thread::scope(|scope| {
        let of_a = scope.spawn(|| a.states());
        let b = b.states()?;
        let a = of_a.join().map_err(|_| anyhow!("asking A panicked"))??;
        Ok(States { a, b })
    })
}

/// How it was settled who runs the guest.
pub(super) struct Settled {
    /// Who, and since when that was seen; `None` if it was not settled in time.
    pub(super) home: Option<(Side, Instant)>,
    /// Whether ever both sides said so.
    pub(super) ever_two: bool,
    /// What both said last.
    pub(super) detail: String,
}

/// Waits until the handoff is over, and the guest runs on one side and on no other.
pub(super) fn settle(a: &Cloudlet, b: &Cloudlet, handoff: &mut Running) -> Result<Settled> {
    let started = Instant::now();
    let mut ever_two = false;
    let mut home: Option<(Side, Instant)> = None;
    loop {
        // One that took over from a killed one may stand at the same step.
        resume_stopped()?;
        // Asked before: what it ended with is what the sides say after.
        let over = handoff.ended()?;
        let states = states(a, b).context("asking both sides")?;
        ever_two |= states.two();
        home = match (home, states.home()) {
            (Some((was, since)), Some(is)) if was == is => Some((was, since)),
            (_, is) => is.map(|side| (side, Instant::now())),
        };
        if (over && home.is_some()) || started.elapsed() > SETTLES {
            return Ok(Settled { home, ever_two, detail: states.detail() });
        }
        thread::sleep(ASK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(a: &[&str], b: &[&str]) -> States {
        let own = |states: &[&str]| states.iter().map(|state| (*state).to_owned()).collect();
        States { a: own(a), b: own(b) }
    }

    #[test]
    fn a_home_is_where_it_runs_alone() {
        assert_eq!(states(&["running"], &[]).home(), Some(Side::A));
        assert_eq!(states(&["handed-off"], &["running"]).home(), Some(Side::B));
        assert_eq!(states(&["handing-off"], &["running"]).home(), None);
        assert_eq!(states(&["handing-off"], &["receiving"]).home(), None);
        assert_eq!(states(&["interrupted"], &["declined"]).home(), None);
        assert!(states(&["running"], &["running"]).two());
        assert!(!states(&["in-doubt"], &["running"]).two());
    }
}
