//! Two cloudlets, a shaped link between them, and a client who reaches the guest wherever it runs.
//!
//! ```text
//!   cloudlet-a                      cloudlet-b
//!   ho  10.77.0.1 ═══ veth, netem ═══ ho  10.77.0.2      the handoff link
//!   acc (bridge)                    acc (bridge)
//!    ├─ tap0 ← guest 10.99.0.2       ├─ tap0
//!    └─ to-client ──┐     ┌── to-client ┘             the access network, not shaped
//!            └── acc (bridge) ───┘
//!                client, 10.99.0.1
//! ```

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::namespace::Namespace;
use crate::scenario::{Link, Side};

/// Where the client is.
pub(crate) const CLIENT: Namespace = Namespace("client");
/// Where the guest is reached, wherever it runs.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// The TAP device of either cloudlet.
pub(crate) const TAP: &str = "tap0";
/// The guest's address on the access network: the same on both sides.
pub(crate) const GUEST_MAC: &str = "02:68:6f:77:64:01";

const CLIENT_ADDRESS: &str = "10.99.0.1/24";
const PACKET_BYTES: f64 = 1500.0;
/// What a queue in front of the link holds beyond what is on its way.
const QUEUE_MS: f64 = 100.0;
/// No queue is shorter, in packets: a slow link must still take a burst.
const MIN_QUEUE: f64 = 64.0;
const MAX_QUEUE: f64 = 50_000.0;
/// How long killed processes may take to be gone.
const DEATH: Duration = Duration::from_secs(10);

impl Side {
    /// Its network namespace.
    pub(crate) fn namespace(self) -> Namespace {
        match self {
            Self::A => Namespace("cloudlet-a"),
            Self::B => Namespace("cloudlet-b"),
        }
    }

    /// Its address on the handoff link.
    pub(crate) fn address(self) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, 0, 1),
            Self::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    /// As it is written in scenarios.
    pub(crate) fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

/// The network of one scenario; goes away, with every process in it, when dropped.
pub(crate) struct Network(());

impl Network {
    /// Builds it.
    pub(crate) fn build(link: Link) -> Result<Self> {
        let network = Self(());
        for namespace in namespaces() {
            ip(&format!("netns add {}", namespace.0))?;
            ip(&format!("-n {} link set lo up", namespace.0))?;
        }
        ip("link add ho netns cloudlet-a type veth peer name ho netns cloudlet-b")?;
        ip("-n client link add acc type bridge forward_delay 0 stp_state 0")?;
        ip(&format!("-n client addr add {CLIENT_ADDRESS} dev acc"))?;
        ip("-n client link set acc up")?;
        for side in [Side::A, Side::B] {
            let (ns, letter) = (side.namespace().0, side.letter());
            // One packet a segment, so that loss and rate act on what a real link would carry.
            ip(&format!("-n {ns} link set ho mtu 1500 gso_max_segs 1 up"))?;
            ip(&format!("-n {ns} addr add {}/24 dev ho", side.address()))?;
            ip(&format!("-n {ns} link add acc type bridge forward_delay 0 stp_state 0"))?;
            ip(&format!("-n {ns} tuntap add {TAP} mode tap"))?;
            ip(&format!(
                "link add to-client netns {ns} type veth peer name to-{letter} netns client"
            ))?;
            for port in [TAP, "to-client"] {
                ip(&format!("-n {ns} link set dev {port} master acc up"))?;
            }
            ip(&format!("-n {ns} link set acc up"))?;
            ip(&format!("-n client link set to-{letter} master acc up"))?;
        }
        network.shape(link)?;
        Ok(network)
    }

    /// Shapes both directions of the link.
    pub(crate) fn shape(&self, link: Link) -> Result<()> {
        for side in [Side::A, Side::B] {
            let ns = side.namespace().0;
            let netem = netem(link);
            run("tc", &format!("-n {ns} qdisc replace dev ho root netem {netem}"))?;
        }
        Ok(())
    }

    /// Bytes that went into the link at each end, headers of Ethernet, IP and TCP included.
    pub(crate) fn link_bytes(&self) -> Result<u64> {
        let sent = |side: Side| {
            side.namespace().within(|| {
                let text = fs::read_to_string("/proc/thread-self/net/dev")
                    .context("cannot read interface counters")?;
                sent_bytes(&text, "ho").context("the handoff link is gone")
            })
        };
        Ok(sent(Side::A)? + sent(Side::B)?)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in namespaces() {
            // What cannot be taken down now goes with the lab host; the next scenario says so.
            let _ = kill_all(namespace);
            let _ = ip(&format!("netns del {}", namespace.0));
        }
    }
}

/// Kills every process in a namespace, and waits until they are gone.
pub(crate) fn kill_all(namespace: Namespace) -> Result<usize> {
    let started = Instant::now();
    let mut killed = 0;
    loop {
        let processes = namespace.processes()?;
        if processes.is_empty() {
            return Ok(killed);
        }
        if started.elapsed() > DEATH {
            bail!("processes {processes:?} in {} do not die", namespace.0);
        }
        killed = killed.max(processes.len());
        for pid in processes {
            // One that has just ended is what was wanted.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn namespaces() -> [Namespace; 3] {
    [Side::A.namespace(), Side::B.namespace(), CLIENT]
}

/// The arguments of netem for one direction.
fn netem(link: Link) -> String {
    let mut words = Vec::new();
    if link.delay_ms > 0.0 {
        words.push(format!("delay {}ms", link.delay_ms));
    }
    if link.loss_percent > 0.0 {
        words.push(format!("loss random {}%", link.loss_percent));
    }
    let limit = if link.rate_mbps > 0.0 {
        words.push(format!("rate {}bit", (link.rate_mbps * 1e6).round()));
        let packets_per_ms = link.rate_mbps * 1e3 / 8.0 / PACKET_BYTES;
        (packets_per_ms * (link.delay_ms + QUEUE_MS)).ceil().clamp(MIN_QUEUE, MAX_QUEUE)
    } else {
        MAX_QUEUE
    };
    words.push(format!("limit {limit}"));
    words.join(" ")
}

/// Reads the ninth counter of an interface in /proc/net/dev: bytes sent.
fn sent_bytes(table: &str, interface: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == interface).then_some(counters)
    })?;
    line.split_whitespace().nth(8)?.parse().ok()
}

fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments)
}

fn run(tool: &str, arguments: &str) -> Result<()> {
    let output = Command::new(Path::new("/usr/sbin").join(tool))
        .args(arguments.split_whitespace())
        .output()
        .with_context(|| format!("cannot run {tool}"))?;
    if !output.status.success() {
        let problem = String::from_utf8_lossy(&output.stderr);
        bail!("{tool} {arguments}: {}", problem.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_hold_what_is_on_its_way_and_a_tenth_of_a_second() {
        let link = Link { rate_mbps: 10.0, delay_ms: 25.0, loss_percent: 0.1 };
        assert_eq!(netem(link), "delay 25ms loss random 0.1% rate 10000000bit limit 105");
        assert_eq!(netem(Link { rate_mbps: 0.0, ..Link::default() }), "limit 50000");
        assert_eq!(netem(Link { rate_mbps: 1.0, ..Link::default() }), "rate 1000000bit limit 64");
    }

    #[test]
    fn counters_are_found_by_interface() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n\
                     who:  1 2 3 4 5 6 7 8 99 10\n    ho: 11 0 0 0 0 0 0 0 4242 7 0 0\n";
        assert_eq!(sent_bytes(table, "ho"), Some(4242));
        assert_eq!(sent_bytes(table, "lo"), None);
    }
}
