//! What it costs to send a chunk again.
//!
//! A version that the target has makes the next one a delta. That is worth a lot where the guest changes
//! little of a chunk, and next to nothing where it fills buffers anew: there an early version is bytes
//! for nothing.

use guest_images::CHUNK_SIZE;

/// Fewer say nothing.
const ENOUGH_CHUNKS: u64 = 64;

/// Chunks that were sent although the target had a version from this handoff.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repeats {
    full: u64,
    deltas: u64,
    delta_bytes: u64,
}

impl Repeats {
    /// One was sent in full, no delta being shorter.
    pub(super) fn full(&mut self) {
        self.full += 1;
    }

    /// One was sent as a delta of so many bytes.
    pub(super) fn delta(&mut self, bytes: usize) {
        self.deltas += 1;
        self.delta_bytes += bytes as u64;
    }

    /// What sending a chunk again costs on the link, as a share of what it costs in full, where bodies
    /// come out of the codec at `ratio`; none while too few were sent again to tell.
    ///
    /// What changed shrinks less than what it is part of: in buffers of an application that looks at
    /// pictures, deltas came out at 0.55 where whole chunks came out at 0.23, about half way to 1.
    pub fn cost_share(&self, ratio: f64) -> Option<f64> {
        let chunks = self.full + self.deltas;
        if chunks < ENOUGH_CHUNKS || !ratio.is_finite() || ratio <= 0.0 {
            return None;
        }
        let ratio = ratio.min(1.0);
        let whole = CHUNK_SIZE as f64 * ratio;
        let deltas = self.delta_bytes as f64 * (1.0 + ratio) / 2.0;
        Some((self.full as f64 * whole + deltas) / (chunks as f64 * whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repeats(full: u64, deltas: u64, bytes: usize) -> Repeats {
        let mut repeats = Repeats::default();
        (0..full).for_each(|_| repeats.full());
        (0..deltas).for_each(|_| repeats.delta(bytes));
        repeats
    }

    #[test]
    fn a_few_say_nothing() {
        assert_eq!(repeats(40, 23, 10).cost_share(0.5), None);
        assert_eq!(repeats(100, 0, 0).cost_share(0.0), None);
        assert_eq!(repeats(100, 0, 0).cost_share(f64::NAN), None);
    }

    #[test]
    fn deltas_count_by_what_they_leave_on_the_link() {
        assert_eq!(repeats(64, 0, 0).cost_share(0.25), Some(1.0));
        let share = |full, deltas, bytes| repeats(full, deltas, bytes).cost_share(0.25).unwrap();
        assert!(share(0, 100, 40) < 0.03);
        assert!(share(0, 100, 2000) > 1.0, "longer than the whole chunk when that is compressed");
        assert!((share(50, 50, 40) - 0.5).abs() < 0.02);
    }
}
