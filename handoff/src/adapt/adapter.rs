//! The adapter, as workers see it.

use std::time::Duration;

use super::{AdaptOptions, Adaptation, ModeChoice, Sample, Trial, View};
use crate::stage::Mode;

/// Chooses the mode of each body. Shared by all workers.
#[derive(Debug)]
pub struct Adapter {
    options: AdaptOptions,
}

impl Adapter {
    /// An adapter that has measured nothing.
    pub fn new(options: AdaptOptions) -> Self {
        Self { options }
    }

    /// The mode for a body that a worker takes now. Every body that it is asked for must be
    /// compressed then, and [`Adapter::measured`] be told.
    pub fn choose(&self, _now: Duration, _view: &View) -> Mode {
        match self.options.choice {
            ModeChoice::Auto => Mode::DEFAULT,
            ModeChoice::Fixed(mode) => mode,
        }
    }

    /// A body was compressed, as [`Adapter::choose`] said.
    pub fn measured(&self, _now: Duration, _trial: Trial) {}

    /// Whether to try a mode on the body that the worker has just compressed, or on its beginning,
    /// and throw the result away: to be asked after each body, and again when the worker finds that
    /// it has to wait (`idle`), for the next body or for room for what it made. At most one sample
    /// is asked for at a time, and CPU for them is bounded.
    pub fn wants_sample(&self, _now: Duration, _idle: bool) -> Option<Sample> {
        None
    }

    /// A sample was tried, as [`Adapter::wants_sample`] said; `body` is what compressing that body
    /// took when it was sent. A sample of the whole body tells most: the two are compared.
    pub fn sampled(&self, _now: Duration, _sample: Trial, _body: Trial) {}

    /// What was done and decided so far.
    pub fn record(&self) -> Adaptation {
        Adaptation { choice: self.options.choice, ..Adaptation::default() }
    }
}
