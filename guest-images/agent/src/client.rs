//! The client outside: asks the agent all the time and notes every answer.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, LineWriter, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::args::ClientOptions;
use crate::clock::{Reading, monotonic_ns};
use crate::probe::{Answer, MAX_ANSWER_BYTES};
use crate::summary::Summary;

/// Probes that may be unanswered at once; an answer to an older one is ignored.
const MAX_OUTSTANDING: usize = 1 << 16;

/// Why the client cannot go on. That nobody answers is a finding, not an error.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    #[error("cannot write {}: {source}", path.display())]
    Out { path: PathBuf, source: io::Error },
    #[error("cannot set up a socket towards {agent}: {source}")]
    Socket { agent: SocketAddr, source: io::Error },
    #[error("cannot wait for answers: {0}")]
    Wait(#[source] Errno),
    #[error("cannot print the summary: {0}")]
    Print(#[source] Box<dyn std::error::Error>),
}

/// An answer with the times, on the client's side, of its question and of its arrival.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Exchange {
    pub(crate) seq: u64,
    pub(crate) sent_monotonic_ns: i64,
    pub(crate) sent_realtime_ns: i64,
    pub(crate) rtt_ns: i64,
    pub(crate) answer: Answer,
}

impl Exchange {
    /// When the answer arrived, by the client's CLOCK_MONOTONIC.
    pub(crate) fn received_monotonic_ns(&self) -> i64 {
        self.sent_monotonic_ns + self.rtt_ns
    }
}

/// Probes until the time is over or a signal says stop, then sums up.
pub(crate) fn run(options: &ClientOptions) -> Result<(), ClientError> {
    let mut stop_signals = SigSet::empty();
    stop_signals.add(Signal::SIGTERM);
    stop_signals.add(Signal::SIGINT);
    stop_signals.thread_block().map_err(ClientError::Wait)?;
    let signals =
        SignalFd::with_flags(&stop_signals, SfdFlags::SFD_NONBLOCK).map_err(ClientError::Wait)?;

    let started_ns = monotonic_ns();
    let end_ns = options.duration.map(|d| started_ns.saturating_add(nanos(d)));
    let mut client = Client::new(options)?;
    let mut next_send_ns = started_ns;
    while end_ns.is_none_or(|end| monotonic_ns() < end) {
        let now = monotonic_ns();
        if now >= next_send_ns {
            client.ask();
            // A client that was held up does not make up for probes it missed.
            next_send_ns = (next_send_ns + nanos(options.interval)).max(now);
        }
        let wait = Duration::from_nanos(u64::try_from(next_send_ns - now).unwrap_or(0));
        if wait_for(&client.socket, &signals, wait)? {
            break;
        }
        client.take_answers()?;
    }
    client.finish(started_ns)
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Waits for an answer, or until it is time for the next probe; true if told to stop.
fn wait_for(socket: &UdpSocket, signals: &SignalFd, wait: Duration) -> Result<bool, ClientError> {
    let mut fds = [
        PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        PollFd::new(signals.as_fd(), PollFlags::POLLIN),
    ];
    match ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None) {
        Ok(_) => Ok(fds[1].any().unwrap_or(false)),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(ClientError::Wait(error)),
    }
}

struct Client {
    socket: UdpSocket,
    /// Tells this client's answers from those meant for one that had the port before.
    session: u64,
    next_seq: u64,
    /// When each probe was sent; None once answered. The first is number `next_seq - len`.
    sent: VecDeque<Option<Reading>>,
    out: Option<(PathBuf, LineWriter<File>)>,
    summary: Summary,
}

impl Client {
    fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        let agent = options.agent;
        let any = match agent.ip() {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        let socket = UdpSocket::bind((any, 0))
            .and_then(|s| s.set_nonblocking(true).map(|()| s))
            .and_then(|s| s.connect(agent).map(|()| s))
            .map_err(|source| ClientError::Socket { agent, source })?;
        let out = match &options.out {
            Some(path) => {
                let file = File::create(path)
                    .map_err(|source| ClientError::Out { path: path.clone(), source })?;
                Some((path.clone(), LineWriter::new(file)))
            }
            None => None,
        };
        let session = Reading::now().realtime_ns.unsigned_abs() ^ u64::from(std::process::id());
        let (sent, summary) = (VecDeque::new(), Summary::default());
        Ok(Self { socket, session, next_seq: 0, sent, out, summary })
    }

    fn token(&self, seq: u64) -> [u8; 16] {
        let mut token = [0; 16];
        token[..8].copy_from_slice(&self.session.to_be_bytes());
        token[8..].copy_from_slice(&seq.to_be_bytes());
        token
    }

    /// The probe that an answer is for, if it is one of ours.
    fn seq_of(&self, token: &str) -> Option<u64> {
        let bytes: [u8; 16] = hex::decode(token).ok()?.try_into().ok()?;
        let (session, seq) = bytes.split_at(8);
        let seq = u64::from_be_bytes(seq.try_into().ok()?);
        (session == self.session.to_be_bytes() && seq < self.next_seq).then_some(seq)
    }

    fn ask(&mut self) {
        let token = self.token(self.next_seq);
        self.sent.push_back(Some(Reading::now()));
        self.next_seq += 1;
        if self.sent.len() > MAX_OUTSTANDING {
            self.sent.pop_front();
        }
        self.summary.asked += 1;
        // While the guest moves, the network may say that nobody is there: that is a gap.
        if self.socket.send(&token).is_err() {
            self.summary.send_errors += 1;
        }
    }

    fn take_answers(&mut self) -> Result<(), ClientError> {
        let mut line = [0; MAX_ANSWER_BYTES];
        // Bounded, so that a flood of answers cannot keep the client from asking.
        for _ in 0..1024 {
            let length = match self.socket.recv(&mut line) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error that came back for an earlier probe.
                Err(_) => continue,
            };
            let now = Reading::now();
            match serde_json::from_slice::<Answer>(&line[..length]) {
                Ok(answer) => self.take(answer, now)?,
                Err(_) => self.summary.malformed += 1,
            }
        }
        Ok(())
    }

    fn take(&mut self, answer: Answer, now: Reading) -> Result<(), ClientError> {
        let Some(seq) = self.seq_of(&answer.token) else {
            self.summary.malformed += 1;
            return Ok(());
        };
        let first = self.next_seq - self.sent.len() as u64;
        let Some(sent) = seq.checked_sub(first).and_then(|i| self.sent.get_mut(i as usize)) else {
            self.summary.too_late += 1;
            return Ok(());
        };
        let Some(sent) = sent.take() else {
            self.summary.duplicates += 1;
            return Ok(());
        };
        let exchange = Exchange {
            seq,
            sent_monotonic_ns: sent.monotonic_ns,
            sent_realtime_ns: sent.realtime_ns,
            rtt_ns: now.monotonic_ns - sent.monotonic_ns,
            answer,
        };
        self.summary.take(&exchange);
        self.write_line(&exchange)
    }

    fn write_line(&mut self, line: &impl Serialize) -> Result<(), ClientError> {
        let Some((path, out)) = &mut self.out else { return Ok(()) };
        serde_json::to_writer(&mut *out, line)
            .map_err(io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .map_err(|source| ClientError::Out { path: path.clone(), source })
    }

    fn finish(mut self, started_ns: i64) -> Result<(), ClientError> {
        let report = self.summary.report(started_ns, monotonic_ns());
        let line = serde_json::json!({ "summary": report });
        self.write_line(&line)?;
        crate::say(&line.to_string()).map_err(ClientError::Print)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vitals::{Identity, Vitals};

    /// A client whose agent is a socket that the test reads and answers itself.
    fn pair() -> (Client, UdpSocket, Vitals) {
        let agent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = Client::new(&ClientOptions {
            agent: agent.local_addr().unwrap(),
            interval: Duration::from_millis(10),
            duration: None,
            out: None,
        });
        let identity = Identity { boot_id: "b".into(), nonce: [1; 16] };
        (client.unwrap(), agent, Vitals::new(identity))
    }

    fn answer_next(agent: &UdpSocket, vitals: &Vitals, times: usize) {
        let mut token = [0; 16];
        let (_, asker) = agent.recv_from(&mut token).unwrap();
        let answer = Answer { token: hex::encode(token), vitals: vitals.snapshot() };
        for _ in 0..times {
            agent.send_to(&serde_json::to_vec(&answer).unwrap(), asker).unwrap();
        }
    }

    #[test]
    fn answers_are_matched_and_a_second_one_is_noticed() {
        let (mut client, agent, vitals) = pair();
        client.ask();
        client.ask();
        answer_next(&agent, &vitals, 1);
        answer_next(&agent, &vitals, 2);
        client.take_answers().unwrap();
        let report = client.summary.report(0, 1);
        assert_eq!((report.asked, report.answered, report.duplicates), (2, 2, 1));
        assert!(report.same_guest);
    }

    #[test]
    fn strangers_are_ignored() {
        let (mut client, agent, vitals) = pair();
        client.ask();
        let (_, asker) = agent.recv_from(&mut [0; 16]).unwrap();
        let stranger = Answer { token: "00".repeat(16), vitals: vitals.snapshot() };
        agent.send_to(&serde_json::to_vec(&stranger).unwrap(), asker).unwrap();
        agent.send_to(b"{", asker).unwrap();
        client.take_answers().unwrap();
        let report = client.summary.report(0, 1);
        assert_eq!((report.answered, report.malformed), (0, 2));
    }
}
