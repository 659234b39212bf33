//! Asking until it is time to stop.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, LineWriter, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
};
use thiserror::Error;

use super::{
    application::{Application, Heard, Talk},
    wire::Wire,
};
use crate::{
    record::{Exchange, Fate, Line, Moment, Run},
    summary::{Counts, Summary, longest_gap_ms, percentile},
};

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(1);
/// Between two attempts.
const RETRY_NS: i64 = 200_000_000;
/// Nothing is waited for longer than this at a time.
const MAX_WAIT_NS: i64 = 1_000_000_000;
/// How often a talk that is not ready for a request is asked again whether it is.
const NOT_READY_NS: i64 = 10_000_000;
const READ_BYTES: usize = 256 << 10;
/// Bytes taken before the schedule is looked at again.
const READS_AT_ONCE: usize = 64;

/// What a client is to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The application.
    pub application: Application,
    /// Where its server is.
    pub address: SocketAddr,
    /// What requests follow from.
    pub seed: u64,
    /// Requests due in a second; 0 for as many as are answered.
    pub rate_hz: f64,
    /// How many may be unanswered.
    pub outstanding: usize,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Stop after so many requests.
    pub requests: Option<u64>,
    /// How long the first connection may take to come about.
    pub connect_within: Duration,
    /// How long to wait at the end for what is outstanding.
    pub grace: Duration,
    /// Where lines go.
    pub jsonl: Option<PathBuf>,
}

/// Why a client cannot go on. That nobody answers is a finding, not an error, once somebody did.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("nobody takes connections at {address} after {}: {source}; is {application} started there?",
            humane(.after))]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Who should be there.
        application: Application,
        /// For how long it was tried.
        after: Duration,
        /// What the system says.
        source: io::Error,
    },
    /// The lines.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Where they go.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The system.
    #[error("cannot wait for answers: {0}")]
    Wait(#[source] Errno),
}

fn humane(duration: &Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// Asks until the time is over, enough was asked or a signal (SIGTERM, SIGINT) says stop.
pub fn run(options: &Options) -> Result<Summary, ClientError> {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    stop.thread_block().map_err(ClientError::Wait)?;
    let signals = SignalFd::with_flags(&stop, SfdFlags::SFD_NONBLOCK).map_err(ClientError::Wait)?;
    let mut client = Client::new(options)?;
    client.first_connection()?;
    client.started_ns = now_ns()?;
    client.due_ns = client.started_ns;
    while !client.is_over(now_ns()?) {
        client.ask_what_is_due()?;
        if client.wait(Some(&signals))? {
            break;
        }
    }
    client.finish()
}

fn now_ns() -> Result<i64, ClientError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(ClientError::Wait)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

struct Client<'a> {
    options: &'a Options,
    talk: Box<dyn Talk>,
    log: Log,
    connection: Option<Connection>,
    /// Connections so far.
    connections: u32,
    retry_ns: i64,
    /// Asked, and not answered, on this connection; the oldest first.
    outstanding: VecDeque<Exchange>,
    done: Vec<Exchange>,
    next_seq: u64,
    started_ns: i64,
    due_ns: i64,
    interval_ns: i64,
    skipped: u64,
}

struct Connection {
    stream: TcpStream,
    wire: Wire,
}

impl<'a> Client<'a> {
    fn new(options: &'a Options) -> Result<Self, ClientError> {
        let mut log = Log::create(options.jsonl.as_deref())?;
        let Options { application, seed, rate_hz, outstanding, .. } = *options;
        log.line(&Line::Run(Run { application, seed, rate_hz, outstanding }))?;
        let interval_ns = if rate_hz > 0.0 { (1e9 / rate_hz) as i64 } else { 0 };
        Ok(Self {
            options,
            talk: application.talk(seed),
            log,
            connection: None,
            connections: 0,
            retry_ns: 0,
            outstanding: VecDeque::new(),
            done: Vec::new(),
            next_seq: 0,
            started_ns: 0,
            due_ns: 0,
            interval_ns,
            skipped: 0,
        })
    }

    /// Tries until a server is there, or for as long as it may take.
    fn first_connection(&mut self) -> Result<(), ClientError> {
        let began_ns = now_ns()?;
        loop {
            let Err(source) = self.connect()? else { return Ok(()) };
            let Options { address, application, connect_within: after, .. } = *self.options;
            if now_ns()? - began_ns > nanos(after) {
                return Err(ClientError::Connect { address, application, after, source });
            }
            std::thread::sleep(Duration::from_nanos(RETRY_NS.unsigned_abs()));
        }
    }

    fn connect(&mut self) -> Result<io::Result<()>, ClientError> {
        let stream = TcpStream::connect_timeout(&self.options.address, CONNECT)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .and_then(|stream| stream.set_nonblocking(true).map(|()| stream));
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                self.retry_ns = now_ns()? + RETRY_NS;
                return Ok(Err(error));
            }
        };
        let mut wire = Wire::default();
        self.talk.connected(&mut wire);
        self.connection = Some(Connection { stream, wire });
        self.connections += 1;
        self.log.line(&Line::Connected(self.moment(String::new())?))?;
        Ok(Ok(()))
    }

    fn moment(&self, detail: String) -> Result<Moment, ClientError> {
        Ok(Moment { monotonic_ns: now_ns()?, connection: self.connections, detail })
    }

    fn is_over(&self, now_ns: i64) -> bool {
        let late = |limit| now_ns - self.started_ns >= nanos(limit);
        self.options.duration.is_some_and(late)
            || self.options.requests.is_some_and(|limit| self.next_seq >= limit)
    }

    fn may_ask(&self, now_ns: i64) -> bool {
        self.connection.is_some()
            && self.talk.ready(now_ns)
            && self.outstanding.len() < self.options.outstanding
    }

    /// Asks, if it is time and the connection may take it; notes what could not be asked.
    fn ask_what_is_due(&mut self) -> Result<(), ClientError> {
        let now = now_ns()?;
        if self.connection.is_none() && now >= self.retry_ns {
            // That it is not possible now is why it is tried again.
            let _ = self.connect()?;
        }
        if self.interval_ns == 0 {
            return if self.may_ask(now) { self.ask() } else { Ok(()) };
        }
        if now < self.due_ns {
            return Ok(());
        }
        // All that were due since, of which one is asked now.
        let due = (now - self.due_ns) / self.interval_ns + 1;
        self.due_ns += due * self.interval_ns;
        let missed = due.unsigned_abs() - u64::from(self.may_ask(now));
        self.skipped += missed;
        if self.may_ask(now) { self.ask() } else { Ok(()) }
    }

    fn ask(&mut self) -> Result<(), ClientError> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let (seq, now) = (self.next_seq, now_ns()?);
        let asked = self.talk.ask(seq, now, &mut connection.wire);
        self.next_seq += 1;
        let (request_bytes, problem) = match asked {
            Ok(bytes) => (bytes, None),
            Err(problem) => (0, Some(problem.0)),
        };
        self.outstanding.push_back(Exchange {
            seq,
            connection: self.connections,
            sent_monotonic_ns: now,
            answered_monotonic_ns: None,
            fate: Fate::Lost,
            request_bytes,
            answer_bytes: 0,
            right: None,
            mark: None,
            problem: None,
        });
        match problem {
            Some(problem) => self.breaks(&problem),
            None => self.flush(),
        }
    }

    fn flush(&mut self) -> Result<(), ClientError> {
        let Some(Connection { stream, wire }) = &mut self.connection else { return Ok(()) };
        match wire.flush(stream) {
            Ok(()) => Ok(()),
            Err(error) => self.breaks(&error.to_string()),
        }
    }

    /// The connection is gone, and with it what was outstanding.
    fn breaks(&mut self, detail: &str) -> Result<(), ClientError> {
        self.connection = None;
        self.retry_ns = now_ns()? + RETRY_NS;
        self.log.line(&Line::Broken(self.moment(detail.to_owned())?))?;
        while let Some(mut lost) = self.outstanding.pop_front() {
            lost.problem = Some(detail.to_owned());
            self.conclude(lost)?;
        }
        Ok(())
    }

    fn conclude(&mut self, exchange: Exchange) -> Result<(), ClientError> {
        let line = Line::Request(exchange);
        self.log.line(&line)?;
        if let Line::Request(exchange) = line {
            self.done.push(exchange);
        }
        Ok(())
    }

    /// Waits until something comes or is due; true if a signal says stop.
    fn wait(&mut self, signals: Option<&SignalFd>) -> Result<bool, ClientError> {
        let now = now_ns()?;
        let next_ns = match (&self.connection, self.interval_ns) {
            (None, _) => self.retry_ns,
            // A talk that is not ready says so by nothing but time.
            (Some(_), 0) if self.outstanding.is_empty() => now + NOT_READY_NS,
            (Some(_), 0) => now + MAX_WAIT_NS,
            (Some(_), _) => self.due_ns,
        };
        let wait = Duration::from_nanos((next_ns - now).clamp(0, MAX_WAIT_NS).unsigned_abs());
        let mut fds = Vec::with_capacity(2);
        if let Some(signals) = signals {
            fds.push(PollFd::new(signals.as_fd(), PollFlags::POLLIN));
        }
        if let Some(Connection { stream, wire }) = &self.connection {
            let out = if wire.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN | out));
        }
        match ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(ClientError::Wait(error)),
        }
        let told = signals.is_some() && fds.first().and_then(PollFd::any) == Some(true);
        drop(fds);
        self.flush()?;
        self.hear()?;
        Ok(told)
    }

    fn hear(&mut self) -> Result<(), ClientError> {
        let mut buffer = vec![0; READ_BYTES];
        for _ in 0..READS_AT_ONCE {
            let Some(Connection { stream, wire }) = &mut self.connection else { return Ok(()) };
            let length = match stream.read(&mut buffer) {
                Ok(0) => return self.breaks("the server closed the connection"),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.breaks(&error.to_string()),
            };
            let (came, now) = (buffer.get(..length).unwrap_or_default(), now_ns()?);
            let heard = match self.talk.hear(came, now, wire) {
                Ok(heard) => heard,
                Err(problem) => return self.breaks(&problem.0),
            };
            for one in heard {
                self.take(one, now)?;
                if self.connection.is_none() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// An answer. One that nobody asked for, or a second one, says that the protocol is broken.
    fn take(&mut self, heard: Heard, now_ns: i64) -> Result<(), ClientError> {
        let at = self.outstanding.iter().position(|one| one.seq == heard.seq);
        let Some(mut exchange) = at.and_then(|at| self.outstanding.remove(at)) else {
            return self
                .breaks(&format!("an answer to request {}, which waits for none", heard.seq));
        };
        exchange.answered_monotonic_ns = Some(now_ns);
        exchange.answer_bytes = heard.bytes;
        match heard.judged {
            Ok(judged) => {
                exchange.fate = Fate::Answered;
                exchange.right = judged.right;
                exchange.mark = judged.mark;
            }
            Err(problem) => {
                exchange.fate = Fate::Failed;
                exchange.problem = Some(problem);
            }
        }
        self.conclude(exchange)
    }

    /// Waits for what is outstanding, gives up what does not come, and sums up.
    fn finish(mut self) -> Result<Summary, ClientError> {
        let ended_ns = now_ns()?;
        self.due_ns = i64::MAX;
        while !self.outstanding.is_empty() && now_ns()? - ended_ns < nanos(self.options.grace) {
            self.wait(None)?;
        }
        while let Some(mut lost) = self.outstanding.pop_front() {
            lost.problem = Some("no answer until the client ended".to_owned());
            self.conclude(lost)?;
        }
        let summary = self.summary(ended_ns);
        self.log.line(&Line::Summary(summary.clone()))?;
        Ok(summary)
    }

    fn summary(&self, ended_ns: i64) -> Summary {
        let mut latencies: Vec<f64> = self.done.iter().filter_map(Exchange::latency_ms).collect();
        Summary {
            application: self.options.application,
            duration_s: (ended_ns - self.started_ns) as f64 / 1e9,
            skipped: self.skipped,
            reconnects: self.connections.saturating_sub(1),
            p50_ms: percentile(&mut latencies, 50),
            p99_ms: percentile(&mut latencies, 99),
            max_ms: percentile(&mut latencies, 100),
            longest_gap_ms: longest_gap_ms(&self.done, i64::MIN, i64::MAX),
            counts: Counts::of(&self.done),
        }
    }
}

/// Where lines go, if anywhere.
struct Log(Option<(PathBuf, LineWriter<File>)>);

impl Log {
    fn create(path: Option<&Path>) -> Result<Self, ClientError> {
        let Some(path) = path else { return Ok(Self(None)) };
        let path = path.to_owned();
        match File::create(&path) {
            Ok(file) => Ok(Self(Some((path, LineWriter::new(file))))),
            Err(source) => Err(ClientError::Write { path, source }),
        }
    }

    fn line(&mut self, line: &Line) -> Result<(), ClientError> {
        let Some((path, out)) = &mut self.0 else { return Ok(()) };
        serde_json::to_writer(&mut *out, line)
            .map_err(io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .map_err(|source| ClientError::Write { path: path.clone(), source })
    }
}
