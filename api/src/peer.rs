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
    /// What it may do; all, if not said.
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
