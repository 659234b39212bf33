//! The binary, run as a user runs it. What needs KVM is skipped where there is none.
#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

mod bases;
mod book;
mod common;
mod crashes;
mod edges;
mod error_table;
mod errors;
mod guests;
mod habits;
mod jail;
mod oci;
mod peers;
mod recover;
mod remote;
mod saved;
mod serve;
mod stage;
mod sync;
mod traces;
