//! Which packets take a tunnel, and which may come out of one: the part of the packet filter's table
//! that is for guests that moved.
//!
//! ```text
//!           old cloudlet                                new cloudlet
//! client ─► dnat ─► route to the guest ──► tunnel ──► bridge ─► guest
//! client ◄─ dnat undone ◄───────────────── tunnel ◄── by the mark of the connection ◄─ guest
//! ```
//!
//! A connection is marked with the tunnel that it came by, and what the guest says in it goes back there.
//! What a guest says that just moved, in a connection that this host has never seen, belongs to one that is
//! older than the move: it goes to the cloudlet that the guest came from, which knows it.

use std::{fmt::Write, net::Ipv4Addr};

use super::{
    book::Network,
    publish::{Protocol, Published},
    tunnel::{self, Tunnel},
};

/// One guest, one peer, one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Whose.
    pub(super) guest: Ipv4Addr,
    pub(super) network: Network,
    pub(super) publish: Vec<Published>,
    pub(super) tunnel: Tunnel,
    pub(super) course: Course,
    /// When it ends, in seconds of the Unix epoch.
    pub(super) until_s: u64,
}

/// Where the peer is, from a guest's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// The guest went there: traffic for it goes on.
    Onward {
        /// As whom neighbours of the subnet speak to it: this host's address towards the peer.
        seen_as: Option<Ipv4Addr>,
    },
    /// The guest came from there: answers go back.
    Back {
        /// It is still coming.
        pending: bool,
    },
}

impl Way {
    fn is_onward(&self) -> bool {
        matches!(self.course, Course::Onward { .. })
    }

    fn left_s(&self, now_s: u64) -> u64 {
        self.until_s.saturating_sub(now_s)
    }
}

/// Ports that are published for guests that went away, with their addresses.
pub(super) fn published(ways: &[Way]) -> Vec<(Published, Ipv4Addr)> {
    let onward = ways.iter().filter(|way| way.is_onward());
    onward.flat_map(|way| way.publish.iter().map(|port| (*port, way.guest))).collect()
}

/// Sets and chains, inside of the table. The kernel itself forgets a guest when its time is over, also
/// where nothing of this program runs any more. Of the ways back of one guest the newest comes first.
pub(super) fn chains(ways: &[Way], tag: &str, now_s: u64) -> String {
    let mut text = String::new();
    if ways.is_empty() {
        return text;
    }
    let all = format!("{}*", tunnel::prefix(tag));
    for (set, onward) in [("onward", true), ("back", false)] {
        let _ = writeln!(text, "  set {set} {{\n    type ifname . ipv4_addr; flags timeout;");
        let those = ways.iter().filter(|way| way.is_onward() == onward && way.left_s(now_s) > 0);
        let elements: Vec<_> = those
            .map(|way| {
                let (name, guest) = (&way.tunnel.name, way.guest);
                format!("\"{name}\" . {guest} timeout {}s", way.left_s(now_s))
            })
            .collect();
        if !elements.is_empty() {
            let _ = writeln!(text, "    elements = {{ {} }}", elements.join(", "));
        }
        let _ = writeln!(text, "  }}");
    }
    // Before connections are tracked: frames of a tunnel's network that are not of its peer.
    text += "  chain frames {\n    type filter hook prerouting priority -300;\n";
    for Tunnel { vni, remote, .. } in tunnels(ways) {
        let _ = writeln!(
            text,
            "    fib daddr type local udp dport {} @th,96,24 {vni:#x} ip saddr != {remote} drop",
            tunnel::PORT
        );
    }
    // When the connection is known, before it is routed and translated.
    text += "  }\n  chain ways {\n    type filter hook prerouting priority -150;\n";
    for way in ways {
        match way.course {
            Course::Onward { .. } => passing(&mut text, way, ways),
            Course::Back { .. } => arriving(&mut text, way, ways),
        }
    }
    let _ = writeln!(
        text,
        "    iifname . ip saddr @onward accept\n    iifname . ip daddr @back accept\n    iifname \"{all}\" drop"
    );
    text += "  }\n  chain between {\n    type filter hook forward priority -150;\n";
    for Tunnel { name, .. } in tunnels(ways) {
        let _ = writeln!(text, "    iifname \"{name}\" oifname \"{name}\" drop");
    }
    for Way { guest, tunnel, course, .. } in ways {
        // The peer has it no more if it sends for it here: it must not have it back.
        if matches!(course, Course::Back { pending: true }) {
            let name = &tunnel.name;
            let _ =
                writeln!(text, "    iifname \"{name}\" ip daddr {guest} oifname \"{all}\" drop");
        }
    }
    text += "  }\n  chain outward {\n    type filter hook postrouting priority -150;\n";
    for Way { guest, tunnel, .. } in ways.iter().filter(|way| way.is_onward()) {
        let name = &tunnel.name;
        let _ = writeln!(
            text,
            "    oifname \"{name}\" ip daddr {guest} oifname . ip daddr != @onward drop"
        );
    }
    // The frame around it is routed too, with the packet's mark: it would come back into the tunnel.
    let _ = writeln!(text, "    oifname \"{all}\" meta mark set 0");
    text += "  }\n";
    text
}

/// What is translated on its way into a tunnel, inside of the chain for sources.
pub(super) fn translations(ways: &[Way], tag: &str) -> String {
    let mut text = String::new();
    for Way { guest, network, tunnel, course, .. } in ways {
        // At the other end the subnet is that cloudlet's own: an answer to one of its addresses would stay
        // there.
        if let Course::Onward { seen_as: Some(seen_as) } = course {
            let (subnet, name) = (network.subnet, &tunnel.name);
            let _ = writeln!(
                text,
                "    oifname \"{name}\" ip saddr {subnet} ip daddr {guest} snat to {seen_as}"
            );
        }
    }
    if !ways.is_empty() {
        let _ = writeln!(text, "    oifname \"{}*\" accept", tunnel::prefix(tag));
    }
    text
}

/// Every tunnel once.
fn tunnels(ways: &[Way]) -> Vec<&Tunnel> {
    let mut all: Vec<_> = ways.iter().map(|way| &way.tunnel).collect();
    all.sort();
    all.dedup();
    all
}

/// The ways back of a guest, newest first.
fn back(guest: Ipv4Addr, ways: &[Way]) -> impl Iterator<Item = &Way> {
    ways.iter().filter(move |way| way.guest == guest && !way.is_onward())
}

/// Packets by which a guest goes on with what it began before this host saw anything of it.
fn older_than_the_move(publish: &[Published]) -> Vec<String> {
    let mut all = vec!["ct state new tcp flags & (fin|syn|rst|ack) != syn".to_owned()];
    let udp = publish.iter().filter(|port| port.protocol == Protocol::Udp);
    let mut ports: Vec<_> = udp.map(|port| port.guest).collect();
    ports.sort_unstable();
    ports.dedup();
    all.extend(ports.into_iter().map(|port| format!("ct state new udp sport {port}")));
    all
}

/// A guest that is here, or was, from where it came.
fn arriving(text: &mut String, way: &Way, ways: &[Way]) {
    let Way { guest, network, tunnel, publish, .. } = way;
    let (bridge, subnet) = (network.name.bridge(), network.subnet);
    let (name, mark) = (&tunnel.name, tunnel.mark());
    let _ = writeln!(text, "    iifname \"{name}\" ip saddr {subnet} ip daddr {guest} drop");
    let _ = writeln!(text, "    iifname \"{name}\" ip daddr {guest} ct mark set {mark:#x}");
    let from = format!("iifname \"{bridge}\" ip saddr {guest} ip daddr != {subnet}");
    let _ = writeln!(text, "    {from} ct mark {mark:#x} meta mark set {mark:#x}");
    if back(*guest, ways).next() == Some(way) {
        for packets in older_than_the_move(publish) {
            let _ = writeln!(
                text,
                "    {from} {packets} ct mark set {mark:#x} meta mark set {mark:#x}"
            );
        }
    }
}

/// A guest that went on: what it says in connections that came here from elsewhere goes back there.
fn passing(text: &mut String, way: &Way, ways: &[Way]) {
    let Way { guest, tunnel, publish, .. } = way;
    let from = format!("iifname \"{}\" ip saddr {guest}", tunnel.name);
    let mut newest = true;
    for before in back(*guest, ways).filter(|before| before.tunnel.name != tunnel.name) {
        let mark = before.tunnel.mark();
        let _ = writeln!(text, "    {from} ct mark {mark:#x} meta mark set {mark:#x}");
        if std::mem::take(&mut newest) {
            for packets in older_than_the_move(publish) {
                let _ = writeln!(
                    text,
                    "    {from} {packets} ct mark set {mark:#x} meta mark set {mark:#x}"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use handoff::tls::Identity;

    use super::*;

    const TAG: &str = "0123abcd";

    fn network() -> Network {
        let (name, subnet) = ("edge".parse().unwrap(), "10.77.0.0/24".parse().unwrap());
        Network { name, subnet, nat: true, forward_for_s: 600 }
    }

    /// Tunnels of one cloudlet to two others.
    fn two_tunnels() -> [Tunnel; 2] {
        let [own, b, c] = [0; 3].map(|_| Identity::generate().unwrap().key());
        let at = |n| Ipv4Addr::new(192, 0, 2, n);
        [Tunnel::between(TAG, own, b, at(2)), Tunnel::between(TAG, own, c, at(3))]
    }

    fn way(tunnel: &Tunnel, course: Course) -> Way {
        Way {
            guest: Ipv4Addr::new(10, 77, 0, 5),
            network: network(),
            publish: vec!["8080:80".parse().unwrap(), "5353:53/udp".parse().unwrap()],
            tunnel: tunnel.clone(),
            course,
            until_s: 1600,
        }
    }

    const HERE: Course = Course::Back { pending: false };
    const GONE: Course = Course::Onward { seen_as: Some(Ipv4Addr::new(192, 0, 2, 1)) };

    #[test]
    fn without_guests_that_moved_there_is_nothing() {
        assert_eq!(chains(&[], TAG, 0), "");
        assert_eq!(translations(&[], TAG), "");
    }

    #[test]
    fn the_kernel_is_told_for_how_long() {
        let [b, _] = two_tunnels();
        let ways = [way(&b, GONE)];
        let text = chains(&ways, TAG, 1000);
        let element = format!("\"{}\" . 10.77.0.5 timeout 600s", b.name);
        assert!(text.contains(&element), "{text}");
        assert!(
            !chains(&ways, TAG, 1600).contains("elements"),
            "a time of nothing would be for ever"
        );
        assert_eq!(text.matches('{').count(), text.matches('}').count());
        assert_eq!(published(&ways).len(), 2);
        assert_eq!(published(&[way(&b, HERE)]), []);
        assert!(translations(&ways, TAG).contains("snat to 192.0.2.1"));
    }

    /// What is older than the move goes to the cloudlet where the guest was last, which knows the one before.
    #[test]
    fn what_is_older_goes_to_the_newest_cloudlet_before() {
        let [b, c] = two_tunnels();
        let text = chains(&[way(&c, HERE), way(&b, HERE)], TAG, 1000);
        let older = |tunnel: &Tunnel| {
            let mark = format!("meta mark set {:#x}", tunnel.mark());
            text.lines().filter(|l| l.contains("ct state new") && l.contains(&mark)).count()
        };
        // TCP, and the published port of UDP.
        assert_eq!((older(&c), older(&b)), (2, 0), "{text}");
    }

    /// Two cloudlets that both believe the other to know a connection would send it to and fro.
    #[test]
    fn nothing_goes_back_by_the_tunnel_that_it_came_by() {
        let [b, c] = two_tunnels();
        let text = chains(&[way(&b, GONE), way(&c, HERE), way(&b, HERE)], TAG, 1000);
        let from_b = format!("iifname \"{}\" ip saddr 10.77.0.5", b.name);
        let sent = |tunnel: &Tunnel| {
            let mark = format!("meta mark set {:#x}", tunnel.mark());
            text.lines().filter(|l| l.contains(&from_b) && l.contains(&mark)).count()
        };
        assert_eq!((sent(&b), sent(&c)), (0, 3), "{text}");
        assert!(text.contains(&format!("iifname \"{0}\" oifname \"{0}\" drop", b.name)));
        let coming = chains(&[way(&b, GONE), way(&c, Course::Back { pending: true })], TAG, 1000);
        let back = format!("iifname \"{}\" ip daddr 10.77.0.5 oifname \"hwx0123*\" drop", c.name);
        assert!(coming.contains(&back), "{coming}");
    }
}
