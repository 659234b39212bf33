//! Which faults are tried: at every named step, and at moments drawn from a seed.

use std::str::FromStr;

use anyhow::{Result, bail};
use handoff::step::{self, Step};

use super::{Case, Hit, Moment};
use crate::scenario::Side;

/// The link's rate where nothing speaks against it: a handoff is over within seconds.
pub(super) const RATE_MBPS: u32 = 50;
/// Slow enough that a handoff can be given up in the middle.
const SLOW_MBPS: u32 = 2;
/// How long what was cut or killed at a step stays so: less than a paused guest waits for a link.
const BACK_AFTER_MS: u64 = 2000;
/// Longer than that, and than the silence after which a link is given up.
const LONG_MS: u64 = 14_000;
/// Random moments lie within so much of the time that a handoff takes.
const PERMILLE: u64 = 1200;
/// Moments relative to a step lie within so long after it.
const AFTER_STEP_MS: u64 = 80;

/// Steps of a handoff that goes well. Rounds after the first depend on what the guest does.
const STEPS: [Step; 31] = [
    Step::BegunDurable,
    Step::HelloSent,
    Step::HelloGot,
    Step::Reserved,
    Step::OfferDurable,
    Step::WelcomeSent,
    Step::WelcomeGot,
    Step::RoundSegment(1),
    Step::RoundApplied(1),
    Step::RoundSegment(2),
    Step::RoundApplied(2),
    Step::Paused,
    Step::StateSaved,
    Step::StateSegment,
    Step::PrepareSent,
    Step::PrepareGot,
    Step::Verified,
    Step::PreparedDurable,
    Step::PreparedSent,
    Step::PreparedGot,
    Step::CommittedDurable,
    Step::CommitSent,
    Step::CommitGot,
    Step::OwnerDurable,
    Step::Running,
    Step::ResumedSent,
    Step::ResumedGot,
    Step::ReleasedDurable,
    Step::ReleasedSent,
    Step::ReleasedGot,
    Step::SettledDurable,
];

/// Those of them that there are only where the commit waits for the target.
const COMMIT_WAITS: [Step; 3] = [Step::PreparedDurable, Step::PreparedSent, Step::PreparedGot];

/// Steps of a handoff that the user gives up.
const CANCELLED: [Step; 3] = [Step::RunsOn, Step::KeptDurable, Step::AbortSent];

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// All random moments follow from it.
    pub(crate) seed: u64,
    /// How many random moments.
    pub(crate) random: u32,
    /// Only cases whose names begin with one of these; all when empty.
    pub(crate) only: Vec<String>,
    /// How howdah is to commit in every case; its own way when absent.
    pub(crate) commit: Option<String>,
}

/// The cases, in the order in which they run.
pub(crate) fn cases(choice: &Choice) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (steps, cancelled) in [(&STEPS[..], false), (&CANCELLED[..], true)] {
        for step in steps {
            cases.extend(at_step(*step, cancelled));
        }
    }
    cases.extend((1..=choice.random).map(|number| random(choice.seed, number)));
    for case in &mut cases {
        case.commit = case.commit.take().or_else(|| choice.commit.clone());
    }
    for prefix in &choice.only {
        if !cases.iter().any(|case| case.name.starts_with(prefix)) {
            bail!("no case is called {prefix}: --list shows them");
        }
    }
    let wanted = |case: &Case| choice.only.iter().any(|prefix| case.name.starts_with(prefix));
    cases.retain(|case| choice.only.is_empty() || wanted(case));
    Ok(cases)
}

/// At one step: its own process is killed, the other's, or the link is cut.
fn at_step(step: Step, cancelled: bool) -> [Case; 3] {
    let side = side_of(step);
    let moment = Moment::Step { step: step.to_string(), side, then_ms: 0 };
    let case = |what: &str, hit: Hit| Case {
        name: format!("{step}-{what}"),
        moment: moment.clone(),
        hits: vec![hit],
        back_after_ms: BACK_AFTER_MS,
        rate_mbps: if cancelled { SLOW_MBPS } else { RATE_MBPS },
        cancelled,
        commit: COMMIT_WAITS.contains(&step).then(|| "prepared".to_owned()),
    };
    [
        case("kill-source", Hit::KillProcess(Side::A)),
        case("kill-target", Hit::KillProcess(Side::B)),
        case("cut", Hit::CutLink),
    ]
}

/// The guest leaves A.
fn side_of(step: Step) -> Side {
    match step.side() {
        step::Side::Source => Side::A,
        step::Side::Target => Side::B,
    }
}

/// A case that follows from seed and number alone, so that it can be run again without the others.
fn random(seed: u64, number: u32) -> Case {
    let mut dice = Dice::new(seed, number);
    let mut waits = false;
    let moment = if dice.below(5) < 3 {
        Moment::Part { permille: dice.below(PERMILLE) }
    } else {
        let step = STEPS[dice.below(STEPS.len() as u64) as usize];
        let then_ms = 1 + dice.below(AFTER_STEP_MS);
        waits = COMMIT_WAITS.contains(&step);
        Moment::Step { step: step.to_string(), side: side_of(step), then_ms }
    };
    let hits = match dice.below(9) {
        0 => vec![Hit::KillProcess(Side::A)],
        1 => vec![Hit::KillProcess(Side::B)],
        2 => vec![Hit::KillCloudlet(Side::A)],
        3 => vec![Hit::KillCloudlet(Side::B)],
        4 => vec![Hit::KillProcess(Side::A), Hit::KillProcess(Side::B)],
        5 => vec![Hit::CutLink, Hit::KillProcess(Side::A)],
        6 => vec![Hit::CutLink, Hit::KillProcess(Side::B)],
        _ => vec![Hit::CutLink],
    };
    let long = dice.below(10) == 0;
    let back_after_ms = if long { LONG_MS } else { dice.below(4000) };
    Case {
        name: format!("random-{number:03}"),
        moment,
        hits,
        back_after_ms,
        rate_mbps: RATE_MBPS,
        cancelled: false,
        commit: (waits || dice.below(4) == 0).then(|| "prepared".to_owned()),
    }
}

/// SplitMix64: small, and the same everywhere for ever.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, number: u32) -> Self {
        let mut dice = Self(seed ^ u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        dice.roll();
        dice
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end.max(1)
    }
}

/// A seed as it is printed and given: hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        u64::from_str_radix(text.trim_start_matches("0x"), 16)
            .map(Self)
            .map_err(|_| format!("{text:?} is no hexadecimal number of at most 16 digits"))
    }
}

impl std::fmt::Display for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(seed: u64) -> Vec<Case> {
        cases(&Choice { seed, random: 200, ..Choice::default() }).unwrap()
    }

    #[test]
    fn a_seed_gives_the_same_cases_and_another_does_not() {
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
        let names: std::collections::HashSet<String> =
            all(7).into_iter().map(|case| case.name).collect();
        assert_eq!(names.len(), all(7).len());
    }

    #[test]
    fn a_case_can_be_run_alone() {
        let only = vec!["random-117".to_owned()];
        let alone = cases(&Choice { seed: 7, random: 200, only, ..Choice::default() }).unwrap();
        let among = all(7).into_iter().find(|case| case.name == "random-117");
        assert_eq!(alone.first(), among.as_ref());
        assert_eq!(alone.len(), 1);
        let only = vec!["nonsense".to_owned()];
        assert!(cases(&Choice { only, ..Choice::default() }).is_err());
    }

    /// Steps that a handoff reaches only after the target failed.
    const ELSEWHERE: [Step; 3] = [Step::DeclinedGot, Step::DeclinedDurable, Step::DeclinedSent];

    #[test]
    fn every_step_is_covered() {
        for step in Step::PLAIN.iter().filter(|step| !ELSEWHERE.contains(step)) {
            for what in ["kill-source", "kill-target", "cut"] {
                let name = format!("{step}-{what}");
                assert!(all(1).iter().any(|case| case.name == name), "{name}");
            }
        }
    }

    #[test]
    fn seeds_are_read_as_they_are_printed() {
        assert_eq!(Seed(0xbeef).to_string().parse(), Ok(Seed(0xbeef)));
        assert_eq!("0xff".parse(), Ok(Seed(255)));
        assert!("seven".parse::<Seed>().is_err());
    }
}
