//! What a handoff reports.

use serde::{Deserialize, Serialize};

/// The report at the end of a handoff.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {}

/// How a handoff stands.
#[derive(Clone, Debug, Default)]
pub struct Progress {}
