//! A link and guests that need no network and no KVM: what tests, benchmarks and played traces
//! drive the real engine over, in one process and in real time.
//!
//! ```text
//! SimConnect ── makes ──► SimLink ══ up:   rate over time, delay, queue ══► SimLink ── accept()
//!     faults                      ◄═ down: rate over time, delay, queue ══
//! ```
//!
//! Each direction is a function of time (the `line` module): what was written says when it has left,
//! when it arrives and when that is known here. The links put real waiting around it. A link is as
//! TCP fills one once it has found the rate: nothing is lost but by a [`Fault`] or an [`Outage`], and
//! there is no slow start.

mod line;
mod link;
mod shape;
mod target;

pub use link::{Fault, SimConnect, SimGauge, SimLink, SimRx, SimTx};
pub use shape::{LinkShape, Outage, Rate, Shape};
pub use target::{MemHost, MemTarget};
