//! What can be typed after `howdah report`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Reports of handoffs, results of the lab, runs of the evaluation, in any mixture
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Where the page goes; a file that is there is replaced
    #[arg(long, default_value = "report.html", value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Write runs.csv, rounds.csv, decisions.csv and samples.csv to this directory too
    #[arg(long, value_name = "DIR")]
    pub(crate) csv: Option<PathBuf>,
}
