//! `howdah vm takeover`: an operator decides what no protocol can.

use handoff::ownership::{Guest, State, source, target};

use crate::{
    failure::{Exit, Failure},
    home::VmDir,
};

/// Takes the VM, durably. It is not started.
pub(crate) fn take(dir: &VmDir, reason: String) -> Result<(), Failure> {
    let what = format!("VM {}", dir.name());
    let _lock = dir.lock()?;
    let mut journal = dir.journal()?;
    let nothing = |why: String| {
        Failure::new(
            Exit::Conflict,
            &what,
            why,
            "only a VM that waits for a peer can be taken over",
        )
    };
    let Some(record) = journal.record() else {
        return Err(nothing("it has no ownership record".into()));
    };
    let taken = match record.state {
        State::Prepared { .. } | State::Declined { .. } => {
            target::step(Some(record), target::Event::Takeover { reason })
                .map(|step| (step.write, step.guest))
        }
        _ => source::step(record, source::Event::Takeover { reason })
            .map(|step| (step.write, step.guest)),
    };
    let (Some(record), Guest::Run) = taken.map_err(|e| nothing(e.to_string()))? else {
        return Err(nothing("it can be run as it is".into()));
    };
    journal.write(record).map_err(|e| Failure::plain(Exit::Failed, what, e))
}
