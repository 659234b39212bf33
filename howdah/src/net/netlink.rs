//! The kernel's interfaces, addresses and routes, asked and changed by netlink. One question at a time,
//! each answered before the next: nothing here waits for an event loop, as a VM's process has none.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressMessage},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// No answer is longer.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Why the kernel's network is not as it should be.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub(crate) struct NetlinkError {
    what: String,
    source: io::Error,
}

impl NetlinkError {
    /// Whether this user may not do it.
    pub(crate) fn is_permission(&self) -> bool {
        self.source.kind() == io::ErrorKind::PermissionDenied
    }

    fn is(&self, errno: i32) -> bool {
        self.source.raw_os_error() == Some(errno)
    }
}

/// An interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) mac: Vec<u8>,
    pub(crate) kind: Option<InfoKind>,
    /// The bridge that it is a port of.
    pub(crate) controller: Option<u32>,
    /// The other end, of a VXLAN interface with one.
    pub(crate) remote: Option<Ipv4Addr>,
}

/// A way to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) to: Ipv4Addr,
    pub(crate) prefix: u8,
    /// Over this neighbour; with `out` too it is one of that interface, whatever its addresses are.
    pub(crate) via: Option<Ipv4Addr>,
    /// Out of this interface.
    pub(crate) out: Option<u32>,
    /// In this table; 254 is the main one.
    pub(crate) table: u32,
}

impl Route {
    /// The main table.
    pub(crate) const MAIN: u32 = 254;

    fn message(self) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = AddressFamily::Inet;
        header.destination_prefix_length = self.prefix;
        header.protocol = RouteProtocol::Static;
        header.scope = if self.via.is_some() { RouteScope::Universe } else { RouteScope::Link };
        header.kind = RouteType::Unicast;
        if self.via.is_some() && self.out.is_some() {
            header.flags = RouteFlags::Onlink;
        }
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Table(self.table));
        if self.prefix > 0 {
            attributes.push(RouteAttribute::Destination(RouteAddress::Inet(self.to)));
        }
        let via = self.via.map(|via| RouteAttribute::Gateway(RouteAddress::Inet(via)));
        attributes.extend(via.into_iter().chain(self.out.map(RouteAttribute::Oif)));
        message
    }

    /// As the kernel describes it; none of one that is not of the kind that is made here.
    fn described(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let mut found = Self {
            to: Ipv4Addr::UNSPECIFIED,
            prefix: header.destination_prefix_length,
            via: None,
            out: None,
            table: header.table.into(),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(to)) => found.to = *to,
                RouteAttribute::Gateway(RouteAddress::Inet(via)) => found.via = Some(*via),
                RouteAttribute::Oif(out) => found.out = Some(*out),
                RouteAttribute::Table(table) => found.table = *table,
                _ => {}
            }
        }
        (header.address_family == AddressFamily::Inet && header.kind == RouteType::Unicast)
            .then_some(found)
    }
}

/// Packets with this mark go by that table, before the main one is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MarkRule {
    pub(crate) mark: u32,
    pub(crate) table: u32,
}

impl MarkRule {
    /// Before the main table's rule, behind the host's own addresses.
    const PRIORITY: u32 = 6877;

    fn message(self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        message.attributes.push(RuleAttribute::Priority(Self::PRIORITY));
        message.attributes.push(RuleAttribute::FwMark(self.mark));
        message.attributes.push(RuleAttribute::FwMask(u32::MAX));
        message.attributes.push(RuleAttribute::Table(self.table));
        message
    }
}

/// A socket to the kernel.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Netlink {
    /// Asks the kernel of this network namespace.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Self { socket, sequence: 0 })
        };
        open().map_err(|source| NetlinkError { what: "open a netlink socket".into(), source })
    }

    /// The interface of this name, if there is one.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut ask = LinkMessage::default();
        ask.attributes.push(LinkAttribute::IfName(name.into()));
        let what = format!("look for the interface {name}");
        match self.ask(Message::GetLink(ask), 0, &what) {
            Ok(Some(Message::NewLink(link))) => Ok(Some(described(&link))),
            Ok(_) => Ok(None),
            Err(e) if e.is(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes an interface, down: whether it was not there before.
    pub(crate) fn add_link(
        &mut self,
        name: &str,
        kind: InfoKind,
        more: impl IntoIterator<Item = LinkAttribute>,
        data: Option<LinkInfo>,
    ) -> Result<bool, NetlinkError> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.into()));
        link.attributes.extend(more);
        let info = [Some(LinkInfo::Kind(kind)), data].into_iter().flatten().collect();
        link.attributes.push(LinkAttribute::LinkInfo(info));
        let what = format!("make the interface {name}");
        match self.ask(Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL, &what) {
            Ok(_) => Ok(true),
            Err(e) if e.is(libc::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Sets an interface up.
    pub(crate) fn set_up(&mut self, index: u32, name: &str) -> Result<(), NetlinkError> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.change(Message::SetLink(link), 0, &format!("set the interface {name} up"))
    }

    /// Makes an interface a port of a bridge.
    pub(crate) fn join(&mut self, index: u32, bridge: u32, name: &str) -> Result<(), NetlinkError> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes.push(LinkAttribute::Controller(bridge));
        self.change(Message::SetLink(link), 0, &format!("join the interface {name} to its bridge"))
    }

    /// Removes an interface: whether it was there.
    pub(crate) fn remove_link(&mut self, name: &str) -> Result<bool, NetlinkError> {
        let Some(found) = self.link(name)? else { return Ok(false) };
        let mut link = LinkMessage::default();
        link.header.index = found.index;
        self.change(Message::DelLink(link), 0, &format!("remove the interface {name}"))?;
        Ok(true)
    }

    /// Gives an interface an address, if it has not got it.
    pub(crate) fn add_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = index;
        let local = IpAddr::V4(address);
        message.attributes.push(AddressAttribute::Local(local));
        message.attributes.push(AddressAttribute::Address(local));
        let what = format!("give an interface the address {address}/{prefix}");
        self.change(Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE, &what)
    }

    /// Adds a route, in place of one to the same destination.
    pub(crate) fn add_route(&mut self, route: Route) -> Result<(), NetlinkError> {
        let what = format!("add the route to {}/{}", route.to, route.prefix);
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.change(Message::NewRoute(route.message()), flags, &what)
    }

    /// Removes a route: whether it was there.
    pub(crate) fn remove_route(&mut self, route: Route) -> Result<bool, NetlinkError> {
        let what = format!("remove the route to {}/{}", route.to, route.prefix);
        match self.change(Message::DelRoute(route.message()), 0, &what) {
            Err(e) if e.is(libc::ESRCH) => Ok(false),
            removed => removed.map(|()| true),
        }
    }

    /// Routes out of an interface, of all tables.
    pub(crate) fn routes_out_of(&mut self, index: u32) -> Result<Vec<Route>, NetlinkError> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = AddressFamily::Inet;
        let what = "list the routes";
        let all = self.exchange(Message::GetRoute(ask), NLM_F_DUMP);
        let all = all.map_err(|source| NetlinkError { what: what.into(), source })?;
        let routes = all.iter().filter_map(|message| match message {
            Message::NewRoute(route) => Route::described(route),
            _ => None,
        });
        Ok(routes.filter(|route| route.out == Some(index)).collect())
    }

    /// Has packets with a mark go by a table of their own.
    pub(crate) fn add_rule(&mut self, rule: MarkRule) -> Result<(), NetlinkError> {
        let what = format!("add the rule for packets marked {:#x}", rule.mark);
        match self.change(Message::NewRule(rule.message()), NLM_F_CREATE | NLM_F_EXCL, &what) {
            Err(e) if e.is(libc::EEXIST) => Ok(()),
            added => added,
        }
    }

    /// Removes such a rule, if it is there.
    pub(crate) fn remove_rule(&mut self, rule: MarkRule) -> Result<(), NetlinkError> {
        let what = format!("remove the rule for packets marked {:#x}", rule.mark);
        match self.change(Message::DelRule(rule.message()), 0, &what) {
            Err(e) if e.is(libc::ENOENT) => Ok(()),
            removed => removed,
        }
    }

    /// Says for good which MAC address a neighbour has.
    pub(crate) fn set_neighbour(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        let destination = NeighbourAddress::Inet(address);
        message.attributes.push(NeighbourAttribute::Destination(destination));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let what = format!("say where the neighbour {address} is");
        self.change(Message::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE, &what)
    }

    pub(super) fn change(
        &mut self,
        message: Message,
        flags: u16,
        what: &str,
    ) -> Result<(), NetlinkError> {
        self.ask(message, flags, what).map(drop)
    }

    /// Sends a request; what it answers besides that it was done.
    fn ask(
        &mut self,
        message: Message,
        flags: u16,
        what: &str,
    ) -> Result<Option<Message>, NetlinkError> {
        self.exchange(message, flags)
            .map(|mut answers| answers.pop())
            .map_err(|source| NetlinkError { what: what.to_owned(), source })
    }

    fn exchange(&mut self, message: Message, flags: u16) -> io::Result<Vec<Message>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.get(..datagram.len().min(MAX_ANSWER_BYTES)).unwrap_or_default();
            while !rest.is_empty() {
                let message = NetlinkMessage::<Message>::deserialize(rest)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length.max(1)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(e) => return Err(e.to_io()),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

fn described(link: &LinkMessage) -> Link {
    let index = link.header.index;
    let mut found = Link { index, mac: Vec::new(), kind: None, controller: None, remote: None };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(mac) => found.mac.clone_from(mac),
            LinkAttribute::Controller(bridge) => found.controller = Some(*bridge),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => found.kind = Some(kind.clone()),
                        LinkInfo::Data(InfoData::Vxlan(said)) => {
                            found.remote = said.iter().find_map(|one| match one {
                                InfoVxlan::Group(remote) => Some(*remote),
                                _ => None,
                            });
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    found
}
