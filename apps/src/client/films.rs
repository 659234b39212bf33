//! The fluid, looked at once more: was every frame the one that its readings give?

use std::collections::BTreeMap;

use thiserror::Error;

use crate::{
    client::Application,
    fluid::Water,
    inputs::readings::reading,
    record::{Fate, Record},
};

/// How many frames were computed again, and how many were different.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Films {
    /// Frames that were compared.
    pub compared: u64,
    /// Those that are not what their readings give.
    pub different: u64,
    /// The first of them.
    pub first_different: Option<u64>,
}

/// Why frames cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FilmsError {
    /// Another application.
    #[error("{0} has no frames that could be computed again: only fluid has")]
    NotFluid(Application),
    /// A mark that no client writes.
    #[error("request {seq} has the mark {mark:?}: FRAME:DIGEST was expected")]
    Mark {
        /// The request.
        seq: u64,
        /// Its mark.
        mark: String,
    },
}

impl Films {
    /// Computes the film of each connection again. What was sent on a connection was answered in
    /// that order, so frame by frame both must be the same; a request that was lost may or may not have moved the
    /// water, so a film ends there.
    pub fn compare(record: &Record) -> Result<Self, FilmsError> {
        if record.run.application != Application::Fluid {
            return Err(FilmsError::NotFluid(record.run.application));
        }
        let mut films: BTreeMap<u32, BTreeMap<u64, Option<&str>>> = BTreeMap::new();
        for one in &record.exchanges {
            let mark = one.mark.as_deref().filter(|_| one.fate == Fate::Answered);
            films.entry(one.connection).or_default().insert(one.seq, mark);
        }
        let mut found = Self { compared: 0, different: 0, first_different: None };
        for film in films.values() {
            let mut water = Water::default();
            for (seq, mark) in film {
                let Some(mark) = mark else { break };
                let picture = water.frame(reading(record.run.seed, *seq));
                found.compared += 1;
                let (frame, digest) = read_mark(*seq, mark)?;
                if (frame, digest) != (picture.frame, hex::encode(picture.digest).as_str()) {
                    found.different += 1;
                    found.first_different.get_or_insert(*seq);
                }
            }
        }
        Ok(found)
    }
}

fn read_mark(seq: u64, mark: &str) -> Result<(u64, &str), FilmsError> {
    let parts = mark.split_once(':').and_then(|(frame, rest)| Some((frame.parse().ok()?, rest)));
    parts.ok_or_else(|| FilmsError::Mark { seq, mark: mark.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Exchange, Run};

    fn record(marks: &[(u32, u64, Option<String>)]) -> Record {
        let exchange = |(connection, seq, mark): &(u32, u64, Option<String>)| Exchange {
            seq: *seq,
            connection: *connection,
            sent_monotonic_ns: 0,
            answered_monotonic_ns: Some(1),
            fate: if mark.is_some() { Fate::Answered } else { Fate::Lost },
            request_bytes: 0,
            answer_bytes: 0,
            right: None,
            mark: mark.clone(),
            problem: None,
        };
        let run = Run { application: Application::Fluid, seed: 9, rate_hz: 1.0, outstanding: 1 };
        let exchanges = marks.iter().map(exchange).collect();
        Record { run, exchanges, reconnects: 0, summary: None }
    }

    fn marks(connection: u32, seqs: std::ops::Range<u64>) -> Vec<(u32, u64, Option<String>)> {
        let mut water = Water::default();
        let mark = |seq| {
            let picture = water.frame(reading(9, seq));
            (connection, seq, Some(format!("{}:{}", picture.frame, hex::encode(picture.digest))))
        };
        seqs.map(mark).collect()
    }

    #[test]
    fn a_film_goes_on_until_a_request_was_lost() {
        let mut all = marks(1, 0..4);
        all.push((1, 4, None));
        all.push((1, 5, Some("6:what came then is not known".into())));
        all.extend(marks(2, 6..8));
        let films = Films::compare(&record(&all)).unwrap();
        assert_eq!(films, Films { compared: 6, different: 0, first_different: None });
    }

    #[test]
    fn water_that_went_back_or_was_damaged_is_noticed() {
        let mut all = marks(1, 0..5);
        all[3].2 = all[2].2.clone();
        let films = Films::compare(&record(&all)).unwrap();
        assert_eq!(films, Films { compared: 5, different: 1, first_different: Some(3) });
        all[1].2 = Some("?".into());
        assert!(Films::compare(&record(&all)).unwrap_err().to_string().contains("request 1"));
    }
}
