//! What runs inside the lab host: its first process, and the scenarios.

pub(crate) mod copy;
pub(crate) mod init;
