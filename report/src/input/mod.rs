//! Files into runs: what is in them, whether it can be, and what to say where it cannot.

mod lab;
mod tame;

use handoff::report::Report;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use crate::run::{PAPER_RUN_FORMAT, PaperRun, Run, Scenario};

/// A longer file is no report.
pub const MAX_FILE_BYTES: usize = 64 << 20;
/// Documents that one file may hold.
const MAX_DOCUMENTS: usize = 10_000;

/// A file that cannot be shown.
#[derive(Debug, Error)]
#[error("{file}: {problem}")]
pub struct InputError {
    /// Its name, as it was given.
    pub file: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a file.
#[derive(Debug, Error)]
pub enum Problem {
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// It is too long.
    #[error("it has {bytes} bytes, and a report at most {MAX_FILE_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It ends too early: a file that was still being written, or was cut off.
    #[error("it is cut off after line {line}, in document {document}")]
    CutOff {
        /// Where it ends.
        line: usize,
        /// Which of its documents, from 1.
        document: usize,
    },
    /// It is no JSON.
    #[error("document {document} is no JSON: {why}")]
    Json {
        /// Which of its documents, from 1.
        document: usize,
        /// What the parser says, with line and column.
        why: serde_json::Error,
    },
    /// It has too many documents.
    #[error("it has more than {MAX_DOCUMENTS} documents")]
    TooMany,
    /// It is JSON, and something else.
    #[error(
        "document {document} is no handoff's report, no result of the lab and no run of the evaluation"
    )]
    Unknown {
        /// Which of its documents, from 1.
        document: usize,
    },
    /// It is a run of the evaluation in a version that is not known here.
    #[error(
        "document {document} has format {found:?}, and this program knows {PAPER_RUN_FORMAT:?}"
    )]
    Version {
        /// Which of its documents, from 1.
        document: usize,
        /// What it says.
        found: String,
    },
    /// A handoff failed before it had anything to report.
    #[error("document {document} is a failure without a report: {why}")]
    NoReport {
        /// Which of its documents, from 1.
        document: usize,
        /// What it says.
        why: String,
    },
    /// A field is missing, or of another type.
    #[error("document {document}, at {at}: {why}")]
    Field {
        /// Which of its documents, from 1.
        document: usize,
        /// Where in it.
        at: String,
        /// What is wrong.
        why: String,
    },
}

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) runs: Vec<Run>,
    pub(crate) scenarios: Vec<Scenario>,
}

/// Reads a file's content.
pub(crate) fn read(name: &str, content: &[u8]) -> Result<Found, InputError> {
    let name = tame::text(name);
    let mut found = Found::default();
    let result = read_documents(&name, content, &mut found);
    result.map(|()| found).map_err(|problem| InputError { file: name, problem })
}

fn read_documents(name: &str, content: &[u8], found: &mut Found) -> Result<(), Problem> {
    if content.len() > MAX_FILE_BYTES {
        return Err(Problem::TooLong { bytes: content.len() });
    }
    let documents = serde_json::Deserializer::from_slice(content).into_iter::<Value>();
    let mut read = 0;
    for value in documents {
        read += 1;
        if read > MAX_DOCUMENTS {
            return Err(Problem::TooMany);
        }
        let value = value.map_err(|why| match why.is_eof() {
            true => Problem::CutOff { line: why.line(), document: read },
            false => Problem::Json { document: read, why },
        })?;
        Document { name, number: read }.take(value, found)?;
    }
    if read == 0 { Err(Problem::Empty) } else { Ok(()) }
}

fn field(document: usize, at: String, why: impl ToString) -> Problem {
    Problem::Field { document, at, why: why.to_string() }
}

/// One document of a file.
#[derive(Clone, Copy)]
struct Document<'a> {
    name: &'a str,
    number: usize,
}

impl Document<'_> {
    /// Finds out what the document is. A list is as good as its elements, but a list of lists is
    /// nothing.
    fn take(self, value: Value, found: &mut Found) -> Result<(), Problem> {
        match value {
            Value::Array(items) if items.len() > MAX_DOCUMENTS => Err(Problem::TooMany),
            Value::Array(items) if !items.is_empty() => {
                items.into_iter().try_for_each(|item| self.take_one(item, found))
            }
            other => self.take_one(other, found),
        }
    }

    fn take_one(self, mut value: Value, found: &mut Found) -> Result<(), Problem> {
        // What is not shown need not be sound: a peer's own figures, a clock's difference.
        tame::prune(&mut value);
        tame::value(&mut value).map_err(|e| field(self.number, e.at, e.why))?;
        let has = |key: &str| value.get(key).is_some_and(|value| !value.is_null());
        if let Some(format) = value.get("format").and_then(Value::as_str) {
            if format != PAPER_RUN_FORMAT {
                let found = format.to_owned();
                return Err(Problem::Version { document: self.number, found });
            }
            // Of a handoff that failed early, there is its error only.
            if value.pointer("/report/rounds").is_none() {
                value["report"] = Value::Null;
            }
            let run: PaperRun = self.typed(value)?;
            found.runs.push(Run::of_paper(self.name, run));
        } else if has("handoff") && has("rounds") && has("outcome") {
            let report: Report = self.typed(value)?;
            found.runs.push(Run::of_report(self.name, report));
        } else if has("legs") && has("checks") {
            lab::take(self, value, found)?;
        } else if has("error") {
            self.failed(value, found)?;
        } else {
            return Err(Problem::Unknown { document: self.number });
        }
        Ok(())
    }

    /// What `howdah --json handoff` says of a handoff that failed.
    fn failed(self, mut value: Value, found: &mut Found) -> Result<(), Problem> {
        match value.get_mut("report").map(Value::take) {
            Some(report @ Value::Object(_)) => {
                let report: Report = self.typed(report)?;
                found.runs.push(Run::of_report(self.name, report));
                Ok(())
            }
            _ => {
                let said = value.pointer("/error/message").and_then(Value::as_str);
                let why = said.unwrap_or("it says no more").to_owned();
                Err(Problem::NoReport { document: self.number, why })
            }
        }
    }

    fn typed<T: DeserializeOwned>(self, value: Value) -> Result<T, Problem> {
        serde_path_to_error::deserialize(value).map_err(|e| {
            let at = e.path().to_string();
            field(self.number, at, e.into_inner())
        })
    }
}

#[cfg(test)]
mod tests;
