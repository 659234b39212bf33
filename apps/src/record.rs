//! What a client writes down: a line of JSON for each thing that happened.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{client::Application, summary::Summary};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// What the client was told to do. The first line.
    Run(Run),
    /// A connection is there.
    Connected(Moment),
    /// A connection is gone; what was outstanding is lost.
    Broken(Moment),
    /// A request whose fate is known.
    Request(Exchange),
    /// All in all. The last line.
    Summary(Summary),
}

/// What a client was told to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The application.
    pub application: Application,
    /// What its requests follow from.
    pub seed: u64,
    /// Requests due in a second; 0 for as many as are answered.
    pub rate_hz: f64,
    /// How many may be unanswered.
    pub outstanding: usize,
}

/// Something at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// When, by CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// Which connection it is about, counted from 1.
    pub connection: u32,
    /// What there is to say.
    pub detail: String,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Answered.
    Answered,
    /// The application said that it could not answer, or nobody can read what it said.
    Failed,
    /// Sent, and never answered: its connection broke, or the client was told to end.
    Lost,
}

/// A request and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exchange {
    /// Its number.
    pub seq: u64,
    /// The connection it went over, counted from 1.
    pub connection: u32,
    /// When it was handed to the system, by CLOCK_MONOTONIC.
    pub sent_monotonic_ns: i64,
    /// When its answer was complete.
    pub answered_monotonic_ns: Option<i64>,
    /// What became of it.
    pub fate: Fate,
    /// Its size on the connection.
    pub request_bytes: u64,
    /// The answer's.
    pub answer_bytes: u64,
    /// Whether the answer is the one that the client's own knowledge of its request calls for.
    pub right: Option<bool>,
    /// What the answer tells of the application's state, to be looked at later.
    pub mark: Option<String>,
    /// Why it failed.
    pub problem: Option<String>,
}

impl Exchange {
    /// From sending to the answer.
    pub fn latency_ms(&self) -> Option<f64> {
        let answered = self.answered_monotonic_ns?;
        Some((answered - self.sent_monotonic_ns) as f64 / 1e6)
    }
}

/// Why a client's lines cannot be read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file.
    #[error("cannot read the requests in {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line in it.
    #[error("{} line {number}: {source}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, counted from 1.
        number: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It does not begin with what the client was told.
    #[error("{} does not begin with a \"run\" line: it is not from howdah-app client", path.display())]
    NoRun {
        /// Which file.
        path: PathBuf,
    },
}

/// A client's lines, read back.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What the client was told to do.
    pub run: Run,
    /// Its requests, in the order in which their fates were known.
    pub exchanges: Vec<Exchange>,
    /// Connections after the first.
    pub reconnects: u32,
    /// Its own summary; none if it was killed.
    pub summary: Option<Summary>,
}

impl Record {
    /// Reads a file of lines. A last line that was cut off is left out: the client may have been
    /// killed while it wrote.
    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let failed = |source| RecordError::Read { path: path.to_owned(), source };
        let no_run = || RecordError::NoRun { path: path.to_owned() };
        let mut lines = BufReader::new(File::open(path).map_err(failed)?).lines().enumerate();
        let (_, first) = lines.next().ok_or_else(no_run)?;
        let Ok(Line::Run(run)) = serde_json::from_str(&first.map_err(failed)?) else {
            return Err(no_run());
        };
        let mut record = Self { run, exchanges: Vec::new(), reconnects: 0, summary: None };
        while let Some((at, line)) = lines.next() {
            match serde_json::from_str(&line.map_err(failed)?) {
                Ok(Line::Request(exchange)) => record.exchanges.push(exchange),
                Ok(Line::Connected(moment)) => {
                    record.reconnects = moment.connection.saturating_sub(1);
                }
                Ok(Line::Summary(summary)) => record.summary = Some(summary),
                Ok(Line::Run(_) | Line::Broken(_)) => {}
                Err(error) if error.is_eof() && lines.next().is_none() => break,
                Err(source) => {
                    return Err(RecordError::Line {
                        path: path.to_owned(),
                        number: at + 1,
                        source,
                    });
                }
            }
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{"run":{"application":"fluid","seed":1,"rate_hz":2.0,"outstanding":1}}"#;
    const LOST: &str = r#"{"request":{"seq":0,"connection":1,"sent_monotonic_ns":5,"answered_monotonic_ns":null,"fate":"lost","request_bytes":33,"answer_bytes":0,"right":null,"mark":null,"problem":null}}"#;

    fn read(text: &str) -> Result<Record, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Record::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_client_that_was_killed_leaves_what_it_knew() {
        let record = read(&format!("{RUN}\n{LOST}\n{{\"request\":{{\"se")).unwrap();
        assert_eq!((record.exchanges.len(), record.summary), (1, None));
        assert_eq!(record.exchanges[0].fate, Fate::Lost);
    }

    #[test]
    fn what_is_no_record_is_refused_by_name_and_line() {
        assert!(read("").unwrap_err().contains("does not begin"));
        assert!(read("{}\n").unwrap_err().contains("does not begin"));
        let error = read(&format!("{RUN}\n{LOST}\n{{}}\n{LOST}\n")).unwrap_err();
        assert!(error.contains("line 3"), "{error}");
    }
}
