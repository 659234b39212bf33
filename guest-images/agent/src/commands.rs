//! The command port: one line in, one line of JSON out.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command as Process;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use crate::ballast::MAX_FILE_MIB;
use crate::gauge::{MAX_SPEED_MIB, MAX_SPEED_MS};
use crate::ram::{Load, MAX_DIRTY_PER_S};
use crate::records::{self, MAX_RATE};
use crate::serve::Agent;
use crate::workloads::{Name, NameError};

/// The port that takes commands.
pub(crate) const PORT: u16 = 7778;

const MAX_LINE_BYTES: u64 = 256;
const MAX_CONNECTIONS: usize = 8;
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// What the agent can be told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    /// `status`: the vital signs.
    Status,
    /// `write on RATE`, `write off`: records appended a second.
    Write(u32),
    /// `dirty PAGES_PER_S MIB [RANDOM_PERCENT [CHANGED_PERCENT]]`, `fill MIB [RANDOM_PERCENT]`: RAM
    /// held, and how it changes.
    Load(Load),
    /// `free`: give the RAM back.
    Free,
    /// `renew`: draw a new nonce.
    Renew,
    /// `file MIB`, `file off`: a file of random bytes, there or gone.
    File(u32),
    /// `trim`: tell the disk which blocks of the data's file system are free.
    Trim,
    /// `start NAME`: start a workload of the image.
    Start(Name),
    /// `progress NAME`: how far it is.
    Progress(Name),
    /// `speed MIB MS`: how fast RAM is read and written.
    Speed { mib: u32, ms: u32 },
    /// `step-clock NS`: move the guest's CLOCK_REALTIME by so much.
    StepClock(i64),
    /// `sync`: flush every file system.
    Sync,
    /// `verify-records`: read all records back and check them.
    VerifyRecords,
    /// `verify-ram`: check every page now.
    VerifyRam,
    /// `poweroff`: shut the guest down.
    PowerOff,
}

/// Why a line is no command.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum CommandError {
    #[error(
        "unknown command '{0}': use status, write on RATE, write off, \
         dirty PAGES_PER_S MIB [RANDOM_PERCENT [CHANGED_PERCENT]], fill MIB [RANDOM_PERCENT], \
         free, renew, file MIB, file off, trim, start NAME, progress NAME, speed MIB MS, \
         step-clock NS, sync, verify-records, verify-ram or poweroff"
    )]
    Unknown(String),
    #[error("{what} must be a number from 0 to {max}, not '{got}'")]
    Number { what: &'static str, max: u32, got: String },
    #[error("the clock cannot be stepped by '{0}' nanoseconds")]
    Step(String),
    #[error(transparent)]
    Name(#[from] NameError),
}

impl FromStr for Command {
    type Err = CommandError;

    fn from_str(line: &str) -> Result<Self, CommandError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let load = |rate: &str, mib: &str, percents: &[&str]| {
            let percent = |at: usize, default: u8| match percents.get(at) {
                Some(text) => number("percent", text, 100).map(|n| u8::try_from(n).unwrap_or(100)),
                None => Ok(default),
            };
            Ok(Self::Load(Load {
                pages_per_s: number("pages a second", rate, MAX_DIRTY_PER_S)?,
                mib: number("MiB", mib, u32::MAX)?,
                random_percent: percent(0, Load::DEFAULT_RANDOM_PERCENT)?,
                changed_percent: percent(1, Load::DEFAULT_CHANGED_PERCENT)?,
            }))
        };
        match *words.as_slice() {
            ["status"] => Ok(Self::Status),
            ["write", "off"] => Ok(Self::Write(0)),
            ["write", "on", rate] => Ok(Self::Write(number("records a second", rate, MAX_RATE)?)),
            ["dirty", rate, mib, ref percents @ ..] if percents.len() <= 2 => {
                load(rate, mib, percents)
            }
            ["fill", mib, ref percents @ ..] if percents.len() <= 1 => load("0", mib, percents),
            ["free"] => Ok(Self::Free),
            ["renew"] => Ok(Self::Renew),
            ["file", "off"] => Ok(Self::File(0)),
            ["file", mib] => Ok(Self::File(number("MiB", mib, MAX_FILE_MIB)?)),
            ["trim"] => Ok(Self::Trim),
            ["start", name] => Ok(Self::Start(name.parse()?)),
            ["progress", name] => Ok(Self::Progress(name.parse()?)),
            ["speed", mib, ms] => Ok(Self::Speed {
                mib: number("MiB", mib, MAX_SPEED_MIB)?,
                ms: number("milliseconds", ms, MAX_SPEED_MS)?,
            }),
            ["step-clock", ns] => {
                ns.parse().map(Self::StepClock).map_err(|_| CommandError::Step(ns.to_owned()))
            }
            ["sync"] => Ok(Self::Sync),
            ["verify-records"] => Ok(Self::VerifyRecords),
            ["verify-ram"] => Ok(Self::VerifyRam),
            ["poweroff"] => Ok(Self::PowerOff),
            _ => Err(CommandError::Unknown(line.trim().to_owned())),
        }
    }
}

fn number(what: &'static str, got: &str, max: u32) -> Result<u32, CommandError> {
    let error = || CommandError::Number { what, max, got: got.to_owned() };
    got.parse().ok().filter(|n| *n <= max).ok_or_else(error)
}

impl Command {
    /// Does it; the answer is what the asker gets to see.
    fn obey(self, agent: &Agent) -> Result<Value, Box<dyn std::error::Error>> {
        let vitals = &agent.vitals;
        match self {
            Self::Status => return Ok(serde_json::to_value(vitals.snapshot())?),
            Self::Write(rate) => agent.throttle.set(rate),
            Self::Load(load) => agent.ram.set(load, vitals)?,
            Self::Free => agent.ram.free(vitals),
            Self::Renew => vitals.renew_nonce()?,
            Self::File(mib) => agent.ballast.set(mib)?,
            Self::Trim => {
                return Ok(json!({ "ok": true, "bytes": agent.ballast.trim()? }));
            }
            Self::Start(name) => agent.workloads.start(&name)?,
            Self::Progress(name) => {
                return Ok(json!({ "ok": true, "count": agent.workloads.progress(&name)? }));
            }
            Self::Speed { mib, ms } => {
                let speed = agent.gauge.measure(mib, Duration::from_millis(ms.into()))?;
                return Ok(json!({
                    "ok": true,
                    "write_mib_per_s": speed.write_mib_per_s,
                    "read_mib_per_s": speed.read_mib_per_s,
                }));
            }
            Self::StepClock(by_ns) => vitals.clock.step(by_ns)?,
            Self::Sync => nix::unistd::sync(),
            Self::VerifyRecords => {
                return Ok(serde_json::to_value(records::verify_file(&agent.records_path)?)?);
            }
            Self::VerifyRam => {
                let (pages, wrong) = agent.ram.verify_all(vitals);
                return Ok(json!({ "ok": wrong == 0, "pages": pages, "wrong": wrong }));
            }
            Self::PowerOff => {
                nix::unistd::sync();
                Process::new("poweroff").spawn()?;
            }
        }
        Ok(json!({ "ok": true }))
    }
}

/// Takes commands for as long as the agent lives.
pub(crate) fn serve(listener: &TcpListener, agent: &Arc<Agent>) -> ! {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of files or memory: let connections end before trying again.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if open.load(Ordering::Acquire) >= MAX_CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::AcqRel);
        let (agent, slot) = (Arc::clone(agent), Slot(Arc::clone(&open)));
        // If no thread can be had, the closure is dropped, and with it the slot and the stream.
        let _ = std::thread::Builder::new().name("command".into()).spawn(move || {
            let _slot = slot;
            // A connection that breaks off concerns only whoever held it.
            let _ = converse(&stream, &agent);
        });
    }
}

/// A place among the open connections, given back when dropped.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn converse(mut stream: &TcpStream, agent: &Agent) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
    stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let length = lines.by_ref().take(MAX_LINE_BYTES).read_line(&mut line)? as u64;
        if length == 0 || (length == MAX_LINE_BYTES && !line.ends_with('\n')) {
            return Ok(());
        }
        let answer = line
            .parse::<Command>()
            .map_err(Into::into)
            .and_then(|command| command.obey(agent))
            .unwrap_or_else(|error| json!({ "ok": false, "error": error.to_string() }));
        stream.write_all(format!("{answer}\n").as_bytes())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_parse() {
        let load = |pages_per_s, mib, random_percent, changed_percent| {
            Ok(Command::Load(Load { pages_per_s, mib, random_percent, changed_percent }))
        };
        assert_eq!("status\r\n".parse(), Ok(Command::Status));
        assert_eq!("write on 50".parse(), Ok(Command::Write(50)));
        assert_eq!("write off".parse(), Ok(Command::Write(0)));
        assert_eq!("step-clock -5".parse(), Ok(Command::StepClock(-5)));
        assert_eq!("dirty 200 20".parse::<Command>(), load(200, 20, 25, 100));
        assert_eq!("dirty 200 20 80".parse::<Command>(), load(200, 20, 80, 100));
        assert_eq!("dirty 200 20 80 10".parse::<Command>(), load(200, 20, 80, 10));
        assert_eq!(" fill  64 ".parse::<Command>(), load(0, 64, 25, 100));
        assert_eq!("fill 300 100".parse::<Command>(), load(0, 300, 100, 100));
        assert_eq!("file off".parse(), Ok(Command::File(0)));
        assert_eq!("file 300".parse(), Ok(Command::File(300)));
        assert_eq!("speed 64 500".parse(), Ok(Command::Speed { mib: 64, ms: 500 }));
        let started = "start detector".parse::<Command>();
        assert!(matches!(started, Ok(Command::Start(_))), "{started:?}");
    }

    #[test]
    fn anything_else_is_told_what_is_wrong() {
        for line in ["", "status now", "write on", "dirty 1", "dirty 1 2 3 4 5", "trim /", "reboot"]
        {
            assert!(matches!(line.parse::<Command>(), Err(CommandError::Unknown(_))), "{line}");
        }
        assert_eq!("step-clock x".parse::<Command>(), Err(CommandError::Step("x".into())));
        assert!(matches!("start ../sh".parse::<Command>(), Err(CommandError::Name(_))));
        for line in ["write on -1", "write on 10001", "dirty x 1", "dirty 1 1 101"] {
            assert!(matches!(line.parse::<Command>(), Err(CommandError::Number { .. })), "{line}");
        }
    }
}
