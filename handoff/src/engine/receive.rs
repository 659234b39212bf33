//! The target's driver.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use guest_images::BaseId;

use super::{Incoming, ReceiveError, ReceiveOptions, Received};
use crate::{BaseView, Clock, Refusal, TargetHost, Transport, ownership::Journal};

/// Opens a base by its id.
pub type BaseResolver<'a> = &'a dyn Fn(BaseId) -> Result<Arc<dyn BaseView>, Refusal>;

/// Receives one guest over a link whose Hello begins a handoff. Returns when the guest runs here
/// and the source has let go (or did not say so in time), or when it is settled that it will not.
///
/// `relinks` brings later links of the same handoff, after the first one broke.
pub fn receive<L: Transport, H: TargetHost>(
    first: Incoming<L>,
    host: &mut H,
    bases: BaseResolver<'_>,
    journal: &mut Journal,
    relinks: &Receiver<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
) -> Result<Received<H::Vm>, ReceiveError> {
    let _ = (host, bases, journal, relinks, options, clock);
    drop(first);
    unimplemented!()
}
