//! What chunks that were not sent yet will cost, told by some of them.
//!
//! Rounds differ: one finds page cache that the base holds, the next buffers that are filled anew. What
//! the last round took of the link says what the next will only where they are alike.

use guest_images::CHUNK_SIZE;

use super::{
    classify::{Decision, Op},
    repeats::Repeats,
};

/// Fewer say nothing.
const ENOUGH_CHUNKS: u64 = 64;
/// What a reference takes in a batch, about: neighbours share one.
const REFERENCE_BYTES: f64 = 4.0;

/// Some chunks, by how they would travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// That were looked at.
    pub chunks: u64,
    /// In full or as deltas against what the target has from elsewhere.
    pub news: u64,
    /// The target has a version of them.
    pub again: u64,
    /// As a reference, or as zeros.
    pub references: u64,
}

impl Forecast {
    pub(super) fn count(&mut self, decision: &Decision) {
        self.chunks += 1;
        match decision.op {
            Op::Unchanged | Op::Known => {}
            Op::Reset | Op::Zero | Op::FromBase(_) | Op::FromSeen(_) => self.references += 1,
            Op::Data if decision.before.is_some() => self.again += 1,
            Op::Data => self.news += 1,
        }
    }

    /// Bytes on the link for each chunk, where bodies come out of the codec at `ratio` and chunks that
    /// were sent again took what `repeats` says; none while too few were looked at, or were sent again.
    pub fn bytes_per_chunk(&self, repeats: Repeats, ratio: f64) -> Option<f64> {
        if self.chunks < ENOUGH_CHUNKS || !ratio.is_finite() || ratio <= 0.0 {
            return None;
        }
        let again = match self.again {
            0 => 0.0,
            again => again as f64 * repeats.cost_share(ratio)?,
        };
        let whole = CHUNK_SIZE as f64 * ratio.min(1.0);
        let bytes = (self.news as f64 + again) * whole + self.references as f64 * REFERENCE_BYTES;
        Some(bytes / self.chunks as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_count_in_full_and_versions_by_what_others_took() {
        let mut repeats = Repeats::default();
        (0..100).for_each(|_| repeats.full());
        let forecast = Forecast { chunks: 100, news: 10, again: 0, references: 0 };
        assert_eq!(forecast.bytes_per_chunk(Repeats::default(), 0.25), Some(102.4));
        let forecast = Forecast { again: 10, ..forecast };
        assert_eq!(forecast.bytes_per_chunk(Repeats::default(), 0.25), None, "nothing tells");
        assert_eq!(forecast.bytes_per_chunk(repeats, 0.25), Some(204.8));
        assert_eq!(Forecast { chunks: 63, ..forecast }.bytes_per_chunk(repeats, 0.25), None);
        assert_eq!(forecast.bytes_per_chunk(repeats, 0.0), None);
    }
}
