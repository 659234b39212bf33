//! Brings a guest's clock in step with this machine's, so that later offsets mean something.
//!
//! Until a guest kernel has switched to kvmclock it counts timer ticks; where the CPU is emulated
//! many are lost, and the guest starts life seconds late. That is not the handoff's doing, so it
//! is put right before one is watched.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use crate::clock::Reading;
use crate::commands;
use crate::probe::{Answer, MAX_ANSWER_BYTES};

/// Probes of one measurement; the fastest answer says most.
const PROBES: u32 = 20;
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the clock was not set.
#[derive(Debug, Error)]
pub(crate) enum SetClockError {
    #[error("cannot talk to the agent at {agent}: {source}")]
    Io { agent: SocketAddr, source: io::Error },
    #[error("no agent answers at {agent}: is the guest up, and its network?")]
    Silent { agent: SocketAddr },
    #[error("the agent at {agent} did not step its clock: {reason}")]
    Refused { agent: SocketAddr, reason: String },
    #[error("cannot print the result: {0}")]
    Print(#[source] Box<dyn std::error::Error>),
}

/// The guest's clock against ours, good to half of `rtt_ns`.
#[derive(Debug, Clone, Copy)]
struct Offset {
    ns: i64,
    rtt_ns: i64,
}

/// Measures, steps and measures again; prints both.
pub(crate) fn run(agent: SocketAddr) -> Result<(), SetClockError> {
    let io = |source| SetClockError::Io { agent, source };
    let silent = || SetClockError::Silent { agent };
    let before = measure(agent).map_err(io)?.ok_or_else(silent)?;
    let answer = step(agent, before.ns.saturating_neg()).map_err(io)?;
    if answer["ok"] != json!(true) {
        return Err(SetClockError::Refused { agent, reason: answer.to_string() });
    }
    let after = measure(agent).map_err(io)?.ok_or_else(silent)?;
    let ms = |ns: i64| ns as f64 / 1e6;
    let result = json!({
        "offset_before_ms": ms(before.ns),
        "offset_after_ms": ms(after.ns),
        "rtt_ms": ms(after.rtt_ns),
    });
    crate::say(&result.to_string()).map_err(SetClockError::Print)
}

fn measure(agent: SocketAddr) -> io::Result<Option<Offset>> {
    let any = match agent.ip() {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(agent)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let offsets = (0..PROBES).filter_map(|number| ask(&socket, number));
    Ok(offsets.min_by_key(|offset| offset.rtt_ns))
}

/// One probe; None if the answer is missing, late or not to this probe.
fn ask(socket: &UdpSocket, number: u32) -> Option<Offset> {
    let sent = Reading::now();
    let token = [sent.realtime_ns.to_be_bytes(), u64::from(number).to_be_bytes()].concat();
    socket.send(&token).ok()?;
    let mut line = [0; MAX_ANSWER_BYTES];
    let length = socket.recv(&mut line).ok()?;
    let rtt_ns = Reading::now().monotonic_ns - sent.monotonic_ns;
    let answer: Answer = serde_json::from_slice(line.get(..length)?).ok()?;
    let middle_ns = sent.realtime_ns.saturating_add(rtt_ns / 2);
    let ns = answer.vitals.realtime_ns.saturating_sub(middle_ns);
    (answer.token == hex::encode(token)).then_some(Offset { ns, rtt_ns })
}

fn step(agent: SocketAddr, by_ns: i64) -> io::Result<Value> {
    let port = SocketAddr::new(agent.ip(), commands::PORT);
    let mut stream = TcpStream::connect_timeout(&port, COMMAND_TIMEOUT)?;
    stream.set_read_timeout(Some(COMMAND_TIMEOUT))?;
    stream.write_all(format!("step-clock {by_ns}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
