//! The process of one VM: owns the machine, answers commands, watches the guest.

pub(crate) mod machine;
mod process;
mod signals;

pub(crate) use process::{End, Event, Process};
