//! `howdah receive`: a listener, and a process for each VM that comes in.
//!
//! ```text
//! listener: accept ─► TLS: who? ─► read Hello ─┬─ a new handoff ─────► start a process, give it the link
//!                                              ├─ its process lives ─► give it the link (control.sock)
//!                                              └─ it does not ───────► answer from the ownership record
//! ```
//!
//! The process outlives the listener: it becomes the VM's own. The listener decides nothing; what
//! it says, it reads from durable records.

mod child;
mod door;
mod events;
mod host;
mod link;
mod listener;
mod newer;
mod oom;
mod room;
mod watched;

pub(crate) use child::run as run_child;
pub(crate) use events::Event;
pub(crate) use host::{Host, HostArgs};
pub(crate) use listener::{listen, start};
pub(crate) use room::{Room, available, free_disk_bytes};
