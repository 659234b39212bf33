//! When to stop sending rounds and cut over: measurements in, a decision out.
//!
//! A round sends what is dirty while the guest goes on writing, so that the next has less to send,
//! if the link is faster than the guest writes. It pays as long as the downtime it saves is worth
//! the time it takes. Total time counts first: rounds go on until the predicted downtime is good
//! enough, and stop as soon as one more would not shrink it by much, or there is hardly anything
//! left that it could shrink. What one more would leave is read from a curve of what became dirty in
//! which time ([`DirtyCurve`]): no round gets below what the guest writes all the time.
//!
//! No I/O and no clock in here; what the driver measured comes in [`Measurements`].

mod curve;

use std::{fmt, str::FromStr, time::Duration};

pub use curve::DirtyCurve;
use serde::{Deserialize, Serialize};

use crate::vm::LEAST_RUN_SHARE;

/// What the driver knows when it is about to start a round. Chunks are those that the stages have
/// to look at, bytes are those on the link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurements {
    /// Rounds finished.
    pub rounds: u32,
    /// Since the request was accepted.
    pub elapsed: Duration,
    /// Chunks dirty now.
    pub remaining_chunks: u64,
    /// Those of them that another round would leave to the pause anyway.
    pub held_chunks: u64,
    /// Rounds in a row, the last included, that left about as much as they began with: see
    /// [`stalled`].
    pub stalled_rounds: u32,
    /// How many chunks become dirty in which time.
    pub dirtied: DirtyCurve,
    /// The share of the time for which the guest's vCPUs run now: below 1 where it is throttled.
    pub run_share: f64,
    /// Bytes on the link for each chunk, as observed lately; 0 if nothing was sent yet.
    pub link_bytes_per_chunk: f64,
    /// Bytes a second that the link takes; 0 if not known yet.
    pub link_bytes_per_s: f64,
    /// Chunks a second that reading, classifying and compressing manage; 0 if not known yet.
    pub stage_chunks_per_s: f64,
    /// The same without the guest, which wants no CPU while it is paused; 0 if not known.
    pub paused_stage_chunks_per_s: f64,
    /// Bytes made but not yet delivered: the last round queues behind them.
    pub queued_bytes: u64,
    /// The link's round-trip time.
    pub rtt: Duration,
    /// How many of them the guest waits for at cutover, besides what is sent.
    pub round_trips: f64,
    /// What a cutover costs whatever is dirty: pause, save, durable records, load, resume.
    pub fixed: Duration,
    /// Bytes that the machine's state will take on the link.
    pub state_link_bytes: u64,
}

/// Whether a round that began with `before` chunks and left `after` got nowhere.
pub fn stalled(before: u64, after: u64) -> bool {
    after as f64 > before as f64 * STALLED_SHARE
}

const STALLED_SHARE: f64 = 0.85;
/// So many rounds in a row that got nowhere show that the next will not either, whatever its
/// prediction says: what rounds cost besides the link is not in it.
const MOST_STALLED: u32 = 2;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Send another round while the guest runs.
    NextRound {
        /// What a cutover now would cost, if it can be told.
        predicted_downtime: Option<Duration>,
        /// The share of the time for which the guest's vCPUs are to run meanwhile.
        run_share: f64,
    },
    /// Pause the guest and send the rest.
    CutOver {
        /// Why now.
        reason: CutOverReason,
        /// What it will cost, if it can be told.
        predicted_downtime: Option<Duration>,
    },
}

/// What a handoff is to be good at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Objective {
    /// The least total time, with a downtime that nobody minds where that costs little.
    #[default]
    Total,
    /// A downtime of this at most, however long it takes, as long as rounds bring it closer.
    Downtime(Duration),
    /// To be over after this, with the least downtime that this allows.
    Deadline(Duration),
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Total => f.write_str("total"),
            Self::Downtime(limit) => write!(f, "downtime={}", limit.as_millis()),
            Self::Deadline(limit) => write!(f, "deadline={}", limit.as_secs_f64()),
        }
    }
}

impl FromStr for Objective {
    type Err = UnknownObjective;

    /// `total`, `downtime=MS` or `deadline=S`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownObjective(text.to_owned());
        if text == "total" {
            return Ok(Self::Total);
        }
        let (name, value) = text.split_once('=').ok_or_else(unknown)?;
        match name {
            "downtime" => value.parse().map(Duration::from_millis).map(Self::Downtime).ok(),
            "deadline" => value.parse().ok().and_then(duration).map(Self::Deadline),
            _ => None,
        }
        .ok_or_else(unknown)
    }
}

/// No objective is written so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no objective is written {0}: it is total, downtime=MS or deadline=S")]
pub struct UnknownObjective(pub String);

/// Why the policy cuts over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutOverReason {
    /// The predicted downtime meets the objective.
    DowntimeMet,
    /// What is left takes so little time that no round could save much of the downtime.
    LittleLeft,
    /// Another round would leave about as much as there is now.
    NoLongerPays,
    /// Another round would end too late for the deadline.
    Deadline,
    /// As many rounds as are allowed were sent.
    RoundLimit,
    /// As much time as is allowed has passed.
    TimeLimit,
}

impl fmt::Display for CutOverReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DowntimeMet => "the predicted downtime meets the objective",
            Self::LittleLeft => "what is left takes hardly any of the downtime",
            Self::NoLongerPays => "another round would not shrink the rest by much",
            Self::Deadline => "another round would miss the deadline",
            Self::RoundLimit => "the limit of rounds was reached",
            Self::TimeLimit => "the time limit was reached",
        })
    }
}

/// Rounds until downtime is low enough or they no longer pay.
#[derive(Clone, Debug, PartialEq)]
pub struct CutOverPolicy {
    /// What the handoff is to be good at.
    pub objective: Objective,
    /// Whether a guest that outruns the link is slowed down until it does not.
    pub throttle: bool,
    /// A predicted downtime at or below this is good enough: no round is sent to shorten it.
    pub downtime_objective: Duration,
    /// Nor does a round pay that can save no more than this of the downtime, ...
    pub least_saving: Duration,
    /// ... or no more than this share of what no round can change.
    pub least_saving_share: f64,
    /// A round pays if it leaves at most this share of the predicted downtime that rounds can
    /// change.
    pub max_remaining_share: f64,
    /// A round that takes no longer than this costs little of the total: ...
    pub cheap_round: Duration,
    /// ... it pays if it leaves at most this share.
    pub cheap_remaining_share: f64,
    /// Rounds at most.
    pub max_rounds: u32,
    /// After this long no further round is begun.
    pub max_rounds_time: Duration,
}

impl Default for CutOverPolicy {
    fn default() -> Self {
        Self {
            objective: Objective::Total,
            throttle: false,
            // A wide-area cutover has 1.5 round trips and three durable records in it, about 100 ms;
            // what a prediction misses comes on top. Beyond 300 ms a user notices. A round that
            // brings it down from there to here takes about as long as it saves.
            downtime_objective: Duration::from_millis(150),
            least_saving: Duration::from_millis(20),
            least_saving_share: 0.25,
            max_remaining_share: 0.7,
            cheap_round: Duration::from_millis(300),
            cheap_remaining_share: 0.9,
            max_rounds: 30,
            max_rounds_time: Duration::from_secs(600),
        }
    }
}

impl CutOverPolicy {
    /// The default with another objective.
    pub fn new(objective: Objective) -> Self {
        let standard = Self { objective, ..Self::default() };
        match objective {
            Objective::Downtime(limit) => Self { downtime_objective: limit, ..standard },
            Objective::Total | Objective::Deadline(_) => standard,
        }
    }

    /// Decides whether another round is sent.
    ///
    /// The first round is never skipped for lack of measurements: without a rate there is no
    /// prediction, and without a prediction only the limits end the rounds.
    pub fn decide(&self, m: &Measurements) -> Decision {
        let transfer = pause_time(m, m.remaining_chunks as f64);
        let predicted_downtime = transfer.map(|t| t + fixed_time(m)).and_then(duration);
        let cut_over = |reason| Decision::CutOver { reason, predicted_downtime };
        if m.rounds >= self.max_rounds {
            return cut_over(CutOverReason::RoundLimit);
        }
        if m.elapsed >= self.max_rounds_time {
            return cut_over(CutOverReason::TimeLimit);
        }
        if predicted_downtime.is_some_and(|downtime| downtime <= self.downtime_objective) {
            return cut_over(CutOverReason::DowntimeMet);
        }
        let Some(transfer) = transfer else {
            return Decision::NextRound { predicted_downtime, run_share: run_share(m) };
        };
        if transfer <= self.little(m) {
            return cut_over(CutOverReason::LittleLeft);
        }
        let round = round_time(m, m.remaining_chunks as f64).unwrap_or(transfer);
        if self.is_last_chance(m, round) {
            return cut_over(CutOverReason::Deadline);
        }
        match self.next_share(m, round) {
            Some(run_share) => Decision::NextRound { predicted_downtime, run_share },
            None => cut_over(CutOverReason::NoLongerPays),
        }
    }

    /// Whether a round under way must be broken off, because only a guest that is paused now is at the
    /// peer by the deadline: `m` counts what is left of the round among what remains.
    pub fn must_break_off(&self, m: &Measurements) -> bool {
        let Objective::Deadline(deadline) = self.objective else { return false };
        let Some(transfer) = pause_time(m, m.remaining_chunks as f64) else { return false };
        let needed = (transfer + fixed_time(m)) * DEADLINE_MARGIN;
        m.elapsed.as_secs_f64() + needed >= deadline.as_secs_f64()
    }

    /// What is not worth a round, in seconds of transfer.
    fn little(&self, m: &Measurements) -> f64 {
        let least = self.least_saving.as_secs_f64();
        match self.objective {
            Objective::Downtime(_) => least,
            _ => least.max(fixed_time(m) * self.least_saving_share),
        }
    }

    /// Whether another round, and a cutover after it, would be over too late.
    fn is_last_chance(&self, m: &Measurements, transfer: f64) -> bool {
        let Objective::Deadline(deadline) = self.objective else { return false };
        let after = pause_time(m, m.dirtied.at(transfer * run_share(m))).unwrap_or(0.0);
        let needed = (transfer + after + fixed_time(m)) * DEADLINE_MARGIN;
        m.elapsed.as_secs_f64() + needed >= deadline.as_secs_f64()
    }

    /// The share of the time for which the guest runs in a round that pays; none if there is no such
    /// round.
    fn next_share(&self, m: &Measurements, transfer: f64) -> Option<f64> {
        let now_share = run_share(m);
        if m.rounds == 0 || (m.stalled_rounds < MOST_STALLED && self.pays(m, transfer, now_share)) {
            return Some(now_share);
        }
        let slower = RUN_SHARES.into_iter().filter(|share| self.throttle && *share < now_share);
        let left = |share: f64| m.dirtied.at(transfer * share);
        slower.into_iter().find(|share| left(*share) <= m.remaining_chunks as f64 * THROTTLED_SHARE)
    }

    /// Whether a round that takes `transfer` seconds leaves enough less than there is now. What it
    /// leaves was sent for nothing, and counts against the total time; what it leaves less counts for
    /// the downtime.
    fn pays(&self, m: &Measurements, transfer: f64, share: f64) -> bool {
        let cheap = transfer <= self.cheap_round.as_secs_f64();
        let bound = match self.objective {
            Objective::Total if !cheap => self.max_remaining_share,
            _ => self.cheap_remaining_share,
        };
        let left = m.dirtied.at(transfer * share).max(m.held_chunks as f64);
        left <= m.remaining_chunks as f64 * bound
    }
}

/// Shares of the time for which a throttled guest may run: the largest that is enough is taken.
const RUN_SHARES: [f64; 6] = [0.7, 0.5, 0.35, 0.25, 0.17, LEAST_RUN_SHARE];
/// A throttled guest's round leaves at most this share: so few rounds are needed, and soon it is over.
const THROTTLED_SHARE: f64 = 0.5;
/// Predictions miss by so much, and a deadline is not to be missed.
const DEADLINE_MARGIN: f64 = 1.15;

/// The guest runs all the time unless a measurement says otherwise.
fn run_share(m: &Measurements) -> f64 {
    let known = m.run_share.is_finite() && m.run_share > 0.0;
    if known { m.run_share.clamp(LEAST_RUN_SHARE, 1.0) } else { 1.0 }
}

/// Seconds that a round of so many chunks takes, beside the guest.
fn round_time(m: &Measurements, chunks: f64) -> Option<f64> {
    transfer_time(m, chunks, m.stage_chunks_per_s)
}

/// Seconds that so many chunks take while the guest waits for them.
fn pause_time(m: &Measurements, chunks: f64) -> Option<f64> {
    let known = finite(m.paused_stage_chunks_per_s) > 0.0;
    let per_s = if known { m.paused_stage_chunks_per_s } else { m.stage_chunks_per_s };
    transfer_time(m, chunks, per_s)
}

/// Seconds until `chunks` and all that queues before them have left: the slower of link and stages.
fn transfer_time(m: &Measurements, chunks: f64, stage_chunks_per_s: f64) -> Option<f64> {
    let known = m.link_bytes_per_s.is_finite() && m.link_bytes_per_s > 0.0;
    let rate = known.then_some(m.link_bytes_per_s)?;
    let bytes = m.queued_bytes as f64 + chunks * finite(m.link_bytes_per_chunk);
    let stages = match finite(stage_chunks_per_s) {
        0.0 => 0.0,
        per_s => chunks / per_s,
    };
    // A small last round goes out in a few pieces: what is slower hides what is faster but for one
    // piece of it, and the target takes as long for the last one as this side did.
    let link = bytes / rate;
    Some(link.max(stages) + (link.min(stages) + stages) / PIECES)
}

/// Pieces into which a small last round is cut.
const PIECES: f64 = 4.0;

/// Seconds of a cutover that no round changes: the state, the way of the last segment there (and of
/// what is said after it, if that waits for an answer), and what the machines themselves need.
fn fixed_time(m: &Measurements) -> f64 {
    let state = m.state_link_bytes as f64 / m.link_bytes_per_s;
    m.fixed.as_secs_f64() + finite(m.round_trips) * m.rtt.as_secs_f64() + finite(state)
}

/// A measurement that is no number, or below zero, counts as not made.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

fn duration(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest that writes `writes_per_s` chunks, drawn from a working set, on a link.
    struct Guest {
        writes_per_s: f64,
        working_set: f64,
        changed_chunks: f64,
        link_bytes_per_s: f64,
        bytes_per_chunk: f64,
    }

    /// Chunks that became dirty in `seconds`: distinct ones among random writes.
    impl Guest {
        fn dirtied(&self, seconds: f64) -> f64 {
            let misses = (-self.writes_per_s * seconds / self.working_set.max(1.0)).exp();
            self.working_set * (1.0 - misses)
        }

        /// Rounds, reason, predicted downtime in s, total in s.
        fn hand_off(&self, policy: &CutOverPolicy) -> (u32, CutOverReason, f64, f64) {
            let mut m = Measurements {
                rtt: Duration::from_millis(50),
                round_trips: 1.5,
                fixed: Duration::from_millis(50),
                state_link_bytes: 8000,
                remaining_chunks: self.changed_chunks as u64,
                ..Measurements::default()
            };
            let mut elapsed = 0.0;
            loop {
                match policy.decide(&m) {
                    Decision::CutOver { reason, predicted_downtime } => {
                        let downtime = predicted_downtime.unwrap_or_default().as_secs_f64();
                        return (m.rounds, reason, downtime, elapsed + downtime);
                    }
                    Decision::NextRound { run_share, .. } => m.run_share = run_share,
                }
                let bytes = m.remaining_chunks as f64 * self.bytes_per_chunk;
                let took = bytes / self.link_bytes_per_s + 0.02;
                // As a round looks every 50 ms.
                let ran = took * m.run_share;
                m.dirtied.taken();
                for look in 1..(took / 0.05) as u32 {
                    let at = f64::from(look) * 0.05 * m.run_share;
                    m.dirtied.saw(at, self.dirtied(at) as u64);
                }
                let dirty = self.dirtied(ran);
                m.dirtied.saw(ran, dirty as u64);
                elapsed += took;
                m.rounds += 1;
                let previous = std::mem::replace(&mut m.remaining_chunks, dirty as u64);
                m.stalled_rounds = match stalled(previous, m.remaining_chunks) {
                    true => m.stalled_rounds + 1,
                    false => 0,
                };
                m.link_bytes_per_chunk = self.bytes_per_chunk;
                m.link_bytes_per_s = self.link_bytes_per_s;
                m.elapsed = Duration::from_secs_f64(elapsed);
            }
        }
    }

    const MBPS_10: f64 = 1.25e6;

    fn objective() -> impl Strategy<Value = Objective> {
        prop_oneof![
            Just(Objective::Total),
            (0u64..10_000).prop_map(|ms| Objective::Downtime(Duration::from_millis(ms))),
            (0u64..1000).prop_map(|s| Objective::Deadline(Duration::from_secs(s))),
        ]
    }

    /// As the guest of the lab's `detector`: a working set that is written over four times a second.
    const DETECTOR: Guest = Guest {
        writes_per_s: 4400.0,
        working_set: 1100.0,
        changed_chunks: 16_000.0,
        link_bytes_per_s: MBPS_10,
        bytes_per_chunk: 640.0,
    };

    #[test]
    fn a_round_that_would_leave_most_to_the_pause_is_not_sent() {
        let measured = |held_chunks| Measurements {
            rounds: 2,
            remaining_chunks: 1000,
            held_chunks,
            link_bytes_per_chunk: 1000.0,
            link_bytes_per_s: 1e6,
            ..Measurements::default()
        };
        let decide = |held| CutOverPolicy::default().decide(&measured(held));
        assert!(matches!(decide(500), Decision::NextRound { .. }));
        let reason = CutOverReason::NoLongerPays;
        assert!(matches!(decide(900), Decision::CutOver { reason: why, .. } if why == reason));
    }

    #[test]
    fn a_paused_guest_leaves_its_cpu_to_the_last_round() {
        let measured = |paused_stage_chunks_per_s| Measurements {
            rounds: 40,
            remaining_chunks: 1000,
            link_bytes_per_chunk: 100.0,
            link_bytes_per_s: 1e6,
            stage_chunks_per_s: 1000.0,
            paused_stage_chunks_per_s,
            ..Measurements::default()
        };
        let downtime_s = |paused| match CutOverPolicy::default().decide(&measured(paused)) {
            Decision::CutOver { predicted_downtime, .. } => predicted_downtime.unwrap(),
            decision => panic!("{decision:?}"),
        };
        assert!(downtime_s(0.0) > Duration::from_millis(1200));
        assert!(downtime_s(10_000.0) < Duration::from_millis(160));
    }

    #[test]
    fn a_working_set_is_not_sent_again_and_again() {
        let (rounds, reason, downtime, total) = DETECTOR.hand_off(&CutOverPolicy::default());
        assert_eq!((rounds, reason), (1, CutOverReason::NoLongerPays));
        assert!(downtime < 0.9 && total < 9.5, "{downtime} s down, {total} s in all");
    }

    #[test]
    fn a_throttled_guest_meets_the_downtime() {
        let wanted = CutOverPolicy::new(Objective::Downtime(Duration::from_millis(300)));
        let (_, _, downtime, _) = DETECTOR.hand_off(&wanted);
        assert!(downtime > 0.5, "it outruns the link: {downtime} s");
        let throttled = CutOverPolicy { throttle: true, ..wanted };
        let (rounds, reason, downtime, total) = DETECTOR.hand_off(&throttled);
        assert_eq!(reason, CutOverReason::DowntimeMet);
        assert!(downtime <= 0.3 && rounds < 8 && total < 11.0, "{downtime} s, {rounds}, {total} s");
    }

    #[test]
    fn a_deadline_is_kept_where_it_can_be() {
        for seconds in [10.0, 12.0, 20.0] {
            let deadline = Objective::Deadline(Duration::from_secs_f64(seconds));
            let (_, _, downtime, total) = DETECTOR.hand_off(&CutOverPolicy::new(deadline));
            assert!(total <= seconds, "{total} s of {seconds}, {downtime} s down");
        }
        // A round that would be over too late is broken off.
        let policy = CutOverPolicy::new(Objective::Deadline(Duration::from_secs(10)));
        let mut m = Measurements {
            elapsed: Duration::from_secs(2),
            remaining_chunks: 10_000,
            link_bytes_per_chunk: 640.0,
            link_bytes_per_s: MBPS_10,
            ..Measurements::default()
        };
        assert!(!policy.must_break_off(&m), "5.1 s to go");
        m.elapsed = Duration::from_secs(5);
        assert!(policy.must_break_off(&m));
        assert!(!CutOverPolicy::default().must_break_off(&m), "nobody is in a hurry");
    }

    #[test]
    fn objectives_are_read_as_they_are_written() {
        for text in ["total", "downtime=0", "downtime=1500", "deadline=20", "deadline=0.5"] {
            assert_eq!(text.parse::<Objective>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "Total",
            "downtime",
            "downtime=",
            "downtime=1.5",
            "deadline=-1",
            "deadline=inf",
            "x=1",
        ] {
            let error = text.parse::<Objective>().unwrap_err().to_string();
            assert!(error.contains("downtime=MS"), "{error}");
        }
    }

    #[test]
    fn idle_guest_meets_the_objective_fast() {
        let guest = Guest {
            writes_per_s: 40.0,
            working_set: 300.0,
            changed_chunks: 20_000.0,
            link_bytes_per_s: MBPS_10,
            bytes_per_chunk: 900.0,
        };
        let (rounds, reason, downtime, total) = guest.hand_off(&CutOverPolicy::default());
        assert_eq!(reason, CutOverReason::DowntimeMet);
        assert!(rounds <= 3, "{rounds} rounds");
        assert!(downtime <= 0.3, "{downtime} s down");
        assert!(total < 16.0, "{total} s in all, 14.4 s of them the first round");
    }

    #[test]
    fn constant_writer_within_the_link_converges() {
        let guest = Guest {
            writes_per_s: 200.0,
            working_set: 5000.0,
            changed_chunks: 20_000.0,
            link_bytes_per_s: MBPS_10,
            bytes_per_chunk: 2500.0,
        };
        let (rounds, reason, downtime, total) = guest.hand_off(&CutOverPolicy::default());
        assert!(rounds <= 8, "{rounds} rounds");
        assert!(reason != CutOverReason::RoundLimit && reason != CutOverReason::TimeLimit);
        assert!(downtime < 0.5, "{downtime} s down");
        assert!(total < 80.0, "{total} s in all, 40 s of them the first round");
    }

    #[test]
    fn writer_faster_than_the_link_is_not_chased() {
        let guest = Guest {
            writes_per_s: 5000.0,
            working_set: 5000.0,
            changed_chunks: 20_000.0,
            link_bytes_per_s: MBPS_10,
            bytes_per_chunk: 2500.0,
        };
        let (rounds, reason, downtime, total) = guest.hand_off(&CutOverPolicy::default());
        assert_eq!(reason, CutOverReason::NoLongerPays);
        assert!(rounds <= 2, "{rounds} rounds");
        assert!(downtime < 11.0, "no worse than the working set once: {downtime} s");
        assert!(total < 62.0, "{total} s in all");
    }

    #[test]
    fn a_guest_equal_to_its_base_still_waits_for_a_measurement() {
        let policy = CutOverPolicy::default();
        let unknown = Measurements { remaining_chunks: 10, ..Measurements::default() };
        assert_eq!(
            policy.decide(&unknown),
            Decision::NextRound { predicted_downtime: None, run_share: 1.0 }
        );
        let late = Measurements { elapsed: policy.max_rounds_time, ..unknown };
        let reason = CutOverReason::TimeLimit;
        let expected = Decision::CutOver { reason, predicted_downtime: None };
        assert_eq!(policy.decide(&late), expected);
    }

    #[test]
    fn slow_stages_count_like_a_slow_link() {
        let m = Measurements {
            rounds: 1,
            remaining_chunks: 1000,
            link_bytes_per_chunk: 10.0,
            link_bytes_per_s: MBPS_10,
            stage_chunks_per_s: 500.0,
            ..Measurements::default()
        };
        let decision = CutOverPolicy::default().decide(&m);
        let Decision::NextRound { predicted_downtime: Some(downtime), .. } = decision else {
            panic!("{decision:?}");
        };
        assert!(
            (2.4..2.6).contains(&downtime.as_secs_f64()),
            "2 s, and the target's last piece: {downtime:?}"
        );
    }

    proptest! {
        /// Whatever is measured, sense or not, rounds end and nothing panics.
        #[test]
        fn always_ends(
            a in any::<f64>(), b in any::<f64>(), c in any::<f64>(), d in any::<f64>(),
            remaining: u64, seen: u64, stalled_rounds: u32, queued: u64, state: u64, rtt: u64, fixed: u64, objective in objective(),
        ) {
            let policy = CutOverPolicy { throttle: seen % 2 == 0, ..CutOverPolicy::new(objective) };
            let mut dirtied = DirtyCurve::default();
            dirtied.saw(a, seen);
            let mut m = Measurements {
                rounds: 0,
                elapsed: Duration::ZERO,
                held_chunks: 0,
                remaining_chunks: remaining,
                stalled_rounds,
                dirtied,
                run_share: a,
                link_bytes_per_chunk: b,
                link_bytes_per_s: c,
                stage_chunks_per_s: d,
                paused_stage_chunks_per_s: d,
                queued_bytes: queued,
                rtt: Duration::from_nanos(rtt),
                round_trips: 1.5,
                fixed: Duration::from_nanos(fixed),
                state_link_bytes: state,
            };
            while let Decision::NextRound { run_share, .. } = policy.decide(&m) {
                prop_assert!((LEAST_RUN_SHARE..=1.0).contains(&run_share));
                policy.must_break_off(&m);
                m.rounds += 1;
                prop_assert!(m.rounds <= policy.max_rounds);
            }
        }

        /// The faster the guest writes, the sooner its rounds end; none is chased past its worth.
        #[test]
        fn total_stays_in_bounds(
            writes_per_s in 0.0f64..20_000.0,
            working_set in 1.0f64..50_000.0,
            changed_chunks in 1.0f64..100_000.0,
            mbps in 1.0f64..100.0,
        ) {
            let link_bytes_per_s = mbps * 125_000.0;
            let guest =
                Guest { writes_per_s, working_set, changed_chunks, link_bytes_per_s, bytes_per_chunk: 2000.0 };
            let (_, reason, _, total) = guest.hand_off(&CutOverPolicy::default());
            prop_assert_ne!(reason, CutOverReason::RoundLimit);
            // A round that pays leaves at most 0.7 of the one before: their sum is bounded.
            let largest = changed_chunks.max(working_set) * 2000.0 / link_bytes_per_s;
            prop_assert!(total <= largest * (1.0 + 1.0 / 0.3) + 5.0, "{total} s, {largest} s");
        }
    }
}
