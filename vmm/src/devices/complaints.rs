//! How often a guest may make this program say the same thing.

use std::sync::atomic::{AtomicU64, Ordering};

/// The first so many are all told.
const ALL_UNTIL: u64 = 4;

/// Counts something that a guest can bring about as often as it likes, and says when to tell of it:
/// the first few times, then each time that it has happened twice as often. So a guest cannot fill the
/// host's disk with messages, and the last one still says how bad it is.
#[derive(Debug, Default)]
pub(crate) struct Complaints(AtomicU64);

impl Complaints {
    /// It happened again: how often it has by now, if that is to be told.
    pub(crate) fn due(&self) -> Option<u64> {
        let times = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        (times <= ALL_UNTIL || times.is_power_of_two()).then_some(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_times_are_told_in_a_few_lines() {
        let complaints = Complaints::default();
        let told: Vec<u64> = (0..1_000_000).filter_map(|_| complaints.due()).collect();
        assert_eq!(told[..6], [1, 2, 3, 4, 8, 16]);
        assert_eq!(told.last(), Some(&(1 << 19)));
    }
}
