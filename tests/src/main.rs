//! The lab: hosts with KVM, shaped links, scenarios and faults.
//!
//! `lab exec` boots a machine in which KVM works and runs one command in it; `lab run` runs
//! scenarios: two cloudlets joined by a shaped link, guests handed off between them, faults, and
//! checks of what must stay true. The same program is the machine's first process and, inside, the
//! runner of scenarios. `docs/lab.md` tells how to use it.

mod compare;
mod encode;
mod exec;
mod fault;
mod faults;
mod films;
mod inside;
mod machine;
mod paper;
mod results;
mod run;
mod scenario;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

/// Hosts with KVM, shaped links, scenarios and faults.
#[derive(Parser)]
#[command(name = "lab", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot a lab host, run a command in it as root, and return its exit status.
    Exec(exec::ExecArgs),
    /// Run scenarios in a lab host: guests handed off, faults, checks.
    Run(run::RunArgs),
    /// Try faults: a kill or a cut at every step of a handoff and at random moments.
    Faults(faults::FaultsArgs),
    /// Make the runs of the evaluation: howdah and others, over the same links.
    Paper(paper::PaperArgs),
    /// Tell what an offline encoder makes of a state: the yardstick for bytes on the link.
    Encode(encode::EncodeArgs),
    /// The part of `lab run` that is inside the lab host.
    #[command(hide = true)]
    Inside(inside::InsideArgs),
}

/// The lab itself failed, as opposed to the command it ran.
const LAB_FAILED: u8 = 125;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        inside::init::main();
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Verb::Exec(args) => exec::exec(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Faults(args) => faults::run(&args),
        Verb::Paper(args) => paper::run(&args),
        Verb::Encode(args) => encode::run(&args),
        Verb::Inside(args) => inside::main(&args),
    };
    match result {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(LAB_FAILED)),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(LAB_FAILED)
        }
    }
}

/// Prints a line at once. Whoever stopped listening is no reason to stop the lab.
fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
