//! What a report says of modes.

use serde::{Deserialize, Serialize};

use super::ModeChoice;
use crate::stage::Mode;

/// How bodies were encoded, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Adaptation {
    /// What was asked for.
    pub choice: ModeChoice,
    /// What each mode was used for.
    pub modes: Vec<ModeShare>,
    /// Decisions in order, as many as are kept.
    pub decisions: Vec<ModeDecision>,
    /// Decisions after those.
    pub decisions_left_out: u64,
}

/// What one mode was used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModeShare {
    /// The mode.
    pub mode: Mode,
    /// Bodies that were sent in it.
    pub bodies: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// What was left of them.
    pub bytes_out: u64,
    /// Seconds in which workers were busy with them.
    pub worker_s: f64,
    /// CPU seconds of that.
    pub cpu_s: f64,
    /// Samples that were tried in it and not sent.
    pub samples: u64,
    /// CPU seconds of those.
    pub samples_cpu_s: f64,
}

/// A decision, with all it rests on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModeDecision {
    /// When, from the start of the handoff.
    pub at_ms: f64,
    /// The mode for bodies while the link has little to do.
    pub mode: Mode,
    /// The mode for bodies while the link has enough to do: with the other in turn, it keeps both
    /// workers and link busy. The same where one mode alone is best.
    pub stronger: Mode,
    /// Bytes of bodies a second that both in turn promise; none while the link is not known.
    pub promised_bytes_per_s: Option<f64>,
    /// Bytes a second of the link that were assumed.
    pub link_bytes_per_s: Option<f64>,
    /// Workers.
    pub workers: u32,
    /// What made it necessary to decide.
    pub why: String,
    /// What was known of the modes.
    pub modes: Vec<ModeEstimate>,
}

/// What was known of a mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModeEstimate {
    /// The mode.
    pub mode: Mode,
    /// Seconds of one worker for each MiB of bodies: P.
    pub worker_s_per_mib: f64,
    /// Bytes out for each byte in: R.
    pub ratio: f64,
    /// Bytes of this guest's that this rests on; 0 where it is only concluded from other modes.
    pub measured_bytes: u64,
    /// Bytes of bodies a second that the mode alone promises; none while the link is not known.
    pub promised_bytes_per_s: Option<f64>,
}
