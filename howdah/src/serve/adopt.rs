//! Handoffs that were under way when the daemon started: begun by commands, or by the daemon before it.
//!
//! Their processes do them, and were not asked by this daemon: it looks how they go, as anybody can, and
//! shows them as operations. How one ended the VM's record and report tell.

use std::{sync::Arc, time::Duration};

use howdah_api::{Kind, Vm, VmState};

use super::{answer::blocking, daemon::Daemon, operations::About};
use crate::{
    failure::{Exit, Failure},
    home::VmDir,
    ops,
};

/// How often it is looked how a handoff goes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Finds them, once.
pub(super) async fn run(daemon: Arc<Daemon>) {
    let shared = Arc::clone(&daemon);
    let vms = blocking(move || ops::vm::list(&shared.home)).await.unwrap_or_default();
    let moving = |vm: &Vm| matches!(vm.state, VmState::HandingOff | VmState::InDoubt);
    for vm in vms.into_iter().filter(|vm| vm.process.is_some() && moving(vm)) {
        let Ok(dir) = vm.name.parse().map(|name| daemon.home.vm(&name)) else { continue };
        let peer = vm.process.and_then(|process| process.progress).map(|progress| progress.peer);
        let about = About { kind: Kind::Handoff, subject: vm.name, peer };
        let (given_up, shared) = (dir.clone(), Arc::clone(&daemon));
        let cancel = Arc::new(move || ops::handoff::cancel(&given_up));
        let begun = daemon.operations.begin(about, Some(cancel), move |work| {
            let ended = follow(&dir, |progress| work.handoff(progress));
            ops::vm::refresh_network(&shared.home);
            shared.vms_changed();
            ended
        });
        if let Err(failure) = begun {
            tracing::warn!("a handoff that is under way is not shown: {failure}");
        }
    }
}

/// Looks until it is over.
fn follow(
    dir: &VmDir,
    mut show: impl FnMut(howdah_api::HandoffProgress),
) -> Result<serde_json::Value, Failure> {
    loop {
        let vm = ops::vm::look(dir);
        let report = || vm.last_report.clone().unwrap_or_default();
        match vm.state {
            VmState::HandingOff | VmState::InDoubt if vm.process.is_some() => {
                if let Some(progress) = vm.process.and_then(|process| process.progress) {
                    show(progress);
                }
                std::thread::sleep(LOOK_EVERY);
            }
            VmState::HandedOff => return Ok(report()),
            // It said so, and keeps what is worth keeping before it ends.
            VmState::Stopping | VmState::NotAnswering => std::thread::sleep(LOOK_EVERY),
            state => {
                let what = format!("VM {}", dir.name());
                let why = format!("it was not handed off: it is {} here", state.name());
                let way_out = format!("see {}", dir.vm_log().display());
                let failure = Failure::new(Exit::NotMoved, what, why, way_out);
                return Err(Failure { report: vm.last_report, ..failure });
            }
        }
    }
}
