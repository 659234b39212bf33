//! The binary, run as a user runs it. Nothing here needs KVM: guests are the lab's business.
#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]
// A helper of a test is a test: it ends where it finds what must not be.
#![allow(clippy::unwrap_used)]

mod bases;
mod common;
mod errors;
