//! The TAP device of a VM, opened while the process still may.

use vmm::{NetConfig, Tap, TapError};

use crate::{
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmName},
    mac::Mac,
    net::{self, NetworkName, Networks},
};

const WHAT: &str = "network of the VM";
const WAY_OUT: &str =
    "name one with --tap (`ip tuntap add NAME mode tap` makes one), or a network with --network";

/// What came of opening a TAP device. A failure matters only to a VM that has a network device.
#[derive(Debug)]
pub(crate) struct HeldTap(Result<Tap, NoTap>);

#[derive(Debug)]
enum NoTap {
    Unnamed,
    Missing(String),
    Failed(TapError),
    Unattached(Failure),
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

    /// Makes a VM's own device, in a network of the cloudlet.
    pub(crate) fn attach(home: &Home, vm: &VmName, network: &NetworkName) -> Self {
        let network = Networks::read(home).and_then(|all| all.get(network).cloned());
        let tap = network.and_then(|network| net::attach(home, vm, &network));
        Self(tap.map_err(NoTap::Unattached))
    }

    /// What a VM's configuration says.
    pub(crate) fn of(home: &Home, vm: &VmName, config: &VmConfig) -> Self {
        match &config.network {
            Some(attachment) => Self::attach(home, vm, &attachment.network),
            None => Self::open(config.tap.as_deref()),
        }
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
            Err(NoTap::Unattached(failure)) => Err(failure.clone()),
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
