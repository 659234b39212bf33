//! A street with people on it, for the detection of objects.

use serde::Deserialize;

use super::{
    Film, Found, Inputs,
    draw::{Canvas, Place},
    read_answer,
};
use crate::{client::Judged, rng::Rng};

const WIDTH: u16 = 400;
const HEIGHT: u16 = 300;
/// People in a picture, at most.
const PEOPLE: usize = 3;
/// Room that each has for itself, so that nobody hides another.
const ROOM: f32 = WIDTH as f32 / PEOPLE as f32;

/// A street and where its people are: their middles.
pub(super) fn street(seed: u64, seq: u64) -> (Canvas, Vec<Place>) {
    let mut rng = Rng::of(&[seed, seq, 0x64]);
    let mut canvas = ground(seed, &mut rng);
    let count = 1 + rng.below(PEOPLE);
    let people = (0..count).map(|at| {
        let middle = [ROOM * (at as f32 + rng.between(0.42, 0.58)), rng.between(160.0, 180.0)];
        person(&mut canvas, middle, rng.between(150.0, 185.0), &mut rng);
        middle
    });
    let people = people.collect();
    canvas.grain(&mut rng, 4.0);
    (canvas, people)
}

/// Sky, houses far away, pavement. The houses are those of the seed's street.
fn ground(seed: u64, rng: &mut Rng) -> Canvas {
    let horizon = 140.0;
    let mut canvas =
        Canvas::new(
            WIDTH,
            HEIGHT,
            |[_, y]| {
                if y < horizon { 205.0 - 0.12 * y } else { 165.0 + 0.08 * y }
            },
        );
    let mut houses = Rng::of(&[seed, 0x68]);
    for house in 0..5 {
        let left = house as f32 * 80.0 + houses.between(-10.0, 10.0);
        let top = houses.between(50.0, 100.0);
        let wall = houses.between(175.0, 195.0);
        canvas.rectangle([left, top], [left + houses.between(60.0, 78.0), horizon], wall);
    }
    let haze = rng.between(0.94, 1.0);
    canvas.light(|_| haze);
    canvas
}

/// Somebody who walks, seen from the front: head, shoulders, arms, legs apart.
fn person(canvas: &mut Canvas, [x, y]: Place, tall: f32, rng: &mut Rng) {
    let coat = rng.between(35.0, 75.0);
    let trousers = rng.between(25.0, 60.0);
    let stride = rng.between(0.05, 0.09);
    let at = |across: f32, down: f32| [x + across * tall, y + down * tall];
    let thick = |part: f32| part * tall;
    for side in [-1.0, 1.0] {
        let (hip, knee, foot) = (
            at(side * 0.05, 0.0),
            at(side * (0.05 + stride * 0.5), 0.24),
            at(side * (0.05 + stride), 0.47),
        );
        canvas.line((hip, thick(0.12)), (knee, thick(0.095)), 1.5, trousers);
        canvas.line((knee, thick(0.095)), (foot, thick(0.065)), 1.5, trousers);
        let (shoulder, elbow, hand) =
            (at(side * 0.1, -0.3), at(side * 0.145, -0.13), at(side * 0.14, 0.03));
        canvas.line((shoulder, thick(0.085)), (elbow, thick(0.07)), 1.5, coat);
        canvas.line((elbow, thick(0.07)), (hand, thick(0.05)), 1.5, coat);
    }
    canvas.line((at(0.0, -0.27), thick(0.22)), (at(0.0, 0.02), thick(0.18)), 2.0, coat);
    canvas.line((at(0.0, -0.36), thick(0.06)), (at(0.0, -0.32), thick(0.08)), 1.5, 120.0);
    canvas.ellipse(at(0.0, -0.42), [thick(0.058), thick(0.075)], 2.0, 95.0);
    canvas.ellipse(at(0.0, -0.455), [thick(0.06), thick(0.045)], 2.0, 30.0);
}

/// Streets for the application to look for people in.
pub(crate) struct Streets(Film<Vec<Place>>);

#[derive(Deserialize)]
struct Answer {
    people: Vec<Found>,
}

impl Streets {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Film::draw(|seq| street(seed, seq)))
    }
}

impl Inputs for Streets {
    fn request(&self, seq: u64) -> Result<Vec<u8>, String> {
        self.0.at(seq).map(|(jpeg, _)| jpeg.clone())
    }

    /// Right if there is a box around everybody's middle. One too many is no fault: detectors that
    /// miss nobody see somebody now and then who is not there.
    fn judge(&self, seq: u64, answer: &[u8]) -> Result<Judged, String> {
        let answer: Answer = read_answer(answer)?;
        let (_, people) = self.0.at(seq)?;
        let seen = |middle: &Place| answer.people.iter().any(|found| found.holds(*middle));
        Ok(Judged { right: Some(people.iter().all(seen)), mark: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_must_be_seen() {
        let streets = Streets::new(1);
        let seq = (0..super::super::FILM)
            .find(|seq| streets.0.at(*seq).unwrap().1.len() > 1)
            .expect("some street has more than one on it");
        let people = &streets.0.at(seq).unwrap().1;
        let judge = |seen: &[Place]| {
            let found =
                |[x, y]: &Place| serde_json::json!({"x": x - 5.0, "y": y - 5.0, "w": 10, "h": 10});
            let boxes: Vec<_> = seen.iter().map(found).collect();
            let answer = serde_json::json!({ "people": boxes });
            streets.judge(seq, answer.to_string().as_bytes()).unwrap().right
        };
        assert_eq!(judge(people), Some(true));
        assert_eq!(judge(&people[1..]), Some(false));
        assert_eq!(judge(&[people.as_slice(), &[[0.0, 0.0]]].concat()), Some(true));
    }
}
