//! What went wrong, as RFC 9457 has it.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The media type of a [`Problem`].
pub const CONTENT_TYPE: &str = "application/problem+json";

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `about:blank`: the status says what kind of problem it is, and `kind` says it finer.
    #[serde(rename = "type")]
    pub type_uri: String,
    /// The status, in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What, why, and the way out, in one line.
    pub detail: String,
    /// The class of failures: `failed`, `usage`, `not-found`, `conflict`, `host`, `corrupt`,
    /// `not-moved`, `in-doubt`, `cancelled`.
    pub kind: String,
    /// What the command line exits with.
    pub exit: u8,
    /// The report of a handoff that did not happen, as far as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub report: Option<serde_json::Value>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Problem {}
