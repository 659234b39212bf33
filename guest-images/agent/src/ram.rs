//! Pages of RAM whose content is known: dirtied at a given rate and checked all the time.
//!
//! A page holds its index, a version, a checksum and words drawn from both. The version that a
//! page should have is kept apart from it, so that a page which went stale (an older version,
//! intact) is found just as one that was damaged.
//!
//! A rewrite gives a page its next version. It writes the header (24 bytes) and either the whole
//! page or, as a program does that updates one record among many, a stretch of it at a place drawn
//! from page and version. Of what is written the first part is random and the rest one byte
//! repeated.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::vitals::Vitals;

/// Bytes of one page.
const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
const HEADER_WORDS: usize = 3;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES as u64;

/// How long the worker sleeps between two batches.
const BATCH_EVERY: Duration = Duration::from_millis(10);
/// Pages of one batch: bounds how long a command waits for the lock.
const MAX_BATCH_PAGES: u64 = 4096;
/// Pages verified a second when nothing else is asked for.
const IDLE_VERIFY_PER_S: u64 = 256;
/// Pages dirtied a second beyond which a wish is refused.
pub(crate) const MAX_DIRTY_PER_S: u32 = 1_000_000;

/// What RAM the agent should hold and how fast it should change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Pages rewritten a second, picked at random.
    pub(crate) pages_per_s: u32,
    /// Size of the buffer.
    pub(crate) mib: u32,
    /// How much of what is written is random; the rest compresses well.
    pub(crate) random_percent: u8,
    /// How much of a page a rewrite writes.
    pub(crate) changed_percent: u8,
}

impl Load {
    /// Compresses about as well as the RAM of a busy guest.
    pub(crate) const DEFAULT_RANDOM_PERCENT: u8 = 25;
    /// A rewrite is one of the whole page.
    pub(crate) const DEFAULT_CHANGED_PERCENT: u8 = 100;
}

/// Why a buffer cannot be had.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum LoadError {
    #[error("{wanted_mib} MiB wanted, but only {available_mib} MiB of guest RAM can be spared")]
    TooLarge { wanted_mib: u32, available_mib: u64 },
    #[error("pages cannot be dirtied without a buffer: give its size in MiB")]
    NoBuffer,
}

/// A page, aligned as the guest's MMU sees it, so that one touch dirties one page.
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

struct Buffer {
    pages: Vec<Page>,
    /// The version that each page should have.
    versions: Vec<u32>,
    random_percent: u8,
    changed_words: usize,
    /// The next page of the round of verification.
    cursor: usize,
    rng: u64,
}

impl Buffer {
    fn new(load: Load, available_mib: u64) -> Result<Self, LoadError> {
        let too_large = LoadError::TooLarge { wanted_mib: load.mib, available_mib };
        if u64::from(load.mib) > available_mib {
            return Err(too_large);
        }
        let count = (u64::from(load.mib) * PAGES_PER_MIB) as usize;
        let mut pages = Vec::new();
        if pages.try_reserve_exact(count).is_err() {
            return Err(too_large);
        }
        let random_percent = load.random_percent;
        for index in 0..count {
            pages.push(Page([0; WORDS]));
            write(&mut pages[index], index, 1, random_percent, WORDS);
        }
        let versions = vec![1; count];
        let changed_words = part_of(WORDS, load.changed_percent).max(1);
        let rng = 0x9e37_79b9_7f4a_7c15;
        Ok(Self { pages, versions, random_percent, changed_words, cursor: 0, rng })
    }

    fn is_sound(&self, index: usize) -> bool {
        // A real read each time: the compiler must not reason about what was written.
        let page = black_box(&self.pages[index]);
        page.0[0] == index as u64
            && page.0[1] == u64::from(self.versions[index])
            && page.0[2] == checksum(page)
    }

    /// Checks a page, then gives it its next version.
    fn dirty_one(&mut self) -> bool {
        self.rng = mix(self.rng);
        let index = (self.rng % self.pages.len() as u64) as usize;
        let sound = self.is_sound(index);
        let version = self.versions[index].wrapping_add(1);
        self.versions[index] = version;
        write(&mut self.pages[index], index, version, self.random_percent, self.changed_words);
        sound
    }

    fn verify_next(&mut self) -> bool {
        let index = self.cursor;
        self.cursor = (index + 1) % self.pages.len();
        self.is_sound(index)
    }
}

fn part_of(words: usize, percent: u8) -> usize {
    words * usize::from(percent.min(100)) / 100
}

/// Gives a page a version, writing so many words of it beside the header.
fn write(page: &mut Page, index: usize, version: u32, random_percent: u8, changed_words: usize) {
    let seed = mix(index as u64 ^ (u64::from(version) << 40));
    page.0[0] = index as u64;
    page.0[1] = u64::from(version);
    let payload = &mut page.0[HEADER_WORDS..];
    let changed_words = changed_words.min(payload.len());
    let at = (mix(!seed) % (payload.len() - changed_words + 1) as u64) as usize;
    let record = &mut payload[at..at + changed_words];
    let (random, plain) = record.split_at_mut(part_of(changed_words, random_percent));
    let mut state = seed;
    for word in random {
        state = mix(state);
        *word = state;
    }
    plain.fill(seed & 0xff);
    page.0[2] = checksum(page);
}

fn checksum(page: &Page) -> u64 {
    let fold =
        |sum: u64, &word: &u64| (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
    page.0[HEADER_WORDS..].iter().fold(mix(page.0[0] ^ (page.0[1] << 32)), fold)
}

/// One step of a generator with a full period (splitmix64).
pub(crate) fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The agent's RAM load: set by commands, kept up by one worker thread.
pub(crate) struct Ram {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    buffer: Option<Buffer>,
    pages_per_s: u32,
}

impl Ram {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::default()), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds and dirties RAM as told. A buffer of the same size and mix stays, and only what is
    /// done to it changes.
    pub(crate) fn set(&self, load: Load, vitals: &Vitals) -> Result<(), LoadError> {
        if load.mib == 0 && load.pages_per_s > 0 {
            return Err(LoadError::NoBuffer);
        }
        let mut state = self.lock();
        let pages = u64::from(load.mib) * PAGES_PER_MIB;
        let same =
            |b: &Buffer| b.pages.len() as u64 == pages && b.random_percent == load.random_percent;
        if !state.buffer.as_ref().map_or(pages == 0, same) {
            state.buffer = None;
            vitals.ram_pages.store(0, Ordering::Release);
            let buffer = Buffer::new(load, available_mib())?;
            vitals.ram_pages.store(pages, Ordering::Release);
            state.buffer = (pages > 0).then_some(buffer);
        }
        if let Some(buffer) = &mut state.buffer {
            buffer.changed_words = part_of(WORDS, load.changed_percent).max(1);
        }
        state.pages_per_s = load.pages_per_s;
        self.changed.notify_all();
        Ok(())
    }

    /// Gives the buffer back; its pages stay in RAM with their old content, as freed pages do.
    pub(crate) fn free(&self, vitals: &Vitals) {
        *self.lock() = State::default();
        vitals.ram_pages.store(0, Ordering::Release);
    }

    /// Checks every page now; returns how many were checked and how many were wrong.
    pub(crate) fn verify_all(&self, vitals: &Vitals) -> (u64, u64) {
        let state = self.lock();
        let Some(buffer) = &state.buffer else { return (0, 0) };
        let wrong = (0..buffer.pages.len()).filter(|&i| !buffer.is_sound(i)).count() as u64;
        vitals.pages_verified.fetch_add(buffer.pages.len() as u64, Ordering::AcqRel);
        vitals.ram_errors.fetch_add(wrong, Ordering::AcqRel);
        (buffer.pages.len() as u64, wrong)
    }

    /// Dirties and verifies for as long as the agent lives.
    pub(crate) fn run(&self, vitals: &Vitals) -> ! {
        let mut last = Instant::now();
        let (mut to_dirty, mut to_verify) = (Budget::default(), Budget::default());
        loop {
            let mut state = self.lock();
            while state.buffer.is_none() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                last = Instant::now();
            }
            let elapsed = last.elapsed();
            last = Instant::now();
            let rate = u64::from(state.pages_per_s);
            if let Some(buffer) = &mut state.buffer {
                let wrong = |sound: bool| u64::from(!sound);
                let dirtied = to_dirty.take(rate, elapsed);
                let errors: u64 = (0..dirtied).map(|_| wrong(buffer.dirty_one())).sum();
                let verified = to_verify.take(rate.max(IDLE_VERIFY_PER_S), elapsed);
                let more: u64 = (0..verified).map(|_| wrong(buffer.verify_next())).sum();
                add(&vitals.pages_dirtied, dirtied);
                add(&vitals.pages_verified, dirtied + verified);
                add(&vitals.ram_errors, errors + more);
            }
            drop(state);
            std::thread::sleep(BATCH_EVERY);
        }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::AcqRel);
}

/// Turns a rate into whole pages, without losing the fractions.
#[derive(Debug, Default)]
struct Budget {
    micropages: u64,
}

impl Budget {
    /// Pages due after `elapsed`, at most a batch: a guest that stood still does not catch up.
    fn take(&mut self, per_second: u64, elapsed: Duration) -> u64 {
        let elapsed_us = elapsed.min(Duration::from_secs(1)).as_micros() as u64;
        self.micropages += per_second * elapsed_us;
        let pages = self.micropages / 1_000_000;
        self.micropages %= 1_000_000;
        pages.min(MAX_BATCH_PAGES)
    }
}

/// Guest RAM that the agent may take: most of what the kernel calls available.
fn available_mib() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024 * 9 / 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(random_percent: u8) -> Buffer {
        Buffer::new(load(1, random_percent, 100), 16).unwrap()
    }

    fn load(mib: u32, random_percent: u8, changed_percent: u8) -> Load {
        Load { pages_per_s: 0, mib, random_percent, changed_percent }
    }

    #[test]
    fn what_is_written_is_sound_however_often() {
        for percent in [0, 25, 100] {
            let mut buffer = buffer(percent);
            assert!((0..2000).all(|_| buffer.dirty_one() && buffer.verify_next()));
        }
    }

    #[test]
    fn damage_staleness_and_a_swapped_page_are_found() {
        let mut flipped = buffer(25);
        flipped.pages[3].0[511] ^= 1;
        assert!(!flipped.is_sound(3));

        let mut stale = buffer(25);
        stale.versions[4] += 1;
        assert!(!stale.is_sound(4));

        let mut swapped = buffer(25);
        swapped.pages.swap(1, 2);
        assert!(!swapped.is_sound(1) && !swapped.is_sound(2) && swapped.is_sound(3));
    }

    #[test]
    fn one_round_of_verification_reaches_every_page() {
        let mut buffer = buffer(25);
        buffer.pages[200].0[0] ^= 1;
        let wrong = (0..buffer.pages.len()).filter(|_| !buffer.verify_next()).count();
        assert_eq!(wrong, 1);
    }

    #[test]
    fn more_than_the_guest_has_is_refused() {
        let error = LoadError::TooLarge { wanted_mib: 17, available_mib: 16 };
        assert_eq!(Buffer::new(load(17, 0, 100), 16).err(), Some(error));
    }

    #[test]
    fn a_rewrite_changes_no_more_of_a_page_than_it_should() {
        for (percent, most) in [(0, 1 + HEADER_WORDS), (10, 51 + HEADER_WORDS), (100, WORDS)] {
            let mut buffer = Buffer::new(load(1, 50, percent), 16).unwrap();
            let before: Vec<[u64; WORDS]> = buffer.pages.iter().map(|page| page.0).collect();
            for (index, before) in before.iter().enumerate() {
                let words = buffer.changed_words;
                buffer.versions[index] = 2;
                write(&mut buffer.pages[index], index, 2, 50, words);
                assert!(buffer.is_sound(index));
                let changed = before.iter().zip(&buffer.pages[index].0);
                let changed = changed.filter(|(old, new)| old != new).count();
                assert!(changed > 1 && changed <= most, "{percent} %: {changed} of {most} words");
            }
        }
    }

    #[test]
    fn budgets_keep_fractions_and_do_not_catch_up() {
        let mut budget = Budget::default();
        let pages: u64 = (0..100).map(|_| budget.take(50, Duration::from_millis(10))).sum();
        assert_eq!(pages, 50);
        assert_eq!(budget.take(50, Duration::from_secs(3600)), 50);
    }
}
