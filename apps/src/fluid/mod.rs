//! The paper's first application: water in a box that somebody tilts.
//!
//! The client sends what an accelerometer says, the server moves the water on by one frame and
//! sends back where its particles are. A simulation belongs to a connection and is a function of
//! the readings it got, in their order.

mod cells;
mod serve;
mod water;

pub use serve::{ServeError, Server};
pub use water::{PARTICLES, Water};

use thiserror::Error;

/// What an accelerometer says, in multiples of the earth's gravity. At rest it shows what holds it
/// against gravity: (0, 0, 1) lies flat.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading(pub [f32; 3]);

/// What the server sends back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Frames of this simulation so far, this one included.
    pub frame: u64,
    /// The start of the BLAKE3 of every particle's place and speed, to the last bit.
    pub digest: [u8; 8],
    /// Where the particles are, in 65535ths of the box.
    pub places: Vec<[u16; 3]>,
}

/// Why bytes are no reading or picture.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// Too long or too short.
    #[error("{what} of {bytes} bytes")]
    Length {
        /// What it should be.
        what: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// No accelerometer says that.
    #[error("a reading of {0}: an accelerometer says -16 to 16")]
    Reading(String),
}

/// What accelerometers of phones can say at most, in multiples of the earth's gravity.
const MAX_READING: f32 = 16.0;

impl Reading {
    /// As it goes over the wire: three big-endian floats.
    pub fn encode(&self) -> Vec<u8> {
        self.0.iter().flat_map(|value| value.to_be_bytes()).collect()
    }

    /// Reads what came over the wire.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let wrong = || WireError::Length { what: "a reading", bytes: bytes.len() };
        let (words, rest) = bytes.as_chunks::<4>();
        let words: [[u8; 4]; 3] = words.try_into().map_err(|_| wrong())?;
        if !rest.is_empty() {
            return Err(wrong());
        }
        let values = words.map(f32::from_be_bytes);
        match values.iter().find(|value| !(-MAX_READING..=MAX_READING).contains(*value)) {
            Some(value) => Err(WireError::Reading(value.to_string())),
            None => Ok(Self(values)),
        }
    }
}

impl Picture {
    /// As it goes over the wire: number, digest, particles.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + 6 * self.places.len());
        bytes.extend(self.frame.to_be_bytes());
        bytes.extend(self.digest);
        bytes.extend(self.places.as_flattened().iter().flat_map(|part| part.to_be_bytes()));
        bytes
    }

    /// Reads what came over the wire.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let wrong = || WireError::Length { what: "a picture", bytes: bytes.len() };
        let (frame, rest) = bytes.split_first_chunk::<8>().ok_or_else(wrong)?;
        let (digest, rest) = rest.split_first_chunk::<8>().ok_or_else(wrong)?;
        let (places, rest) = rest.as_chunks::<6>();
        if !rest.is_empty() || places.is_empty() {
            return Err(wrong());
        }
        let place =
            |p: &[u8; 6]| [[p[0], p[1]], [p[2], p[3]], [p[4], p[5]]].map(u16::from_be_bytes);
        Ok(Self {
            frame: u64::from_be_bytes(*frame),
            digest: *digest,
            places: places.iter().map(place).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_and_pictures_travel_whole_or_not_at_all() {
        let reading = Reading([0.0, -1.5, 15.9]);
        assert_eq!(Reading::decode(&reading.encode()), Ok(reading));
        for length in [0, 11, 13, 16] {
            assert!(Reading::decode(&vec![0; length]).is_err(), "{length}");
        }
        for bad in [f32::NAN, f32::INFINITY, -16.1] {
            assert!(Reading::decode(&Reading([0.0, bad, 0.0]).encode()).is_err(), "{bad}");
        }
        let picture =
            Picture { frame: 7, digest: *b"8 bytes!", places: vec![[1, 2, 65535], [0; 3]] };
        let wire = picture.encode();
        assert_eq!(Picture::decode(&wire), Ok(picture));
        for length in [0, 15, 16, wire.len() - 1] {
            assert!(Picture::decode(&wire[..length]).is_err(), "{length}");
        }
    }
}
