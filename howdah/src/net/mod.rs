//! Networks of guests that a cloudlet manages (ADR 0030).
//!
//! ```text
//! client ── host's port ─ dnat ─┐
//!                          bridge hw-NAME  gateway 10.77.0.1, on every cloudlet the same
//!                           ├── hwt… TAP of VM a's process      guest 10.77.0.5
//!                           └── hwt… TAP of VM b's process      guest 10.77.0.9
//! ```
//!
//! [`book`] keeps which networks there are, [`mod@attach`] makes bridges and TAP interfaces by [`netlink`],
//! [`ports`] and [`nft`] hold published ports and addresses beyond. Goals: a guest keeps its addresses
//! and finds its gateway under the same ones wherever it goes; what a VM's process made goes with it.
//! Non-goals: IPv6 of the bridge's own, a DHCP server, networks across hosts.

mod attach;
mod book;
mod netlink;
mod nft;
mod place;
mod ports;
mod publish;
mod subnet;
#[cfg(test)]
mod testing;

pub(crate) use attach::{attach, bring_up, refresh, take_down};
pub(crate) use book::{Attachment, Network, NetworkName, Networks, attached};
pub(crate) use place::Place;
pub(crate) use publish::Published;
pub(crate) use subnet::Subnet;
