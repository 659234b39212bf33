//! The workload that runs inside the minimal guest, and the tools that check it from outside.
//!
//! A handoff is right when the guest cannot tell that it moved. The agent makes that checkable:
//!
//! ```text
//!   inside the guest: howdah-agent run             outside
//!   ┌──────────────────────────────────┐
//!   │ nonce, counter     (RAM only)    │  UDP 7777  howdah-agent client: who answers, how
//!   │ pages with known content  [ram]  │ ◄────────► late, is it the same guest, did its
//!   │ clocks that must not step [clock]│            counter or its clocks step back?
//!   │ checksummed records,             │  TCP 7778  a script: load up, load down, verify
//!   │ fsynced, on disk      [records]  │ ◄────────►
//!   └──────────────────────────────────┘            howdah-agent verify FILE: is every
//!                                                   record there that the guest was promised?
//! ```
//!
//! A guest that was rebooted has another boot id; a restarted agent another nonce; a lost page
//! shows as a RAM error; a lost disk write as a gap in the records or as a last record older than
//! the agent reported durable. Nothing here knows how the guest is moved.

mod args;
mod ballast;
mod client;
mod clock;
mod commands;
mod gauge;
mod probe;
mod ram;
mod records;
mod serve;
mod setclock;
mod summary;
mod vitals;
mod workloads;

use std::io::{self, Write};
use std::process::ExitCode;

use args::Action;

fn main() -> ExitCode {
    let outcome = match args::parse(std::env::args().skip(1)) {
        Ok(Action::Help) => say(args::USAGE),
        Ok(Action::Run(options)) => serve::run(&options).map_err(Into::into),
        Ok(Action::Verify(file)) => return verify(&file),
        Ok(Action::SetClock(agent)) => setclock::run(agent).map_err(Into::into),
        Ok(Action::Client(options)) => client::run(&options).map_err(Into::into),
        Err(error) => Err(error.into()),
    };
    finish(outcome)
}

/// Prints what was found in a records file; success only if all of it is sound.
fn verify(file: &std::path::Path) -> ExitCode {
    let outcome = records::verify_file(file)
        .map_err(|source| format!("cannot read records file {}: {source}", file.display()).into())
        .and_then(|report| {
            say(&serde_json::to_string(&report)?)?;
            Ok(report.ok)
        });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => finish(Err(error)),
    }
}

fn finish(outcome: Result<(), Box<dyn std::error::Error>>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("howdah-agent: {error}");
            ExitCode::from(2)
        }
    }
}

/// One line to standard output, which for the service is the guest's console.
fn say(line: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}
