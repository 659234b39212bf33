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
//! [`plan`] says what VM directories make of it, [`nft`] holds published ports and addresses beyond.
//! Guests that moved are followed for a while ([`trail`], [`ways`], [`mod@tunnel`]; ADR 0034), and
//! [`mod@keeper`] sees to it that all this ends, and is there again after a restart.
//!
//! Goals: a guest keeps its addresses and finds its gateway under the same ones wherever it goes; what a
//! VM's process made goes with it; connections live through a move. Non-goals: IPv6 of the bridge's own,
//! a DHCP server, networks across hosts.

mod arp;
mod attach;
mod book;
mod keeper;
mod netlink;
mod nft;
mod place;
mod plan;
mod publish;
mod subnet;
#[cfg(test)]
mod testing;
mod trail;
mod tunnel;
mod ways;

pub(crate) use attach::{attach, bring_up, refresh, take_down};
pub(crate) use book::{Attachment, FORWARD_FOR_S, Network, NetworkName, Networks, attached};
pub(crate) use keeper::keep;
pub(crate) use place::Place;
pub(crate) use plan::forwarded;
pub(crate) use publish::Published;
pub(crate) use subnet::Subnet;
