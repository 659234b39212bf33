//! Markers in a cluttered scene, for augmented reality.

use serde::Deserialize;

use super::{
    Film, Inputs, Named,
    draw::{Canvas, Place},
    read_answer,
};
use crate::{client::Judged, rng::Rng};

/// How many markers the application knows.
const MARKERS: usize = 8;
/// What markers follow from: the same whatever a client's seed.
const PRINTED: u64 = 0x6172;
/// A marker's edge, in pixels of its own.
const EDGE: u16 = 240;
const WIDTH: u16 = 480;
const HEIGHT: u16 = 360;
/// How far a corner may be from where it is, in pixels, on average.
const CLOSE: f32 = 8.0;

/// A marker's file name without its suffix, which is also what the application calls it.
fn name(marker: usize) -> String {
    format!("marker-{marker}")
}

/// A printed pattern: blots and bars of every size, so that it has corners at every scale.
fn printed(marker: usize) -> Canvas {
    let mut rng = Rng::of(&[PRINTED, marker as u64]);
    let edge = f32::from(EDGE);
    let mut canvas = Canvas::new(EDGE, EDGE, |_| 225.0);
    for n in 0..110 {
        let size = edge * 0.16 / (1.0 + n as f32 / 20.0);
        let place = [rng.between(0.0, edge), rng.between(0.0, edge)];
        let value =
            if rng.below(2) == 0 { rng.between(10.0, 90.0) } else { rng.between(160.0, 250.0) };
        match rng.below(3) {
            0 => canvas.ellipse(place, [size, size * rng.between(0.4, 1.0)], 1.0, value),
            1 => {
                let high = [place[0] + size * rng.between(0.6, 2.0), place[1] + size];
                canvas.rectangle(place, high, value);
            }
            _ => {
                let end = [
                    place[0] + rng.between(-2.0, 2.0) * size,
                    place[1] + rng.between(-2.0, 2.0) * size,
                ];
                canvas.line((place, size * 0.4), (end, size * 0.2), 1.0, value);
            }
        }
    }
    canvas
}

/// What the application knows beforehand.
pub(super) fn gallery() -> Vec<Named> {
    (0..MARKERS).map(|marker| (format!("{}.jpg", name(marker)), printed(marker).jpeg())).collect()
}

/// Where a marker is in a scene.
pub(super) struct Truth {
    marker: usize,
    /// Its corners: left upper, right upper, right lower, left lower.
    corners: [Place; 4],
}

/// A scene with a marker in it.
pub(super) fn sight(seed: u64, seq: u64) -> (Canvas, Truth) {
    let mut rng = Rng::of(&[seed, seq, 0x73]);
    let mut canvas = clutter(&mut rng);
    let marker = rng.below(MARKERS);
    let corners = stand(&mut rng);
    let back = Projection::from_square(corners).inverse();
    let picture = printed(marker);
    let last = f32::from(EDGE - 1);
    let ends = |pick: fn(f32, f32) -> f32, axis: usize| {
        corners.iter().map(|corner| corner[axis]).fold(corners[0][axis], pick)
    };
    canvas.lay(
        [ends(f32::min, 0), ends(f32::min, 1)],
        [ends(f32::max, 0), ends(f32::max, 1)],
        |place| {
            let [u, v] = back.apply(place);
            picture.at([u * last, v * last]).map(|value| (value, 1.0))
        },
    );
    let light = rng.between(-0.2, 0.2);
    canvas.light(|[x, _]| 0.92 + light * (x / f32::from(WIDTH) - 0.5));
    canvas.grain(&mut rng, 6.0);
    (canvas, Truth { marker, corners })
}

/// A table with things on it.
fn clutter(rng: &mut Rng) -> Canvas {
    let (tone, wave) = (rng.between(90.0, 150.0), rng.between(20.0, 50.0));
    let mut canvas =
        Canvas::new(WIDTH, HEIGHT, |[x, y]| tone + 14.0 * ((x + 0.4 * y) / wave).sin());
    for _ in 0..26 {
        let place = [rng.between(0.0, f32::from(WIDTH)), rng.between(0.0, f32::from(HEIGHT))];
        let radii = [rng.between(6.0, 40.0), rng.between(6.0, 30.0)];
        canvas.ellipse(place, radii, rng.between(1.0, 8.0), rng.between(50.0, 210.0));
    }
    canvas
}

/// Corners of a marker that lies turned and tilted before the camera.
fn stand(rng: &mut Rng) -> [Place; 4] {
    let half = rng.between(65.0, 90.0);
    let middle = [rng.between(170.0, 310.0), rng.between(165.0, 195.0)];
    let (sin, cos) = rng.between(-0.6, 0.6).sin_cos();
    let tilt = [rng.between(-0.1, 0.1), rng.between(-0.1, 0.1)];
    [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]].map(|[x, y]: Place| {
        // What is farther away is smaller.
        let near = half / (1.0 + tilt[0] * x + tilt[1] * y);
        [middle[0] + near * (cos * x - sin * y), middle[1] + near * (sin * x + cos * y)]
    })
}

/// A projection of the plane: a 3×3 matrix, row by row.
struct Projection([f32; 9]);

impl Projection {
    /// The one that takes the unit square's corners there (after Heckbert, 1989).
    fn from_square([p0, p1, p2, p3]: [Place; 4]) -> Self {
        let sum = [0, 1].map(|axis| p0[axis] - p1[axis] + p2[axis] - p3[axis]);
        let one = [0, 1].map(|axis| p1[axis] - p2[axis]);
        let two = [0, 1].map(|axis| p3[axis] - p2[axis]);
        let area = one[0] * two[1] - two[0] * one[1];
        let g = (sum[0] * two[1] - two[0] * sum[1]) / area;
        let h = (one[0] * sum[1] - sum[0] * one[1]) / area;
        Self([
            p1[0] - p0[0] + g * p1[0],
            p3[0] - p0[0] + h * p3[0],
            p0[0],
            p1[1] - p0[1] + g * p1[1],
            p3[1] - p0[1] + h * p3[1],
            p0[1],
            g,
            h,
            1.0,
        ])
    }

    /// The way back; its scale does not matter.
    fn inverse(&self) -> Self {
        let [a, b, c, d, e, f, g, h, i] = self.0;
        Self([
            e * i - f * h,
            c * h - b * i,
            b * f - c * e,
            f * g - d * i,
            a * i - c * g,
            c * d - a * f,
            d * h - e * g,
            b * g - a * h,
            a * e - b * d,
        ])
    }

    fn apply(&self, [x, y]: Place) -> Place {
        let [a, b, c, d, e, f, g, h, i] = self.0;
        let depth = g * x + h * y + i;
        [(a * x + b * y + c) / depth, (d * x + e * y + f) / depth]
    }
}

/// Scenes for the application to annotate.
pub(crate) struct Sights(Film<Truth>);

#[derive(Deserialize)]
struct Answer {
    markers: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Annotation {
    name: String,
    corners: [Place; 4],
}

impl Sights {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Film::draw(|seq| sight(seed, seq)))
    }
}

impl Inputs for Sights {
    fn request(&self, seq: u64) -> Result<Vec<u8>, String> {
        self.0.at(seq).map(|(jpeg, _)| jpeg.clone())
    }

    /// Right if the marker has its name, and its corners are where they are.
    fn judge(&self, seq: u64, answer: &[u8]) -> Result<Judged, String> {
        let answer: Answer = read_answer(answer)?;
        let (_, truth) = self.0.at(seq)?;
        let apart = |corners: &[Place; 4]| {
            let pairs = corners.iter().zip(&truth.corners);
            pairs.map(|(a, b)| (a[0] - b[0]).hypot(a[1] - b[1])).sum::<f32>() / 4.0
        };
        let good = |one: &Annotation| one.name == name(truth.marker) && apart(&one.corners) < CLOSE;
        Ok(Judged { right: Some(answer.markers.iter().any(good)), mark: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_projection_takes_corners_there_and_its_inverse_takes_them_back() {
        let corners = [[100.0, 80.0], [220.0, 95.0], [205.0, 230.0], [90.0, 190.0]];
        let there = Projection::from_square(corners);
        let square = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]];
        let close = |a: Place, b: Place| (a[0] - b[0]).hypot(a[1] - b[1]) < 0.01;
        for (from, to) in square.into_iter().zip(corners) {
            assert!(close(there.apply(from), to));
            assert!(close(there.inverse().apply(to), from));
        }
    }

    #[test]
    fn markers_lie_within_the_picture_and_answers_are_held_against_them() {
        let sights = Sights::new(2);
        for (_, truth) in &sights.0.0 {
            let within = |[x, y]: Place| (0.0..480.0).contains(&x) && (0.0..360.0).contains(&y);
            assert!(truth.corners.into_iter().all(within), "{:?}", truth.corners);
        }
        let (_, truth) = sights.0.at(0).unwrap();
        let judge = |name: &str, off: f32| {
            let corners = truth.corners.map(|[x, y]| [x + off, y]);
            let answer = serde_json::json!({ "markers": [{ "name": name, "corners": corners }] });
            sights.judge(0, answer.to_string().as_bytes()).unwrap().right
        };
        assert_eq!(judge(&name(truth.marker), 1.0), Some(true));
        assert_eq!(judge(&name(truth.marker), 12.0), Some(false));
        assert_eq!(judge("marker-99", 0.0), Some(false));
    }
}
