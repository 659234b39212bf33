//! What each class of chunk was, and what it cost: the numbers behind every choice of stage.

use std::{
    ops::{Index, IndexMut},
    time::Duration,
};

/// How a chunk travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// The target holds it already: not sent.
    Unchanged = 0,
    /// Back to its base state.
    Reset = 1,
    /// Zeros on disk where the base has none.
    Zero = 2,
    /// Named by its place in the base.
    Base = 3,
    /// Named by a chunk sent before.
    Seen = 4,
    /// Sent in full.
    Data = 5,
}

impl Class {
    /// All classes, in order of their numbers.
    pub const ALL: [Class; 6] =
        [Class::Unchanged, Class::Reset, Class::Zero, Class::Base, Class::Seen, Class::Data];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Unchanged => "unchanged",
            Class::Reset => "reset",
            Class::Zero => "zero",
            Class::Base => "base",
            Class::Seen => "seen",
            Class::Data => "data",
        }
    }
}

/// One class's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStats {
    /// Chunks that fell into the class.
    pub chunks: u64,
    /// Bytes they hold.
    pub bytes_in: u64,
    /// Bytes they became in a batch, before compression.
    pub bytes_out: u64,
    /// CPU time spent to find the class, estimated from samples.
    pub cpu_ns: u64,
    /// Chunks whose CPU time was taken, and what it came to.
    sampled: (u64, u64),
}

impl ClassStats {
    /// Takes the CPU time of one chunk of this class as a sample for all of them.
    pub(crate) fn sample(&mut self, took: Duration) {
        self.sampled.0 += 1;
        self.sampled.1 += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.estimate();
    }

    /// Scales what was sampled to all chunks of the class.
    pub(crate) fn estimate(&mut self) {
        let (samples, ns) = self.sampled;
        if samples > 0 {
            let scaled = u128::from(ns) * u128::from(self.chunks) / u128::from(samples);
            self.cpu_ns = u64::try_from(scaled).unwrap_or(u64::MAX);
        }
    }
}

/// The classes of one round, one handoff, or one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats([ClassStats; Class::ALL.len()]);

impl Stats {
    /// The classes with their shares.
    pub fn iter(&self) -> impl Iterator<Item = (Class, &ClassStats)> {
        Class::ALL.into_iter().zip(&self.0)
    }

    /// Chunks over all classes.
    pub fn chunks(&self) -> u64 {
        self.0.iter().map(|c| c.chunks).sum()
    }

    /// Adds what a batch's steps take, as [`crate::stage::RawBatch::class_bytes`] has it.
    pub fn add_bytes_out(&mut self, class_bytes: &[u64; Class::ALL.len()]) {
        for (class, bytes) in self.0.iter_mut().zip(class_bytes) {
            class.bytes_out += bytes;
        }
    }
}

impl Index<Class> for Stats {
    type Output = ClassStats;

    fn index(&self, class: Class) -> &ClassStats {
        &self.0[class as usize]
    }
}

impl IndexMut<Class> for Stats {
    fn index_mut(&mut self, class: Class) -> &mut ClassStats {
        &mut self.0[class as usize]
    }
}
