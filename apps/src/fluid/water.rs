//! Smoothed-particle hydrodynamics, after Müller, Charypar and Gross (2003).
//!
//! Units are metres, seconds and kilograms; the box is the unit cube. Only additions,
//! multiplications, divisions and square roots are used, in a fixed order: a simulation is a
//! function of its readings, bit for bit, on every machine.

use super::{Picture, Reading, cells::Cells};

/// How many particles there are.
pub const PARTICLES: usize = 16 * 16 * 8;

/// How far apart particles of water at rest are.
const SPACING: f32 = 0.04;
/// How far a particle sees: some thirty neighbours.
const REACH: f32 = 2.0 * SPACING;
const REST_DENSITY: f32 = 1000.0;
const MASS: f32 = REST_DENSITY * SPACING * SPACING * SPACING;
/// Pressure for each kg/m³ too many; its root is the speed of sound. Low for water, so that steps can be long.
const STIFFNESS: f32 = 30.0;
/// Thick as a light syrup, so that it comes to rest.
const VISCOSITY: f32 = 6.0;
const GRAVITY: f32 = 9.81;
/// What of its speed a particle keeps when a wall throws it back.
const BOUNCE: f32 = 0.4;
const STEP_S: f32 = 0.004;
/// Steps of a frame.
const STEPS: usize = 3;
/// No particle goes farther than half its reach in a step, whatever shakes the box.
const MAX_SPEED: f32 = 0.5 * REACH / STEP_S;

/// The kernels' factors, for `REACH`.
struct Kernels {
    poly6: f32,
    spiky_gradient: f32,
    viscosity_laplacian: f32,
}

const KERNELS: Kernels = {
    const PI: f32 = std::f32::consts::PI;
    const H3: f32 = REACH * REACH * REACH;
    Kernels {
        poly6: 315.0 / (64.0 * PI * H3 * H3 * H3),
        spiky_gradient: -45.0 / (PI * H3 * H3),
        viscosity_laplacian: 45.0 / (PI * H3 * H3),
    }
};

type Vector = [f32; 3];

/// Water in a box.
#[derive(Debug, Clone)]
pub struct Water {
    places: Vec<Vector>,
    speeds: Vec<Vector>,
    densities: Vec<f32>,
    forces: Vec<Vector>,
    cells: Cells,
    frames: u64,
}

impl Default for Water {
    /// A column of water in a corner that is about to collapse.
    fn default() -> Self {
        let at = |n: usize| SPACING * (n as f32 + 0.5);
        let places: Vec<Vector> =
            (0..PARTICLES).map(|n| [at(n % 8), at(n / 8 % 16), at(n / 128)]).collect();
        Self {
            speeds: vec![[0.0; 3]; places.len()],
            densities: vec![REST_DENSITY; places.len()],
            forces: vec![[0.0; 3]; places.len()],
            cells: Cells::new(REACH),
            frames: 0,
            places,
        }
    }
}

impl Water {
    /// Goes on by one frame in a box that is held, and shaken, as the reading says.
    pub fn frame(&mut self, reading: Reading) -> Picture {
        // What the accelerometer feels holds it against what the water feels.
        let pull = reading.0.map(|part| -GRAVITY * part);
        for _ in 0..STEPS {
            self.cells.sort(&self.places);
            self.weigh();
            self.push(pull);
            self.go();
        }
        self.frames += 1;
        self.picture()
    }

    /// How dense the water is around each particle.
    fn weigh(&mut self) {
        for (place, density) in self.places.iter().zip(&mut self.densities) {
            let mut sum = 0.0;
            self.cells.near(*place, |other| {
                let inside = REACH * REACH - square(minus(*place, self.places[other]));
                if inside > 0.0 {
                    sum += inside * inside * inside;
                }
            });
            *density = MASS * KERNELS.poly6 * sum;
        }
    }

    /// What pushes each particle: pressure, its neighbours' speed, gravity.
    fn push(&mut self, pull: Vector) {
        let pressure = |density: f32| STIFFNESS * (density - REST_DENSITY).max(0.0);
        for one in 0..self.places.len() {
            let (place, speed, density) = (self.places[one], self.speeds[one], self.densities[one]);
            let own = pressure(density);
            let mut force = [0.0; 3];
            self.cells.near(place, |other| {
                let apart = minus(place, self.places[other]);
                let squared = square(apart);
                if other == one || squared >= REACH * REACH || squared == 0.0 {
                    return;
                }
                let distance = squared.sqrt();
                let left = REACH - distance;
                let theirs = self.densities[other];
                let mean = (own + pressure(theirs)) / 2.0;
                let press = -MASS * mean / theirs * KERNELS.spiky_gradient * left * left / distance;
                let drag = VISCOSITY * MASS / theirs * KERNELS.viscosity_laplacian * left;
                for axis in 0..3 {
                    let faster = self.speeds[other][axis] - speed[axis];
                    force[axis] += press * apart[axis] + drag * faster;
                }
            });
            // Per mass: what changes its speed.
            self.forces[one] = std::array::from_fn(|axis| force[axis] / density + pull[axis]);
        }
    }

    /// Moves each particle, and keeps it in the box.
    fn go(&mut self) {
        let particles = self.places.iter_mut().zip(&mut self.speeds).zip(&self.forces);
        for ((place, speed), force) in particles {
            for axis in 0..3 {
                let faster = speed[axis] + STEP_S * force[axis];
                speed[axis] = faster.clamp(-MAX_SPEED, MAX_SPEED);
                place[axis] += STEP_S * speed[axis];
                if place[axis] < 0.0 || place[axis] > 1.0 {
                    place[axis] = place[axis].clamp(0.0, 1.0);
                    speed[axis] *= -BOUNCE;
                }
            }
        }
    }

    fn picture(&self) -> Picture {
        let mut hasher = blake3::Hasher::new();
        for vectors in [&self.places, &self.speeds] {
            let bytes: Vec<u8> =
                vectors.as_flattened().iter().flat_map(|part| part.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
        let mut digest = [0; 8];
        hasher.finalize_xof().fill(&mut digest);
        let places = self.places.iter().map(|place| place.map(|part| (part * 65535.0) as u16));
        Picture { frame: self.frames, digest, places: places.collect() }
    }
}

fn minus(a: Vector, b: Vector) -> Vector {
    std::array::from_fn(|axis| a[axis] - b[axis])
}

fn square(v: Vector) -> f32 {
    v[0] * v[0] + v[1] * v[1] + v[2] * v[2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::readings::reading;

    const FLAT: Reading = Reading([0.0, 0.0, 1.0]);

    fn mean_height(water: &Water) -> f32 {
        water.places.iter().map(|place| place[2]).sum::<f32>() / PARTICLES as f32
    }

    #[test]
    fn a_column_collapses_and_comes_to_rest_at_its_density() {
        let mut water = Water::default();
        let before = mean_height(&water);
        for _ in 0..250 {
            water.frame(FLAT);
        }
        let after = mean_height(&water);
        // 2048 × 0.04³ m³ on 1 m²: 0.13 m deep, so its middle is at 0.065 m.
        assert!(after < before / 3.0 && (0.02..0.1).contains(&after), "{before} {after}");
        let speed = water.speeds.iter().map(|speed| square(*speed)).sum::<f32>() / PARTICLES as f32;
        assert!(speed.sqrt() < 0.25, "still {} m/s", speed.sqrt());
        let mean = water.densities.iter().sum::<f32>() / PARTICLES as f32;
        assert!((700.0..1400.0).contains(&mean), "{mean} kg/m³");
    }

    #[test]
    fn a_box_held_the_other_way_up_pours_the_water_to_the_other_side() {
        let mut water = Water::default();
        for _ in 0..80 {
            water.frame(Reading([0.0, 0.0, -1.0]));
        }
        assert!(mean_height(&water) > 0.7, "{}", mean_height(&water));
    }

    #[test]
    fn the_same_readings_give_the_same_water_to_the_last_bit() {
        let film = |seed: u64| {
            let mut water = Water::default();
            (0..20).map(|seq| water.frame(reading(seed, seq)).digest).collect::<Vec<_>>()
        };
        assert_eq!(film(1), film(1));
        assert_ne!(film(1), film(2));
    }

    #[test]
    fn water_stays_in_the_box_however_it_is_shaken() {
        let mut water = Water::default();
        for n in 0..40 {
            let side = if n % 2 == 0 { 16.0 } else { -16.0 };
            water.frame(Reading([side, -side, side]));
            assert!(water.places.as_flattened().iter().all(|part| (0.0..=1.0).contains(part)));
        }
    }
}
