//! What a cloudlet's daemon and its clients say to each other.
//!
//! ```text
//! howdah CLI ─┐
//! programs ───┼─ HTTP/1.1 + JSON ─► HOME/api.sock ─► howdah serve ─► the processes of VMs
//! curl ───────┘
//! ```
//!
//! The types here are the messages; the OpenAPI document that the daemon serves at `/openapi.json` is
//! made of them. [`Client`] speaks over the Unix socket, or a connection that is made for it ([`Dial`]), and
//! blocks, so that callers need no runtime.
//!
//! Whatever takes long is an [`Operation`]: it is begun, looked at, waited for and cancelled by its
//! id, and goes on whoever asked for it. What fails is a [`Problem`] (RFC 9457), with the exit code
//! that the command line ends with.

mod base;
mod client;
mod event;
mod host;
mod operation;
mod peer;
mod problem;
mod vm;

pub use base::{
    Base, BaseHeal, BaseJudged, BaseMoved, BasePull, BasePush, BaseRemoved, BasesCollected, BasesGc,
};
pub use client::{At, Client, ClientError, Connection, Dial, Events};
pub use event::Event;
pub use host::{Disk, Host, Kvm, Receiving};
pub use operation::{Kind, Operation, Progress, State};
pub use peer::{CouldGo, GuestNetwork, HeldBase, Peer, PeerSpec, Pinged, Rights};
pub use problem::{CONTENT_TYPE as PROBLEM_TYPE, Problem};
pub use vm::{
    Attachment, HandoffProgress, HandoffSpec, Limits, Process, Record, Started, Vm, VmConfig,
    VmRun, VmRunning, VmState,
};

/// Where, in a cloudlet's home directory, its daemon listens.
pub const SOCKET: &str = "api.sock";
/// The version of the paths below which everything is.
pub const VERSION: &str = "v1";
/// What names of VMs and peers are.
pub const NAME_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$";
