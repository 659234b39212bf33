//! `howdah vm logs`: what a VM's process had to say, or what its guest printed.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{cli::VmLogsArgs, failure::Failure, home::VmDir, lock::Probe, output::Output};

/// How often a log is looked at that is followed: logs of a guest are for people to read.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Read and shown at once.
const PIECE_BYTES: usize = 64 << 10;
/// No line that is looked for from the end is longer; a guest may print one that never ends.
const MAX_TAIL_BYTES: u64 = 16 << 20;

/// Runs `howdah vm logs`.
pub(crate) fn show(dir: &VmDir, args: &VmLogsArgs, output: Output) -> anyhow::Result<()> {
    let path = if args.console { dir.console_log() } else { dir.vm_log() };
    let mut log = match Log::open(&path) {
        // A VM in the foreground has its log on the terminal, and one that was just received none yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            output.note(&format!("VM {}: nothing in {} yet", dir.name(), path.display()));
            None
        }
        opened => Some(opened.map_err(|e| Failure::file("read", &path, &e))?),
    };
    let failed = |e: io::Error| Failure::file("read", &path, &e);
    if let (Some(log), Some(lines)) = (&mut log, args.lines) {
        log.skip_to_last(lines).map_err(failed)?;
    }
    let mut shown = Shown::new(output);
    loop {
        // Before the log is read: what a process says last is then not missed.
        let alive = matches!(dir.probe(), Ok(Probe::Held { .. }));
        if log.is_none() {
            log = Log::open(&path).ok();
        }
        if let Some(log) = &mut log
            && !log.pass_on(&mut shown).map_err(failed)?
        {
            return Ok(());
        }
        if !args.follow || !alive {
            shown.end();
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A log that may grow, be cut off, or be replaced by a new one.
struct Log {
    path: PathBuf,
    file: File,
    inode: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self { path: path.to_owned(), file, inode })
    }

    /// Goes to where the last `lines` lines begin.
    fn skip_to_last(&mut self, lines: usize) -> io::Result<()> {
        let end = self.file.seek(SeekFrom::End(0))?;
        let from = end.saturating_sub(MAX_TAIL_BYTES);
        self.file.seek(SeekFrom::Start(from))?;
        let mut tail = Vec::new();
        (&self.file).take(end - from).read_to_end(&mut tail)?;
        self.file.seek(SeekFrom::Start(from + last_lines(&tail, lines) as u64))?;
        Ok(())
    }

    /// Shows what is there and was not shown; `false` when nobody reads any more.
    fn pass_on(&mut self, shown: &mut Shown) -> io::Result<bool> {
        loop {
            if !self.pass_on_file(shown)? {
                return Ok(false);
            }
            match self.path.metadata() {
                // Turned: the rest of the old one has just been shown.
                Ok(now) if now.ino() != self.inode => *self = Self::open(&self.path)?,
                // Cut off.
                Ok(now) if now.len() < self.file.stream_position()? => {
                    self.file.seek(SeekFrom::Start(0))?;
                }
                _ => return Ok(true),
            }
        }
    }

    fn pass_on_file(&mut self, shown: &mut Shown) -> io::Result<bool> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match self.file.read(&mut piece) {
                Ok(0) => return Ok(true),
                Ok(count) => {
                    if !shown.put(piece.get(..count).unwrap_or_default()) {
                        return Ok(false);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Where the last `lines` lines of a text begin. A line that has not ended is one too.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    ends.nth(lines - 1).map_or(0, |(at, _)| at + 1)
}

/// Where it is shown: as it is where a program reads, tamed on a terminal, by line in JSON.
struct Shown {
    json: bool,
    terminal: bool,
    line: Vec<u8>,
}

impl Shown {
    fn new(output: Output) -> Self {
        let terminal = io::stdout().is_terminal();
        Self { json: output.is_json(), terminal, line: Vec::new() }
    }

    fn put(&mut self, text: &[u8]) -> bool {
        if self.json {
            return self.put_json(text);
        }
        let mut stdout = io::stdout().lock();
        let written = if self.terminal {
            stdout.write_all(tame(text).as_bytes())
        } else {
            stdout.write_all(text)
        };
        written.and_then(|()| stdout.flush()).is_ok()
    }

    fn put_json(&mut self, text: &[u8]) -> bool {
        let mut stdout = io::stdout().lock();
        for part in text.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            // One that never ends is shown in pieces.
            if part.ends_with(b"\n") || self.line.len() > PIECE_BYTES {
                let line = String::from_utf8_lossy(&self.line);
                let value = serde_json::json!({ "line": line.trim_end_matches(['\r', '\n']) });
                if writeln!(stdout, "{value}").is_err() {
                    return false;
                }
                self.line.clear();
            }
        }
        stdout.flush().is_ok()
    }

    /// Shows a last line that has not ended.
    fn end(&mut self) {
        if self.json && !self.line.is_empty() {
            self.put_json(b"\n");
        }
    }
}

/// A guest's output must not drive the terminal: of control characters, line ends and tabs stay.
fn tame(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let last = |text: &'static str, lines| &text[last_lines(text.as_bytes(), lines)..];
        assert_eq!(last("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last("a\nb\nc", 2), "b\nc");
        assert_eq!(last("a\nb\n", 9), "a\nb\n");
        assert_eq!(last("a\nb\n", 0), "");
        assert_eq!(last("", 3), "");
    }

    #[test]
    fn a_guest_does_not_drive_the_terminal() {
        assert_eq!(tame(b"a\x1b[2J\tb\r\n\xff"), "a[2J\tb\n\u{fffd}");
    }
}
