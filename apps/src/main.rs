//! `howdah-app`: applications for guests, and their clients outside.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use howdah_apps::{
    PORT, Progress,
    client::{self, Application, Films, Options},
    fluid, inputs,
    record::Record,
    summary::{Requests, Summary},
};
use serde::Serialize;

/// Applications for guests, and their clients outside.
#[derive(Parser)]
#[command(name = "howdah-app", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Water in a box: the server, in the guest.
    #[command(subcommand)]
    Fluid(FluidVerb),
    /// Ask an application until told to stop (SIGTERM, SIGINT), and sum up.
    Client(ClientArgs),
    /// What a handoff did to the requests of a client.
    Summarize(SummarizeArgs),
    /// Compute the fluid of a client's requests once more and compare every frame.
    Check {
        /// What the client wrote.
        file: PathBuf,
    },
    /// Write what an application knows beforehand, or the requests that its client would send.
    Inputs(InputsArgs),
}

#[derive(Subcommand)]
enum FluidVerb {
    /// Serve until killed.
    Serve {
        /// Where to listen.
        #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)))]
        listen: SocketAddr,
        /// Keep the number of answered requests in this file.
        #[arg(long, value_name = "FILE")]
        progress: Option<PathBuf>,
    },
}

#[derive(Args)]
struct ClientArgs {
    /// fluid, faces, ar, detect or desktop.
    #[arg(long)]
    application: Application,
    /// Where the guest is: an address, with a port if not the application's own.
    #[arg(long, value_name = "IP[:PORT]")]
    address: String,
    /// Requests due in a second; 0: the next one as soon as one is answered.
    #[arg(long, default_value_t = 0.0)]
    rate_hz: f64,
    /// Requests that may be unanswered at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    outstanding: u16,
    /// What the requests follow from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop by itself after this time.
    #[arg(long, value_name = "N")]
    duration_s: Option<f64>,
    /// Stop by itself after so many requests.
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// How long the server may take to be there.
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    connect_s: f64,
    /// How long to wait at the end for what is outstanding.
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    grace_s: f64,
    /// A line of JSON for each request goes there.
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
}

#[derive(Args)]
struct SummarizeArgs {
    /// What the client wrote.
    file: PathBuf,
    /// When the handoff was asked for, by CLOCK_MONOTONIC.
    #[arg(long)]
    from_ns: i64,
    /// When it was over.
    #[arg(long)]
    to_ns: i64,
}

#[derive(Args)]
struct InputsArgs {
    /// faces, ar or detect.
    #[arg(long)]
    application: Application,
    /// Directory to write to; made if it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the requests follow from. What the application knows does not depend on it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write so many requests instead of what the application knows beforehand.
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("howdah-app: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Fluid(FluidVerb::Serve { listen, progress }) => {
            let progress = progress.as_deref().map(Progress::new);
            fluid::Server::bind(listen, progress)?.run()
        }
        Verb::Client(args) => client(&args),
        Verb::Summarize(args) => {
            if args.from_ns > args.to_ns {
                bail!("--from-ns {} is after --to-ns {}", args.from_ns, args.to_ns);
            }
            let Record { exchanges, reconnects, .. } = Record::read(&args.file)?;
            say(&Requests::around(&exchanges, reconnects, args.from_ns, args.to_ns))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Check { file } => {
            let Films { compared, different, first_different } =
                Films::compare(&Record::read(&file)?)?;
            say(&serde_json::json!({
                "compared": compared, "different": different, "first_different": first_different,
            }))?;
            Ok(if different == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Verb::Inputs(args) => write_inputs(&args),
    }
}

fn client(args: &ClientArgs) -> Result<ExitCode> {
    let seconds = |name: &str, value: f64| {
        Duration::try_from_secs_f64(value).with_context(|| format!("--{name} {value}: no time"))
    };
    if !(0.0..=10_000.0).contains(&args.rate_hz) {
        bail!("--rate-hz {}: use 0 (as fast as answers come) to 10000", args.rate_hz);
    }
    let options = Options {
        application: args.application,
        address: address(&args.address, args.application)?,
        seed: args.seed,
        rate_hz: args.rate_hz,
        outstanding: args.outstanding.into(),
        duration: args.duration_s.map(|value| seconds("duration-s", value)).transpose()?,
        requests: args.requests,
        connect_within: seconds("connect-s", args.connect_s)?,
        grace: seconds("grace-s", args.grace_s)?,
        jsonl: args.jsonl.clone(),
    };
    let summary: Summary = client::run(&options)?;
    say(&summary)?;
    Ok(ExitCode::SUCCESS)
}

fn address(text: &str, application: Application) -> Result<SocketAddr> {
    let alone = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, application.port()));
    alone.or_else(|_| text.parse()).with_context(|| {
        format!("--address {text}: an IP address, with or without :PORT, was expected")
    })
}

fn write_inputs(args: &InputsArgs) -> Result<ExitCode> {
    let files = match args.requests {
        Some(count) => inputs::requests(args.application, args.seed, count),
        None => inputs::known(args.application),
    };
    let files = files.with_context(|| format!("no inputs for {}", args.application))?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    for (name, bytes) in files {
        let path = args.out.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line of JSON to standard output.
fn say(value: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}
