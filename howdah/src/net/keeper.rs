//! Looks after networks for as long as a process lives: what was set up before the host was restarted
//! is set up again, what others left undone is done, and what is over goes.

use std::{thread, time::Duration};

use super::plan::{Plan, alone, now_s};
use crate::{failure::Failure, home::Home};

/// How often it is looked whether VMs came or went without anybody's doing what follows from it.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Begins to look after the networks of `home`.
pub(crate) fn keep(home: &Home) {
    let home = home.clone();
    let look_after = move || {
        let mut applied: Option<Plan> = None;
        let mut said = None;
        loop {
            if home.networks().exists() {
                match look(&home, applied.as_ref()) {
                    Ok(plan) => (applied, said) = (Some(plan), None),
                    Err(failure) if said.as_ref() == Some(&failure.message) => {}
                    Err(failure) => {
                        tracing::warn!("{failure}");
                        said = Some(failure.message);
                    }
                }
            }
            let ends_s = applied.as_ref().and_then(Plan::ends_s);
            let left_s = ends_s.map_or(u64::MAX, |ends_s| ends_s.saturating_sub(now_s()));
            thread::sleep(LOOK_EVERY.min(Duration::from_secs(left_s.max(1))));
        }
    };
    if let Err(e) = thread::Builder::new().name("networks".into()).spawn(look_after) {
        tracing::warn!("networks are not looked after: {e}");
    }
}

/// Looks, and acts if something is different from what was done before.
fn look(home: &Home, applied: Option<&Plan>) -> Result<Plan, Failure> {
    let _alone = alone(home)?;
    let plan = Plan::make(home)?;
    if applied != Some(&plan) {
        plan.apply(home)?;
    }
    Ok(plan)
}
