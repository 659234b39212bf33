//! What modes cost and bring before anything is measured.

use crate::stage::{Codec, Mode};

/// What a mode costs and brings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Prior {
    /// CPU seconds for each byte of a body.
    pub(super) cpu_s_per_byte: f64,
    /// Bytes out for each byte in.
    pub(super) ratio: f64,
}

/// Level, MB a second and ratio, by level: what 58 MB of a Debian guest's memory took that were left
/// after deduplication, in batches of 1 MiB on one core. What is between is interpolated.
type Table = &'static [(i32, f64, f64)];

const NONE: Table = &[(0, 5000.0, 1.0)];
const LZ4: Table = &[(0, 610.0, 0.369)];
const ZSTD: Table = &[
    (-7, 700.0, 0.40),
    (1, 480.0, 0.246),
    (3, 360.0, 0.230),
    (6, 110.0, 0.224),
    (9, 67.0, 0.220),
    (12, 26.0, 0.218),
    (15, 12.0, 0.215),
    (19, 3.0, 0.2045),
    (22, 2.5, 0.204),
];
const XZ: Table =
    &[(0, 20.0, 0.20), (1, 14.0, 0.189), (3, 7.0, 0.181), (6, 2.3, 0.1667), (9, 2.2, 0.1665)];
const GZIP: Table = &[(1, 65.0, 0.28), (6, 25.0, 0.262), (9, 10.0, 0.261)];
const BZIP2: Table = &[(1, 13.0, 0.225), (9, 11.0, 0.22)];

/// What is assumed of a mode.
pub(super) fn of(mode: Mode) -> Prior {
    let table = match mode.codec() {
        Codec::Raw => NONE,
        Codec::Lz4 => LZ4,
        Codec::Zstd => ZSTD,
        Codec::Xz => XZ,
        Codec::Gzip => GZIP,
        Codec::Bzip2 => BZIP2,
    };
    let (mb_per_s, ratio) = at(table, mode.level());
    Prior { cpu_s_per_byte: 1e-6 / mb_per_s, ratio }
}

fn at(table: Table, level: i32) -> (f64, f64) {
    let above = table.iter().find(|row| row.0 >= level);
    let below = table.iter().rev().find(|row| row.0 <= level);
    match (below, above) {
        (Some(&(low, slow, weak)), Some(&(high, fast, strong))) if low < high => {
            let part = f64::from(level - low) / f64::from(high - low);
            (slow * (fast / slow).powf(part), weak + (strong - weak) * part)
        }
        (Some(row), _) | (None, Some(row)) => (row.1, row.2),
        // No table is empty.
        (None, None) => (1.0, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_has_one() {
        for mode in Mode::STATIC.iter().chain(Mode::LADDER) {
            let prior = of(*mode);
            assert!((1e-10..1e-5).contains(&prior.cpu_s_per_byte), "{mode}: {prior:?}");
            assert!((0.1..=1.0).contains(&prior.ratio), "{mode}: {prior:?}");
        }
        let level = |level| of(Mode::new(Codec::Zstd, level).unwrap());
        assert_eq!(level(3).ratio, 0.230);
        assert!(level(4).cpu_s_per_byte > level(3).cpu_s_per_byte);
        assert!(level(4).cpu_s_per_byte < level(6).cpu_s_per_byte);
        assert!(level(4).ratio < level(3).ratio);
    }

    #[test]
    fn each_of_the_ladder_is_stronger_and_slower_than_the_one_before() {
        let (_text, ladder) = Mode::LADDER.split_last().unwrap();
        for pair in ladder.windows(2) {
            let (fast, strong) = (of(pair[0]), of(pair[1]));
            assert!(fast.cpu_s_per_byte < strong.cpu_s_per_byte, "{pair:?}");
            assert!(fast.ratio > strong.ratio, "{pair:?}");
        }
    }
}
