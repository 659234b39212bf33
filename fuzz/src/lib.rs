//! Fuzz targets: everything that reads bytes from a peer, a guest or a file, under arbitrary ones.
//!
//! ```text
//! seeds (made here, and fuzz/seeds/) ─┐
//! libFuzzer (make fuzz)  ─────────────┼─ bytes ─> Target::run ─> the product ─> checked against what
//! mutations (cargo test) ─────────────┘                                         must be true of it
//! ```
//!
//! A target is a function over bytes that does not return normally unless everything held: no
//! panic in any thread, and the properties that its module names. Formats with a checksum are
//! *resealed*: the input says what stands in the file, the target computes the checksum, so that the
//! fuzzer reaches what is behind it. That is also what a hostile writer would do.
//!
//! The same targets run in two ways: under libFuzzer with coverage and address sanitizer
//! (`make fuzz`, `fuzz/README.md`), and for a moment each in `cargo test`, over the seeds and random
//! mutations of them. Goals: one list of targets, each of them deterministic where the product is.
//! Non-goals: KVM (a guest's instructions are not fuzzed), the insides of rustls.

pub mod device;
pub mod disk;
pub mod input;
pub mod model;
pub mod mutate;
pub mod peer;
pub mod scratch;
pub mod targets;
pub mod told;
pub mod world;

pub use input::{Input, Program};
pub use targets::{TARGETS, Target};

/// Runs the target with this name once: what a libFuzzer program is made of.
pub fn run(name: &str, data: &[u8]) {
    let target = targets::find(name).expect("a target of this name");
    let _taken = (target.run)(data);
}
