//! What the host's network is to be, of what VM directories say; and making it so.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, ToSocketAddrs, UdpSocket},
    os::unix::fs::MetadataExt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use handoff::{ownership::Record, tls::PeerKey};

use super::{
    attach,
    book::{Attachment, Network, Networks, attached},
    nft::{self, Rules},
    trail::{Moment, Trail, Trails},
    tunnel::{self, Tunnel},
    ways::{Course, Way},
};
use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName},
    lock::Lock,
    peers,
};

/// How long another process may take that does the same.
const PATIENCE: Duration = Duration::from_secs(20);
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// What the host's network is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    rules: Rules,
    /// The networks' bridges, and whether each answers for guests that are not on it.
    bridges: BTreeMap<String, bool>,
}

/// A VM in a network, as its directory has it.
struct Member {
    vm: VmName,
    attachment: Attachment,
    record: Record,
    written_s: u64,
}

/// Lets one process at a time look and act on it: what was seen first must not be done last.
pub(super) fn alone(home: &Home) -> Result<Lock, Failure> {
    let path = home.networks_lock();
    let since = Instant::now();
    loop {
        match Lock::take(&path) {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) if since.elapsed() < PATIENCE => std::thread::sleep(BETWEEN_TRIES),
            Ok(None) => {
                let why = format!("another process has held it for {PATIENCE:?}");
                let way_out = "see why that one hangs: its pid is in the file";
                return Err(Failure::new(Exit::Failed, path.display(), why, way_out));
            }
            Err(e) => return Err(Failure::file("lock", &path, &e)),
        }
    }
}

pub(super) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Plan {
    /// Looks at networks and VMs, and notes where those went that are handed off. With the lock.
    pub(super) fn make(home: &Home) -> Result<Self, Failure> {
        let networks = Networks::read(home)?.all().to_vec();
        let now_s = now_s();
        let members = members(home, now_s)?;
        let mut published = Vec::new();
        for Member { attachment, record, .. } in &members {
            let Some(address) = attachment.address.filter(|_| record.may_run()) else { continue };
            published.extend(attachment.publish.iter().map(|port| (*port, address)));
        }
        published.sort();
        let trails = trails(home, &networks, &members, now_s)?;
        let ways = ways(home, &networks, &members, &trails, now_s);
        let bridges = networks.iter().map(|network| {
            let onward = |way: &Way| matches!(way.course, Course::Onward { .. });
            let answers = ways.iter().any(|way| way.network == *network && onward(way));
            (network.name.bridge(), answers)
        });
        let bridges = bridges.collect();
        Ok(Self { rules: Rules { networks, published, ways }, bridges })
    }

    /// When it is to be looked at again, because a way ends.
    pub(super) fn ends_s(&self) -> Option<u64> {
        self.rules.ways.iter().map(|way| way.until_s).min()
    }

    /// Gives the kernel what it is to have. Guests that moved are served as far as the host can; the
    /// others do not depend on it.
    pub(super) fn apply(&self, home: &Home) -> Result<(), Failure> {
        let mut ways = &self.rules.ways[..];
        for network in self.rules.networks.iter().filter(|n| ways.iter().any(|w| w.network == **n))
        {
            // After a restart of the host nobody else may have made it yet.
            if let Err(failure) = attach::bring_up(network) {
                tracing::warn!("{failure}");
            }
        }
        // Rules first: what enters a tunnel before is not translated.
        match nft::load(home, &self.rules) {
            Err(failure) if !ways.is_empty() => {
                tracing::warn!("nothing goes on to guests that left: {failure}");
                ways = &[];
                nft::load(home, &Rules { ways: Vec::new(), ..self.rules.clone() })?;
            }
            loaded => loaded?,
        }
        if let Err(e) = tunnel::apply(&home.tag(), ways) {
            // Without rights there are no networks either: that is said elsewhere.
            tracing::warn!("{}", attach::failure(&"tunnels to peers", &e));
        }
        tunnel::answer_for(&self.bridges);
        Ok(())
    }
}

/// VMs in networks, with their records. What is wrong with one is told of when it is used.
fn members(home: &Home, now_s: u64) -> Result<Vec<Member>, Failure> {
    let found = attached(home)?.into_iter().filter_map(|(vm, _, attachment)| {
        let journal = home.vm(&vm).journal().ok()?;
        let record = journal.record().cloned()?;
        let written = fs::metadata(journal.path()).ok().and_then(|m| u64::try_from(m.mtime()).ok());
        let written_s = written.unwrap_or(now_s);
        Some(Member { vm, attachment, record, written_s })
    });
    Ok(found.collect())
}

/// What is known after this look, which is noted.
fn trails(
    home: &Home,
    networks: &[Network],
    members: &[Member],
    now_s: u64,
) -> Result<Trails, Failure> {
    let before = Trails::read(home);
    let after = Trails::with(members.iter().filter_map(|member| {
        let Member { vm, attachment, record, written_s } = member;
        let network = networks.iter().find(|network| network.name == attachment.network)?;
        let keep_s = network.forward_for_s.into();
        let at = Moment { now_s, written_s: *written_s, keep_s };
        Some((vm.clone(), Trail::after(before.get(vm).cloned(), record, at, address)))
    }));
    if after != before {
        after.write(home)?;
    }
    Ok(after)
}

/// A peer's address, as far as packets can be sent to it from here.
fn address(host_and_port: &str) -> Option<Ipv4Addr> {
    let found = match host_and_port.to_socket_addrs() {
        Ok(found) => found,
        Err(e) => {
            tracing::warn!("{host_and_port}: {e}: nothing goes on to there");
            return None;
        }
    };
    let mut addresses = found.filter_map(|address| match address.ip().to_canonical() {
        IpAddr::V4(address) if !address.is_loopback() && !address.is_unspecified() => Some(address),
        _ => None,
    });
    let address = addresses.next();
    if address.is_none() {
        tracing::info!("{host_and_port} is not reached over IPv4: nothing goes on to there");
    }
    address
}

/// As whom this host speaks to that one.
fn own_address(remote: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((remote, tunnel::PORT)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// Ways of all guests whose time is not over.
fn ways(
    home: &Home,
    networks: &[Network],
    members: &[Member],
    trails: &Trails,
    now_s: u64,
) -> Vec<Way> {
    let mut ways = Vec::new();
    for network in networks.iter().filter(|network| network.forward_for_s > 0) {
        let of = |member: &&Member| member.attachment.network == network.name;
        let moved: Vec<_> = members
            .iter()
            .filter(of)
            .filter_map(|member| Some((member, trails.get(&member.vm)?)))
            .collect();
        if moved.is_empty() || leads_elsewhere(network) {
            continue;
        }
        // Whoever has peers by key has one itself.
        let own = match peers::identity(home) {
            Ok(identity) => identity.key(),
            Err(failure) => {
                tracing::warn!("{failure}");
                return Vec::new();
            }
        };
        for (member, trail) in moved {
            of_one(&mut ways, &home.tag(), own, network, member, trail, now_s);
        }
    }
    ways
}

fn leads_elsewhere(network: &Network) -> bool {
    tunnel::leads_elsewhere(&network.name.bridge()).unwrap_or_else(|e| {
        tracing::warn!("{e}");
        false
    })
}

fn of_one(
    ways: &mut Vec<Way>,
    tag: &str,
    own: PeerKey,
    network: &Network,
    member: &Member,
    trail: &Trail,
    now_s: u64,
) {
    let Attachment { address: Some(guest), publish, .. } = &member.attachment else { return };
    let onward = trail.left.iter().filter(|_| !member.record.may_run()).map(|hop| (hop, false));
    for (hop, back) in onward.chain(trail.came.iter().rev().map(|hop| (hop, true))) {
        let until_s = hop.until_s(now_s, network.forward_for_s.into());
        let (Some(remote), Some(until_s)) = (hop.address, until_s) else { continue };
        let course = match back {
            true => Course::Back { pending: hop.since_s.is_none() },
            false => Course::Onward { seen_as: own_address(remote) },
        };
        ways.push(Way {
            guest: *guest,
            network: network.clone(),
            publish: publish.clone(),
            tunnel: Tunnel::between(tag, own, hop.peer, remote),
            course,
            until_s,
        });
    }
}

/// Where a VM's traffic goes on to, for people: the peer's key, its address and for how long.
pub(crate) fn forwarded(
    home: &Home,
    network: &Network,
    vm: &VmName,
) -> Option<(PeerKey, Ipv4Addr, u64)> {
    let trails = Trails::read(home);
    let left = trails.get(vm)?.left.as_ref()?;
    let now_s = now_s();
    let until_s = left.until_s(now_s, network.forward_for_s.into())?;
    Some((left.peer, left.address?, until_s - now_s))
}

#[cfg(test)]
mod tests;
