//! What cloudlets say of themselves to each other: `howdah peer ping`.
//!
//! ```text
//! caller                               called
//! Call "about", versions  ──────────►
//!                         ◄──────────  Called
//!                         ◄──────────  length u32 LE, About as JSON
//! number [8]              ──────────►
//!                         ◄──────────  the number        a few times: the round trip
//! ```
//!
//! What is said is for the peer that asks: whether it may hand VMs off to here, and the bases that it
//! may. Whether a VM could go is the asking side's to tell, as only it knows the VM; the peer looks again
//! when it is offered.

mod verdict;

use std::{
    io::{self, Read, Write},
    time::{Duration, Instant},
};

use handoff::{link::is_tick, wire::Versions};
use serde::{Deserialize, Serialize};
use vmm::{HostCheck, HostProfile};

pub(crate) use verdict::{Candidate, Verdict, verdicts};

use crate::{
    commands::base,
    failure::{Exit, Failure, one_line},
    home::Home,
    net::{Networks, Subnet},
    peers::{self, Endpoint, Line, Peer, Right},
    receive,
};

/// The service's name, and the versions of it that this program speaks.
pub(crate) const SERVICE: &str = "about";
pub(crate) const VERSIONS: Versions = Versions { min: 1, max: 1 };
/// No answer is longer.
const MAX_ABOUT_BYTES: u32 = 1 << 20;
/// Round trips that are measured.
const ROUND_TRIPS: u64 = 5;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cloudlet, as it tells a peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct About {
    /// The program's version.
    pub(crate) version: String,
    /// The versions of the handoff's protocol that it speaks.
    pub(crate) protocol: (u32, u32),
    /// Whether it takes VMs from who asks, and why not.
    pub(crate) takes: Result<(), String>,
    /// What its host can run.
    pub(crate) host: Result<HostProfile, String>,
    /// Memory that guests could have.
    pub(crate) available_memory_bytes: u64,
    /// Room for disks.
    pub(crate) available_disk_bytes: u64,
    /// Bases of which who asks may hand VMs off, by id.
    pub(crate) bases: Vec<HeldBase>,
    /// The network that VMs come into: its addresses, or a TAP interface of the operator's.
    pub(crate) network: Incoming,
}

/// A base that a cloudlet holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeldBase {
    pub(crate) id: String,
    pub(crate) names: Vec<String>,
}

/// What a guest's network device is joined to where it comes in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Incoming {
    /// Nothing: guests with one are refused.
    Nothing,
    /// An interface that the operator made.
    Tap,
    /// A network that the cloudlet manages.
    Network(Subnet),
}

/// What VMs come into where this cloudlet listens.
pub(crate) fn incoming(
    home: &Home,
    tap: Option<&str>,
    network: Option<&crate::net::NetworkName>,
) -> Incoming {
    let managed = network.and_then(|name| Some(Networks::read(home).ok()?.get(name).ok()?.subnet));
    match (managed, tap) {
        (Some(subnet), _) => Incoming::Network(subnet),
        (None, Some(_)) => Incoming::Tap,
        (None, None) => Incoming::Nothing,
    }
}

impl About {
    /// This cloudlet, as it tells `peer`.
    pub(crate) fn here(home: &Home, peer: &Peer, network: Incoming) -> Self {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let takes = peer.check(Right::Send);
        let host = HostCheck::run().and_then(|host| HostProfile::of(&host));
        let (available_memory_bytes, available_disk_bytes) = receive::available(home);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: (Versions::OURS.min, Versions::OURS.max),
            takes: takes.map_err(|failure| failure.message),
            host: host.map_err(|e| text(&e)),
            available_memory_bytes,
            available_disk_bytes,
            bases: held(home, peer),
            network,
        }
    }
}

impl About {
    /// As a peer said it, fit to be shown: what it calls itself and its bases could else tell a terminal
    /// what to do.
    fn tamed(self) -> Self {
        let tame = |text: String| one_line(&text);
        let base = |base: HeldBase| HeldBase {
            id: tame(base.id),
            names: base.names.into_iter().map(tame).collect(),
        };
        Self {
            version: tame(self.version),
            takes: self.takes.map_err(tame),
            host: self.host.map_err(tame),
            bases: self.bases.into_iter().map(base).collect(),
            ..self
        }
    }
}

fn held(home: &Home, peer: &Peer) -> Vec<HeldBase> {
    let listed = base::store(home).and_then(|store| store.list().map_err(base::store_failure));
    let listed = listed.unwrap_or_else(|failure| {
        tracing::warn!("{failure}");
        Vec::new()
    });
    let mut bases: Vec<HeldBase> = Vec::new();
    for one in listed {
        let Ok(found) = one.base else { continue };
        if !base::allowed(home, peer, found.id()) {
            continue;
        }
        bases.push(HeldBase { id: found.id().to_string(), names: one.names });
    }
    bases
}

/// Answers a peer that asks.
pub(crate) fn answer(about: &About, rx: &mut dyn Read, tx: &mut dyn Write) -> io::Result<()> {
    let text = serde_json::to_vec(about)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= MAX_ABOUT_BYTES);
    let length = length.ok_or_else(|| io::Error::other("too much is to be said"))?;
    let deadline = Instant::now() + PATIENCE;
    send(tx, &[&length.to_le_bytes()[..], &text].concat(), deadline)?;
    for _ in 0..ROUND_TRIPS {
        let mut number = [0; 8];
        match receive_all(rx, &mut number, deadline) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            received => received?,
        }
        send(tx, &number, deadline)?;
    }
    Ok(())
}

/// A peer that answered.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) about: About,
    /// The shortest of a few round trips, over the link that handoffs use.
    pub(crate) round_trip: Duration,
    /// Until the link was made, and each side knew the other.
    pub(crate) connected_in: Duration,
}

/// Asks a peer.
pub(crate) fn ask(home: &Home, endpoint: &Endpoint) -> Result<Answered, Failure> {
    let begun = Instant::now();
    let Line { mut rx, mut tx, .. } = peers::call(home, endpoint, SERVICE, VERSIONS)?;
    let connected_in = begun.elapsed();
    let deadline = Instant::now() + PATIENCE;
    let mut asked = || -> io::Result<Answered> {
        let mut length = [0; 4];
        receive_all(&mut rx, &mut length, deadline)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_ABOUT_BYTES {
            return Err(io::Error::other(format!("it says {length} bytes of itself")));
        }
        let mut text = vec![0; length as usize];
        receive_all(&mut rx, &mut text, deadline)?;
        let about = serde_json::from_slice::<About>(&text)?.tamed();
        let mut round_trip = Duration::MAX;
        for number in 0..ROUND_TRIPS {
            let (begun, number) = (Instant::now(), number.to_le_bytes());
            send(&mut tx, &number, deadline)?;
            let mut back = [0; 8];
            receive_all(&mut rx, &mut back, deadline)?;
            if back != number {
                return Err(io::Error::other("it answers another question"));
            }
            round_trip = round_trip.min(begun.elapsed());
        }
        Ok(Answered { about, round_trip, connected_in })
    };
    asked().map_err(|e| {
        let what = format!("peer {}", endpoint.address);
        Failure::new(Exit::Failed, what, e, "try again; see what `howdah receive` says there")
    })
}

fn send(tx: &mut dyn Write, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        match tx.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(e) if is_tick(&e) && Instant::now() < deadline => {}
            Err(e) => return Err(e),
        }
    }
    tx.flush()
}

fn receive_all(rx: &mut dyn Read, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !into.is_empty() {
        match rx.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => into = &mut into[count..],
            Err(e) if is_tick(&e) && Instant::now() < deadline => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
