//! What a handoff says of itself: while it runs, and at its end.
//!
//! The report's JSON form is described by `docs/report.schema.json`; fields are added, never
//! renamed. All times are taken by the source's clock alone.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    adapt::Adaptation,
    stage::{Share, Stats},
};

/// How a handoff stands: enough for one live line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// The round, from 1; 0 before the first.
    pub round: u32,
    /// Bytes sent on all links so far, headers included.
    pub sent_bytes: u64,
    /// Chunks still to be looked at in this round.
    pub remaining_chunks: u64,
    /// Bytes a second that the link took lately.
    pub rate_bytes_per_s: u64,
    /// What a cutover now would cost, once there is enough to tell.
    pub predicted_downtime_ms: Option<f64>,
}

/// What a handoff is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Making a link and agreeing.
    #[default]
    Connecting,
    /// Sending rounds while the guest runs.
    Rounds,
    /// The guest is paused: last round, state, commit.
    Cutover,
    /// The link broke and is being made again.
    Relinking,
    /// Decided; waiting for the peer to confirm.
    Committing,
}

/// How a handoff ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the peer.
    Moved,
    /// The guest goes on running at the source.
    #[default]
    KeptHere,
    /// Committed, not confirmed: the guest may run at the peer and is paused at the source.
    InDoubt,
}

/// The report at the end of a handoff.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The handoff's id, in hex.
    pub handoff: String,
    /// The VM's name.
    pub vm: String,
    /// The base's id, in hex.
    pub base: String,
    /// Where it went, as it was given.
    pub peer: String,
    /// The epoch of ownership that the handoff ended with.
    pub epoch: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it ended so, where it is not [`Outcome::Moved`].
    pub reason: Option<String>,
    /// From the request accepted until the source was needed for nothing more.
    pub total_ms: f64,
    /// Of that, the time until the target had taken the offer: to reach it, and for it to get ready.
    #[serde(default)]
    pub setup_ms: f64,
    /// What it took, meanwhile, to find what had changed in the guest.
    #[serde(default)]
    pub tracking_ms: f64,
    /// From the guest's last instruction at the source to its first at the target, estimated; none
    /// where the guest did not move. See [`Downtime`].
    pub downtime_ms: Option<f64>,
    /// How sure [`Report::downtime_ms`] is.
    pub downtime: Option<Downtime>,
    /// All bytes on all links of this handoff, both ways, headers included.
    pub bytes_on_link: u64,
    /// Of those, bytes sent by the source.
    pub bytes_sent: u64,
    /// Of those, bytes received by it.
    pub bytes_received: u64,
    /// Links that were made; more than one where a link broke.
    pub links: u32,
    /// When there was no link: the first few of those times, if there were many.
    #[serde(default)]
    pub outages: Vec<Outage>,
    /// How long in all there was none between the first link and the last.
    #[serde(default)]
    pub outage_ms: f64,
    /// The rate at which the link took bytes while it was kept busy, in bytes a second.
    pub link_rate_bytes_per_s: Option<f64>,
    /// Bytes sent ÷ (that rate × the time from the first round's start to the last segment sent, less
    /// outages).
    pub utilisation: Option<f64>,
    /// BLAKE3 of all RAM and disk while the guest was paused, in hex, if the handoff was audited: both
    /// sides computed it, and the target had to find the same.
    pub full_hash: Option<String>,
    /// The rounds, the one at cutover included.
    pub rounds: Vec<Round>,
    /// How it went over time: a few hundred samples at most, however long it took.
    #[serde(default)]
    pub samples: Vec<Sample>,
    /// What became of the chunks, by class, in the order in which classes are tried.
    pub classes: Vec<StageShare>,
    /// What each stage did, in the order in which chunks pass them.
    pub stages: Vec<StageShare>,
    /// How bodies were encoded, and why.
    #[serde(default)]
    pub adaptation: Option<Adaptation>,
    /// Where the downtime went.
    pub cutover: Option<Cutover>,
}

/// The downtime and its bounds.
///
/// The clocks of two machines are not compared. The source takes the time from the moment it asks
/// its VM to pause, after which the guest may still run for a little, to the peer's word that the
/// guest runs, which is sent when it does. So the whole is an upper bound, and less half a round
/// trip, the word's way back, it is the estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// The upper bound less half a round trip.
    pub estimate_ms: f64,
    /// From the start of the pause until the peer's word arrived.
    pub upper_bound_ms: f64,
    /// The round trip that was assumed.
    pub rtt_ms: f64,
    /// What the policy predicted when it decided to cut over.
    pub predicted_ms: Option<f64>,
}

impl Downtime {
    /// From the time between the start of the pause and the peer's word, and the round trip.
    pub fn measured(until_word: Duration, rtt: Duration, predicted: Option<Duration>) -> Self {
        Self {
            estimate_ms: millis(until_word.saturating_sub(rtt / 2)),
            upper_bound_ms: millis(until_word),
            rtt_ms: millis(rtt),
            predicted_ms: predicted.map(millis),
        }
    }
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 1.
    pub number: u32,
    /// When it began, counted as [`Report::total_ms`] is.
    #[serde(default)]
    pub began_ms: f64,
    /// Chunks that it had to look at.
    pub chunks: u64,
    /// Those of them that it left out after all: dirty again before their turn, or free by then.
    #[serde(default)]
    pub left_out: u64,
    /// Bytes that it put on the link.
    pub bytes: u64,
    /// From its harvest to its last segment handed over.
    pub duration_ms: f64,
    /// Chunks that were dirty again when it ended.
    pub dirty_after: u64,
    /// Of `duration_ms`, the time without a link.
    #[serde(default)]
    pub outage_ms: f64,
}

/// How a handoff stood at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When, counted as [`Report::total_ms`] is.
    pub at_ms: f64,
    /// Bytes given to all links so far, headers included.
    pub sent_bytes: u64,
    /// Of those, bytes that had reached the peer's end; zero where the transport does not measure.
    pub delivered_bytes: u64,
    /// Bytes of segments that had not; where the transport does not measure, those not applied.
    pub in_flight_bytes: u64,
    /// Chunks still to be looked at in the round.
    pub remaining_chunks: u64,
}

/// A time in which there was no link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outage {
    /// When the link was given up, counted as [`Report::total_ms`] is.
    pub began_ms: f64,
    /// From then until the peer welcomed a new one.
    pub lasted_ms: f64,
    /// Why it was given up.
    pub reason: String,
}

/// What one class of chunks or one stage took in and gave out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageShare {
    /// The class or stage.
    pub name: String,
    /// Chunks of the class; chunks that the stage was given.
    pub chunks: u64,
    /// Bytes in: for the class and for `classify` and `delta` those of the chunks, then what the
    /// stage before gave. The machine's state enters at `compress`.
    pub bytes_in: u64,
    /// Bytes out; for a class those that it takes in batches, before compression.
    pub bytes_out: u64,
    /// Seconds of CPU of the threads that did it. Those of classes add up to `classify` and `delta`,
    /// shared out by samples.
    pub cpu_s: f64,
}

/// Where the downtime went, in the order in which it happened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cutover {
    /// When it began, counted as [`Report::total_ms`] is.
    #[serde(default)]
    pub began_ms: f64,
    /// To stop vCPUs and drain devices.
    pub pause_ms: f64,
    /// To read and pack the last round.
    pub final_round_ms: f64,
    /// To save and pack the machine's state.
    pub state_ms: f64,
    /// From there until the target had verified all of it and was durable; with an early commit, until
    /// that was said behind the last segment. The last bytes on the link are in here.
    pub prepare_ms: f64,
    /// From there until the peer's word that the guest runs.
    pub commit_ms: f64,
    /// Of `prepare_ms` (of `commit_ms` with an early commit), what the target says it took from the last
    /// frame on: to verify, to make the disk and its record durable, to load the machine's state.
    #[serde(default)]
    pub peer_prepare_ms: f64,
    /// Of `commit_ms`, what the target took to make its ownership durable.
    #[serde(default)]
    pub peer_commit_ms: f64,
    /// Of `commit_ms`, what it then took to set the guest running.
    #[serde(default)]
    pub peer_resume_ms: f64,
    /// Chunks in the last round.
    pub final_chunks: u64,
    /// Bytes of the machine's state before compression.
    pub state_bytes: u64,
    /// Why the policy cut over.
    pub cut_because: String,
    /// When the source committed: `early`, behind the last segment, or `prepared`, when the target
    /// had verified it.
    #[serde(default)]
    pub commit: String,
}

/// A time as reports have it.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The classes as reports have them.
pub fn class_shares(stats: &Stats) -> Vec<StageShare> {
    stats.classes().map(|(class, share)| share_of(class.name(), share)).collect()
}

/// The stages as reports have them.
pub fn stage_shares(stats: &Stats) -> Vec<StageShare> {
    stats.stages().map(|(stage, share)| share_of(stage.name(), share)).collect()
}

fn share_of(name: &str, share: &Share) -> StageShare {
    StageShare {
        name: name.to_owned(),
        chunks: share.chunks,
        bytes_in: share.bytes_in,
        bytes_out: share.bytes_out,
        cpu_s: share.cpu_ns as f64 / 1e9,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::adapt::{ModeDecision, ModeEstimate, ModeShare};

    fn adaptation() -> Adaptation {
        let decision = ModeDecision { modes: vec![ModeEstimate::default()], ..Default::default() };
        Adaptation {
            modes: vec![ModeShare::default()],
            decisions: vec![decision],
            ..Adaptation::default()
        }
    }

    fn sample() -> Report {
        let until_word = Duration::from_millis(180);
        let downtime = Downtime::measured(until_word, Duration::from_millis(50), None);
        Report {
            handoff: "00ff".into(),
            outcome: Outcome::Moved,
            downtime_ms: Some(downtime.estimate_ms),
            downtime: Some(downtime),
            rounds: vec![Round { number: 1, chunks: 10, ..Round::default() }],
            samples: vec![Sample::default()],
            outages: vec![Outage::default()],
            classes: class_shares(&Stats::default()),
            stages: stage_shares(&Stats::default()),
            adaptation: Some(adaptation()),
            cutover: Some(Cutover::default()),
            ..Report::default()
        }
    }

    fn types(schema: &Value) -> Vec<&str> {
        match &schema["type"] {
            Value::String(one) => vec![one],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        }
    }

    /// As much of JSON Schema as the report's schema uses.
    fn check(at: &str, schema: &Value, value: &Value) {
        if let Value::Array(allowed) = &schema["enum"] {
            return assert!(allowed.contains(value), "{at}: {value} is none of {allowed:?}");
        }
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(n) if n.is_u64() => "integer",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        assert!(types(schema).contains(&kind), "{at}: {kind} is none of {:?}", types(schema));
        for (i, item) in value.as_array().into_iter().flatten().enumerate() {
            check(&format!("{at}[{i}]"), &schema["items"], item);
        }
        let Some(fields) = value.as_object() else { return };
        let mut required: Vec<_> =
            schema["required"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let mut described: Vec<_> = schema["properties"].as_object().unwrap().keys().collect();
        let mut present: Vec<_> = fields.keys().collect();
        required.sort_unstable();
        described.sort_unstable();
        present.sort_unstable();
        assert_eq!(present, described, "{at}: fields and properties");
        assert_eq!(present, required, "{at}: fields and required");
        for (name, field) in fields {
            check(&format!("{at}.{name}"), &schema["properties"][name], field);
        }
    }

    #[test]
    fn the_schema_describes_the_report() {
        let schema = serde_json::from_str(include_str!("../../docs/report.schema.json")).unwrap();
        let report = sample();
        check("report", &schema, &serde_json::to_value(&report).unwrap());
        check("report", &schema, &serde_json::to_value(Report::default()).unwrap());
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }

    #[test]
    fn downtime_is_bounded() {
        let downtime = sample().downtime.unwrap();
        assert_eq!((downtime.estimate_ms, downtime.upper_bound_ms), (155.0, 180.0));
        let odd = Downtime::measured(Duration::from_millis(10), Duration::from_secs(1), None);
        assert_eq!(odd.estimate_ms, 0.0);
    }
}
