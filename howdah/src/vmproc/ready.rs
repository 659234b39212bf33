//! Waits until a guest says on its serial console that its workload is up.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, select};

use super::Event;
use crate::failure::one_line;

/// No line of a console is looked at beyond this.
const MAX_LINE_BYTES: usize = 4096;

/// Why a guest did not get ready.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotReady {
    /// The time is over.
    #[error("it said nothing with {text:?} within {} s; {}", .after.as_secs(), last_words(.last))]
    TimedOut {
        /// What was waited for.
        text: String,
        /// How long.
        after: Duration,
        /// The last line that it wrote.
        last: String,
    },
    /// The guest ended.
    #[error("it ended first: {why}; {}", last_words(.last))]
    Ended {
        /// Why.
        why: String,
        /// The last line that it wrote.
        last: String,
    },
    /// The user wants no more.
    #[error("interrupted")]
    Interrupted,
}

fn last_words(last: &str) -> String {
    if last.is_empty() {
        "it wrote nothing at all".into()
    } else {
        format!("its last words were {last:?}")
    }
}

/// The console, line by line.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    last: String,
}

impl Lines {
    /// Takes output; whether a line in it holds `text`.
    fn take(&mut self, piece: &[u8], text: &str) -> bool {
        let mut found = false;
        for part in piece.split_inclusive(|&byte| byte == b'\n') {
            let room = MAX_LINE_BYTES.saturating_sub(self.line.len());
            self.line.extend_from_slice(part.get(..room.min(part.len())).unwrap_or_default());
            let line = String::from_utf8_lossy(&self.line);
            found |= line.contains(text);
            let line = one_line(&line);
            if !line.is_empty() {
                self.last = line;
            }
            if part.ends_with(b"\n") {
                self.line.clear();
            }
        }
        found
    }
}

/// Waits for `text` in what `console` shows; `events` tell if the guest ends instead.
pub(crate) fn wait(
    console: &Receiver<Vec<u8>>,
    events: &Receiver<Event>,
    text: &str,
    limit: Duration,
) -> Result<(), NotReady> {
    let begun = Instant::now();
    let mut lines = Lines::default();
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        select! {
            recv(console) -> piece => match piece {
                Ok(piece) if lines.take(&piece, text) => return Ok(()),
                Ok(_) if !left.is_zero() => {}
                _ => return Err(timed_out(text, limit, lines)),
            },
            recv(events) -> event => match event {
                Ok(Event::GuestEnded(why) | Event::GuestFailed(why)) => {
                    // What it wrote last says more than that it ended.
                    while let Ok(piece) = console.recv_timeout(Duration::from_millis(100)) {
                        lines.take(&piece, text);
                    }
                    return Err(NotReady::Ended { why, last: lines.last });
                }
                Ok(Event::Terminate) | Err(_) => return Err(NotReady::Interrupted),
                Ok(_) => {}
            },
            default(left) => return Err(timed_out(text, limit, lines)),
        }
    }
}

fn timed_out(text: &str, after: Duration, lines: Lines) -> NotReady {
    NotReady::TimedOut { text: text.to_owned(), after, last: lines.last }
}

/// Lets the guest run on for a while; fails if it ends.
pub(crate) fn settle(events: &Receiver<Event>, quiet: Duration) -> Result<(), NotReady> {
    let begun = Instant::now();
    loop {
        match events.recv_timeout(quiet.saturating_sub(begun.elapsed())) {
            Ok(Event::GuestEnded(why) | Event::GuestFailed(why)) => {
                return Err(NotReady::Ended { why, last: String::new() });
            }
            Ok(Event::Terminate) => return Err(NotReady::Interrupted),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(NotReady::Interrupted),
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(60);

    #[test]
    fn a_line_is_found_however_it_is_cut() {
        let (console, seen) = unbounded();
        let (_events, events) = unbounded();
        for piece in ["booting\r\nhow", "dah: re", "ady boot_id=1\r\n"] {
            console.send(piece.as_bytes().to_vec()).unwrap();
        }
        assert_eq!(wait(&seen, &events, "howdah: ready", LATE), Ok(()));
    }

    #[test]
    fn text_over_two_lines_is_none() {
        let mut lines = Lines::default();
        assert!(!lines.take(b"howdah:\n ready\n", "howdah: ready"));
        assert!(!lines.take(&[b'x'; 3 * MAX_LINE_BYTES], "howdah: ready"));
        assert!(lines.line.len() <= MAX_LINE_BYTES);
        assert!(lines.take(b"\nhowdah: ready", "howdah: ready"));
    }

    #[test]
    fn silence_and_a_guest_that_ends_are_told_apart() {
        let (console, seen) = unbounded();
        let (tell, events) = unbounded();
        console.send(b"Kernel panic\r\n".to_vec()).unwrap();
        let late = wait(&seen, &events, "ready", SOON).unwrap_err().to_string();
        assert!(late.contains("\"ready\"") && late.contains("Kernel panic"), "{late}");
        console.send(b"no init\n".to_vec()).unwrap();
        tell.send(Event::GuestEnded("it asked to start over".into())).unwrap();
        let ended = wait(&seen, &events, "ready", LATE).unwrap_err().to_string();
        assert!(ended.contains("start over") && ended.contains("no init"), "{ended}");
        tell.send(Event::Terminate).unwrap();
        assert_eq!(wait(&seen, &events, "ready", LATE), Err(NotReady::Interrupted));
        assert_eq!(settle(&events, SOON), Ok(()));
        tell.send(Event::GuestFailed("triple fault".into())).unwrap();
        assert!(settle(&events, LATE).is_err());
    }
}
