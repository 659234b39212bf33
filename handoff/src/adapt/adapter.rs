//! The adapter, as workers see it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    AdaptOptions, Adaptation, ModeChoice, ModeShare, Sample, Trial, View, chooser::Chooser,
};
use crate::stage::Mode;

/// Chooses the mode of each body. Shared by all workers.
#[derive(Debug)]
pub struct Adapter {
    choice: ModeChoice,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    chooser: Chooser,
    shares: BTreeMap<Mode, ModeShare>,
}

impl Adapter {
    /// An adapter that has measured nothing.
    pub fn new(options: AdaptOptions) -> Self {
        let state = State { chooser: Chooser::new(&options), shares: BTreeMap::new() };
        Self { choice: options.choice, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Estimates, all of them bounded: a panic elsewhere leaves them usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mode for a body that a worker takes now. Every body that it is asked for must be
    /// compressed then, and [`Adapter::measured`] be told.
    pub fn choose(&self, now: Duration, view: &View) -> Mode {
        match self.choice {
            ModeChoice::Auto => self.state().chooser.choose(now, view),
            ModeChoice::Fixed(mode) => mode,
        }
    }

    /// For how long the link should still have something to do when a worker takes a body: with
    /// less, strong modes would keep it waiting.
    pub fn lead(&self) -> Duration {
        match self.choice {
            ModeChoice::Auto => self.state().chooser.lead(),
            ModeChoice::Fixed(_) => Duration::ZERO,
        }
    }

    /// A body was compressed, as [`Adapter::choose`] said.
    pub fn measured(&self, now: Duration, trial: Trial) {
        let mut state = self.state();
        if self.choice == ModeChoice::Auto {
            state.chooser.measured(now, trial);
        }
        let share = state.share(trial.mode);
        share.bodies = share.bodies.saturating_add(1);
        share.bytes_in = share.bytes_in.saturating_add(trial.bytes_in);
        share.bytes_out = share.bytes_out.saturating_add(trial.bytes_out);
        share.worker_s += trial.took.as_secs_f64();
        share.cpu_s += trial.cpu.as_secs_f64();
    }

    /// Whether to try a mode on the body that the worker has just compressed, or on its beginning,
    /// and throw the result away: to be asked after each body, and again when the worker finds that
    /// it has to wait (`idle`), for the next body or for room for what it made. At most one sample
    /// is asked for at a time, and CPU for them is bounded.
    pub fn wants_sample(&self, now: Duration, idle: bool) -> Option<Sample> {
        match self.choice {
            ModeChoice::Auto => self.state().chooser.wants_sample(now, idle),
            ModeChoice::Fixed(_) => None,
        }
    }

    /// A sample was tried, as [`Adapter::wants_sample`] said; `body` is what compressing that body
    /// took when it was sent. A sample of the whole body tells most: the two are compared.
    pub fn sampled(&self, now: Duration, sample: Trial, body: Trial) {
        let mut state = self.state();
        state.chooser.sampled(now, sample, body);
        let share = state.share(sample.mode);
        share.samples = share.samples.saturating_add(1);
        share.samples_cpu_s += sample.cpu.as_secs_f64();
    }

    /// What was done and decided so far.
    pub fn record(&self) -> Adaptation {
        let state = self.state();
        let (decisions, decisions_left_out) = state.chooser.decisions();
        let modes = state.shares.values().copied().collect();
        Adaptation { choice: self.choice, modes, decisions, decisions_left_out }
    }
}

impl State {
    fn share(&mut self, mode: Mode) -> &mut ModeShare {
        self.shares.entry(mode).or_insert_with(|| ModeShare { mode, ..ModeShare::default() })
    }
}
