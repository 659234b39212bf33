//! The TAP device of a VM, opened while the process still may.

use vmm::{NetConfig, Tap, TapError};

use crate::{
    failure::{Exit, Failure},
    mac::Mac,
};

const WHAT: &str = "network of the VM";
const WAY_OUT: &str = "name one with --tap (`ip tuntap add NAME mode tap` makes one)";

/// What came of opening a TAP device. A failure matters only to a VM that has a network device.
#[derive(Debug)]
pub(crate) struct HeldTap(Result<Tap, NoTap>);

#[derive(Debug)]
enum NoTap {
    Unnamed,
    Missing(String),
    Failed(TapError),
}

impl HeldTap {
    /// Opens the device of this name, if one is named.
    pub(crate) fn open(name: Option<&str>) -> Self {
        let Some(name) = name else { return Self(Err(NoTap::Unnamed)) };
        // Opening a TAP device that is not there would make one, joined to nothing.
        if nix::net::if_::if_nametoindex(name).is_err() {
            return Self(Err(NoTap::Missing(name.to_owned())));
        }
        Self(Tap::open(name).map_err(NoTap::Failed))
    }

    /// The network of a guest with this address, if it has one.
    pub(crate) fn network(&self, mac: Option<&str>) -> Result<Option<NetConfig>, Failure> {
        let Some(mac) = mac else { return Ok(None) };
        let mac: Mac =
            mac.parse().map_err(|e| Failure::new(Exit::Corrupt, "config.json", e, "correct it"))?;
        match &self.0 {
            Ok(tap) => Ok(Some(NetConfig { tap: tap.clone(), mac: mac.0, addresses: Vec::new() })),
            Err(NoTap::Unnamed) => {
                let why = "it has a network device, and no TAP device of this host is named for it";
                Err(Failure::new(Exit::Host, WHAT, why, WAY_OUT))
            }
            Err(NoTap::Missing(name)) => {
                let why = format!("this host has no network device {name}");
                Err(Failure::new(Exit::Host, WHAT, why, WAY_OUT))
            }
            Err(NoTap::Failed(e)) => Err(Failure::plain(Exit::Host, WHAT, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_matters_to_a_guest_with_a_network_only() {
        for (name, says) in [(None, "no TAP device"), (Some("no-such-tap"), "no-such-tap")] {
            let held = HeldTap::open(name);
            assert!(held.network(None).unwrap().is_none());
            let failure = held.network(Some("02:00:00:00:00:01")).unwrap_err();
            assert!(failure.exit == Exit::Host && failure.message.contains(says), "{failure}");
        }
        assert_eq!(HeldTap::open(None).network(Some("x")).unwrap_err().exit, Exit::Corrupt);
    }
}
