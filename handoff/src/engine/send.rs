//! The source's driver.

use std::sync::{Arc, atomic::AtomicBool};

use super::{SendError, SendOptions, SendOutcome};
use crate::{BaseView, Clock, Connect, SourceVm, ownership::Journal, report::Progress};

/// Hands the guest off to the peer that `connect` reaches.
///
/// **Paused on success, resumed on failure**: [`SendOutcome::Moved`] and
/// [`SendOutcome::InDoubt`] leave the guest paused, [`SendOutcome::KeptHere`] leaves it running.
/// `cancel` is looked at until the commit; after it the handoff can only go forward.
#[allow(clippy::too_many_arguments)]
pub fn send<C: Connect + Send>(
    vm: &mut dyn SourceVm,
    base: Arc<dyn BaseView>,
    connect: &mut C,
    journal: &mut Journal,
    options: &SendOptions,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(&Progress),
    cancel: &AtomicBool,
) -> Result<SendOutcome, SendError> {
    let _ = (vm, base, connect, options, clock, progress, cancel);
    journal.record().ok_or(SendError::NoRecord).map(|_| unimplemented!())
}
