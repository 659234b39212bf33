//! Bases: what VMs start from, and what peers need not be sent.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A base of a cloudlet's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Base {
    /// What it is made of, as 64 hex digits: the same id is the same base, on every cloudlet.
    pub id: String,
    /// What it is called here.
    pub names: Vec<String>,
    /// Length of its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Of a base with memory, that of its VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A base that was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseRemoved {
    /// Its id.
    pub id: String,
}
