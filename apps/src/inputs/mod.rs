//! What clients send: functions of a seed and a number.
//!
//! Pictures are drawn, not taken: nobody's face is needed, any two runs get the same, and what is
//! in them is known, so that an answer can be judged. A film of [`FILM`] pictures is drawn before
//! the first request and then shown again and again, so that drawing takes nothing from the guest
//! that shares a machine with its client.

mod draw;
mod faces;
mod markers;
pub mod readings;
mod streets;

use serde::de::DeserializeOwned;

use crate::{
    client::{Application, Judged},
    fluid::Picture,
    inputs::{draw::Place, readings::reading},
};

pub(crate) use self::{faces::Portraits, markers::Sights, streets::Streets};

/// Pictures of a film.
pub const FILM: u64 = 24;

/// What a client asks, and what it thinks of the answers.
pub(crate) trait Inputs {
    /// The request of this number; an error says why there is none.
    fn request(&self, seq: u64) -> Result<Vec<u8>, String>;

    /// What to think of its answer; an error if nobody can read it.
    fn judge(&self, seq: u64, answer: &[u8]) -> Result<Judged, String>;
}

/// Readings of an accelerometer, for the fluid.
pub(crate) struct Readings {
    pub(crate) seed: u64,
}

impl Inputs for Readings {
    fn request(&self, seq: u64) -> Result<Vec<u8>, String> {
        Ok(reading(self.seed, seq).encode())
    }

    fn judge(&self, _: u64, answer: &[u8]) -> Result<Judged, String> {
        let picture = Picture::decode(answer).map_err(|error| error.to_string())?;
        let mark = Some(format!("{}:{}", picture.frame, hex::encode(picture.digest)));
        Ok(Judged { right: None, mark })
    }
}

/// A named file.
pub type Named = (String, Vec<u8>);

/// What an application's server has on its disk beforehand; none for one that takes no pictures.
pub fn known(application: Application) -> Option<Vec<Named>> {
    match application {
        Application::Faces => Some(faces::gallery()),
        Application::Ar => Some(markers::gallery()),
        Application::Detect => Some(Vec::new()),
        Application::Fluid | Application::Desktop => None,
    }
}

/// The first requests of a client, as files; none for one that takes no pictures.
pub fn requests(application: Application, seed: u64, count: u64) -> Option<Vec<Named>> {
    let picture = |seq| match application {
        Application::Faces => Some(faces::portrait(seed, seq).0),
        Application::Ar => Some(markers::sight(seed, seq).0),
        Application::Detect => Some(streets::street(seed, seq).0),
        Application::Fluid | Application::Desktop => None,
    };
    let named = |seq| Some((format!("{application}-{seq:04}.jpg"), picture(seq)?.jpeg()));
    (0..count).map(named).collect()
}

/// A film: pictures as they are sent, and what is in each.
struct Film<T>(Vec<(Vec<u8>, T)>);

impl<T> Film<T> {
    fn draw(picture: impl Fn(u64) -> (draw::Canvas, T)) -> Self {
        let frame = |seq| {
            let (canvas, truth) = picture(seq);
            (canvas.jpeg(), truth)
        };
        Self((0..FILM).map(frame).collect())
    }

    fn at(&self, seq: u64) -> Result<&(Vec<u8>, T), String> {
        let frame = self.0.get((seq % FILM) as usize);
        frame.ok_or_else(|| format!("there is no picture for request {seq}"))
    }
}

fn read_answer<T: DeserializeOwned>(answer: &[u8]) -> Result<T, String> {
    serde_json::from_slice(answer)
        .map_err(|error| format!("an answer that nobody can read: {error}"))
}

/// A box around something, as OpenCV gives it.
#[derive(Debug, Clone, Copy, PartialEq, serde::Deserialize)]
struct Found {
    x: f32,
    y: f32,
    w: f32,
    h: f32,
}

impl Found {
    fn holds(&self, [x, y]: Place) -> bool {
        (self.x..=self.x + self.w).contains(&x) && (self.y..=self.y + self.h).contains(&y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_follow_from_the_seed_and_are_jpegs() {
        for application in [Application::Faces, Application::Ar, Application::Detect] {
            let film = requests(application, 3, 2).unwrap();
            assert_eq!(film, requests(application, 3, 2).unwrap());
            assert_ne!(film[0].1, film[1].1);
            assert_ne!(film, requests(application, 4, 2).unwrap());
            for (name, jpeg) in film {
                assert!(jpeg.starts_with(&[0xff, 0xd8]) && jpeg.ends_with(&[0xff, 0xd9]), "{name}");
                assert!((2_000..100_000).contains(&jpeg.len()), "{name}: {} bytes", jpeg.len());
            }
        }
        assert!(requests(Application::Fluid, 1, 1).is_none());
    }
}
