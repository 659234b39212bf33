//! The binary, run as a user runs it. Nothing here needs KVM: guests are the lab's business.

mod bases;
mod common;
mod errors;
