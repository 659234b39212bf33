//! Others that move running guests, driven in the same lab host, between the same cloudlets.
//!
//! QEMU is driven as its management tools drive it: the disk is mirrored to the target over NBD, then
//! memory migrates; right before the switch the source's guest is stopped, what the mirror still owes
//! is written, and the target runs. Each step is a command of QMP, kept for the record.

mod disk;
mod migrate;
mod qemu;
mod qmp;
mod run;
mod variant;

pub(crate) use self::run::run;
