//! Which applications there are, and what a client must know of one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{framed::Framed, rfb::Desktop, wire::Wire};
use crate::inputs;

/// An application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Application {
    /// Water in a box that is tilted.
    Fluid,
    /// Whose face is it?
    Faces,
    /// Where in the picture is which marker?
    Ar,
    /// Where in the picture are people?
    Detect,
    /// Writing in an editor, over RFB.
    Desktop,
}

/// All of them.
const ALL: [Application; 5] = [
    Application::Fluid,
    Application::Faces,
    Application::Ar,
    Application::Detect,
    Application::Desktop,
];

/// There is no application of this name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no application '{0}': have fluid, faces, ar, detect, desktop")]
pub struct UnknownApplication(String);

impl Application {
    /// Its name: also that of the workload that starts it in a guest.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fluid => "fluid",
            Self::Faces => "faces",
            Self::Ar => "ar",
            Self::Detect => "detect",
            Self::Desktop => "desktop",
        }
    }

    /// Where it listens in a guest.
    pub fn port(self) -> u16 {
        match self {
            Self::Desktop => crate::DESKTOP_PORT,
            Self::Fluid | Self::Faces | Self::Ar | Self::Detect => crate::PORT,
        }
    }

    /// The client's side of it.
    pub(super) fn talk(self, seed: u64) -> Box<dyn Talk> {
        match self {
            Self::Fluid => Box::new(Framed::new(inputs::Readings { seed })),
            Self::Faces => Box::new(Framed::new(inputs::Portraits::new(seed))),
            Self::Ar => Box::new(Framed::new(inputs::Sights::new(seed))),
            Self::Detect => Box::new(Framed::new(inputs::Streets::new(seed))),
            Self::Desktop => Box::new(Desktop::new(seed)),
        }
    }
}

impl fmt::Display for Application {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Application {
    type Err = UnknownApplication;

    fn from_str(text: &str) -> Result<Self, UnknownApplication> {
        let found = ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| UnknownApplication(text.to_owned()))
    }
}

/// The client's side of a protocol: what to say, and what was heard. It does no I/O.
pub(super) trait Talk {
    /// A connection is new; what was outstanding on the one before is forgotten.
    fn connected(&mut self, wire: &mut Wire);

    /// Whether a request can be made now: a protocol may have to greet first.
    fn ready(&self, _now_ns: i64) -> bool {
        true
    }

    /// Queues a request; returns its size.
    fn ask(&mut self, seq: u64, now_ns: i64, wire: &mut Wire) -> Result<u64, Problem>;

    /// Takes what came and tells which requests it answers.
    fn hear(&mut self, bytes: &[u8], now_ns: i64, wire: &mut Wire) -> Result<Vec<Heard>, Problem>;
}

/// Why a connection cannot be used any more: what came over it is not the protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub(super) struct Problem(pub(super) String);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) seq: u64,
    pub(super) bytes: u64,
    /// What the client makes of it; an error if the application failed or nobody can read it.
    pub(super) judged: Result<Judged, String>,
}

/// What a client thinks of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Judged {
    /// Whether it is right, where that can be told at once.
    pub(crate) right: Option<bool>,
    /// What it tells of the application's state.
    pub(crate) mark: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for one in ALL {
            assert_eq!(one.name().parse(), Ok(one));
            assert_eq!(serde_json::to_value(one).unwrap(), one.name());
        }
        assert!("Fluid".parse::<Application>().unwrap_err().to_string().contains("faces"));
    }
}
