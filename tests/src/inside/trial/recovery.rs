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
        product::{Cloudlet, Running, Seen, VM},
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
    a: Vec<Seen>,
    b: Vec<Seen>,
}

/// Whether anybody is left who could say that a handoff is over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Source {
    /// The process that gave it up lives, and says so.
    Lives,
    /// It was killed. The record of the next one says that the guest is its own, and not to whom it
    /// was once offered.
    Killed,
}

impl States {
    /// Where the guest runs, if it runs on one side and the other has no part in it any more.
    pub(super) fn home(&self, source: Source) -> Option<Side> {
        let only = |here: &[Seen], there: &[Seen]| {
            let Some(runs) = here.iter().find(|vm| vm.state == "running") else { return false };
            let waits = |vm: &&Seen| source == Source::Killed && waits_in_vain(vm, runs);
            active(here) == 1 && active(there) == there.iter().filter(waits).count()
        };
        match (only(&self.a, &self.b), only(&self.b, &self.a)) {
            (true, false) => Some(Side::A),
            (false, true) => Some(Side::B),
            _ => None,
        }
    }

    /// Whether both say that it runs.
    fn two(&self) -> bool {
        let runs = |vms: &[Seen]| vms.iter().any(|vm| vm.state == "running");
        runs(&self.a) && runs(&self.b)
    }

    /// In words.
    pub(super) fn detail(&self) -> String {
        let list = |vms: &[Seen]| vms.iter().map(|vm| vm.state.clone()).collect::<Vec<_>>();
        format!("VMs on A: {:?}, on B: {:?}", list(&self.a), list(&self.b))
    }
}

fn active(vms: &[Seen]) -> usize {
    vms.iter().filter(|vm| ACTIVE.contains(&vm.state.as_str())).count()
}

/// Whether a copy comes in of a guest that runs elsewhere under a higher epoch. It can never own: it would
/// have to be told Commit of its epoch, by a source whose record says so. The source's record is beyond
/// that epoch, because it left that handoff by writing that it keeps the guest, and no record goes
/// back. The copy takes room until nobody has asked for it for long enough, or until the next handoff
/// takes its place; that is all.
fn waits_in_vain(copy: &Seen, runs: &Seen) -> bool {
    let (Some(copied), Some(owned)) = (&copy.record, &runs.record) else { return false };
    let same = copied.vm_id == owned.vm_id;
    let beyond = owned.may_run && !copied.may_run && owned.epoch > copied.epoch;
    copy.state == "receiving" && same && beyond
}

/// Asks both sides, at once.
pub(super) fn states(a: &Cloudlet, b: &Cloudlet) -> Result<States> {
    thread::scope(|scope| {
        let of_a = scope.spawn(|| a.seen());
        let b = b.seen()?;
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
pub(super) fn settle(
    a: &Cloudlet,
    b: &Cloudlet,
    handoff: &mut Running,
    source: Source,
) -> Result<Settled> {
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
        home = match (home, states.home(source)) {
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
    use crate::inside::product::SeenRecord;

    fn vm(state: &str, record: Option<(u64, bool)>) -> Seen {
        let record =
            record.map(|(epoch, may_run)| SeenRecord { vm_id: "aa".into(), epoch, may_run });
        Seen { state: state.into(), record }
    }

    fn states(a: &[&str], b: &[&str]) -> States {
        let own = |states: &[&str]| states.iter().map(|state| vm(state, None)).collect();
        States { a: own(a), b: own(b) }
    }

    #[test]
    fn a_home_is_where_it_runs_alone() {
        for source in [Source::Lives, Source::Killed] {
            let home = |a: &[&str], b: &[&str]| states(a, b).home(source);
            assert_eq!(home(&["running"], &[]), Some(Side::A));
            assert_eq!(home(&["handed-off"], &["running"]), Some(Side::B));
            assert_eq!(home(&["handing-off"], &["running"]), None);
            assert_eq!(home(&["handing-off"], &["receiving"]), None);
            assert_eq!(home(&["running"], &["receiving"]), None);
            assert_eq!(home(&["interrupted"], &["declined"]), None);
        }
        assert!(states(&["running"], &["running"]).two());
        assert!(!states(&["in-doubt"], &["running"]).two());
    }

    /// Beside a guest that runs under this record on A, B has this copy.
    fn home(owner: Seen, copy: Seen, source: Source) -> Option<Side> {
        States { a: vec![owner], b: vec![copy] }.home(source)
    }

    #[test]
    fn a_copy_that_can_never_own_is_no_part_of_it_where_nobody_can_say_so() {
        use Source::{Killed, Lives};
        let owner = || vm("running", Some((3, true)));
        let copy = |epoch| vm("receiving", Some((epoch, false)));
        assert_eq!(home(owner(), copy(2), Killed), Some(Side::A));
        assert_eq!(home(owner(), copy(2), Lives), None, "whoever lives says so");
        // It may be told Commit yet, or owns it already.
        for copy in [copy(3), copy(4), vm("receiving", Some((2, true))), vm("receiving", None)] {
            assert_eq!(home(owner(), copy.clone(), Killed), None, "{copy:?}");
        }
        for state in ["starting", "paused", "running", "handing-off", "not answering"] {
            let copy = vm(state, Some((2, false)));
            assert_eq!(home(owner(), copy, Killed), None, "{state}");
        }
        let mut other = copy(2);
        other.record.as_mut().unwrap().vm_id = "bb".into();
        assert_eq!(home(owner(), other, Killed), None);
        for owner in [vm("handing-off", Some((3, true))), vm("running", Some((3, false)))] {
            assert_eq!(home(owner, copy(2), Killed), None);
        }
    }

    #[test]
    fn what_a_cloudlet_lists_is_read() {
        let listed = r#"[{"name":"a","state":"running","record":{"vm_id":"aa","epoch":3,
            "ownership":"owner of epoch 3","may_run":true},"kept_bytes":7},
            {"name":"b","state":"damaged","problems":["?"]}]"#;
        let seen: Vec<Seen> = serde_json::from_str(listed).unwrap();
        assert_eq!(seen, [vm("running", Some((3, true))), vm("damaged", None)]);
    }
}
