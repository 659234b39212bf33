//! The handoff engine: moves a VM it sees only through [`SourceVm`] and [`TargetVm`].
//!
//! ```text
//! harvest -> read -> classify -> compress -> seal ==link==> open -> decompress -> resolve -> apply
//! ```
//!
//! Goals: nothing runs unverified, one owner at any instant, cost follows change, every queue and
//! wait bounded. Non-goals: KVM, files of a VM, sockets (a [`Transport`] is given).

pub mod adapt;
pub mod audit;
pub mod base_view;
pub mod chunks;
pub mod engine;
mod health;
pub mod heap;
pub mod link;
pub mod order;
pub mod ownership;
pub mod policy;
mod priority;
pub mod report;
pub mod root;
pub mod sim;
pub mod source;
pub mod stage;
pub mod step;
pub mod target;
pub mod tcp;
pub mod tls;
pub mod trace;
pub mod vm;
pub mod wire;

pub use base_view::{BasePlace, BaseView, Bases};
pub use chunks::{ChunkId, ChunkSet, Geometry, Space};
pub use link::{Clock, Connect, LinkGauge, LinkReading, Transport};
pub use root::{StateRoot, StateTable};
pub use vm::{Offer, Refusal, SourceVm, TargetHost, TargetVm};
