//! What each command does.

pub(crate) mod base;
pub(crate) mod console;
pub(crate) mod generate;
pub(crate) mod handoff;
pub(crate) mod interrupt;
pub(crate) mod logs;
pub(crate) mod network;
pub(crate) mod overlay;
pub(crate) mod peer;
pub(crate) mod ping;
pub(crate) mod recover;
pub(crate) mod report;
pub(crate) mod restore;
pub(crate) mod run;
pub(crate) mod save;
mod shown;
pub(crate) mod takeover;
pub(crate) mod trace;
pub(crate) mod vm;
