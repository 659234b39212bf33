//! Buffers of bodies and payloads, which go round and are used again and again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A spare buffer is taken if it is larger than needed by no more than this share of the need, ...
const SLACK_SHARE: usize = 4;
/// ... or by so many bytes: what a window of payloads takes stays near what it counts.
const SLACK_BYTES: usize = 4 << 10;

/// Spare buffers, shared by the threads that fill them and those that empty them.
#[derive(Clone, Debug)]
pub struct Buffers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    most_bytes: usize,
    spare: Mutex<Spare>,
}

#[derive(Debug, Default)]
struct Spare {
    /// The one given back longest ago first.
    buffers: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Buffers {
    /// Keeps no more than so many bytes of buffers that nobody uses.
    pub fn new(most_bytes: usize) -> Self {
        Self(Arc::new(Shared { most_bytes, spare: Mutex::default() }))
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        // A buffer more or less: a panic elsewhere leaves it usable.
        self.0.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer with room for `len` bytes, and not for much more.
    pub fn take(&self, len: usize) -> Vec<u8> {
        let fits = len..=len + (len / SLACK_SHARE).max(SLACK_BYTES);
        let mut spare = self.spare();
        let best = spare
            .buffers
            .iter()
            .enumerate()
            .filter(|(_, buffer)| fits.contains(&buffer.capacity()))
            .min_by_key(|(_, buffer)| buffer.capacity())
            .map(|(at, _)| at);
        let Some(mut buffer) = best.and_then(|at| spare.buffers.remove(at)) else {
            drop(spare);
            return Vec::with_capacity(len);
        };
        spare.bytes -= buffer.capacity();
        drop(spare);
        buffer.clear();
        buffer
    }

    /// Gives a buffer back. Where there are too many, those go that were not wanted for longest.
    pub fn give(&self, buffer: Vec<u8>) {
        if buffer.capacity() == 0 || buffer.capacity() > self.0.most_bytes {
            return;
        }
        let mut spare = self.spare();
        spare.bytes += buffer.capacity();
        spare.buffers.push_back(buffer);
        while spare.bytes > self.0.most_bytes {
            let Some(oldest) = spare.buffers.pop_front() else { break };
            spare.bytes -= oldest.capacity();
        }
    }

    /// Bytes of buffers that nobody uses.
    pub fn spare_bytes(&self) -> usize {
        self.spare().bytes
    }
}

impl Default for Buffers {
    /// Keeps nothing.
    fn default() -> Self {
        Self::new(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_that_fits_is_used_again() {
        let buffers = Buffers::new(1 << 20);
        let mut first = buffers.take(100_000);
        first.push(7);
        let place = first.as_ptr();
        buffers.give(first);
        assert!(buffers.take(60_000).capacity() < 100_000, "one that is much too large is not");
        assert!(buffers.take(100_001).capacity() > 100_000, "nor one that is too small");
        let again = buffers.take(90_000);
        assert_eq!(again.as_ptr(), place);
        assert!(again.is_empty());
        assert_eq!(buffers.spare_bytes(), 0);
    }

    proptest! {
        #[test]
        fn what_is_spare_is_bounded(
            steps in prop::collection::vec((any::<bool>(), 0usize..50_000), 0..200),
        ) {
            let buffers = Buffers::new(100_000);
            let mut taken = Vec::new();
            for (take, len) in steps {
                match take {
                    true => {
                        let buffer = buffers.take(len);
                        prop_assert!(buffer.is_empty() && buffer.capacity() >= len);
                        prop_assert!(buffer.capacity() <= len + (len / 4).max(SLACK_BYTES));
                        taken.push(buffer);
                    }
                    false => if let Some(buffer) = taken.pop() {
                        buffers.give(buffer);
                    },
                }
                let bytes: usize = buffers.spare().buffers.iter().map(Vec::capacity).sum();
                prop_assert_eq!(bytes, buffers.spare_bytes());
                prop_assert!(bytes <= 100_000);
            }
        }
    }
}
