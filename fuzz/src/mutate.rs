//! Random changes to seeds, for where there is no libFuzzer.

use rand::{RngExt, rngs::SmallRng};

/// Numbers that lie at the borders of things.
const BORDERS: [u64; 10] =
    [0, 1, 0x7f, 0x80, 0xff, 0x1000, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// Changes `bytes` in one to four ways; `other` is another seed to take pieces from.
pub fn mutate(rng: &mut SmallRng, bytes: &mut Vec<u8>, other: &[u8], most: usize) {
    for _ in 0..rng.random_range(1..=4) {
        change(rng, bytes, other);
    }
    bytes.truncate(most);
}

fn change(rng: &mut SmallRng, bytes: &mut Vec<u8>, other: &[u8]) {
    if bytes.is_empty() {
        bytes.push(rng.random());
        return;
    }
    let at = rng.random_range(0..bytes.len());
    match rng.random_range(0..8) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = rng.random(),
        2 => border(rng, bytes, at),
        3 => bytes.truncate(at),
        4 => bytes.insert(at, rng.random()),
        5 => {
            let end = (at + rng.random_range(1..=32)).min(bytes.len());
            bytes.drain(at..end);
        }
        6 => {
            let end = (at + rng.random_range(1..=64)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        _ if other.is_empty() => {}
        _ => {
            let from = rng.random_range(0..other.len());
            let end = (from + rng.random_range(1..=256)).min(other.len());
            let over = (at + rng.random_range(0..=(end - from))).min(bytes.len());
            bytes.splice(at..over, other[from..end].iter().copied());
        }
    }
}

/// Puts a border of 1, 2, 4 or 8 bytes.
fn border(rng: &mut SmallRng, bytes: &mut [u8], at: usize) {
    let number = BORDERS[rng.random_range(0..BORDERS.len())].to_le_bytes();
    let length = (1 << rng.random_range(0..4)).min(bytes.len() - at);
    bytes[at..at + length].copy_from_slice(&number[..length]);
}
