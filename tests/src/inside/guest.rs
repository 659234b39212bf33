//! The guest as seen from outside: its agent's answers, and the client that watches it throughout.

use std::{
    error, fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    net::{CLIENT, GUEST},
    product::{HOLDERS, processes_of},
};
use crate::scenario::Side;

/// Where the lab puts the agent.
pub(crate) const AGENT: &str = "/usr/local/bin/howdah-agent";
/// Where the agent takes commands.
const COMMAND_PORT: u16 = 7778;
/// How long one command may take: filling or verifying much RAM in an emulated guest is slow.
const ANSWER: Duration = Duration::from_secs(240);
/// How often it is looked whether there still is a VM that can answer.
const LOOK: Duration = Duration::from_secs(2);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a guest that cannot be reached is tried. One that is busy on an emulated CPU can be silent
/// for seconds; how long it was is the client's to say, and has bounds of its own.
const REACHED: Duration = Duration::from_secs(20);
/// How long the client may take to sum up.
const SUMMARY: Duration = Duration::from_secs(20);

/// The agent's vital signs that checks look at.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Vitals {
    /// The kernel's boot id.
    pub(crate) boot_id: String,
    /// Held only in RAM.
    pub(crate) nonce: String,
    /// Grows at every tick.
    pub(crate) counter: u64,
    /// The last record that fsync returned for.
    pub(crate) durable_seq: u64,
    /// Steps backward of either clock, seen by the guest itself.
    pub(crate) clock_violations: u64,
    /// Records that could not be written.
    pub(crate) write_errors: u64,
    /// Pages found with the wrong content.
    pub(crate) ram_errors: u64,
}

/// The agent took no connection.
#[derive(Debug)]
pub(crate) struct Unreachable(io::Error);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest's agent cannot be reached: {}", self.0)
    }
}

impl error::Error for Unreachable {}

/// Tells the agent something and returns its answer. A guest that cannot be reached is tried for a
/// while; one that has taken the command is not told twice.
pub(crate) fn ask(command: &str) -> Result<Value> {
    let started = Instant::now();
    loop {
        match ask_once(command) {
            Err(error) if error.is::<Unreachable>() && started.elapsed() < REACHED => {
                thread::sleep(Duration::from_millis(100));
            }
            result => return result,
        }
    }
}

/// Tells the agent something and returns its answer, if it can be reached now.
pub(crate) fn ask_once(command: &str) -> Result<Value> {
    let line = CLIENT.within(|| {
        let address = SocketAddr::from((GUEST, COMMAND_PORT));
        let mut stream = TcpStream::connect_timeout(&address, CONNECT).map_err(Unreachable)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        read_answer(&mut BufReader::new(stream))
    })?;
    let answer: Value = serde_json::from_str(&line)
        .with_context(|| format!("the agent answered {command:?} with {line:?}"))?;
    if answer.get("ok").and_then(Value::as_bool) == Some(false) {
        bail!("the agent answered {command:?} with {}", line.trim());
    }
    Ok(answer)
}

/// Waits for a line as long as a VM is there that may still say it.
fn read_answer(stream: &mut impl BufRead) -> Result<String> {
    let asked = Instant::now();
    let mut line = Vec::new();
    loop {
        match stream.read_until(b'\n', &mut line) {
            Ok(_) => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && asked.elapsed() < ANSWER => {
                if !any_vm()? {
                    bail!("the guest's agent does not answer: its VM has ended");
                }
            }
            Err(error) => return Err(error).context("the guest's agent does not answer"),
        }
    }
}

/// Whether there is a VM's process on either cloudlet.
pub(crate) fn any_vm() -> Result<bool> {
    let here = |side| processes_of(side, &HOLDERS).map(|found| !found.is_empty());
    Ok(here(Side::A)? || here(Side::B)?)
}

/// The agent's vital signs now.
pub(crate) fn vitals() -> Result<Vitals> {
    serde_json::from_value(ask("status")?).context("the agent's status lacks something")
}

fn vitals_once() -> Result<Vitals> {
    serde_json::from_value(ask_once("status")?).context("the agent's status lacks something")
}

/// Waits until the agent answers.
pub(crate) fn wait_ready(limit: Duration) -> Result<Vitals> {
    let started = Instant::now();
    loop {
        match vitals_once() {
            Ok(vitals) => return Ok(vitals),
            Err(error) if started.elapsed() > limit => {
                return Err(error).with_context(|| {
                    format!("the guest was not ready after {} s", limit.as_secs())
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Gives a guest that goes on from a base's memory a nonce of its own; its first vital signs.
pub(crate) fn renew() -> Result<Vitals> {
    ask("renew")?;
    vitals()
}

/// Puts right what a slow boot did to the guest's clock, so that a handoff is not blamed for it.
pub(crate) fn set_clock() -> Result<()> {
    let output = CLIENT
        .command(Path::new(AGENT))?
        .args(["set-clock", &GUEST.to_string()])
        .output()
        .context("cannot run the agent")?;
    if !output.status.success() {
        bail!("cannot set the guest's clock: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The client, probing.
pub(crate) struct Client {
    child: Child,
    answers: PathBuf,
}

/// What the client found, all in all.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Summary {
    /// Probes sent.
    pub(crate) asked: u64,
    /// Answers.
    pub(crate) answered: u64,
    /// Second answers to one probe.
    pub(crate) duplicates: u64,
    /// The boot id never changed.
    pub(crate) boot_id_constant: bool,
    /// The nonce never changed.
    pub(crate) nonce_constant: bool,
    /// Counter, durable record and clocks never went back.
    pub(crate) counter_monotonic: bool,
    /// The worst difference of the guest's clock to ours, by estimate.
    pub(crate) worst_offset_ms: f64,
    /// The part of it that network delay cannot explain.
    pub(crate) certain_offset_ms: f64,
    /// The newest answer.
    pub(crate) last: Option<Vitals>,
}

/// One answer, as far as gaps need it.
#[derive(Deserialize)]
struct Line {
    sent_monotonic_ns: i64,
    rtt_ns: i64,
}

/// The client's findings.
pub(crate) struct Watched {
    /// All in all.
    pub(crate) summary: Summary,
    /// When each answer came, by CLOCK_MONOTONIC, in order.
    received_ns: Vec<i64>,
}

impl Client {
    /// Starts probing the guest.
    pub(crate) fn start(interval_ms: u32, logs: &Path) -> Result<Self> {
        let answers = logs.join("client.jsonl");
        // Not straight to /out: that is a 9p mount, and each line would wait for it.
        let answers_live = Path::new("/run/client.jsonl");
        let log = File::create(logs.join("client.log"))?;
        let mut command = CLIENT.command(Path::new(AGENT))?;
        command
            .args(["client", &GUEST.to_string(), "--interval-ms", &interval_ms.to_string()])
            .arg("--out")
            .arg(answers_live)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().context("cannot run the client")?;
        Ok(Self { child, answers })
    }

    /// Stops probing and sums up.
    pub(crate) fn stop(mut self) -> Result<Watched> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)
            .context("the client ended by itself")?;
        let started = Instant::now();
        while self.child.try_wait()?.is_none() {
            if started.elapsed() > SUMMARY {
                let _ = self.child.kill();
                bail!("the client did not sum up");
            }
            thread::sleep(Duration::from_millis(10));
        }
        let text = fs::read_to_string("/run/client.jsonl").context("the client left no answers")?;
        fs::write(&self.answers, &text)
            .with_context(|| format!("cannot write {}", self.answers.display()))?;
        Watched::read(&text)
    }
}

impl Watched {
    fn read(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Last {
            summary: Summary,
        }
        let mut lines: Vec<&str> = text.lines().collect();
        let last = lines.pop().context("the client wrote nothing")?;
        let summary =
            serde_json::from_str::<Last>(last).context("the client did not sum up")?.summary;
        let mut received_ns = Vec::with_capacity(lines.len());
        for line in lines {
            let line: Line = serde_json::from_str(line).context("the client wrote no answer")?;
            received_ns.push(line.sent_monotonic_ns + line.rtt_ns);
        }
        received_ns.sort_unstable();
        Ok(Self { summary, received_ns })
    }

    /// From a moment of CLOCK_MONOTONIC until the next answer, in milliseconds.
    pub(crate) fn first_after_ms(&self, from_ns: i64) -> Option<f64> {
        let next = self.received_ns.iter().find(|received| **received >= from_ns)?;
        Some((next - from_ns) as f64 / 1e6)
    }

    /// The longest silence, in milliseconds, that touches a stretch of CLOCK_MONOTONIC.
    pub(crate) fn longest_gap_ms(&self, from_ns: i64, to_ns: i64) -> f64 {
        let gaps = self.received_ns.windows(2).filter_map(|pair| match pair {
            [before, after] if *after >= from_ns && *before <= to_ns => Some(after - before),
            _ => None,
        });
        gaps.max().unwrap_or(0) as f64 / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_those_of_the_handoff() {
        let text = [(0, 1), (10, 1), (900, 2), (905, 1), (2000, 3)]
            .map(|(sent, rtt)| format!("{{\"sent_monotonic_ns\":{sent},\"rtt_ns\":{rtt}}}\n"))
            .concat();
        let received_ns = text
            .lines()
            .map(|line| serde_json::from_str::<Line>(line).unwrap())
            .map(|line| (line.sent_monotonic_ns + line.rtt_ns) * 1_000_000)
            .collect();
        let summary = Summary {
            asked: 5,
            answered: 5,
            duplicates: 0,
            boot_id_constant: true,
            nonce_constant: true,
            counter_monotonic: true,
            worst_offset_ms: 0.0,
            certain_offset_ms: 0.0,
            last: None,
        };
        let watched = Watched { summary, received_ns };
        assert_eq!(watched.longest_gap_ms(500_000_000, 950_000_000), 1097.0);
        assert_eq!(watched.longest_gap_ms(500_000_000, 600_000_000), 891.0);
        assert_eq!(watched.longest_gap_ms(0, 5_000_000), 10.0);
        assert_eq!(watched.first_after_ms(500_000_000), Some(402.0));
        assert_eq!(watched.first_after_ms(5_000_000_000), None);
    }
}
