//! A VM's place in a network: the bridge, and its own TAP interface.
//!
//! The bridge is made when a network is added, and again when a VM comes after the host has booted. The
//! TAP belongs to the VM's process, which makes it while it still may: it goes with the process, by
//! whatever end, so that there is nothing to clean up.

use netlink_packet_route::link::{InfoKind, LinkAttribute};
use vmm::Tap;

use super::{
    book::Network,
    netlink::{Netlink, NetlinkError},
    plan::{Plan, alone},
};
use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName},
};

/// What the host's kernel needs to be told, to pass on what is not for itself.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

pub(super) fn failure(what: &dyn std::fmt::Display, error: &NetlinkError) -> Failure {
    let way_out = if error.is_permission() {
        "run it as root, or with CAP_NET_ADMIN"
    } else {
        "`ip -d link` shows the interfaces that there are"
    };
    Failure::new(Exit::Host, what, error, way_out)
}

/// Makes a network's bridge as it should be, if it is not.
pub(crate) fn bring_up(network: &Network) -> Result<(), Failure> {
    let what = format!("network {}", network.name);
    let up = || -> Result<Option<String>, NetlinkError> {
        let (name, mac) = (network.name.bridge(), network.subnet.gateway_mac());
        let mut netlink = Netlink::open()?;
        netlink.add_link(&name, InfoKind::Bridge, [LinkAttribute::Address(mac.to_vec())], None)?;
        let link = netlink.link(&name)?;
        let Some(link) = link.filter(|l| l.kind == Some(InfoKind::Bridge) && l.mac == mac) else {
            return Ok(Some(name));
        };
        netlink.add_address(link.index, network.subnet.gateway(), network.subnet.prefix())?;
        netlink.set_up(link.index, &name)?;
        Ok(None)
    };
    match up() {
        Ok(None) => {}
        Ok(Some(name)) => {
            let why = format!("there is another interface {name}, which is not this network's");
            let way_out =
                format!("`ip link del {name}` if it is nobody's, or name the network otherwise");
            return Err(Failure::new(Exit::Conflict, what, why, way_out));
        }
        Err(e) => return Err(failure(&what, &e)),
    }
    std::fs::write(FORWARDING, "1").map_err(|e| {
        let way_out = format!("allow it: `sysctl -w net.ipv4.ip_forward=1` ({FORWARDING})");
        Failure::new(Exit::Host, what, format!("the host does not forward packets: {e}"), way_out)
    })
}

/// Removes a network's bridge.
pub(crate) fn take_down(network: &Network) -> Result<(), Failure> {
    let what = format!("network {}", network.name);
    let mut netlink = Netlink::open().map_err(|e| failure(&what, &e))?;
    netlink.remove_link(&network.name.bridge()).map_err(|e| failure(&what, &e))?;
    Ok(())
}

/// The name of a VM's TAP interface: of several cloudlets on a host each has its own.
fn tap_name(home: &Home, vm: &VmName) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(home.root().as_os_str().as_encoded_bytes());
    hasher.update(b"\0");
    hasher.update(vm.as_ref().as_bytes());
    format!("hwt{}", &hasher.finalize().to_hex()[..10])
}

/// Makes the VM's TAP interface, as a port of its network's bridge.
pub(crate) fn attach(home: &Home, vm: &VmName, network: &Network) -> Result<Tap, Failure> {
    bring_up(network)?;
    let what = format!("network of VM {vm}");
    let name = tap_name(home, vm);
    let tap = Tap::open(&name).map_err(|e| Failure::plain(Exit::Host, &what, e))?;
    let join = || -> Result<(), NetlinkError> {
        let mut netlink = Netlink::open()?;
        let bridge = netlink.link(&network.name.bridge())?.map_or(0, |link| link.index);
        let port = netlink.link(&name)?.map_or(0, |link| link.index);
        netlink.join(port, bridge, &name)
    };
    join().map_err(|e| failure(&what, &e))?;
    Ok(tap)
}

/// Brings the host's packet filter, and the ways to guests that moved, to what networks and VMs are now.
/// Where nothing needs them, a host without will do.
pub(crate) fn refresh(home: &Home) -> Result<(), Failure> {
    if !home.networks().exists() {
        return Ok(());
    }
    let _alone = alone(home)?;
    Plan::make(home)?.apply(home)
}

#[cfg(test)]
mod tests;
