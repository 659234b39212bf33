//! What the client's answers say of the guest's lives: one after the other, and none that comes back.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;

/// One line of the client's file.
#[derive(Deserialize)]
struct Line {
    answer: Answer,
}

/// What an answer says of who gave it.
#[derive(Deserialize)]
struct Answer {
    boot_id: String,
    nonce: String,
    /// The guest's own time: a network may bring answers in another order than they were given.
    monotonic_ns: i64,
    counter: u64,
    durable_seq: u64,
}

impl Answer {
    /// Who gave it.
    fn life(&self) -> (&str, &str) {
        (&self.boot_id, &self.nonce)
    }
}

/// The guest's lives: one, and one more each time it lost its RAM.
#[derive(Debug, PartialEq)]
pub(super) struct Lives {
    /// How many.
    pub(super) count: usize,
    /// The last record that any of them called durable.
    pub(super) promised: u64,
    /// The first thing that cannot be, if there is one.
    pub(super) broken: Option<String>,
}

impl Lives {
    /// Reads the client's file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::of(&text)
    }

    fn of(text: &str) -> Result<Self> {
        let mut lives: Vec<Vec<Answer>> = Vec::new();
        let mut broken = None;
        for line in text.lines().filter(|line| !line.contains("\"summary\"")) {
            let Line { answer } =
                serde_json::from_str(line).with_context(|| format!("no answer: {line}"))?;
            let same = |life: &Vec<Answer>| life.first().map(Answer::life) == Some(answer.life());
            let known = lives.iter().position(same);
            let newest = lives.len();
            match known.and_then(|at| lives.get_mut(at).map(|life| (at, life))) {
                Some((at, life)) => {
                    if at + 1 < newest {
                        let why = format!("life {} answered after life {newest} had", at + 1);
                        broken.get_or_insert(why);
                    }
                    life.push(answer);
                }
                None => lives.push(vec![answer]),
            }
        }
        let mut promised = 0;
        for (at, life) in lives.iter_mut().enumerate() {
            life.sort_by_key(|answer| answer.monotonic_ns);
            // A guest that boots finds on its disk what an earlier life was promised; at first it has
            // not looked.
            let first = life.iter().map(|answer| answer.durable_seq).find(|seq| *seq > 0);
            if let Some(first) = first.filter(|first| *first < promised) {
                let why = format!("life {} began at record {first}, before {promised}", at + 1);
                broken.get_or_insert(why);
            }
            for pair in life.windows(2) {
                let [before, after] = pair else { continue };
                if before.counter > after.counter || before.durable_seq > after.durable_seq {
                    let why = format!(
                        "life {}: counter {} then {}, record {} then {}",
                        at + 1,
                        before.counter,
                        after.counter,
                        before.durable_seq,
                        after.durable_seq
                    );
                    broken.get_or_insert(why);
                }
            }
            let last = life.iter().map(|answer| answer.durable_seq).max().unwrap_or(0);
            promised = promised.max(last);
        }
        Ok(Self { count: lives.len(), promised, broken })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lives(answers: &[(&str, i64, u64, u64)]) -> Lives {
        let lines = answers.iter().map(|(boot, at, counter, durable)| {
            format!(
                "{{\"answer\":{{\"boot_id\":\"{boot}\",\"nonce\":\"n\",\"monotonic_ns\":{at},\
                 \"counter\":{counter},\"durable_seq\":{durable}}}}}\n"
            )
        });
        let text = lines.collect::<String>() + "{\"summary\":{}}\n";
        Lives::of(&text).unwrap()
    }

    #[test]
    fn one_life_after_the_other_is_sound() {
        let one = lives(&[("x", 1, 1, 1), ("x", 2, 2, 1), ("x", 3, 2, 2)]);
        assert_eq!(one, Lives { count: 1, promised: 2, broken: None });
        let two = lives(&[("x", 9, 5, 7), ("y", 1, 1, 0), ("y", 2, 2, 8)]);
        assert_eq!(two, Lives { count: 2, promised: 8, broken: None });
    }

    #[test]
    fn answers_that_overtake_each_other_are_no_step_back() {
        assert_eq!(lives(&[("x", 2, 6, 7), ("x", 1, 5, 6)]).broken, None);
    }

    #[test]
    fn a_life_that_comes_back_or_goes_back_is_found() {
        assert!(lives(&[("x", 1, 5, 7), ("y", 1, 1, 7), ("x", 2, 6, 7)]).broken.is_some());
        assert!(lives(&[("x", 1, 5, 7), ("x", 2, 4, 7)]).broken.is_some());
        assert!(lives(&[("x", 1, 5, 7), ("x", 2, 6, 6)]).broken.is_some());
        assert!(lives(&[("x", 1, 5, 7), ("y", 1, 1, 6)]).broken.is_some());
    }
}
