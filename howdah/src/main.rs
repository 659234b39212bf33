//! howdah: agile VM handoff between cloudlets.
//!
//! ```text
//! howdah vm run A ──────► process of A ◄── control.sock ── howdah handoff A peer:port
//!                              │ link
//! howdah receive ─ accepts ─► process of A at the peer (a child that outlives the listener)
//! ```
//!
//! One process runs one VM (ADR 0007). Commands talk to it through a Unix socket in the VM's
//! directory. Errors are one line that names the thing and the way out.

use std::process::ExitCode;

use clap::Parser;

use crate::{
    cli::{Cli, Command, OverlayCommand},
    cloudlet::Cloudlet,
    home::Home,
    output::Output,
    spawn::Ready,
    vmproc::Front,
};

mod about;
mod bases;
mod cgroup;
mod cli;
mod cloudlet;
mod commands;
mod config;
mod console;
mod control;
mod disk;
mod doctor;
mod failure;
mod home;
mod jail;
mod lock;
mod logging;
mod mac;
mod net;
mod offer;
mod ops;
mod output;
mod partial;
mod peers;
mod receive;
mod serve;
mod spawn;
mod steps;
mod visit;
mod vmproc;

fn main() -> ExitCode {
    handoff::heap::give_back_large_blocks();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    let output = Output::new(cli.json).quietly(cli.quiet);
    logging::start(cli.verbose, cli.log_format, cli.command.is_confined());
    match run(cli, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failure = failure::describe(&error);
            output.failure(&failure);
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(cli: Cli, output: Output) -> anyhow::Result<()> {
    let home = Home::new(&cli.home)?;
    let elsewhere = cli.elsewhere()?.map(str::to_owned);
    let cloudlet = || Cloudlet::meant(&home, elsewhere.as_deref());
    match cli.command {
        Command::Base(command) => commands::base::run(command, &cloudlet()?, output),
        Command::Vm(command) => commands::vm::run(command, &cloudlet()?, output, cli.verbose),
        Command::Network(command) => commands::network::run(command, &home, output),
        Command::Peer(command) => commands::peer::run(command, &cloudlet()?, output),
        Command::Identity => commands::peer::show_identity(&cloudlet()?, output),
        Command::Handoff(args) => commands::handoff::run(args, &cloudlet()?, output),
        Command::Serve(args) => serve::run(&args, &home, output, cli.verbose),
        Command::Config(command) => config::run(command, &home, output),
        Command::Receive(args) => receive::listen(args, &home, output, cli.verbose),
        Command::Save(args) => commands::save::run(args, &home, output),
        Command::Restore(args) => commands::restore::run(&args, &home, output, cli.verbose),
        Command::Recover(args) => commands::recover::run(&args, &home, output),
        Command::Overlay(OverlayCommand::Inspect { file }) => {
            commands::overlay::inspect(&file, output)
        }
        Command::Trace(command) => commands::trace::run(command, &home, output),
        Command::Report(args) => commands::report::run(&args, output),
        Command::Doctor => doctor::run(&home, output),
        Command::Completion { shell } => commands::generate::completion(shell),
        Command::Man { dir } => commands::generate::man(&dir, output),
        Command::RestoreProcess(args) => telling_the_starter(
            commands::restore::run_here(&args, &home, Front::Detached).map(drop),
        ),
        Command::VmProcess(args) => {
            let dir = home.existing(&args.name)?;
            telling_the_starter(vmproc::run(&dir, &home, Front::Detached, &args.jail).map(|_| ()))
        }
        Command::ReceiveProcess(args) => telling_the_starter(receive::run_child(&args, &home)),
    }
}

/// A process in the background says on stdout why it failed; its starter shows it. Once it was
/// ready, that goes nowhere, and the log has it.
fn telling_the_starter(ended: anyhow::Result<()>) -> anyhow::Result<()> {
    if let Err(error) = &ended {
        spawn::say(&Ready::Failed(failure::describe(error)));
    }
    ended
}

fn wrong_usage(error: &clap::Error) -> ExitCode {
    if cli::is_help(error) {
        // Help that nobody reads (a closed pipe) is no failure.
        let _ = error.print();
        return ExitCode::from(error.exit_code().try_into().unwrap_or(2));
    }
    let json = std::env::args_os().any(|word| word == "--json");
    let failure = cli::usage_failure(error);
    Output::new(json).failure(&failure);
    ExitCode::from(failure.exit as u8)
}
