//! `HOWDAH_STEP`: stops or kills this process where a fault test wants it.
//!
//! The variable holds `NAME:stop` or `NAME:kill`, or several separated by commas; the names are those
//! of [`handoff::step::Step`]. `stop` is SIGSTOP to itself: whoever watches can cut a link, kill
//! something, and let it go on by SIGCONT. Each acts once in a process, when it gets there first.

use std::{
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
};

use handoff::step::{Step, StepHook, UnknownStep};
use nix::{
    sys::signal::{Signal, kill},
    unistd::getpid,
};

use crate::failure::{Exit, Failure};

/// The environment variable.
const VARIABLE: &str = "HOWDAH_STEP";

/// What the environment asks for; no hook where it asks for nothing.
pub(crate) fn from_env() -> Result<StepHook, Failure> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(StepHook::default()) };
    let stops = Stop::parse_all(&text.to_string_lossy()).map_err(|why| {
        Failure::new(Exit::Usage, VARIABLE, why, "give NAME:stop or NAME:kill, or unset it")
    })?;
    Ok(StepHook::new(move |step| {
        if let Some(signal) = stops.iter().find_map(|stop| stop.at(step)) {
            tracing::warn!("{VARIABLE}: {signal} at {step}");
            if let Err(e) = kill(getpid(), signal) {
                tracing::error!("{VARIABLE}: {signal} at {step}: {e}");
            }
        }
    }))
}

/// One place and what happens there.
#[derive(Debug)]
struct Stop {
    step: Step,
    signal: Signal,
    done: AtomicBool,
}

impl Stop {
    fn parse_all(text: &str) -> Result<Vec<Self>, String> {
        text.split(',').map(str::parse).collect()
    }

    /// What to do at `step`, the first time.
    fn at(&self, step: Step) -> Option<Signal> {
        (step == self.step && !self.done.swap(true, Ordering::Relaxed)).then_some(self.signal)
    }
}

impl FromStr for Stop {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (step, action) =
            text.split_once(':').ok_or_else(|| format!("{text:?} has no colon"))?;
        let step = step.parse().map_err(|e: UnknownStep| e.to_string())?;
        let signal = match action {
            "stop" => Signal::SIGSTOP,
            "kill" => Signal::SIGKILL,
            other => return Err(format!("{other:?} is neither stop nor kill")),
        };
        Ok(Self { step, signal, done: AtomicBool::new(false) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acts_once_at_the_step_that_was_named() {
        let stops = Stop::parse_all("paused:stop,round-2-segment:kill").unwrap();
        let at = |step| stops.iter().find_map(|stop| stop.at(step));
        assert_eq!(at(Step::RoundSegment(1)), None);
        assert_eq!(at(Step::RoundSegment(2)), Some(Signal::SIGKILL));
        assert_eq!(at(Step::RoundSegment(2)), None);
        assert_eq!(at(Step::Paused), Some(Signal::SIGSTOP));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bad, says) in [
            ("paused", "no colon"),
            ("paused:hang", "\"hang\" is neither"),
            ("asleep:stop", "\"asleep\" is no step"),
            ("paused:stop,", "no colon"),
        ] {
            let why = Stop::parse_all(bad).unwrap_err();
            assert!(why.contains(says), "{bad}: {why}");
        }
    }
}
