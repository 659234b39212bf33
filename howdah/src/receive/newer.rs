//! A source that begins anew, while a process here still receives what it began before: it gave that up,
//! and could not say so. Without this it would be refused for as long as the process waits for it.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use handoff::{
    ownership::{Question, Record},
    tls::PeerKey,
};

use crate::{
    control::{Reply, Request, client},
    failure::Failure,
    home::VmDir,
    lock::Probe,
};

/// How long a process that was told may take to be gone, with the memory and the disk that it had. The
/// source that waits meanwhile is more patient.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether it is.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Handoffs that were to be given up for newer ones, by their ids, until whoever waits for one has heard
/// how it ended.
#[derive(Debug, Default)]
pub(super) struct GivenUp(Mutex<BTreeSet<String>>);

impl GivenUp {
    /// Has the process that receives an older handoff of this VM from the same caller give it up, and waits
    /// until it is gone. Whether it does that is its own decision; what it does not give up stands in the
    /// newcomer's way as it would have.
    pub(super) fn make_way(&self, dir: &VmDir, offered: Question, caller: Option<PeerKey>) {
        if !is_held(dir) {
            return;
        }
        let held = dir.record().ok().flatten().filter(Record::is_volatile);
        let held = held.and_then(|record| record.handoff()).map(|id| id.to_string());
        // Before it can end.
        self.ids().extend(held.clone());
        let told = matches!(tell(dir, offered, caller), Ok(Reply::Done));
        let since = Instant::now();
        while told && is_held(dir) && !runs(dir) && since.elapsed() < GONE_WITHIN {
            thread::sleep(LOOK_EVERY);
        }
        if !told || is_held(dir) {
            held.inspect(|id| _ = self.ids().remove(id));
        }
    }

    /// Whether this handoff was one of them; asked once, when it is over.
    pub(super) fn take(&self, handoff: &str) -> bool {
        self.ids().remove(handoff)
    }

    fn ids(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // It is whole after every step: a panic elsewhere leaves it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(dir: &VmDir, offered: Question, caller: Option<PeerKey>) -> Result<Reply, Failure> {
    let mut channel = client::ask(dir, Request::Newer { offered, caller }, None)?;
    client::next_reply(dir, &mut channel)
}

fn is_held(dir: &VmDir) -> bool {
    matches!(dir.probe(), Ok(Probe::Held { .. }))
}

/// Whether it was decided meanwhile that it is here: then there is nothing to wait for.
fn runs(dir: &VmDir) -> bool {
    matches!(dir.record(), Ok(Some(record)) if record.may_run())
}
