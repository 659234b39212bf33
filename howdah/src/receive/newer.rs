//! A source that begins anew, while a process here still receives what it began before: it gave that up,
//! and could not say so. Without this it would be refused for as long as the process waits for it.

use std::{
    thread,
    time::{Duration, Instant},
};

use handoff::{ownership::Question, tls::PeerKey};

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

/// Has the process that receives an older handoff of this VM from the same caller give it up, and waits
/// until it is gone. Whether it does that is its own decision; what it does not give up stands in the
/// newcomer's way as it would have.
pub(super) fn make_way(dir: &VmDir, offered: Question, caller: Option<PeerKey>) {
    if !is_held(dir) || !matches!(tell(dir, offered, caller), Ok(Reply::Done)) {
        return;
    }
    tracing::info!(vm = %dir.name(), epoch = %offered.epoch, "its source began anew");
    let since = Instant::now();
    while is_held(dir) && !runs(dir) && since.elapsed() < GONE_WITHIN {
        thread::sleep(LOOK_EVERY);
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
