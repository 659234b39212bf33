//! When to stop sending rounds and cut over: measurements in, a decision out.
//!
//! A round sends what is dirty while the guest goes on writing, so that the next has less to send,
//! if the link is faster than the guest writes. It pays as long as the downtime it saves is worth
//! the time it takes. Total time counts first: rounds go on until the predicted downtime meets the
//! objective, and stop as soon as one more would not shrink it by much, or there is hardly anything
//! left that it could shrink.
//!
//! No I/O and no clock in here; what the driver measured comes in [`Measurements`].

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// What the driver knows when it is about to start a round. Chunks are those that the stages have
/// to look at, bytes are those on the link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measurements {
    /// Rounds finished.
    pub rounds: u32,
    /// Since the request was accepted.
    pub elapsed: Duration,
    /// Chunks dirty now.
    pub remaining_chunks: u64,
    /// Chunks that were to be sent when the round before began; 0 before the second.
    pub previous_chunks: u64,
    /// Rounds in a row, the last included, that left about as much as they began with: see
    /// [`stalled`].
    pub stalled_rounds: u32,
    /// Chunks that became dirty while the last round ran ÷ its duration, per second.
    pub dirty_chunks_per_s: f64,
    /// Bytes on the link for each chunk, as observed lately; 0 if nothing was sent yet.
    pub link_bytes_per_chunk: f64,
    /// Bytes a second that the link takes; 0 if not known yet.
    pub link_bytes_per_s: f64,
    /// Chunks a second that reading, classifying and compressing manage; 0 if not known yet.
    pub stage_chunks_per_s: f64,
    /// Bytes made but not yet delivered: the last round queues behind them.
    pub queued_bytes: u64,
    /// The link's round-trip time.
    pub rtt: Duration,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send another round while the guest runs.
    NextRound {
        /// What a cutover now would cost, if it can be told.
        predicted_downtime: Option<Duration>,
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
        let transfer = transfer_time(m, m.remaining_chunks as f64);
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
        let little = self.least_saving.as_secs_f64().max(fixed_time(m) * self.least_saving_share);
        if transfer.is_some_and(|transfer| transfer <= little) {
            return cut_over(CutOverReason::LittleLeft);
        }
        if transfer.is_some_and(|transfer| !self.pays(m, transfer)) {
            return cut_over(CutOverReason::NoLongerPays);
        }
        Decision::NextRound { predicted_downtime }
    }

    /// Whether a round that takes `transfer` seconds leaves enough less than there is now.
    fn pays(&self, m: &Measurements, transfer: f64) -> bool {
        if m.rounds == 0 {
            return true;
        }
        if m.stalled_rounds >= MOST_STALLED {
            return false;
        }
        let now = m.remaining_chunks as f64;
        let share = match transfer <= self.cheap_round.as_secs_f64() {
            true => self.cheap_remaining_share,
            false => self.max_remaining_share,
        };
        let bound = now * share;
        let dirtied = finite(m.dirty_chunks_per_s) * transfer;
        if dirtied <= bound {
            return true;
        }
        // A guest that writes the same few chunks over and over has a high rate in a short round
        // and a low one in a long round. If the last round did shrink the rest, so may the next.
        m.previous_chunks > 0 && now <= m.previous_chunks as f64 * share && dirtied <= now
    }
}

/// Seconds until `chunks` and all that queues before them have left: the slower of link and stages.
fn transfer_time(m: &Measurements, chunks: f64) -> Option<f64> {
    let known = m.link_bytes_per_s.is_finite() && m.link_bytes_per_s > 0.0;
    let rate = known.then_some(m.link_bytes_per_s)?;
    let bytes = m.queued_bytes as f64 + chunks * finite(m.link_bytes_per_chunk);
    let stages = match finite(m.stage_chunks_per_s) {
        0.0 => 0.0,
        per_s => chunks / per_s,
    };
    Some((bytes / rate).max(stages))
}

/// Seconds of a cutover that no round changes: the state, one and a half round trips (last segment
/// there, Prepared back, Commit there), and what the machines themselves need.
fn fixed_time(m: &Measurements) -> f64 {
    let state = m.state_link_bytes as f64 / m.link_bytes_per_s;
    m.fixed.as_secs_f64() + 1.5 * m.rtt.as_secs_f64() + finite(state)
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
                    Decision::NextRound { .. } => {}
                }
                let bytes = m.remaining_chunks as f64 * self.bytes_per_chunk;
                let took = bytes / self.link_bytes_per_s + 0.02;
                let dirty = self.dirtied(took);
                elapsed += took;
                m.rounds += 1;
                m.previous_chunks = m.remaining_chunks;
                m.remaining_chunks = dirty as u64;
                m.stalled_rounds = match stalled(m.previous_chunks, m.remaining_chunks) {
                    true => m.stalled_rounds + 1,
                    false => 0,
                };
                m.dirty_chunks_per_s = dirty / took;
                m.link_bytes_per_chunk = self.bytes_per_chunk;
                m.link_bytes_per_s = self.link_bytes_per_s;
                m.elapsed = Duration::from_secs_f64(elapsed);
            }
        }
    }

    const MBPS_10: f64 = 1.25e6;

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
        assert_eq!(policy.decide(&unknown), Decision::NextRound { predicted_downtime: None });
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
        let expected = Decision::NextRound { predicted_downtime: Some(Duration::from_secs(2)) };
        assert_eq!(CutOverPolicy::default().decide(&m), expected);
    }

    proptest! {
        /// Whatever is measured, sense or not, rounds end and nothing panics.
        #[test]
        fn always_ends(
            a in any::<f64>(), b in any::<f64>(), c in any::<f64>(), d in any::<f64>(),
            remaining: u64, previous: u64, stalled_rounds: u32, queued: u64, state: u64, rtt: u64, fixed: u64,
        ) {
            let policy = CutOverPolicy::default();
            let mut m = Measurements {
                rounds: 0,
                elapsed: Duration::ZERO,
                remaining_chunks: remaining,
                previous_chunks: previous,
                stalled_rounds,
                dirty_chunks_per_s: a,
                link_bytes_per_chunk: b,
                link_bytes_per_s: c,
                stage_chunks_per_s: d,
                queued_bytes: queued,
                rtt: Duration::from_nanos(rtt),
                fixed: Duration::from_nanos(fixed),
                state_link_bytes: state,
            };
            while let Decision::NextRound { .. } = policy.decide(&m) {
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
