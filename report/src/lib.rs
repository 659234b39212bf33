//! What handoffs say of themselves, for people: one page, and tables for their own plots.
//!
//! ```text
//! report.json ─┐                                     ┌─ page ── one HTML file, SVG inside, no script
//! lab results ─┼─ input ── Run, Scenario ── tables ──┤
//! paper runs ──┘  (tamed: bounded, no odd text)      └─ csv ─── runs, rounds, decisions
//! ```
//!
//! Files come from anywhere. `input` is where they are doubted: what it returns has no number that is
//! negative or absurd, no list too long to draw, and no character that could mislead a reader. All
//! markup is made by `maud`, which escapes every value. The page allows itself no script, no font and
//! no request (its Content-Security-Policy says so), so it can be mailed and archived.
//!
//! The same files give the same page: there is no time of making in it.

mod chart;
mod csv;
mod input;
mod page;
mod run;
mod stats;
mod units;

pub use crate::{
    csv::{CsvError, CsvFile},
    input::{InputError, MAX_FILE_BYTES, Problem},
    run::{Application, HostFacts, Link, LinkChange, PAPER_RUN_FORMAT, PaperRun, Requests},
};

/// Everything that was read, in the order in which it was given.
#[derive(Debug, Default)]
pub struct Evidence {
    runs: Vec<run::Run>,
    scenarios: Vec<run::Scenario>,
    files: usize,
}

impl Evidence {
    /// Reads one file's content; `name` is what errors and the page call it.
    ///
    /// A file holds one or more JSON documents, each a handoff's report, the lab's results or a run of
    /// the evaluation, or a list of these.
    pub fn read(&mut self, name: &str, content: &[u8]) -> Result<(), InputError> {
        let found = input::read(name, content)?;
        self.runs.extend(found.runs);
        self.scenarios.extend(found.scenarios);
        self.files += 1;
        Ok(())
    }

    /// How many handoffs and migrations there are.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The page.
    pub fn html(&self) -> String {
        page::page(self).into_string()
    }

    /// The tables: one row a run, a round, a decision.
    pub fn csv(&self) -> Result<Vec<CsvFile>, CsvError> {
        csv::files(self)
    }
}
