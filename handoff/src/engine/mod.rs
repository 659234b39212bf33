//! The blocking drivers: threads, links and VMs around the sans-I/O sessions.
//!
//! ```text
//! source                                                            target
//! engine thread ─► compress, seal ─► courier ══ link ══► reader ─► engine thread
//! harvest, read,     one worker       owns the session    answers   open, decompress,
//! classify, batch                     and reconnects      pings     apply, acknowledge
//! ```
//!
//! The contract of [`send()`] in one line: the guest is **paused on success, resumed on failure**.

mod accept;
mod options;
mod receive;
mod send;
mod settle;

pub use accept::{AcceptError, Incoming, accept};
pub use options::{
    KeptReason, Limits, ReceiveError, ReceiveOptions, Received, SendError, SendOptions, SendOutcome,
};
pub use receive::{BaseResolver, receive};
pub use send::send;
pub use settle::{Recovery, SettleError, recover, send_resume};
