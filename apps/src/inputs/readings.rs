//! What somebody's accelerometer says who tilts a box of water to and fro, and now and then shakes it.

use crate::{fluid::Reading, rng::Rng};

/// Readings between two turns of the hand.
const TURN: u64 = 40;
/// How far the box is tilted at most, in multiples of gravity along its bottom.
const TILT: f32 = 0.7;
const SHAKE: f32 = 0.8;

/// The reading of this number.
pub fn reading(seed: u64, seq: u64) -> Reading {
    let turn = seq / TURN;
    let (from, to) = (pose(seed, turn), pose(seed, turn + 1));
    let part = (seq % TURN) as f32 / TURN as f32;
    // As a hand moves: slow, fast, slow.
    let part = part * part * (3.0 - 2.0 * part);
    let mut held: [f32; 3] =
        std::array::from_fn(|axis| from[axis] + (to[axis] - from[axis]) * part);
    if Rng::of(&[seed, turn, 2]).below(4) == 0 {
        let mut rng = Rng::of(&[seed, seq, 3]);
        held = held.map(|part| part + rng.between(-SHAKE, SHAKE));
    }
    Reading(held)
}

/// How the box is held when a turn begins.
fn pose(seed: u64, turn: u64) -> [f32; 3] {
    let mut rng = Rng::of(&[seed, turn, 1]);
    let (x, y) = (rng.between(-TILT, TILT), rng.between(-TILT, TILT));
    [x, y, (1.0 - (x * x + y * y).min(1.0)).sqrt()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_what_an_accelerometer_can_say_and_follow_from_the_seed() {
        for seq in 0..1000 {
            let now = reading(5, seq);
            assert_eq!(now, reading(5, seq));
            assert_eq!(Reading::decode(&now.encode()), Ok(now));
        }
        assert_ne!(reading(5, 3), reading(6, 3));
    }
}
