//! What is dirty again before it was sent: hot chunks go last.
//!
//! A round goes on for seconds, and some of what it is to send the guest writes meanwhile. Sent now it
//! would be sent again. So the round looks at the dirty log now and then, and leaves such chunks to the
//! next one. One of which the target has no version yet is left out once only, where versions pay: what
//! comes after is then a delta against it, and the pause is no longer than it must be. Where deltas cost
//! about as much as the chunks, it waits for the pause.

use std::time::Duration;

use crate::{ChunkId, ChunkSet, Geometry, order::RoundOrder};

/// A round looks no more often than this, ...
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// ... and so much more seldom than a look takes: looking costs by the size of the guest, not by
/// what it changed.
const LOOK_SHARE: u32 = 32;

#[derive(Debug)]
pub(super) struct Again {
    /// Chunks of which the target has a version from this handoff.
    sent: ChunkSet,
    /// Chunks that were left out once.
    deferred: ChunkSet,
    /// When to look next.
    due: Duration,
}

impl Again {
    pub(super) fn new(geometry: Geometry) -> Self {
        let none = ChunkSet::new(geometry);
        Self { sent: none.clone(), deferred: none, due: Duration::ZERO }
    }

    /// Whether it is time to look.
    pub(super) fn is_due(&self, now: Duration) -> bool {
        now >= self.due
    }

    /// A look was taken from `began` until `now`.
    pub(super) fn looked(&mut self, began: Duration, now: Duration) {
        self.due = began + LOOK_EVERY.max(now.saturating_sub(began) * LOOK_SHARE);
    }

    /// These are sent now.
    pub(super) fn sends(&mut self, ids: &[ChunkId]) {
        for id in ids {
            self.sent.insert(*id);
        }
    }

    /// Those of `set` that were left out, and of which the target has no version yet: known to be hot,
    /// they go last in their round.
    pub(super) fn waiting(&self, set: &ChunkSet) -> ChunkSet {
        let mut waiting = ChunkSet::new(set.geometry());
        for id in self.deferred.iter().filter(|id| set.contains(*id) && !self.sent.contains(*id)) {
            waiting.insert(id);
        }
        waiting
    }

    /// How many of `set` the target has no version of.
    pub(super) fn unsent(&self, set: &ChunkSet) -> u64 {
        set.iter().filter(|id| !self.sent.contains(*id)).count() as u64
    }

    /// Takes out of a round what is dirty again; says how many chunks that were. `versions_pay` unless
    /// a version of a chunk makes the next one no cheaper.
    pub(super) fn leave_out(
        &mut self,
        order: &mut RoundOrder,
        dirty: &ChunkSet,
        versions_pay: bool,
    ) -> u64 {
        let mut out = ChunkSet::new(dirty.geometry());
        for id in dirty.iter().filter(|id| order.holds(*id)) {
            if !versions_pay || self.sent.contains(id) || !self.deferred.contains(id) {
                self.deferred.insert(id);
                out.insert(id);
            }
        }
        order.leave_out(&out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Space;

    const GEOMETRY: Geometry = Geometry { ram_chunks: 100, disk_chunks: 10 };

    fn set(ids: &[u64]) -> ChunkSet {
        let mut set = ChunkSet::new(GEOMETRY);
        for &index in ids {
            set.insert(ChunkId { space: Space::Ram, index });
        }
        set
    }

    #[test]
    fn what_was_never_sent_is_left_out_once() {
        let mut again = Again::new(GEOMETRY);
        let mut round = |dirty: &[u64]| -> Vec<u64> {
            let mut order = RoundOrder::ascending(set(&[1, 2, 3]));
            again.leave_out(&mut order, &set(dirty), true);
            let ids: Vec<ChunkId> = order.collect();
            again.sends(&ids);
            ids.iter().map(|id| id.index).collect()
        };
        assert_eq!(round(&[2, 9]), [1, 3]);
        assert_eq!(round(&[2, 3]), [1, 2], "2 has waited; of 3 the target has a version");
        assert_eq!(round(&[2, 3]), [1]);
    }

    #[test]
    fn where_versions_do_not_pay_it_waits_for_the_pause() {
        let mut again = Again::new(GEOMETRY);
        for _ in 0..3 {
            let mut order = RoundOrder::ascending(set(&[1, 2, 3]));
            again.leave_out(&mut order, &set(&[2]), false);
            let ids: Vec<ChunkId> = order.collect();
            assert_eq!(ids.iter().map(|id| id.index).collect::<Vec<_>>(), [1, 3]);
            again.sends(&ids);
        }
        assert_eq!(again.waiting(&set(&[1, 2, 9])), set(&[2]));
        assert_eq!(again.unsent(&set(&[1, 2, 9])), 2);
    }

    #[test]
    fn a_look_costs_something_so_it_is_not_taken_all_the_time() {
        let mut again = Again::new(GEOMETRY);
        let ms = Duration::from_millis;
        assert!(again.is_due(ms(0)));
        again.looked(ms(0), ms(1));
        assert!(!again.is_due(ms(49)) && again.is_due(ms(50)));
        again.looked(ms(50), ms(60));
        assert!(!again.is_due(ms(369)) && again.is_due(ms(370)), "a 32nd part of the time");
    }
}
