//! The blocking drivers: threads, links and VMs around the sans-I/O sessions.
//!
//! ```text
//! source                                                            target
//! engine thread ─► compress ─► seal ─► courier ══ link ══► reader ─► engine ─► decoders ─► engine
//! harvest, read,   N workers   in      owns the session    answers   thread    open, de-   thread
//! classify, batch              order   and reconnects      pings               compress,   apply,
//!                                                                              hash        ack
//! ```
//!
//! The contract of [`send()`] in one line: the guest is **paused on success, resumed on failure**.

mod accept;
mod again;
mod ahead;
mod arriving;
mod backoff;
mod commit;
mod courier;
mod cutover;
mod decode;
mod farewell;
mod flush;
mod landing;
mod meter;
mod options;
mod outage;
mod pace;
mod pipe;
mod pipeline;
mod press;
mod reader;
mod receive;
mod run;
pub mod saved;
mod send;
mod sequence;
mod series;
mod settle;
mod status;
mod worker;

pub use accept::{
    AcceptError, CallRx, Greeting, Incoming, IncomingCall, SettleLinkError, accept, greet,
};
pub use backoff::Backoff;
pub use farewell::{Farewell, Untold, say_farewell};
pub use options::{
    CONTENTS_BYTES, CommitMode, KeptReason, Limits, MAX_DECODERS, ReceiveError, ReceiveOptions,
    Received, SendError, SendOptions, SendOutcome, TABLES_BYTES,
};
pub use pipeline::{MAX_WORKERS, PipelineOptions};
pub use press::WORKING_BYTES;
pub use receive::receive;
pub use saved::{inspect, restore, save};
pub use send::send;
pub use settle::{Recovery, SettleError, decline_lost_copy, recover, send_resume, takeover};
pub use worker::LEAST_CPU_SHARE;

/// The most that a machine's state may have besides RAM and disk.
pub const MAX_MACHINE_STATE_BYTES: usize = 64 << 20;
