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
    counter: u64,
    durable_seq: u64,
}

/// The guest's lives: one, and one more each time it lost its RAM.
#[derive(Debug, PartialEq)]
pub(super) struct Lives {
    /// How many.
    pub(super) count: usize,
    /// The last record that any of them called durable.
    pub(super) promised: u64,
    /// The first answer that cannot be, if there is one.
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
        let mut lives: Vec<Answer> = Vec::new();
        let mut broken = None;
        let mut promised = 0;
        for line in text.lines().filter(|line| !line.contains("\"summary\"")) {
            let Line { answer } =
                serde_json::from_str(line).with_context(|| format!("no answer: {line}"))?;
            promised = promised.max(answer.durable_seq);
            let same =
                |life: &Answer| (&life.boot_id, &life.nonce) == (&answer.boot_id, &answer.nonce);
            match lives.iter().position(same) {
                Some(at) if at + 1 < lives.len() => {
                    let why = format!("life {} answered after life {}", at + 1, lives.len());
                    broken.get_or_insert(why);
                }
                Some(at) => {
                    let went_back = |life: &Answer| {
                        life.counter > answer.counter || life.durable_seq > answer.durable_seq
                    };
                    if lives.get(at).is_some_and(went_back) {
                        let why = format!("life {}: counter or records went back", at + 1);
                        broken.get_or_insert(why);
                    }
                    lives.truncate(at);
                    lives.push(answer);
                }
                None => {
                    // A guest that boots finds on its disk what an earlier life was promised.
                    let last = lives.last().map_or(0, |life| life.durable_seq);
                    if answer.durable_seq > 0 && answer.durable_seq < last {
                        let why = format!(
                            "a new life began at record {}, before {last}",
                            answer.durable_seq
                        );
                        broken.get_or_insert(why);
                    }
                    lives.push(answer);
                }
            }
        }
        Ok(Self { count: lives.len(), promised, broken })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lives(answers: &[(&str, u64, u64)]) -> Lives {
        let lines = answers.iter().map(|(boot, counter, durable)| {
            format!(
                "{{\"answer\":{{\"boot_id\":\"{boot}\",\"nonce\":\"n\",\"counter\":{counter},\
                 \"durable_seq\":{durable}}}}}\n"
            )
        });
        let text = lines.collect::<String>() + "{\"summary\":{}}\n";
        Lives::of(&text).unwrap()
    }

    #[test]
    fn one_life_after_the_other_is_sound() {
        let one = lives(&[("x", 1, 1), ("x", 2, 1), ("x", 2, 2)]);
        assert_eq!(one, Lives { count: 1, promised: 2, broken: None });
        let two = lives(&[("x", 5, 7), ("y", 1, 0), ("y", 2, 8)]);
        assert_eq!(two, Lives { count: 2, promised: 8, broken: None });
    }

    #[test]
    fn a_life_that_comes_back_or_goes_back_is_found() {
        assert!(lives(&[("x", 5, 7), ("y", 1, 7), ("x", 6, 7)]).broken.is_some());
        assert!(lives(&[("x", 5, 7), ("x", 4, 7)]).broken.is_some());
        assert!(lives(&[("x", 5, 7), ("x", 6, 6)]).broken.is_some());
        assert!(lives(&[("x", 5, 7), ("y", 1, 6)]).broken.is_some());
    }
}
