//! The disk's ring, and whose its operations are.

use uring::{Need, RingError};

/// Operations in the kernel at once, at most.
const RING_ENTRIES: u32 = 256;

/// Who is told of an operation's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The request with this number.
    Request(usize),
    /// The running flush.
    Flush,
}

pub(super) type Ring = uring::Ring<Token>;
pub(super) type Operation = uring::Operation<Token>;

/// A ring that tells of ends by its event descriptor.
pub(super) fn new() -> Result<Ring, RingError> {
    let needs = [Need::Read, Need::Write, Need::Sync, Need::Punch];
    Ring::new(RING_ENTRIES, &needs)?.with_event()
}
