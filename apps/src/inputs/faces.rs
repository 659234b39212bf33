//! Faces of people who do not exist, for face recognition.

use serde::Deserialize;

use super::{
    Film, Found, Inputs, Named,
    draw::{Canvas, Place},
    read_answer,
};
use crate::{client::Judged, rng::Rng};

/// Who they are.
const NAMES: [&str; 12] = [
    "ada", "bela", "cleo", "dora", "emil", "fritz", "greta", "hugo", "ida", "jonas", "karl", "lena",
];
/// Pictures of each that the application has seen before.
const SEEN: u64 = 8;
/// What faces follow from: the same people whatever a client's seed.
const PEOPLE: u64 = 0x0066_6163_6573;
const WIDTH: u16 = 320;
const HEIGHT: u16 = 240;

/// How somebody looks. Lengths are parts of half the head's width or height.
struct Looks {
    skin: f32,
    hair: f32,
    /// Half the head's width, as a part of half its height.
    slim: f32,
    hairline: f32,
    eyes_apart: f32,
    brows: f32,
    nose: f32,
    mouth: f32,
    beard: bool,
    glasses: bool,
}

impl Looks {
    fn of(who: usize) -> Self {
        let mut rng = Rng::of(&[PEOPLE, who as u64]);
        Self {
            skin: rng.between(165.0, 215.0),
            hair: rng.between(15.0, 75.0),
            slim: rng.between(0.68, 0.82),
            hairline: rng.between(-0.72, -0.5),
            eyes_apart: rng.between(0.38, 0.46),
            brows: rng.between(0.05, 0.11),
            nose: rng.between(0.22, 0.36),
            mouth: rng.between(0.26, 0.44),
            beard: rng.below(4) == 0,
            glasses: rng.below(4) == 0,
        }
    }
}

/// How somebody stands before the camera.
struct Pose {
    middle: Place,
    /// Half the head's height, in pixels.
    size: f32,
    /// To the left or to the right, a little.
    turn: f32,
    /// How far the mouth is open.
    mouth: f32,
    /// From which side the light comes, and how much.
    light: f32,
}

impl Pose {
    fn draw(rng: &mut Rng, free: f32) -> Self {
        Self {
            middle: [
                160.0 + free * rng.between(-60.0, 60.0),
                122.0 + free * rng.between(-12.0, 12.0),
            ],
            size: 78.0 + free * rng.between(-10.0, 14.0),
            turn: rng.between(-0.05, 0.05),
            mouth: rng.between(0.02, 0.07),
            light: rng.between(-0.18, 0.18),
        }
    }
}

/// A portrait with its place and who it is.
pub(super) fn portrait(seed: u64, seq: u64) -> (Canvas, (Place, usize)) {
    let mut rng = Rng::of(&[seed, seq, 0x70]);
    let who = rng.below(NAMES.len());
    let pose = Pose::draw(&mut rng, 1.0);
    (face(&Looks::of(who), &pose, &mut rng), (pose.middle, who))
}

/// What the application has seen before: files named by who is on them.
pub(super) fn gallery() -> Vec<Named> {
    let one = |who: usize, at: u64| {
        let mut rng = Rng::of(&[PEOPLE, who as u64, at, 0x67]);
        let pose = Pose::draw(&mut rng, 0.8);
        (format!("{}-{at}.jpg", NAMES[who]), face(&Looks::of(who), &pose, &mut rng).jpeg())
    };
    (0..NAMES.len()).flat_map(|who| (0..SEEN).map(move |at| one(who, at))).collect()
}

fn face(looks: &Looks, pose: &Pose, rng: &mut Rng) -> Canvas {
    let wall = rng.between(95.0, 140.0);
    let stripe = rng.between(25.0, 60.0);
    let mut canvas =
        Canvas::new(WIDTH, HEIGHT, |[x, y]| wall + 12.0 * (x / stripe).sin() - 0.08 * y);
    let (ry, rx) = (pose.size, pose.size * looks.slim);
    let at = |x: f32, y: f32| [pose.middle[0] + x * rx, pose.middle[1] + y * ry];
    let turned = |x: f32, y: f32| at(x + pose.turn, y);

    // Shoulders, neck, hair behind the head, head.
    canvas.ellipse(at(0.0, 1.9), [rx * 2.0, ry * 0.75], 3.0, looks.hair + 30.0);
    canvas.line((at(0.0, 0.6), rx * 0.9), (at(0.0, 1.3), rx * 0.9), 3.0, looks.skin * 0.72);
    canvas.ellipse(at(0.0, -0.18), [rx * 1.1, ry * 0.98], 4.0, looks.hair);
    canvas.ellipse(at(0.0, 0.0), [rx, ry], 4.0, looks.skin * 0.8);
    canvas.ellipse(turned(0.0, 0.02), [rx * 0.82, ry * 0.86], rx * 0.5, looks.skin);
    // The fringe.
    canvas.ellipse(at(0.0, looks.hairline - 0.32), [rx * 0.9, ry * 0.36], 6.0, looks.hair);
    if looks.beard {
        canvas.ellipse(turned(0.0, 0.72), [rx * 0.62, ry * 0.3], rx * 0.25, looks.hair + 25.0);
    }
    for side in [-1.0, 1.0] {
        eye(&mut canvas, looks, turned(side * looks.eyes_apart, -0.14), side, [rx, ry]);
        // Cheeks catch the light.
        canvas.ellipse(
            turned(side * 0.42, 0.2),
            [rx * 0.2, ry * 0.14],
            rx * 0.2,
            looks.skin + 14.0,
        );
    }
    // The nose: a bright ridge, and shade below it.
    let tip = looks.nose;
    canvas.line(
        (turned(0.0, -0.2), rx * 0.1),
        (turned(0.0, tip - 0.05), rx * 0.2),
        5.0,
        looks.skin + 18.0,
    );
    canvas.ellipse(turned(0.0, tip + 0.04), [rx * 0.2, ry * 0.035], 4.0, looks.skin * 0.55);
    // The mouth, and shade below the lip.
    canvas.ellipse(turned(0.0, 0.5), [rx * looks.mouth, ry * (0.03 + pose.mouth)], 4.0, 80.0);
    canvas.ellipse(turned(0.0, 0.64), [rx * looks.mouth * 0.7, ry * 0.03], 6.0, looks.skin * 0.75);
    if looks.glasses {
        canvas.line((turned(-0.14, -0.14), 3.0), (turned(0.14, -0.14), 3.0), 1.5, 40.0);
    }
    canvas.light(|[x, _]| 1.0 + pose.light * (x - pose.middle[0]) / rx.max(1.0) * 0.6);
    canvas.grain(rng, 5.0);
    canvas
}

fn eye(canvas: &mut Canvas, looks: &Looks, middle: Place, side: f32, [rx, ry]: Place) {
    let [x, y] = middle;
    // The socket lies in shade; that is what detectors of faces look for.
    canvas.ellipse(middle, [rx * 0.27, ry * 0.13], ry * 0.1, looks.skin * 0.55);
    if looks.glasses {
        canvas.ellipse(middle, [rx * 0.29, ry * 0.17], 3.0, 45.0);
        canvas.ellipse(middle, [rx * 0.25, ry * 0.14], 3.0, looks.skin * 0.62);
    }
    canvas.ellipse([x, y + ry * 0.01], [rx * 0.17, ry * 0.055], 2.0, 205.0);
    canvas.ellipse([x, y + ry * 0.01], [rx * 0.085, ry * 0.06], 2.0, 25.0);
    let thick = ry * looks.brows;
    let brow = |part: f32, lift: f32| [x + side * rx * part, y - ry * (0.17 + lift)];
    canvas.line((brow(-0.22, 0.0), thick), (brow(0.24, 0.02), thick * 0.7), 2.5, looks.hair + 10.0);
}

/// Portraits for the application to put names to.
pub(crate) struct Portraits(Film<(Place, usize)>);

#[derive(Deserialize)]
struct Answer {
    faces: Vec<Face>,
}

#[derive(Deserialize)]
struct Face {
    #[serde(flatten)]
    found: Found,
    who: String,
}

impl Portraits {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Film::draw(|seq| portrait(seed, seq)))
    }
}

impl Inputs for Portraits {
    fn request(&self, seq: u64) -> Result<Vec<u8>, String> {
        self.0.at(seq).map(|(jpeg, _)| jpeg.clone())
    }

    /// Right if the face was found where it is, and given its name.
    fn judge(&self, seq: u64, answer: &[u8]) -> Result<Judged, String> {
        let answer: Answer = read_answer(answer)?;
        let (_, (middle, who)) = self.0.at(seq)?;
        let known = |face: &Face| face.found.holds(*middle) && face.who == NAMES[*who];
        Ok(Judged { right: Some(answer.faces.iter().any(known)), mark: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_right_if_place_and_name_are() {
        let portraits = Portraits::new(1);
        let (_, ([x, y], who)) = portraits.0.at(3).unwrap();
        let judge = |x: f32, who: &str| {
            let answer = format!(
                r#"{{"faces":[{{"x":{},"y":{},"w":40,"h":40,"who":"{who}","distance":2.5}}]}}"#,
                x - 20.0,
                y - 20.0
            );
            portraits.judge(3, answer.as_bytes()).unwrap().right
        };
        assert_eq!(judge(*x, NAMES[*who]), Some(true));
        assert_eq!(judge(*x + 50.0, NAMES[*who]), Some(false));
        assert_eq!(judge(*x, "nobody"), Some(false));
        assert_eq!(portraits.judge(3, br#"{"faces":[]}"#).unwrap().right, Some(false));
        assert!(portraits.judge(3, b"[]").is_err());
    }

    #[test]
    fn everybody_is_in_the_gallery() {
        let gallery = gallery();
        assert_eq!(gallery.len(), NAMES.len() * SEEN as usize);
        for name in NAMES {
            assert!(gallery.iter().any(|(file, _)| file.starts_with(name)), "{name}");
        }
    }
}
