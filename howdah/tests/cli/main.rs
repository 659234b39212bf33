//! The binary, run as a user runs it. Nothing here needs KVM: guests are the lab's business.
#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

mod bases;
mod common;
mod errors;
mod guests;
mod saved;
mod traces;
