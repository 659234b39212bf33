//! The process of one VM: owns the machine, answers commands, watches the guest.

pub(crate) mod boot;
pub(crate) mod farewell;
pub(crate) mod kvm;
mod leaving;
pub(crate) mod machine;
mod process;
mod progress;
mod ready;
mod save;
mod settle;
mod signals;
pub(crate) mod snapshot;
mod tap;

pub(crate) use boot::{
    Brought, Front, Origin, check_host, finish, run, run_with, warn_of_slow_host,
};
pub(crate) use kvm::cmdline;
pub(crate) use process::{Coming, End, Event, Links, Process};
pub(crate) use settle::{Asking, decline_lost_copies, recover};
pub(crate) use signals::watch as watch_signals;
pub(crate) use tap::HeldTap;
