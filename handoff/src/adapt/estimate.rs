//! What modes cost and bring on this guest's data, from what was measured and what was not.
//!
//! A body tells of one mode only, and what it tells is in part the body's: some compress better than
//! others. So of each mode it is kept how it stands to the others, and of the data, apart from that, how
//! it is now; what one mode meets counts for all.
//!
//! - **P**: `cost(mode) × speed × contention`. `speed` is this machine's on this data, `contention` is
//!   how much longer a worker takes than its CPU time, because guest and other threads have the CPU.
//! - **R**: the data is taken for a mixture. At savings 1 each mode leaves its `ratio`; below that a
//!   part of the data does not shrink at all, above it a part vanishes. Unlike a factor, that stays
//!   between 0 and 1, and the mean of mixtures is the mixture of means.

use std::time::Duration;

use super::{Trial, prior};
use crate::stage::{Codec, Mode};

/// How far the machine may be from the one of the prior, as a logarithm's variance: 5 times either way.
const SPEED_VAR: f64 = 2.6;
/// How much speed may change in a second: data of another kind.
const SPEED_DRIFT: f64 = 0.02;
/// How far a mode's cost may be from the prior, against other modes': by half.
const COST_VAR: f64 = 0.2;
/// How much that may change in a second.
const COST_DRIFT: f64 = 0.002;
/// How much one body's cost differs from another's.
const COST_NOISE: f64 = 0.02;
/// Of less than this, the fixed cost of a body is most of its cost.
const SMALL_BYTES: f64 = 65_536.0;
/// How far a mode's ratio may be from the prior, and how much that may change in a second.
const RATIO_VAR: f64 = 0.006;
const RATIO_DRIFT: f64 = 2e-5;
/// The part of that which the levels of a codec have in common. What levels of zstd bring against each
/// other is much the same everywhere; what an effort of xz brings, and how far it sees, depends on the data.
fn shared(codec: Codec) -> f64 {
    match codec {
        Codec::Zstd => 0.83,
        _ => 0.0,
    }
}
/// How well two modes are compared on the same body, and what half of it tells less than all, a third
/// twice that, and so on.
const PAIRED_NOISE: f64 = 2e-4;
const PIECE_NOISE: f64 = 1e-3;
const MOST_PIECES: f64 = 5.0;
/// Savings are a mean over so many bytes.
const WINDOW_BYTES: f64 = 8e6;
/// What the prior counts for in that.
const PRIOR_BYTES: f64 = 64e3;
/// Contention is a mean over so much time of workers.
const CONTENTION_S: f64 = 0.2;
/// A longer gap between two measurements tells no more than this.
const MOST_GAP: Duration = Duration::from_secs(60);

/// Something that is not known exactly.
#[derive(Clone, Copy, Debug)]
struct Belief {
    mean: f64,
    var: f64,
}

impl Belief {
    fn drift(&mut self, var: f64, most: f64) {
        self.var = (self.var + var).min(most);
    }
}

/// What a mode is taken to cost and bring now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) mode: Mode,
    /// P: seconds of a worker for each byte of a body.
    pub(super) s_per_byte: f64,
    /// R: bytes out for each byte in.
    pub(super) ratio: f64,
    /// By what factor P may be wrong, either way.
    pub(super) cost_within: f64,
    /// By how much R may be wrong.
    pub(super) ratio_within: f64,
    /// Bytes that it was measured on.
    pub(super) measured_bytes: u64,
}

#[derive(Clone, Debug)]
struct ModeState {
    mode: Mode,
    /// Logarithm of CPU seconds a byte, at speed 0.
    cost: Belief,
    /// Bytes out for each in, at savings 1, but for what all levels of its codec have in common.
    ratio: Belief,
    measured_bytes: u64,
}

/// What is known of all modes.
#[derive(Clone, Debug)]
pub(super) struct Estimates {
    modes: Vec<ModeState>,
    /// How far the ratios of each codec are from the prior.
    codecs: [Belief; Codec::ALL.len()],
    /// Logarithm of how much longer everything takes than the prior says.
    speed: Belief,
    /// Wall time of a worker for each second of its CPU time.
    contention: f64,
    /// 0: nothing shrinks; 1: as the modes' ratios say; 2: all vanishes.
    savings: f64,
    savings_bytes: f64,
    /// How much bodies differ in their savings.
    savings_var: f64,
    /// Of the last measurement.
    last: Option<Duration>,
}

impl Estimates {
    pub(super) fn new(modes: &[Mode]) -> Self {
        let state = |mode: &Mode| {
            let prior = prior::of(*mode);
            ModeState {
                mode: *mode,
                cost: Belief { mean: prior.cpu_s_per_byte.ln(), var: COST_VAR },
                ratio: Belief { mean: prior.ratio, var: RATIO_VAR * (1.0 - shared(mode.codec())) },
                measured_bytes: 0,
            }
        };
        Self {
            modes: modes.iter().map(state).collect(),
            codecs: Codec::ALL.map(|codec| Belief { mean: 0.0, var: RATIO_VAR * shared(codec) }),
            speed: Belief { mean: 0.0, var: SPEED_VAR },
            contention: 1.0,
            savings: 1.0,
            savings_bytes: PRIOR_BYTES,
            savings_var: 0.25,
            last: None,
        }
    }

    /// A body was compressed and sent.
    pub(super) fn body(&mut self, now: Duration, trial: Trial) {
        self.age(now);
        let Some(seen) = Seen::of(trial) else { return };
        self.cost(trial.mode, &seen);
        let gain = 1.0 - (-seen.took_s.min(60.0) / CONTENTION_S).exp();
        self.contention += gain * (seen.contention - self.contention);
        let Some(at) = self.position(trial.mode) else { return };
        let Some(here) = savings(seen.ratio, self.ratio(&self.modes[at])) else { return };
        let off = here - self.savings;
        self.compare(at, self.savings, seen.ratio, self.savings_var, Of::Others);
        self.savings_bytes = (self.savings_bytes + seen.bytes).min(WINDOW_BYTES);
        let gain = (seen.bytes / self.savings_bytes).min(1.0);
        self.savings += gain * off;
        self.savings_var += gain.min(0.2) * (off * off - self.savings_var);
    }

    /// A mode was tried on a body that was sent in another, or on a part of it.
    pub(super) fn sample(&mut self, now: Duration, sample: Trial, body: Trial) {
        self.age(now);
        let Some(seen) = Seen::of(sample) else { return };
        self.cost(sample.mode, &seen);
        let (Some(whole), Some(known)) = (Seen::of(body), self.position(body.mode)) else { return };
        let Some(here) = savings(whole.ratio, self.ratio(&self.modes[known])) else { return };
        let rest = (whole.bytes / seen.bytes.max(1.0) - 1.0).clamp(0.0, MOST_PIECES);
        let noise = PAIRED_NOISE + PIECE_NOISE * rest;
        if let Some(at) = self.position(sample.mode) {
            self.compare(at, here, seen.ratio, noise, Of::Same);
        }
    }

    /// What all modes are taken to cost and bring now, in the order in which they were given.
    pub(super) fn all(&self) -> impl Iterator<Item = Estimate> + '_ {
        self.modes.iter().map(|state| Estimate {
            mode: state.mode,
            s_per_byte: (state.cost.mean + self.speed.mean).exp().clamp(1e-12, 1e-1)
                * self.contention.clamp(1.0, 1e3),
            // What is sent as it is does not shrink, however well the data would.
            ratio: match state.mode {
                Mode::NONE => 1.0,
                _ => ratio_at(self.savings, self.ratio(state)),
            },
            cost_within: (state.cost.var + self.speed.var).sqrt().exp(),
            ratio_within: (state.ratio.var + self.codec(state.mode).var).sqrt(),
            measured_bytes: state.measured_bytes,
        })
    }

    /// A mode cannot be used here.
    pub(super) fn remove(&mut self, mode: Mode) {
        self.modes.retain(|state| state.mode != mode);
    }

    fn position(&self, mode: Mode) -> Option<usize> {
        self.modes.iter().position(|state| state.mode == mode)
    }

    /// What is known gets older.
    fn age(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.last.unwrap_or(now)).min(MOST_GAP).as_secs_f64();
        self.last = Some(self.last.unwrap_or(now).max(now));
        self.speed.drift(SPEED_DRIFT * gap, SPEED_VAR);
        for state in &mut self.modes {
            state.cost.drift(COST_DRIFT * gap, COST_VAR);
            let own = 1.0 - shared(state.mode.codec());
            state.ratio.drift(RATIO_DRIFT * gap * own, RATIO_VAR * own);
        }
        for (codec, belief) in Codec::ALL.into_iter().zip(&mut self.codecs) {
            belief.drift(RATIO_DRIFT * gap * shared(codec), RATIO_VAR * shared(codec));
        }
    }

    /// What was seen of a mode's cost is in part the mode's, in part that of machine and data.
    fn cost(&mut self, mode: Mode, seen: &Seen) {
        let Some(at) = self.position(mode) else { return };
        let state = &mut self.modes[at];
        state.measured_bytes = state.measured_bytes.saturating_add(seen.bytes as u64);
        // What costs nothing tells nothing of what others cost.
        let Some(log_cost) = seen.log_cost else { return };
        let off = log_cost - state.cost.mean - self.speed.mean;
        let noise = COST_NOISE + 0.25 * SMALL_BYTES / seen.bytes;
        let var = state.cost.var + self.speed.var + noise;
        let (of_mode, of_all) = (state.cost.var / var, self.speed.var / var);
        state.cost.mean += of_mode * off;
        state.cost.var *= 1.0 - of_mode;
        self.speed.mean += of_all * off;
        self.speed.var *= 1.0 - of_all;
    }
}

impl Estimates {
    fn codec(&self, mode: Mode) -> Belief {
        self.codecs[mode.codec() as usize]
    }

    /// Bytes out for each in, at savings 1.
    fn ratio(&self, state: &ModeState) -> f64 {
        (state.ratio.mean + self.codec(state.mode).mean).clamp(0.002, 1.0)
    }

    /// A mode left `seen` of something of these savings, which are known with this variance. What is
    /// off is in part the level's, in part its codec's.
    ///
    /// A body of another time is of other data: bodies next to each other are alike, and those of one
    /// level may all be easier than those of another. So where levels have something in common, only
    /// the same data tells how they stand to each other.
    fn compare(&mut self, at: usize, savings: f64, seen: f64, noise: f64, of: Of) {
        let Some(state) = self.modes.get(at) else { return };
        let expected = ratio_at(savings, self.ratio(state));
        // How much of the mode's own ratio shows in what is left.
        let shows = if savings <= 1.0 { savings } else { 2.0 - savings };
        if shows < 0.1 || state.mode == Mode::NONE {
            return;
        }
        let off = (seen - expected) / shows;
        let common = shared(state.mode.codec()) > 0.0;
        let codec = state.mode.codec() as usize;
        let var = state.ratio.var + self.codecs[codec].var + noise / (shows * shows);
        let own = (of == Of::Same || !common).then_some(&mut self.modes[at].ratio);
        for belief in own.into_iter().chain([&mut self.codecs[codec]]) {
            let gain = belief.var / var;
            belief.mean = (belief.mean + gain * off).clamp(-0.98, 0.98);
            belief.var *= 1.0 - gain;
        }
    }
}

/// What a mode is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// Another mode on the same data.
    Same,
    /// What modes left of the data before.
    Others,
}

/// What a mode leaves that leaves `ratio` at savings 1.
fn ratio_at(savings: f64, ratio: f64) -> f64 {
    let left = match savings <= 1.0 {
        true => 1.0 - savings * (1.0 - ratio),
        false => (2.0 - savings) * ratio,
    };
    left.clamp(1e-3, 1.0)
}

/// The savings at which a mode leaves `seen` that leaves `ratio` at savings 1; none for a mode that
/// says nothing of the data.
fn savings(seen: f64, ratio: f64) -> Option<f64> {
    if ratio > 0.98 {
        return None;
    }
    Some(if seen >= ratio { (1.0 - seen) / (1.0 - ratio) } else { 2.0 - seen / ratio })
}

/// A trial whose numbers can be used.
struct Seen {
    bytes: f64,
    ratio: f64,
    log_cost: Option<f64>,
    took_s: f64,
    contention: f64,
}

impl Seen {
    fn of(trial: Trial) -> Option<Self> {
        if trial.bytes_in == 0 {
            return None;
        }
        let bytes = trial.bytes_in as f64;
        let took_s = trial.took.as_secs_f64();
        // Where CPU time is not measured, all of the time is taken for it.
        let cpu_s = match trial.cpu.as_secs_f64() {
            cpu_s if cpu_s > 0.0 => cpu_s,
            _ => took_s,
        };
        Some(Self {
            bytes,
            ratio: (trial.bytes_out as f64 / bytes).min(1.0),
            log_cost: (cpu_s > 0.0).then(|| (cpu_s / bytes).clamp(1e-12, 1e-1).ln()),
            took_s,
            contention: if cpu_s > 0.0 { (took_s / cpu_s).clamp(1.0, 1e3) } else { 1.0 },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVELS: [&str; 2] = ["zstd:1", "zstd:3"];

    fn trial(mode: &str, ratio: f64) -> Trial {
        let (mode, bytes_in) = (mode.parse().unwrap(), 1 << 20);
        let took = Duration::from_millis(10);
        Trial { mode, bytes_in, bytes_out: (bytes_in as f64 * ratio) as u64, took, cpu: took }
    }

    fn ratios(estimates: &Estimates) -> [f64; 2] {
        LEVELS.map(|level| {
            let mode: Mode = level.parse().unwrap();
            estimates.all().find(|estimate| estimate.mode == mode).unwrap().ratio
        })
    }

    #[test]
    fn easy_data_makes_no_level_better_than_another() {
        let mut estimates = Estimates::new(Mode::LADDER);
        let mut now = Duration::ZERO;
        for (level, ratio) in [("zstd:3", 0.35), ("zstd:1", 0.06), ("zstd:3", 0.3)] {
            for _ in 0..20 {
                now += Duration::from_millis(200);
                estimates.body(now, trial(level, ratio));
                let [light, strong] = ratios(&estimates);
                assert!(strong < light, "{level}: {strong} against {light}");
            }
        }
    }

    #[test]
    fn the_same_data_tells_how_levels_stand_to_each_other() {
        let mut estimates = Estimates::new(Mode::LADDER);
        let mut now = Duration::ZERO;
        for _ in 0..20 {
            now += Duration::from_millis(200);
            estimates.body(now, trial("zstd:1", 0.20));
            estimates.sample(now, trial("zstd:3", 0.22), trial("zstd:1", 0.20));
        }
        let [light, strong] = ratios(&estimates);
        assert!((light - 0.20).abs() < 0.01 && (strong - 0.22).abs() < 0.01, "{light} {strong}");
    }
}
