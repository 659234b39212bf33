//! io_uring for files: what is to be done, given to the kernel many at a time, and the memory that
//! the kernel works on until it is done.
//!
//! ```text
//! Operation ── Ring::push ──> backlog ── submit ──> kernel ── reap ──> token and result
//! Batch     ── Batches::run ──> all of it, start to end
//! ```
//!
//! [`Ring`] is for who goes on meanwhile: a device that has its guest's requests carried out. It
//! works on memory that others own, so that giving it an operation is `unsafe`. [`Batch`] is for who waits:
//! it borrows its memory, and [`Batches::run`] returns when the kernel is done with it, also when something
//! fails or panics.
//!
//! What the kernel cut short is given to it again, as is what it was too busy for. Goals: nothing
//! that the kernel may still write is ever freed; no more threads. Non-goals: sockets, an executor.

mod batch;
mod operation;
mod ring;
mod slab;

pub use batch::{Batch, Batches};
pub use operation::{Action, FileEnd, Operation};
pub use ring::{Need, Ring, RingError};
pub use slab::Slab;
