//! What each command does.

pub(crate) mod base;
pub(crate) mod console;
pub(crate) mod handoff;
pub(crate) mod run;
pub(crate) mod takeover;
pub(crate) mod vm;
