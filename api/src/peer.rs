//! Peers: the cloudlets that are known.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rights {
    /// Hand VMs off to this cloudlet.
    pub send: bool,
    /// Be handed VMs of this cloudlet.
    pub receive: bool,
    /// Bring bases to this cloudlet.
    #[serde(default)]
    pub push: bool,
    /// Have bases of this cloudlet.
    #[serde(default)]
    pub pull: bool,
    /// Look at this cloudlet through its API.
    #[serde(default)]
    pub observe: bool,
    /// Do through its API what an operator can do.
    #[serde(default)]
    pub operate: bool,
}

/// A cloudlet that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Peer {
    /// What it is called here.
    pub name: String,
    /// Who it is: the name of its public key.
    pub key: String,
    /// Where it listens, `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Where its API listens for peers, `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// What it may do.
    pub rights: Rights,
    /// The bases of the VMs that may go from or to it, by name or id; all, if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bases: Option<Vec<String>>,
    /// Until when it may begin handoffs, in seconds since 1970; for ever, if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// What is to be said of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Who it is: what `howdah identity` shows there.
    #[schema(pattern = "^howdah:[a-z2-7]{51}[aq]$")]
    pub key: String,
    /// Where it listens, `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?:[1-9][0-9]{0,3}$")]
    pub address: Option<String>,
    /// Where its API listens for peers, `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?:[1-9][0-9]{0,3}$")]
    pub api: Option<String>,
    /// What it may do; hand VMs off to here and be handed VMs, if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Rights>,
    /// The bases of the VMs that may go from or to it, by name or id; all, if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 64, value_type = Option<Vec<BaseName>>)]
    pub bases: Option<Vec<String>>,
    /// Until when it may begin handoffs, in seconds since 1970; for ever, if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 253402300799_i64)]
    pub until: Option<u64>,
}

/// Name or id of a base.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", value_type = String)]
pub(crate) struct BaseName(#[allow(dead_code)] String);

/// What a peer said when it was asked how it is, and which VMs could go there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pinged {
    /// Who it is, for people.
    pub peer: String,
    /// Where it was asked.
    pub address: String,
    /// Until the link was made and each side knew the other.
    pub connected_in_ms: f64,
    /// The shortest of a few round trips, over such a link as handoffs use.
    pub round_trip_ms: f64,
    /// The version of its program.
    pub version: String,
    /// The oldest and the newest version of the handoff's protocol that it speaks.
    pub protocol: (u32, u32),
    /// Whether it takes VMs from here.
    pub takes_vms: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
    /// Memory that guests could have there.
    pub available_memory_bytes: u64,
    /// Room for disks there.
    pub available_disk_bytes: u64,
    /// What a guest's network device is joined to there.
    pub network: GuestNetwork,
    /// Bases of which VMs from here may go there.
    pub bases: Vec<HeldBase>,
    /// The VMs of this cloudlet.
    pub vms: Vec<CouldGo>,
}

/// What a guest's network device is joined to where it comes in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GuestNetwork {
    /// Nothing: guests that have one are refused.
    Nothing,
    /// An interface that the operator made.
    Tap,
    /// A network that the cloudlet manages, by its addresses.
    Network(String),
}

/// A base that a peer holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldBase {
    /// Its id.
    pub id: String,
    /// What it is called there.
    pub names: Vec<String>,
}

/// Whether a VM could go to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CouldGo {
    /// The VM.
    pub vm: String,
    /// Whether nothing is in the way.
    pub could_go: bool,
    /// Everything that is.
    pub why_not: Vec<String>,
}
