//! The way between two cloudlets for packets of guests that moved: a VXLAN interface for each peer.
//!
//! Both ends make theirs of what they know anyway, their two keys and the other's address, and need no
//! word of each other for it: the network's number and the MAC addresses follow from the keys.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use handoff::tls::PeerKey;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo};
use nix::net::if_::if_nameindex;

use super::{
    arp,
    netlink::{MarkRule, Netlink, NetlinkError, Route},
    ways::{Course, Way},
};

/// The port of VXLAN (RFC 7348), which firewalls between cloudlets let pass.
pub(super) const PORT: u16 = 4789;
/// What tunnels' names begin with; bridges of networks have another beginning.
const PREFIX: &str = "hwx";
/// Hexadecimal digits of a network's number, at a name's end.
const VNI_DIGITS: usize = 6;
/// Marks and tables of ours: a network's number is below.
const MARKS: u32 = 0x6800_0000;
/// Who is at the other end, on every tunnel: the dummy address of RFC 7600, seen by no packet.
const OTHER_END: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// A tunnel to a peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tunnel {
    /// Its interface.
    pub(super) name: String,
    /// The number of its network: 24 bits.
    pub(super) vni: u32,
    /// The peer's address.
    pub(super) remote: Ipv4Addr,
    here: [u8; 6],
    there: [u8; 6],
}

/// What the names of a cloudlet's tunnels begin with; `tag` is that cloudlet's on this host.
pub(super) fn prefix(tag: &str) -> String {
    format!("{PREFIX}{}", &tag[..tag.len().min(4)])
}

impl Tunnel {
    /// Between this cloudlet and the peer at `remote`.
    pub(super) fn between(tag: &str, own: PeerKey, peer: PeerKey, remote: Ipv4Addr) -> Self {
        let (first, second) = (own.min(peer).to_string(), own.max(peer).to_string());
        let hash = blake3::hash(format!("howdah tunnel {first} {second}").as_bytes());
        let [a, b, c, ..] = *hash.as_bytes();
        let vni = u32::from_be_bytes([0, a, b, c]).max(1);
        let mac = |key: PeerKey| {
            let hash = blake3::hash(format!("howdah tunnel's end {key}").as_bytes());
            let [a, b, c, d, ..] = *hash.as_bytes();
            [0x02, 0x68, a, b, c, d]
        };
        let name = format!("{}{vni:0VNI_DIGITS$x}", prefix(tag));
        Self { name, vni, remote, here: mac(own), there: mac(peer) }
    }

    /// What packets carry in the host's memory that go back over this one.
    pub(super) fn mark(&self) -> u32 {
        MARKS | self.vni
    }

    fn rule(&self) -> MarkRule {
        MarkRule { mark: self.mark(), table: self.mark() }
    }

    fn route(&self, index: u32, to: Ipv4Addr, prefix: u8, table: u32) -> Route {
        Route { to, prefix, via: Some(OTHER_END), out: Some(index), table }
    }

    /// Makes it as it should be, if it is not; its index.
    fn bring_up(&self, netlink: &mut Netlink) -> Result<u32, NetlinkError> {
        let name = &self.name;
        let found = netlink.link(name)?;
        if found.is_some_and(|link| link.remote != Some(self.remote)) {
            // The peer has another address now.
            netlink.remove_link(name)?;
        }
        let data = vec![
            InfoVxlan::Id(self.vni),
            InfoVxlan::Group(self.remote),
            InfoVxlan::Port(PORT),
            InfoVxlan::Learning(false),
        ];
        let data = Some(LinkInfo::Data(InfoData::Vxlan(data)));
        let mac = LinkAttribute::Address(self.here.to_vec());
        let made = netlink.add_link(name, InfoKind::Vxlan, [mac], data)?;
        let index = netlink.link(name)?.map_or(0, |link| link.index);
        if made {
            // Who calls a guest comes from anywhere: a route back over this interface is not asked for.
            let strictest = sysctl("all", "rp_filter").unwrap_or_default();
            set_sysctl(name, "rp_filter", if strictest.trim() == "1" { "2" } else { "0" });
        }
        netlink.set_up(index, name)?;
        netlink.set_neighbour(index, OTHER_END, self.there)?;
        netlink.add_route(self.route(index, Ipv4Addr::UNSPECIFIED, 0, self.mark()))?;
        netlink.add_rule(self.rule())?;
        Ok(index)
    }
}

fn sysctl_path(interface: &str, name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/{name}")
}

fn sysctl(interface: &str, name: &str) -> Option<String> {
    std::fs::read_to_string(sysctl_path(interface, name)).ok()
}

fn set_sysctl(interface: &str, name: &str, value: &str) {
    let path = sysctl_path(interface, name);
    if let Err(e) = std::fs::write(&path, value) {
        tracing::warn!("{path}: {e}");
    }
}

/// The interfaces that there are.
fn interfaces() -> Vec<String> {
    let all = if_nameindex().map(|all| {
        all.iter().filter_map(|one| one.name().to_str().ok().map(str::to_owned)).collect()
    });
    all.unwrap_or_else(|e| {
        tracing::warn!("interfaces cannot be listed: {e}");
        Vec::new()
    })
}

/// Whether a bridge leads to others than this host's VMs: it has a port that is no TAP interface. Then
/// those who look for a guest find it by themselves, and answering for it would be in its way.
pub(super) fn leads_elsewhere(bridge: &str) -> Result<bool, NetlinkError> {
    let mut netlink = Netlink::open()?;
    let Some(index) = netlink.link(bridge)?.map(|link| link.index) else { return Ok(false) };
    for name in interfaces() {
        let link = netlink.link(&name)?;
        let port = link.filter(|link| link.controller == Some(index));
        if port.is_some_and(|p| p.kind != Some(InfoKind::Tun) && !name.starts_with("hwt")) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Brings tunnels and routes to what `ways` need; those of this cloudlet (`tag`) that none needs go.
pub(super) fn apply(tag: &str, ways: &[Way]) -> Result<(), NetlinkError> {
    let wanted: BTreeMap<&str, &Tunnel> =
        ways.iter().map(|way| (way.tunnel.name.as_str(), &way.tunnel)).collect();
    let mut netlink = Netlink::open()?;
    let ours = prefix(tag);
    for name in interfaces().iter().filter(|name| name.starts_with(&ours)) {
        if wanted.contains_key(name.as_str()) {
            continue;
        }
        if let Ok(vni) = u32::from_str_radix(&name[ours.len()..], 16) {
            let mark = MARKS | vni;
            netlink.remove_rule(MarkRule { mark, table: mark })?;
        }
        // Its routes go with it.
        netlink.remove_link(name)?;
    }
    for tunnel in wanted.into_values() {
        // One that cannot be made takes nothing from the others.
        if let Err(e) = lead_through(&mut netlink, tunnel, ways) {
            tracing::warn!("tunnel {} to {}: {e}", tunnel.name, tunnel.remote);
        }
    }
    Ok(())
}

/// Makes a tunnel, with routes to those guests that are behind it.
fn lead_through(netlink: &mut Netlink, tunnel: &Tunnel, ways: &[Way]) -> Result<(), NetlinkError> {
    let index = tunnel.bring_up(netlink)?;
    let onward = ways.iter().filter(|way| {
        way.tunnel.name == tunnel.name && matches!(way.course, Course::Onward { .. })
    });
    let onward: Vec<&Way> = onward.collect();
    let guests: BTreeSet<Ipv4Addr> = onward.iter().map(|way| way.guest).collect();
    let mut there = BTreeSet::new();
    for route in netlink.routes_out_of(index)? {
        if route.table != Route::MAIN || route.prefix != 32 {
            continue;
        }
        if guests.contains(&route.to) {
            there.insert(route.to);
        } else {
            netlink.remove_route(route)?;
        }
    }
    for way in onward.iter().filter(|way| !there.contains(&way.guest)) {
        netlink.add_route(tunnel.route(index, way.guest, 32, Route::MAIN))?;
        // Those who remember the guest's own MAC address would find nobody there for a while.
        let bridge = way.network.name.bridge();
        if let Some(link) = netlink.link(&bridge)? {
            let said = arp::announce(link.index, way.network.subnet.gateway_mac(), way.guest);
            if let Err(e) = said {
                tracing::warn!("neighbours of {} are not told: {e}", way.guest);
            }
        }
    }
    Ok(())
}

/// Has bridges answer for those of their guests that are behind a tunnel, and for nobody else's.
pub(super) fn answer_for(bridges: &BTreeMap<String, bool>) {
    for (bridge, answer) in bridges {
        let value = if *answer { "1" } else { "0" };
        // A bridge that is not there answers for nobody.
        if sysctl(bridge, "proxy_arp").is_some_and(|now| now.trim() != value) {
            set_sysctl(bridge, "proxy_arp", value);
        }
    }
}

#[cfg(test)]
mod tests {
    use handoff::tls::Identity;

    use super::*;

    #[test]
    fn both_ends_make_the_same_of_their_keys() {
        let [a, b, c] = [0; 3].map(|_| Identity::generate().unwrap().key());
        let (to_a, to_b) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
        let here = Tunnel::between("0123abcd", a, b, to_b);
        let there = Tunnel::between("4567abcd", b, a, to_a);
        assert_eq!((here.vni, here.here, here.there), (there.vni, there.there, there.here));
        assert_ne!(here.here, here.there);
        assert!(here.name.len() <= 15 && here.name.starts_with("hwx0123"), "{}", here.name);
        assert!(here.vni > 0 && here.vni < 1 << 24);
        let other = Tunnel::between("0123abcd", a, c, to_b);
        assert!(other.vni != here.vni && other.mark() != here.mark());
    }
}
