//! What became of the chunks and what each stage cost: the numbers behind every choice of stage.

use std::{
    ops::{Index, IndexMut},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use guest_images::{CHUNK_SIZE, Part};

use crate::base_view::BasePlace;

/// How a chunk travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// The target holds it already, from its base or from this handoff: not sent.
    Unchanged = 0,
    /// The target holds it already, from an earlier visit of this VM: not sent.
    Known = 1,
    /// Back to its base state.
    Reset = 2,
    /// Zeros, where the base state is something else.
    Zero = 3,
    /// Named by its place in the disk of the VM's base, or in its kernel or initramfs.
    BaseDisk = 4,
    /// Named by its place in the memory of the VM's base.
    BaseMemory = 5,
    /// Named by its place in another base that both ends hold.
    OtherBase = 6,
    /// Named by another chunk that the target holds.
    Seen = 7,
    /// Sent as what changed in it.
    Delta = 8,
    /// Sent in full.
    Data = 9,
}

impl Class {
    /// All classes, in order of their numbers: that in which they are tried.
    pub const ALL: [Class; 10] = [
        Class::Unchanged,
        Class::Known,
        Class::Reset,
        Class::Zero,
        Class::BaseDisk,
        Class::BaseMemory,
        Class::OtherBase,
        Class::Seen,
        Class::Delta,
        Class::Data,
    ];

    /// The class of chunks that are named by such a place.
    pub fn of_place(at: BasePlace) -> Self {
        match (at.base, at.place.part) {
            (1.., _) => Class::OtherBase,
            (0, Part::Memory) => Class::BaseMemory,
            (0, Part::Disk | Part::Kernel | Part::Initramfs) => Class::BaseDisk,
        }
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Unchanged => "unchanged",
            Class::Known => "known",
            Class::Reset => "reset",
            Class::Zero => "zero",
            Class::BaseDisk => "base_disk",
            Class::BaseMemory => "base_memory",
            Class::OtherBase => "other_base",
            Class::Seen => "seen",
            Class::Delta => "delta",
            Class::Data => "data",
        }
    }
}

impl Share {
    /// Adds what was done besides.
    pub(crate) fn add(&mut self, more: Share) {
        self.chunks += more.chunks;
        self.bytes_in += more.bytes_in;
        self.bytes_out += more.bytes_out;
        self.cpu_ns += more.cpu_ns;
    }
}

/// A stage of the source, in the order in which chunks pass them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Stage {
    /// Compares, hashes and looks up. Gives out the chunks for which nothing cheaper was found.
    Classify = 0,
    /// Turns those into deltas where that pays.
    Delta = 1,
    /// Puts ops and data into batches.
    Pack = 2,
    /// Compresses batches, and the machine's state.
    Compress = 3,
    /// Numbers and chains what was compressed.
    Seal = 4,
}

impl Stage {
    /// All stages, in order.
    pub const ALL: [Stage; 5] =
        [Stage::Classify, Stage::Delta, Stage::Pack, Stage::Compress, Stage::Seal];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Classify => "classify",
            Stage::Delta => "delta",
            Stage::Pack => "pack",
            Stage::Compress => "compress",
            Stage::Seal => "seal",
        }
    }
}

/// The share of one class or one stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Chunks that it saw; segments of the machine's state have none.
    pub chunks: u64,
    /// Bytes that it took.
    pub bytes_in: u64,
    /// Bytes that it gave. For a class: what it takes in batches, before compression.
    pub bytes_out: u64,
    /// CPU time of the threads that did it.
    pub cpu_ns: u64,
}

/// What the stages of a source did: by class and by stage.
///
/// The CPU time of stages is the threads' own, taken around each group of chunks or each batch.
/// That of classes is the time of `classify` and `delta`, shared out by samples of single chunks:
/// it adds up to the time of these two stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    classes: [Share; Class::ALL.len()],
    stages: [Share; Stage::ALL.len()],
}

impl Stats {
    /// The classes with their shares.
    pub fn classes(&self) -> impl Iterator<Item = (Class, &Share)> {
        Class::ALL.into_iter().zip(&self.classes)
    }

    /// The stages with their shares.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, &Share)> {
        Stage::ALL.into_iter().zip(&self.stages)
    }

    /// Chunks over all classes.
    pub fn chunks(&self) -> u64 {
        self.classes.iter().map(|share| share.chunks).sum()
    }

    /// Counts one chunk of a class.
    pub(crate) fn count(&mut self, class: Class) {
        self[class].chunks += 1;
        self[class].bytes_in += CHUNK_SIZE as u64;
    }

    /// Adds what a batch's steps take, as [`super::RawBatch::class_bytes`] has it.
    pub fn add_bytes_out(&mut self, class_bytes: &[u64; Class::ALL.len()]) {
        for (share, bytes) in self.classes.iter_mut().zip(class_bytes) {
            share.bytes_out += bytes;
        }
    }
}

impl Index<Class> for Stats {
    type Output = Share;

    fn index(&self, class: Class) -> &Share {
        &self.classes[class as usize]
    }
}

impl IndexMut<Class> for Stats {
    fn index_mut(&mut self, class: Class) -> &mut Share {
        &mut self.classes[class as usize]
    }
}

impl Index<Stage> for Stats {
    type Output = Share;

    fn index(&self, stage: Stage) -> &Share {
        &self.stages[stage as usize]
    }
}

impl IndexMut<Stage> for Stats {
    fn index_mut(&mut self, stage: Stage) -> &mut Share {
        &mut self.stages[stage as usize]
    }
}

/// Shares the CPU time of the stages `classify` and `delta` out to classes.
#[derive(Debug, Default)]
pub(crate) struct ClassTimes {
    /// Chunks of each class whose time was taken by itself, and what it came to.
    samples: [(u64, u64); Class::ALL.len()],
}

impl ClassTimes {
    /// Takes note of what one chunk took to classify.
    pub(crate) fn sample(&mut self, class: Class, ns: u64) {
        let (chunks, sum) = &mut self.samples[class as usize];
        *chunks += 1;
        *sum += ns;
    }

    /// Sets the CPU time of the classes in `stats` so that they add up to that of the two stages.
    pub(crate) fn share_out(&self, stats: &mut Stats) {
        let mean = |(chunks, ns): (u64, u64)| ns as f64 / chunks as f64;
        let sum = self.samples.iter().fold((0, 0), |(c, n), (chunks, ns)| (c + chunks, n + ns));
        let weights: [f64; Class::ALL.len()] = std::array::from_fn(|i| {
            let each = match (self.samples[i], sum) {
                ((1.., _), _) => mean(self.samples[i]),
                (_, (1.., _)) => mean(sum),
                _ => 1.0,
            };
            // A clock too coarse to see a chunk sees all of them alike.
            stats.classes[i].chunks as f64 * each.max(1.0)
        });
        let tried = |class: Class| match class {
            Class::Delta | Class::Data => stats[class].chunks as f64,
            _ => 0.0,
        };
        // Where no delta was tried, seeing that is what the stage did for all.
        let any = stats[Stage::Delta].chunks > 0;
        let deltas = if any { Class::ALL.map(tried) } else { weights };
        let (classify, delta) = (stats[Stage::Classify].cpu_ns, stats[Stage::Delta].cpu_ns);
        for (total, weights) in [(classify, weights), (delta, deltas)] {
            let all: f64 = weights.iter().sum();
            for (share, weight) in stats.classes.iter_mut().zip(weights) {
                if all > 0.0 {
                    share.cpu_ns += (total as f64 * weight / all) as u64;
                }
            }
        }
    }
}

/// The share of a stage that works on a thread of its own, read from others.
#[derive(Debug, Default)]
pub struct SharedShare {
    chunks: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    cpu_ns: AtomicU64,
}

impl SharedShare {
    /// Adds what was done just now.
    pub fn add(&self, done: Share) {
        self.chunks.fetch_add(done.chunks, Relaxed);
        self.bytes_in.fetch_add(done.bytes_in, Relaxed);
        self.bytes_out.fetch_add(done.bytes_out, Relaxed);
        self.cpu_ns.fetch_add(done.cpu_ns, Relaxed);
    }

    /// What was done so far.
    pub fn get(&self) -> Share {
        Share {
            chunks: self.chunks.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            cpu_ns: self.cpu_ns.load(Relaxed),
        }
    }
}

/// The CPU time that the calling thread has used, in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is that of the calling thread and `time` is a valid place for its value.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    match done {
        0 => (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64),
        _ => 0,
    }
}

/// A watch on the calling thread's CPU time.
#[derive(Debug)]
pub struct CpuWatch(u64);

impl CpuWatch {
    /// Starts now.
    pub fn start() -> Self {
        Self(thread_cpu_ns())
    }

    /// CPU time since the start or the last lap, in nanoseconds.
    pub fn lap_ns(&mut self) -> u64 {
        let now = thread_cpu_ns();
        now.saturating_sub(std::mem::replace(&mut self.0, now))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A thread that waits uses no CPU, one that works does.
    #[test]
    fn classes_add_up_to_their_stages() {
        let (mut stats, mut times) = (Stats::default(), ClassTimes::default());
        stats[Stage::Classify].cpu_ns = 9_000_000;
        stats[Stage::Delta].cpu_ns = 1_000_000;
        stats[Stage::Delta].chunks = 100;
        for (class, chunks) in [(Class::Unchanged, 100), (Class::Data, 100), (Class::Zero, 50)] {
            stats[class].chunks = chunks;
        }
        times.sample(Class::Unchanged, 100);
        times.sample(Class::Data, 1700);
        times.sample(Class::Data, 1900);
        times.share_out(&mut stats);
        let sum: u64 = stats.classes().map(|(_, share)| share.cpu_ns).sum();
        assert!(sum.abs_diff(10_000_000) < 10, "{sum}");
        assert!(stats[Class::Data].cpu_ns > 15 * stats[Class::Unchanged].cpu_ns);
        assert!(stats[Class::Zero].cpu_ns > 0, "not sampled: the mean of all");
        let mut none = Stats::default();
        ClassTimes::default().share_out(&mut none);
        assert_eq!(none, Stats::default());
    }

    #[test]
    fn cpu_time_is_not_wall_time() {
        let mut watch = CpuWatch::start();
        std::thread::sleep(Duration::from_millis(60));
        assert!(watch.lap_ns() < 30_000_000);
        let start = Instant::now();
        let mut hash = blake3::Hasher::new();
        while watch.lap_ns() == 0 || start.elapsed() < Duration::from_millis(5) {
            hash.update(&[1; 4096]);
        }
        let begin = thread_cpu_ns();
        (0..2000).for_each(|_| _ = hash.update(&[1; 4096]));
        assert!(thread_cpu_ns() - begin > 100_000, "{}", hash.finalize());
    }
}
