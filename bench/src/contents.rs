//! What guests hold: chunks of known kinds, each made from its number alone.

use guest_images::{CHUNK_SIZE, Chunk};

/// A kind of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Words of a vocabulary with spaces and line ends, frequent ones more often.
    Text,
    /// Pointers, small integers and zeros, as heaps have them.
    Heap,
    /// Rows of a table that differ in little: every codec is fast with it.
    Rows,
    /// Nothing that compresses: images, ciphers, what is compressed already.
    Noise,
}

/// How often each kind comes, out of the sum.
pub(crate) type Mix = [(Kind, u64)];

/// Like what a guest's own writes leave: it compresses to about a quarter.
pub(crate) const MEMORY: &Mix = &[(Kind::Heap, 6), (Kind::Text, 3), (Kind::Noise, 1)];
/// It compresses to next to nothing.
pub(crate) const ROWS: &Mix = &[(Kind::Rows, 1)];
/// Nothing of it can.
pub(crate) const NOISE: &Mix = &[(Kind::Noise, 1)];

/// Random numbers that are the same each time.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mixed(seed) | 1)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn mixed(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(0x9e37_79b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Chunk number `n` of a mix.
pub(crate) fn fill(mix: &Mix, n: u64, into: &mut Chunk) {
    let sum: u64 = mix.iter().map(|(_, share)| share).sum();
    let mut at = mixed(n) % sum.max(1);
    let kind = mix.iter().find(|(_, share)| {
        let found = at < *share;
        at = at.wrapping_sub(*share);
        found
    });
    let mut dice = Dice::new(n);
    match kind.map_or(Kind::Noise, |(kind, _)| *kind) {
        Kind::Text => text(&mut dice, into),
        Kind::Heap => heap(&mut dice, into),
        Kind::Rows => {
            let (rows, _) = into.as_chunks_mut::<64>();
            for (number, row) in (0..).zip(rows) {
                row.fill(b'.');
                row[..8].copy_from_slice(&(n << 8 | number).to_be_bytes());
            }
        }
        Kind::Noise => {
            let (words, _) = into.as_chunks_mut::<8>();
            words.iter_mut().for_each(|word| *word = mixed(dice.roll()).to_le_bytes());
        }
    }
}

/// So many chunks of a mix, one after the other.
pub(crate) fn chunks(mix: &Mix, count: usize) -> Vec<Chunk> {
    let mut chunks = vec![[0; CHUNK_SIZE]; count];
    (0..).zip(&mut chunks).for_each(|(n, chunk)| fill(mix, n, chunk));
    chunks
}

fn text(dice: &mut Dice, into: &mut Chunk) {
    const WORDS: u64 = 6000;
    let mut at = 0;
    while at < CHUNK_SIZE {
        // Squared twice: few words make most of a text.
        let share = (dice.roll() >> 11) as f64 / (1u64 << 53) as f64;
        let word = (share * share * share * WORDS as f64) as u64;
        let letters = mixed(word);
        let len = 2 + (letters >> 60) as usize % 9;
        for letter in 0..len {
            let Some(byte) = into.get_mut(at) else { return };
            *byte = b'a' + (letters >> (letter * 5)) as u8 % 26;
            at += 1;
        }
        if let Some(byte) = into.get_mut(at) {
            *byte = if dice.roll().is_multiple_of(12) { b'\n' } else { b' ' };
        }
        at += 1;
    }
}

fn heap(dice: &mut Dice, into: &mut Chunk) {
    let arena = 0x7f00_0000_0000 | (dice.roll() & 0xff) << 24;
    let (words, _) = into.as_chunks_mut::<8>();
    for word in words {
        let n = dice.roll();
        let value = match n % 16 {
            0..5 => 0,
            5..10 => arena | n >> 8 & 0xf_fff0,
            10..14 => n >> 16 & 0xff,
            14 => n >> 8 & 0xffff_ffff,
            _ => n,
        };
        *word = value.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_compress_as_they_say() {
        let left = |mix| {
            let chunks = chunks(mix, 512);
            let bytes = chunks.as_flattened();
            zstd::bulk::compress(bytes, 3).unwrap().len() as f64 / bytes.len() as f64
        };
        assert!((0.15..0.55).contains(&left(MEMORY)), "{}", left(MEMORY));
        assert!(left(ROWS) < 0.1, "{}", left(ROWS));
        assert!(left(NOISE) > 0.99);
        let (mut once, mut again) = ([0; CHUNK_SIZE], [1; CHUNK_SIZE]);
        fill(MEMORY, 77, &mut once);
        fill(MEMORY, 77, &mut again);
        assert!(once == again);
    }
}
