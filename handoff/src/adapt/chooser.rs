//! What a body is encoded in: the plan, and how the pipeline stands at this moment.

use std::{collections::VecDeque, time::Duration};

use super::{
    AdaptOptions, ModeDecision, ModeEstimate, Sample, Trial, View,
    estimate::{Estimate, Estimates},
    plan::{self, Plan},
};
use crate::stage::Mode;

/// A plan is changed for one that promises so much more.
const BETTER: f64 = 1.03;
/// Or for one that takes less than half the CPU, and promises no less than this.
const LIGHTER: f64 = 1.002;
/// Bodies come slowly if they take so many times as long as link and workers need for them.
const UNHURRIED: f64 = 1.1;
/// How much of the time between bodies a mode may fill then, of workers and of link.
const SPARE: f64 = 0.75;
/// And how much of the workers' time while no body waits for one.
const EAGER: f64 = 1.25;
/// The rate of the link is news when it changed by this factor.
const LINK_NEWS: f64 = 1.2;
/// Decisions that are kept.
const MOST_DECISIONS: usize = 200;
/// Bodies that can be in workers' hands as far as the adapter cares.
const MOST_IN_HAND: usize = 64;
/// The link must have so much to do besides, for a body to count as ready in time.
const MARGIN: Duration = Duration::from_millis(15);
/// A mode never measured may keep the link waiting for so long if it is much slower than thought.
const RISK_S: f64 = 0.05;
/// How much slower.
const RISK: f64 = 3.0;
/// CPU seconds for samples at the start, and then for each second of a worker that waits, and of one
/// that does not.
const FIRST_SAMPLES_S: f64 = 0.2;
const SAMPLES_SHARE: f64 = 0.1;
const BUSY_SAMPLES_SHARE: f64 = 0.02;
/// The most that one sample may take, if a worker has nothing else to do, and if it has.
const IDLE_SAMPLE_S: f64 = 0.15;
const BUSY_SAMPLE_S: f64 = 0.03;
/// Less of a body tells nothing.
const LEAST_SAMPLE_BYTES: f64 = 32e3;
/// A sample that was not heard of for so long is lost.
const SAMPLE_LOST: Duration = Duration::from_secs(5);
/// What a mode brings is known well enough within so much.
const KNOWN_WITHIN: f64 = 0.035;
/// A mode is worth a sample if it might promise so much more.
const WORTH: f64 = 1.02;
/// How much more than a body takes the link should have to do, and the most that it should have.
const LEAD: f64 = 1.2;
const MOST_LEAD_S: f64 = 1.0;
/// What is thought of as the most that was ever ahead of the link fades over so long.
const PEAK_S: f64 = 3.0;

/// A body in a worker's hands.
#[derive(Clone, Copy, Debug)]
struct InHand {
    mode: Mode,
    bytes: u64,
    ready: Duration,
    out_bytes: f64,
}

/// The automatic choice.
#[derive(Debug)]
pub(super) struct Chooser {
    started: Duration,
    estimates: Estimates,
    plan: Option<Plan>,
    /// The rate of the link for which the plan was made.
    plan_link: f64,
    in_hand: VecDeque<InHand>,
    /// The most that the link was ahead lately, in seconds, and when that was said.
    peak: (f64, Duration),
    /// What the last view said.
    view: View,
    sampling: Option<Duration>,
    sampled_s: f64,
    /// The mode that the plan would have, were it known better.
    wanted: Option<Mode>,
    /// The modes for as long as all wait for those who make the bodies: while bodies wait for a worker
    /// all the same, and while none does.
    unhurried: Option<(Mode, Mode)>,
    decisions: Vec<ModeDecision>,
    left_out: u64,
}

impl Chooser {
    pub(super) fn new(options: &AdaptOptions) -> Self {
        Self {
            started: options.started,
            estimates: Estimates::new(&options.modes),
            plan: None,
            plan_link: 0.0,
            in_hand: VecDeque::new(),
            peak: (0.0, options.started),
            view: View::default(),
            sampling: None,
            sampled_s: 0.0,
            wanted: None,
            unhurried: None,
            decisions: Vec::new(),
            left_out: 0,
        }
    }

    pub(super) fn decisions(&self) -> (Vec<ModeDecision>, u64) {
        (self.decisions.clone(), self.left_out)
    }

    pub(super) fn choose(&mut self, now: Duration, view: &View) -> Mode {
        self.view = *view;
        let modes: Vec<Estimate> = self.estimates.all().collect();
        let link = view.link_bytes_per_s.filter(|rate| rate.is_finite() && *rate > 0.0);
        let mode = match link.map(|rate| rate.clamp(1e3, 1e12)) {
            None => Mode::DEFAULT,
            Some(link) => self.choose_for(now, view, link, &modes),
        };
        self.hand_out(now, mode, view, &modes);
        mode
    }

    fn choose_for(&mut self, now: Duration, view: &View, link: f64, modes: &[Estimate]) -> Mode {
        let workers = view.workers.max(1) as f64;
        let ahead = self.ahead(now, view, link);
        let usable = self.usable(view, ahead, modes, workers, link);
        self.replan(now, workers, link, modes, &usable);
        if let Some(mode) = self.unhurried(now, view, workers, link, modes, &usable) {
            return mode;
        }
        let pick =
            match self.plan.and_then(|plan| Some((modes.get(plan.fast)?, modes.get(plan.strong)?)))
            {
                None => None,
                Some(_) if view.paused => soonest(&usable, view, ahead, workers, link),
                // None waits behind it: what this one takes holds up nothing else. A plan of two
                // supposes that there are always more, and would send this one as it is.
                Some((_, strong)) if view.queued_bodies == 0 => Some(strong.mode),
                Some((fast, strong)) => self.in_turn(fast, strong, &usable, view, ahead, link),
            };
        pick.unwrap_or(Mode::DEFAULT)
    }

    /// For how long the link has something to do before it wants this body: what is on its way,
    /// and what is in the hands of other workers and goes before it.
    fn ahead(&mut self, now: Duration, view: &View, link: f64) -> f64 {
        let mut ahead = view.in_flight_bytes as f64 / link;
        for body in &self.in_hand {
            ahead = ahead.max(body.ready.saturating_sub(now).as_secs_f64()) + body.out_bytes / link;
        }
        let ahead = (ahead - (MARGIN + view.rtt).as_secs_f64()).max(0.0);
        let since = now.saturating_sub(self.peak.1).as_secs_f64();
        self.peak = ((self.peak.0 * (-since / PEAK_S).exp()).max(ahead), now);
        ahead
    }

    /// Modes that may be used: those that were measured, and those with which little can go wrong.
    fn usable(
        &mut self,
        view: &View,
        ahead: f64,
        modes: &[Estimate],
        workers: f64,
        link: f64,
    ) -> Vec<Estimate> {
        let bytes = view.body_bytes as f64;
        let safe = |mode: &&Estimate| {
            mode.measured_bytes > 0 || mode.s_per_byte * RISK * bytes <= ahead.max(RISK_S)
        };
        let usable: Vec<Estimate> = modes.iter().filter(safe).copied().collect();
        let (all, known) = (plan::best(modes, workers, link), plan::best(&usable, workers, link));
        self.wanted = match (all, known) {
            (Some(all), Some(known)) if known.s_per_byte > all.s_per_byte * WORTH => {
                let new = |at: usize| modes.get(at).filter(|mode| !usable.contains(mode));
                new(all.strong).or(new(all.fast)).map(|mode| mode.mode)
            }
            _ => None,
        };
        usable
    }

    fn replan(
        &mut self,
        now: Duration,
        workers: f64,
        link: f64,
        modes: &[Estimate],
        usable: &[Estimate],
    ) {
        let Some(best) = plan::best(usable, workers, link) else { return };
        let place = |at: usize| {
            let mode = usable.get(at)?.mode;
            modes.iter().position(|other| other.mode == mode)
        };
        let (Some(fast), Some(strong)) = (place(best.fast), place(best.strong)) else { return };
        let best = Plan { fast, strong, ..best };
        let news = link > self.plan_link * LINK_NEWS || link * LINK_NEWS < self.plan_link;
        let why = match self.plan {
            None => "the link was measured",
            Some(old) => {
                let (Some(one), Some(other)) = (modes.get(old.fast), modes.get(old.strong)) else {
                    return;
                };
                let still = plan::in_turn(one, other, workers, link);
                let cost = |at: usize| modes.get(at).map_or(0.0, |mode| mode.s_per_byte);
                let lighter = 2.0 * (cost(fast) + cost(strong)) < cost(old.fast) + cost(old.strong)
                    && best.s_per_byte <= still * LIGHTER;
                let better = still >= best.s_per_byte * BETTER;
                if (old.fast, old.strong) == (fast, strong) || !(better || lighter) {
                    return;
                }
                if news { "the link's rate changed" } else { "modes cost or bring something else" }
            }
        };
        self.plan = Some(best);
        self.plan_link = link;
        self.record(now, workers, link, modes, best, why);
    }

    /// The strongest mode that keeps nobody waiting, where workers and link wait for bodies anyway:
    /// what it takes costs no time, and what it brings is not on the link. And while no body waits for
    /// a worker, one that is stronger still: should bodies begin to wait for it, the other's turn is next.
    fn unhurried(
        &mut self,
        now: Duration,
        view: &View,
        workers: f64,
        link: f64,
        modes: &[Estimate],
        usable: &[Estimate],
    ) -> Option<Mode> {
        let supply = view.supply_s_per_byte.filter(|_| !view.paused);
        let slow =
            supply.filter(|s| self.plan.is_some_and(|plan| *s > plan.s_per_byte * UNHURRIED));
        let Some(supply) = slow else {
            self.unhurried = None;
            return None;
        };
        let within = |mode: &&Estimate, of_workers: f64, of_link: f64| {
            mode.s_per_byte <= of_workers * supply * workers
                && mode.ratio <= of_link * supply * link
        };
        let strongest = |of_workers: f64| {
            usable
                .iter()
                .filter(|mode| within(mode, of_workers, SPARE))
                .min_by(|a, b| a.ratio.total_cmp(&b.ratio))
        };
        let (steady, eager) = (strongest(SPARE)?, strongest(EAGER)?);
        let known = |mode: Mode| usable.iter().find(|other| other.mode == mode);
        let old = self.unhurried.and_then(|(one, other)| Some((known(one)?, known(other)?)));
        let kept = old.filter(|(one, other)| {
            within(one, 1.0, 1.0)
                && one.ratio < steady.ratio * BETTER
                && within(other, EAGER * BETTER, 1.0)
                && other.ratio < eager.ratio * BETTER
        });
        let (steady, eager) = kept.unwrap_or((steady, eager));
        let pair = Some((steady.mode, eager.mode));
        if self.unhurried != pair {
            self.unhurried = pair;
            let at = |mode: Mode| modes.iter().position(|other| other.mode == mode);
            let (fast, strong) = (at(steady.mode)?, at(eager.mode)?);
            let plan = Plan { fast, strong, s_per_byte: supply };
            self.record(now, workers, link, modes, plan, "link and workers wait for what is read");
        }
        Some(if view.queued_bodies == 0 { eager.mode } else { steady.mode })
    }

    fn record(
        &mut self,
        now: Duration,
        workers: f64,
        link: f64,
        modes: &[Estimate],
        plan: Plan,
        why: &str,
    ) {
        if self.decisions.len() >= MOST_DECISIONS {
            self.left_out = self.left_out.saturating_add(1);
            return;
        }
        let mode = |at: usize| modes.get(at).map_or(Mode::DEFAULT, |mode| mode.mode);
        let estimate = |mode: &Estimate| ModeEstimate {
            mode: mode.mode,
            worker_s_per_mib: mode.s_per_byte * f64::from(1 << 20),
            ratio: mode.ratio,
            measured_bytes: mode.measured_bytes,
            promised_bytes_per_s: Some(1.0 / plan::alone(mode, workers, link)),
        };
        self.decisions.push(ModeDecision {
            at_ms: now.saturating_sub(self.started).as_secs_f64() * 1e3,
            mode: mode(plan.fast),
            stronger: mode(plan.strong),
            promised_bytes_per_s: Some(1.0 / plan.s_per_byte),
            link_bytes_per_s: Some(link),
            workers: workers as u32,
            why: why.to_owned(),
            modes: modes.iter().map(estimate).collect(),
        });
    }

    /// The stronger of the plan's two while the link has enough to do meanwhile, the faster if not;
    /// and if even that would keep the link waiting, what is over soonest.
    fn in_turn(
        &self,
        fast: &Estimate,
        strong: &Estimate,
        usable: &[Estimate],
        view: &View,
        ahead: f64,
        link: f64,
    ) -> Option<Mode> {
        let bytes = view.body_bytes as f64;
        let takes = |mode: &Estimate| mode.s_per_byte * bytes;
        let over = |mode: &Estimate| takes(mode).max(ahead) + mode.ratio * bytes / link;
        if takes(strong) * 1.1 <= ahead {
            return Some(strong.mode);
        }
        // Where there is never so much ahead, the workers have to wait anyway.
        if ahead >= 0.7 * self.peak.0 && takes(fast) <= ahead && over(strong) < over(fast) {
            return Some(strong.mode);
        }
        if takes(fast) <= ahead {
            return Some(fast.mode);
        }
        let no_slower = usable.iter().filter(|mode| mode.s_per_byte <= fast.s_per_byte);
        no_slower
            .min_by(|a, b| over(a).total_cmp(&over(b)))
            .map(|mode| mode.mode)
            .or(Some(fast.mode))
    }

    /// Remembers a body that a worker has now.
    fn hand_out(&mut self, now: Duration, mode: Mode, view: &View, modes: &[Estimate]) {
        let bytes = view.body_bytes as f64;
        let (takes, out_bytes) = modes
            .iter()
            .find(|known| known.mode == mode)
            .map_or((0.0, bytes), |known| (known.s_per_byte * bytes, known.ratio * bytes));
        if self.in_hand.len() >= MOST_IN_HAND {
            self.in_hand.pop_front();
        }
        let ready = now.saturating_add(Duration::from_secs_f64(takes.clamp(0.0, 3600.0)));
        self.in_hand.push_back(InHand { mode, bytes: view.body_bytes as u64, ready, out_bytes });
    }

    /// For how long the link should have something to do when a worker takes a body: else the
    /// stronger mode is never ready in time.
    pub(super) fn lead(&self) -> Duration {
        let strong = self.plan.and_then(|plan| self.estimates.all().nth(plan.strong));
        let takes = strong.map_or(0.0, |mode| mode.s_per_byte * self.view.body_bytes as f64);
        Duration::from_secs_f64((takes * LEAD).clamp(0.0, MOST_LEAD_S))
    }

    pub(super) fn measured(&mut self, now: Duration, trial: Trial) {
        let done = |body: &InHand| body.mode == trial.mode && body.bytes == trial.bytes_in;
        let at = self.in_hand.iter().position(done);
        // A body may have been sent in another mode than it was handed out for.
        let at = at.or(self.in_hand.iter().position(|body| body.bytes == trial.bytes_in));
        if let Some(at) = at {
            self.in_hand.remove(at);
        }
        self.estimates.body(now, trial);
    }

    pub(super) fn wants_sample(&mut self, now: Duration, idle: bool) -> Option<Sample> {
        if self.sampling.is_some_and(|since| now.saturating_sub(since) < SAMPLE_LOST)
            || self.view.paused
        {
            return None;
        }
        let link = self.view.link_bytes_per_s.filter(|rate| rate.is_finite() && *rate > 0.0)?;
        let link = link.clamp(1e3, 1e12);
        let workers = self.view.workers.max(1) as f64;
        let elapsed = now.saturating_sub(self.started).as_secs_f64();
        // A plan that keeps the workers busy all the time would else never be compared with others.
        let share = if idle { SAMPLES_SHARE } else { BUSY_SAMPLES_SHARE };
        let allowance = FIRST_SAMPLES_S + share * elapsed * workers - self.sampled_s;
        let most_s = allowance.min(if idle { IDLE_SAMPLE_S } else { BUSY_SAMPLE_S });
        let modes: Vec<Estimate> = self.estimates.all().collect();
        let mode = match self.wanted {
            Some(wanted) => *modes.iter().find(|mode| mode.mode == wanted)?,
            None => doubtful(&modes, workers, link)?,
        };
        let most_bytes = (most_s / mode.s_per_byte).min(f64::from(1 << 20));
        if most_bytes < LEAST_SAMPLE_BYTES {
            return None;
        }
        self.sampling = Some(now);
        Some(Sample { mode: mode.mode, most_bytes: most_bytes as usize })
    }

    pub(super) fn sampled(&mut self, now: Duration, sample: Trial, body: Trial) {
        self.sampling = None;
        let spent = if sample.cpu.is_zero() { sample.took } else { sample.cpu };
        self.sampled_s += spent.as_secs_f64();
        if self.wanted == Some(sample.mode) {
            self.wanted = None;
        }
        if sample.bytes_in == 0 {
            // There is no memory for it. Places in the plan are others then.
            self.estimates.remove(sample.mode);
            self.plan = None;
        }
        self.estimates.sample(now, sample, body);
    }
}

/// The mode with which what is left is over soonest: latency counts, for the guest waits.
fn soonest(usable: &[Estimate], view: &View, ahead: f64, workers: f64, link: f64) -> Option<Mode> {
    let (bytes, more) = (view.body_bytes as f64, view.queued_bodies as f64);
    let over = |mode: &Estimate| {
        let (work, send) = (mode.s_per_byte * bytes, mode.ratio * bytes / link);
        work.max(ahead) + send + more * (work / workers).max(send)
    };
    usable.iter().min_by(|a, b| over(a).total_cmp(&over(b))).map(|mode| mode.mode)
}

/// The mode that might be worth most if it is better than thought, as far as that is possible.
fn doubtful(modes: &[Estimate], workers: f64, link: f64) -> Option<Estimate> {
    let now = plan::best(modes, workers, link)?.s_per_byte;
    let mut best: Option<(f64, Estimate)> = None;
    for (at, mode) in modes.iter().enumerate() {
        // Known well enough, and nothing to be known of.
        let known =
            mode.measured_bytes > 0 && mode.cost_within < 1.4 && mode.ratio_within < KNOWN_WITHIN;
        if known || mode.mode == Mode::NONE {
            continue;
        }
        let hoped = Estimate {
            s_per_byte: mode.s_per_byte / mode.cost_within,
            ratio: (mode.ratio - mode.ratio_within).max(1e-3),
            ..*mode
        };
        let mut with = modes.to_vec();
        with[at] = hoped;
        let Some(then) = plan::best(&with, workers, link) else { continue };
        if now > then.s_per_byte * WORTH && best.is_none_or(|(least, _)| then.s_per_byte < least) {
            best = Some((then.s_per_byte, *mode));
        }
    }
    best.map(|(_, mode)| mode)
}
