//! A client of QMP, the JSON protocol by which QEMU is driven: commands with answers, and events that
//! come in between.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long QEMU may take to answer a command. Most answer at once; block devices may have to drain.
const ANSWERS: Duration = Duration::from_secs(60);
/// How long QEMU may take to make its socket.
const APPEARS: Duration = Duration::from_secs(20);
/// The most bytes that a message may have.
const MAX_MESSAGE_BYTES: u64 = 16 << 20;

/// Why QEMU could not be driven.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// The socket cannot be used.
    #[error("QMP socket: {0}")]
    Socket(#[from] io::Error),
    /// QEMU ended, or says something that is not QMP.
    #[error("QEMU closed its QMP socket{0}")]
    Closed(String),
    /// It takes too long.
    #[error("QEMU: no {what} within {} s", limit.as_secs())]
    Timeout {
        /// What was awaited.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// It refuses.
    #[error("QEMU refuses {command}: {problem}")]
    Refused {
        /// What it was told.
        command: String,
        /// Its answer.
        problem: String,
    },
}

/// Something that happened, by the clock of the host that QEMU runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// Its name.
    pub(crate) event: String,
    /// More of it.
    #[serde(default)]
    pub(crate) data: Value,
    /// When.
    pub(crate) timestamp: Timestamp,
}

/// A moment of CLOCK_REALTIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Timestamp {
    /// Whole seconds.
    pub(crate) seconds: i64,
    /// The rest.
    pub(crate) microseconds: i64,
}

impl Timestamp {
    /// From an earlier moment to this one.
    pub(crate) fn ms_since(self, earlier: Self) -> f64 {
        (self.seconds - earlier.seconds) as f64 * 1e3
            + (self.microseconds - earlier.microseconds) as f64 / 1e3
    }
}

/// What QEMU sends.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Error {
        error: Refusal,
    },
    Answer {
        r#return: Value,
    },
    Greeting {
        #[serde(rename = "QMP")]
        qmp: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

/// A connection to one QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: UnixStream,
    inbox: Receiver<Result<Message, String>>,
    /// Events that nobody has waited for yet.
    pending: VecDeque<Event>,
    /// Every event so far.
    history: Vec<Event>,
    /// Every command so far that changes something, as it was sent.
    said: Vec<String>,
}

impl Qmp {
    /// Connects as soon as the socket is there, and begins.
    pub(crate) fn connect(path: &Path) -> Result<Self, QmpError> {
        let started = Instant::now();
        let socket = loop {
            match UnixStream::connect(path) {
                Ok(socket) => break socket,
                Err(error) if started.elapsed() > APPEARS => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        Self::begin(socket)
    }

    /// Begins on a connection.
    pub(super) fn begin(socket: UnixStream) -> Result<Self, QmpError> {
        let (sender, inbox) = channel();
        let reader = socket.try_clone()?;
        thread::spawn(move || forward(reader, &sender));
        let (pending, history, said) = (VecDeque::new(), Vec::new(), Vec::new());
        let mut qmp = Self { socket, inbox, pending, history, said };
        match qmp.next("greeting", Instant::now(), ANSWERS)? {
            Message::Greeting { qmp: version } if version.is_object() => {}
            other => return Err(QmpError::Closed(format!(": it began with {other:?}"))),
        }
        qmp.query("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Asks for something.
    pub(crate) fn query(&mut self, command: &str) -> Result<Value, QmpError> {
        self.send(command, &json!({ "execute": command }))
    }

    /// Tells QEMU to do something; its answer.
    pub(crate) fn tell(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let message = json!({ "execute": command, "arguments": arguments });
        self.said.push(format!("{command} {arguments}"));
        self.send(command, &message)
    }

    fn send(&mut self, command: &str, message: &Value) -> Result<Value, QmpError> {
        let mut line = message.to_string();
        line.push('\n');
        self.socket.write_all(line.as_bytes())?;
        let started = Instant::now();
        loop {
            match self.next(&format!("answer to {command}"), started, ANSWERS)? {
                Message::Answer { r#return } => return Ok(r#return),
                Message::Error { error } => {
                    return Err(QmpError::Refused { command: command.into(), problem: error.desc });
                }
                Message::Event(event) => self.note(event),
                Message::Greeting { .. } => {}
            }
        }
    }

    /// The next event, whatever it is; none if none comes in time.
    pub(crate) fn event(&mut self, within: Duration) -> Result<Option<Event>, QmpError> {
        let started = Instant::now();
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(Some(event));
            }
            match self.next("event", started, within) {
                Ok(Message::Event(event)) => self.note(event),
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for an event that fits; others are passed over, but stay in the history.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        within: Duration,
        fits: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let started = Instant::now();
        loop {
            let left = within.saturating_sub(started.elapsed());
            match self.event(left)? {
                Some(event) if fits(&event) => return Ok(event),
                Some(_) => {}
                None => return Err(QmpError::Timeout { what: what.into(), limit: within }),
            }
        }
    }

    /// Takes what has come without waiting; an error if the connection has ended.
    pub(crate) fn check(&mut self) -> Result<(), QmpError> {
        loop {
            match self.next("event", Instant::now(), Duration::ZERO) {
                Ok(Message::Event(event)) => self.note(event),
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// When an event of this name came last.
    pub(crate) fn last(&self, name: &str) -> Option<Timestamp> {
        self.history.iter().rev().find(|event| event.event == name).map(|event| event.timestamp)
    }

    /// Every event so far.
    pub(crate) fn history(&self) -> &[Event] {
        &self.history
    }

    /// The commands so far that change something.
    pub(crate) fn said(&self) -> &[String] {
        &self.said
    }

    fn note(&mut self, event: Event) {
        self.history.push(event.clone());
        self.pending.push_back(event);
    }

    fn next(&self, what: &str, since: Instant, limit: Duration) -> Result<Message, QmpError> {
        match self.inbox.recv_timeout(limit.saturating_sub(since.elapsed())) {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(problem)) => Err(QmpError::Closed(format!(": {problem}"))),
            Err(RecvTimeoutError::Disconnected) => Err(QmpError::Closed(String::new())),
            Err(RecvTimeoutError::Timeout) => Err(QmpError::Timeout { what: what.into(), limit }),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Ends the reader; a socket that is closed already is as good.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Reads messages until the connection ends or one cannot be understood.
fn forward(socket: UnixStream, to: &Sender<Result<Message, String>>) {
    let mut reader = BufReader::new(socket);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = io::Read::take(&mut reader, MAX_MESSAGE_BYTES).read_until(b'\n', &mut line);
        let message = match read {
            Ok(0) => return,
            Ok(_) => serde_json::from_slice(&line)
                .map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&line).trim())),
            Err(error) => Err(error.to_string()),
        };
        let last = message.is_err();
        if to.send(message).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}"#;

    /// A QEMU that answers each command it gets with these lines.
    fn qemu(answers: Vec<Vec<String>>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            let mut commands = BufReader::new(theirs).lines();
            writeln!(out, "{GREETING}").unwrap();
            let capabilities = vec![r#"{"return": {}}"#.to_owned()];
            for lines in [vec![capabilities], answers].concat() {
                if commands.next().is_none() {
                    return;
                }
                for line in lines {
                    writeln!(out, "{line}").unwrap();
                }
            }
        });
        ours
    }

    fn event(name: &str, us: i64) -> String {
        format!(
            r#"{{"timestamp": {{"seconds": 7, "microseconds": {us}}}, "event": "{name}", "data": {{"status": "x"}}}}"#
        )
    }

    #[test]
    fn events_come_between_answers_and_none_is_lost() {
        let answers = vec![
            vec![event("STOP", 10), r#"{"return": {"status": "paused"}}"#.into()],
            vec![r#"{"return": {}}"#.into(), event("RESUME", 2010), event("JOB", 3000)],
        ];
        let mut qmp = Qmp::begin(qemu(answers)).unwrap();
        assert_eq!(qmp.query("query-status").unwrap(), json!({ "status": "paused" }));
        qmp.tell("cont", json!({})).unwrap();
        let within = Duration::from_secs(5);
        let resumed = qmp.wait_for("RESUME", within, |event| event.event == "RESUME").unwrap();
        assert_eq!(resumed.timestamp.ms_since(qmp.last("STOP").unwrap()), 2.0);
        assert_eq!(qmp.event(within).unwrap().unwrap().event, "JOB");
        assert_eq!(qmp.history().len(), 3);
        assert_eq!(qmp.said(), ["cont {}"]);
    }

    #[test]
    fn refusals_ends_and_silence_are_told_apart() {
        let refused = r#"{"error": {"class": "GenericError", "desc": "no such node"}}"#;
        let mut qmp = Qmp::begin(qemu(vec![vec![refused.into()], vec![]])).unwrap();
        let error = qmp.tell("blockdev-del", json!({ "node-name": "x" })).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses blockdev-del: no such node");
        assert!(qmp.event(Duration::from_millis(20)).unwrap().is_none());
        let error = qmp.query("query-status").unwrap_err();
        assert!(matches!(error, QmpError::Closed(_)), "{error}");
    }

    #[test]
    fn what_is_not_qmp_is_an_error_that_shows_it() {
        let mut qmp = Qmp::begin(qemu(vec![vec!["hello".into()]])).unwrap();
        let error = qmp.query("query-status").unwrap_err().to_string();
        assert!(error.contains("hello"), "{error}");
    }
}
