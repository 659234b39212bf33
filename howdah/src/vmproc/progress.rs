//! The engine's progress, as commands show it.

use guest_images::CHUNK_SIZE;
use handoff::report::{Phase, Progress as Engine};

use crate::control::Progress;

/// What the engine tells, for the clients of this process.
pub(crate) fn of(peer: &str, engine: &Engine) -> Progress {
    let stage = match engine.phase {
        Phase::Connecting => "connecting",
        Phase::Rounds => "sending",
        Phase::Cutover => "cutting over",
        Phase::Relinking => "the link broke, making it again",
        Phase::Committing => "waiting for the peer to confirm",
    };
    Progress {
        peer: peer.to_owned(),
        stage: stage.to_owned(),
        round: engine.round,
        sent_bytes: engine.sent_bytes,
        remaining_bytes: engine.remaining_chunks.saturating_mul(CHUNK_SIZE as u64),
        rate_bytes_per_s: engine.rate_bytes_per_s,
        predicted_downtime_ms: engine.predicted_downtime_ms.map(|ms| ms.round() as u64),
    }
}
