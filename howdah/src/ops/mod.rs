//! What can be done with a cloudlet: each verb once, for whoever asks.
//!
//! ```text
//! commands/ ─ prints ─┐
//!                     ├─► ops/ ─► HOME, the processes of VMs
//! serve/ ─── answers ─┘
//! ```
//!
//! A verb takes what it needs, does it, and returns a type of the API or a [`crate::failure::Failure`]; it
//! prints nothing. Verbs block.

pub(crate) mod base;
pub(crate) mod gc;
pub(crate) mod handoff;
pub(crate) mod host;
pub(crate) mod peer;
pub(crate) mod ping;
pub(crate) mod run;
pub(crate) mod vm;
