//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::probe;
use crate::ram::{Load, MAX_DIRTY_PER_S};
use crate::records::MAX_RATE;

/// What `--help` prints.
pub(crate) const USAGE: &str = "\
howdah-agent: a guest workload that shows whether the guest was moved without harm

  howdah-agent run [--data DIR] [--tick-ms N] [--write-rate N] [--dirty PAGES_PER_S,MIB[,RANDOM[,CHANGED]]]
      the service inside the guest: probes on UDP 7777, commands on TCP 7778
  howdah-agent client ADDR [--interval-ms N] [--duration-s N] [--out FILE]
      probes the agent at ADDR (port 7777 unless given) until stopped by SIGTERM or SIGINT;
      a line of JSON per answer goes to FILE, a summary to FILE and to standard output
  howdah-agent set-clock ADDR
      brings the clock of the guest at ADDR in step with this machine's; prints how far it was off
  howdah-agent verify FILE
      checks a records file; prints what it holds; exit 0 only if all of it is sound";

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Help,
    Run(RunOptions),
    Client(ClientOptions),
    SetClock(SocketAddr),
    Verify(PathBuf),
}

/// How the service runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RunOptions {
    /// Directory of the records file.
    pub(crate) data: PathBuf,
    /// Time between two increments of the counter.
    pub(crate) tick: Duration,
    /// Records appended a second; 0 for none.
    pub(crate) write_rate: u32,
    /// RAM held from the start.
    pub(crate) load: Load,
}

impl Default for RunOptions {
    fn default() -> Self {
        let random_percent = Load::DEFAULT_RANDOM_PERCENT;
        let changed_percent = Load::DEFAULT_CHANGED_PERCENT;
        Self {
            data: PathBuf::from("/data"),
            tick: Duration::from_millis(10),
            write_rate: 1,
            load: Load { pages_per_s: 0, mib: 0, random_percent, changed_percent },
        }
    }
}

/// How the client probes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ClientOptions {
    pub(crate) agent: SocketAddr,
    /// Time between two probes.
    pub(crate) interval: Duration,
    /// Stops by itself after this long.
    pub(crate) duration: Option<Duration>,
    /// Where the answers go.
    pub(crate) out: Option<PathBuf>,
}

/// What is wrong with the command line.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("{0}: see howdah-agent --help")]
    Usage(String),
    #[error("{option} needs a value: see howdah-agent --help")]
    NoValue { option: String },
    #[error("{option} does not take '{value}': {expected}")]
    BadValue { option: String, value: String, expected: &'static str },
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Action, ArgsError> {
    let mut args = Args(args);
    match args.0.next().as_deref() {
        None | Some("help" | "--help" | "-h") => Ok(Action::Help),
        Some("run") => parse_run(args).map(Action::Run),
        Some("client") => parse_client(args).map(Action::Client),
        Some("set-clock") => match (args.0.next(), args.0.next()) {
            (Some(address), None) => parse_address("set-clock", &address).map(Action::SetClock),
            _ => Err(ArgsError::Usage("set-clock takes one address".into())),
        },
        Some("verify") => match (args.0.next(), args.0.next()) {
            (Some(file), None) => Ok(Action::Verify(file.into())),
            _ => Err(ArgsError::Usage("verify takes one file".into())),
        },
        Some(other) => Err(ArgsError::Usage(format!("unknown command '{other}'"))),
    }
}

fn parse_run(mut args: Args<impl Iterator<Item = String>>) -> Result<RunOptions, ArgsError> {
    let mut options = RunOptions::default();
    while let Some(option) = args.0.next() {
        match option.as_str() {
            "--data" => options.data = args.value(&option)?.into(),
            "--tick-ms" => {
                options.tick = Duration::from_millis(args.number(&option, 60_000)?.max(1));
            }
            "--write-rate" => options.write_rate = args.number(&option, MAX_RATE)?,
            "--dirty" => options.load = parse_load(&option, &args.value(&option)?)?,
            _ => return Err(ArgsError::Usage(format!("run takes no '{option}'"))),
        }
    }
    Ok(options)
}

fn parse_load(option: &str, value: &str) -> Result<Load, ArgsError> {
    let bad = || ArgsError::BadValue {
        option: option.to_owned(),
        value: value.to_owned(),
        expected: "expected PAGES_PER_S,MIB[,RANDOM_PERCENT[,CHANGED_PERCENT]]",
    };
    let numbers: Result<Vec<u32>, _> = value.split(',').map(str::parse).collect();
    let numbers = numbers.map_err(|_| bad())?;
    let percent = |number: Option<&u32>, default: u8| {
        let percent = number.map_or(Some(default), |&n| u8::try_from(n).ok());
        percent.filter(|percent| *percent <= 100).ok_or_else(bad)
    };
    match *numbers.as_slice() {
        [pages_per_s, mib, ref percents @ ..]
            if percents.len() <= 2 && pages_per_s <= MAX_DIRTY_PER_S =>
        {
            Ok(Load {
                pages_per_s,
                mib,
                random_percent: percent(percents.first(), Load::DEFAULT_RANDOM_PERCENT)?,
                changed_percent: percent(percents.get(1), Load::DEFAULT_CHANGED_PERCENT)?,
            })
        }
        _ => Err(bad()),
    }
}

fn parse_client(mut args: Args<impl Iterator<Item = String>>) -> Result<ClientOptions, ArgsError> {
    let mut agent = None;
    let mut options = ClientOptions {
        agent: SocketAddr::from(([127, 0, 0, 1], probe::PORT)),
        interval: Duration::from_millis(10),
        duration: None,
        out: None,
    };
    while let Some(option) = args.0.next() {
        match option.as_str() {
            "--interval-ms" => {
                options.interval = Duration::from_millis(args.number(&option, 60_000)?.max(1));
            }
            "--duration-s" => {
                options.duration = Some(Duration::from_secs(args.number(&option, 1_000_000)?));
            }
            "--out" => options.out = Some(args.value(&option)?.into()),
            address if agent.is_none() && !address.starts_with('-') => {
                agent = Some(parse_address("client", address)?);
            }
            _ => return Err(ArgsError::Usage(format!("client takes no '{option}'"))),
        }
    }
    options.agent = agent.ok_or_else(|| ArgsError::Usage("client needs an address".into()))?;
    Ok(options)
}

fn parse_address(command: &str, value: &str) -> Result<SocketAddr, ArgsError> {
    let with_port = value.parse::<SocketAddr>();
    let bare = || value.parse().map(|ip| SocketAddr::new(ip, probe::PORT));
    with_port.or_else(|_| bare()).map_err(|_| ArgsError::BadValue {
        option: command.to_owned(),
        value: value.to_owned(),
        expected: "expected an IP address, with or without a port",
    })
}

struct Args<I>(I);

impl<I: Iterator<Item = String>> Args<I> {
    fn value(&mut self, option: &str) -> Result<String, ArgsError> {
        self.0.next().ok_or_else(|| ArgsError::NoValue { option: option.to_owned() })
    }

    fn number<N: FromStr + PartialOrd>(&mut self, option: &str, max: N) -> Result<N, ArgsError> {
        let value = self.value(option)?;
        value.parse().ok().filter(|n| *n <= max).ok_or(ArgsError::BadValue {
            option: option.to_owned(),
            value,
            expected: "expected a number in its range",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Action, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn commands_parse() {
        assert_eq!(parse_words(""), Ok(Action::Help));
        assert_eq!(parse_words("run"), Ok(Action::Run(RunOptions::default())));
        assert_eq!(parse_words("verify x"), Ok(Action::Verify("x".into())));
        let run = parse_words("run --data /d --tick-ms 1 --write-rate 50 --dirty 200,20,100,10");
        assert_eq!(
            run,
            Ok(Action::Run(RunOptions {
                data: "/d".into(),
                tick: Duration::from_millis(1),
                write_rate: 50,
                load: Load { pages_per_s: 200, mib: 20, random_percent: 100, changed_percent: 10 },
            }))
        );
        let Ok(Action::Client(client)) = parse_words("client 10.99.0.2 --interval-ms 20") else {
            panic!("client did not parse");
        };
        assert_eq!(client.agent, "10.99.0.2:7777".parse().unwrap());
        assert_eq!(client.interval, Duration::from_millis(20));
    }

    #[test]
    fn wrong_ones_are_refused() {
        for line in [
            "fly",
            "run fast",
            "run --data",
            "run --write-rate 10001",
            "run --dirty 1",
            "run --dirty 1,2,101",
            "run --dirty 1,2,3,256",
            "run --dirty 1,2,3,4,5",
            "client",
            "client example.org",
            "client 1.2.3.4 5.6.7.8",
            "verify",
            "set-clock",
            "set-clock host",
            "verify a b",
        ] {
            assert!(parse_words(line).is_err(), "{line}");
        }
    }
}
