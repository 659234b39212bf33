//! A machine as the process's main loop sees it. A real seam: the loop's decisions are tested
//! without KVM.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use handoff::trace::record::Recorded;
use vmm::MachineProfile;

use crate::{
    control::{HandoffRequest, Progress, RecordRequest, SaveRequest},
    failure::Failure,
};

/// A machine with its disk and its ownership journal.
pub(crate) trait Machine: Send {
    /// What it is, as peers are told.
    fn profile(&self) -> Result<MachineProfile, Failure>;

    /// Stops the vCPUs and drains the devices.
    fn pause(&mut self) -> anyhow::Result<()>;

    /// Lets a paused guest go on.
    fn resume(&mut self) -> anyhow::Result<()>;

    /// Stops the guest and makes its disk durable.
    fn stop(self: Box<Self>) -> anyhow::Result<()>;

    /// Writes the paused machine's disk, flattened, to an empty file.
    fn export_disk(&mut self, to: &File) -> anyhow::Result<()>;

    /// Writes the paused machine, as what differs from its base, to an empty file. Called on a
    /// thread of its own, like [`Machine::hand_off`].
    fn save(&mut self, request: &SaveRequest, to: &File) -> Result<serde_json::Value, Failure>;

    /// Records what the running guest changes, until the time is over or `cancel` is set. Called on a
    /// thread of its own.
    fn record(&mut self, request: &RecordRequest, cancel: &AtomicBool)
    -> Result<Recorded, Failure>;

    /// Hands the guest off: blocks until it is decided where the guest runs. Called on a thread of
    /// its own; while it works nothing else touches the machine.
    fn hand_off(self: Box<Self>, request: &HandoffRequest, watch: &dyn Watch) -> HandoffEnd;
}

/// What a handoff looks at, and tells, while it works.
pub(crate) trait Watch: Send + Sync {
    /// Set when it is to give up, if that is still possible.
    fn cancel(&self) -> &AtomicBool;

    /// How far it is.
    fn progress(&self, progress: Progress);

    /// It is committed, and the peer has not confirmed.
    fn in_doubt(&self, why: &str);
}

/// Where the guest is after a handoff.
pub(crate) enum HandoffEnd {
    /// At the peer, which confirmed.
    Moved {
        /// The report.
        report: serde_json::Value,
        /// Keeps what makes the way back short. Done when the report is told: it takes its time.
        keep: Option<Keep>,
    },
    /// Here, running.
    Kept {
        /// The machine.
        machine: Box<dyn Machine>,
        /// Why it did not move, with the report as far as it came.
        failure: Failure,
    },
    /// Committed and not confirmed; or lost with a machine that cannot go on. The record says
    /// which, and `howdah vm run` goes on from it.
    Undecided {
        /// What is known.
        failure: Failure,
    },
}

/// Keeps a visit.
pub(crate) type Keep = Box<dyn FnOnce() -> Result<(), Failure> + Send>;

/// Tells a handoff to give up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Gives up.
    pub(crate) fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// The flag itself, for those who look at it often.
    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.0
    }
}
