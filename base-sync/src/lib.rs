//! Bases between two stores, over any pair of byte streams.
//!
//! One side *gives* a base and the other *takes* it; either may have called. The taker leads: it knows
//! what it lacks.
//!
//! ```text
//! giver                                          taker
//! Offer or Push: the manifest  ───────────────►
//!                              ◄───────────────  Have: ids of the bases that it holds
//!   which of them it knows     ───────────────►
//!                              ◄───────────────  Hashes of this slab?         (again and again)
//!   runs: "as in base b at n", or hashes ──────►  part root = manifest's? else nothing is fetched
//!                              ◄───────────────  Chunks, those found nowhere here
//!   their contents, zstd       ───────────────►  each checked against its hash, put in its place
//!                              ◄───────────────  Done: it is in the store
//! ```
//!
//! Goals: nothing that the taker holds in any base travels; a link that breaks costs what was under way;
//! a base appears whole, verified and durable, or not at all; memory does not grow with a base, but for
//! one bounded table. Non-goals: who the other is and what it may do ([`Host`] says that), links
//! (anything that reads and writes), names of bases beyond handing them on.

mod give;
mod link;
mod session;
mod take;
#[cfg(test)]
mod tests;
mod wire;

pub use give::Given;
pub use link::Link;
pub use session::{Host, Served, pull, push, serve};
pub use take::{Progress, Taken, Taking};
pub use wire::{MAX_FRAME_BYTES, Message, No, SyncError, Why};
