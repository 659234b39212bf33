//! Which mode encodes the next body: from what modes cost and bring on this guest's data, what the
//! link takes, and what waits. Pure: no I/O, no clock, no threads of its own (ADR 0017).

mod adapter;
mod chooser;
mod estimate;
mod plan;
mod prior;
mod rate;
mod record;

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

pub use adapter::Adapter;
pub use rate::{LinkRate, Stuck};
pub use record::{Adaptation, ModeDecision, ModeEstimate, ModeShare};

use crate::stage::{Mode, UnknownMode};

/// Who says in which mode bodies are encoded. Its text is `auto` or that of the mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ModeChoice {
    /// The [`Adapter`], for each body anew.
    #[default]
    Auto,
    /// The user, for all of them.
    Fixed(Mode),
}

impl fmt::Display for ModeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(mode) => mode.fmt(f),
        }
    }
}

impl FromStr for ModeChoice {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "auto" => Ok(Self::Auto),
            mode => mode.parse().map(Self::Fixed),
        }
    }
}

impl From<ModeChoice> for String {
    fn from(choice: ModeChoice) -> Self {
        choice.to_string()
    }
}

impl TryFrom<String> for ModeChoice {
    type Error = UnknownMode;

    fn try_from(text: String) -> Result<Self, UnknownMode> {
        text.parse()
    }
}

/// What an [`Adapter`] begins with.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptOptions {
    /// Who chooses.
    pub choice: ModeChoice,
    /// What is chosen from.
    pub modes: Vec<Mode>,
    /// When the handoff started: decisions are dated from there.
    pub started: Duration,
}

impl AdaptOptions {
    /// The usual modes, for a handoff that starts now.
    pub fn new(choice: ModeChoice, started: Duration) -> Self {
        Self { choice, modes: Mode::LADDER.to_vec(), started }
    }
}

/// How the pipeline stands when a worker takes a body.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct View {
    /// Bytes of the body.
    pub body_bytes: usize,
    /// Bodies that wait for a worker behind it.
    pub queued_bodies: usize,
    /// Bytes that are encoded and not delivered: sealed, queued, in the socket, on the link.
    pub in_flight_bytes: u64,
    /// Bytes a second that the link takes now; none where that is not known yet.
    pub link_bytes_per_s: Option<f64>,
    /// The shortest round trip seen; zero where it is not known.
    pub rtt: Duration,
    /// Workers that compress at once.
    pub workers: usize,
    /// Seconds in which those before the workers make each byte of a body, as far as nobody keeps them
    /// waiting; none where that is not known.
    pub supply_s_per_byte: Option<f64>,
    /// Whether the guest is paused and waits for what is left.
    pub paused: bool,
}

/// What one body, or a piece of one, took in one mode.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// The mode.
    pub mode: Mode,
    /// Bytes given to it.
    pub bytes_in: u64,
    /// Bytes that came out, at most [`Trial::bytes_in`]: bodies that do not shrink are sent raw.
    pub bytes_out: u64,
    /// Time that the worker was busy with it, in which it also waited for CPU, or left it to others.
    pub took: Duration,
    /// CPU time of that; zero where it is not measured.
    pub cpu: Duration,
}

/// A question of the adapter: what does this mode bring on this guest's data?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The mode to try.
    pub mode: Mode,
    /// Try it on no more bytes of a recent body than that.
    pub most_bytes: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_texts() {
        assert_eq!("auto".parse(), Ok(ModeChoice::Auto));
        assert_eq!("zstd:3".parse(), Ok(ModeChoice::Fixed(Mode::DEFAULT)));
        assert_eq!(ModeChoice::Fixed(Mode::DEFAULT).to_string(), "zstd:3");
        assert_eq!(serde_json::to_string(&ModeChoice::Auto).unwrap(), "\"auto\"");
        "automatic".parse::<ModeChoice>().unwrap_err();
    }
}
