//! The moments of a cutover, and where its time went.

use std::time::Duration;

use super::CommitMode;
use crate::{
    report::{Cutover, millis},
    wire::Resumed,
};

/// Times of a cutover, each when the step was done.
#[derive(Debug, Default)]
pub(super) struct CutoverTimes {
    pub(super) pausing: Option<Duration>,
    pub(super) paused: Option<Duration>,
    pub(super) final_round: Option<Duration>,
    pub(super) state: Option<Duration>,
    pub(super) prepared: Option<Duration>,
    pub(super) resumed: Option<Duration>,
    pub(super) peer: Option<Resumed>,
    pub(super) state_bytes: u64,
    pub(super) final_chunks: u64,
    pub(super) because: String,
}

impl CutoverTimes {
    /// Where the time went, counted from `started`; none if there was no cutover.
    pub(super) fn shares(&self, started: Duration, early: bool) -> Option<Cutover> {
        let pausing = self.pausing?;
        let between = |from: Option<Duration>, to: Option<Duration>| match (from, to) {
            (Some(from), Some(to)) => millis(to.saturating_sub(from)),
            _ => 0.0,
        };
        let peer =
            |of: fn(&Resumed) -> u64| self.peer.as_ref().map_or(0.0, |said| of(said) as f64 / 1e3);
        Some(Cutover {
            began_ms: millis(pausing.saturating_sub(started)),
            pause_ms: between(self.pausing, self.paused),
            final_round_ms: between(self.paused, self.final_round),
            state_ms: between(self.final_round, self.state),
            prepare_ms: between(self.state, self.prepared),
            commit_ms: between(self.prepared, self.resumed),
            peer_prepare_ms: peer(|said| said.prepare_us),
            peer_commit_ms: peer(|said| said.commit_us),
            peer_resume_ms: peer(|said| said.resume_us),
            final_chunks: self.final_chunks,
            state_bytes: self.state_bytes,
            cut_because: self.because.clone(),
            commit: if early { CommitMode::Early } else { CommitMode::Prepared }.to_string(),
        })
    }
}
