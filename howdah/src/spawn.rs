//! Processes that outlive the command that started them, and how they say that they are ready.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        fs::OpenOptionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{
    failure::{Exit, Failure},
    logging,
};

/// No such message is longer.
const MAX_READY_BYTES: u64 = 64 << 10;

/// What a started process says on its stdout: how it went, once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ready {
    /// A guest begins to come in; how it went follows.
    Coming,
    /// The guest runs; what a reception knows of its transfer.
    Running(Option<serde_json::Value>),
    /// It will not.
    Failed(Failure),
}

/// Starts this program again with `arguments`, its messages in `log`. It is to call [`detach`].
pub(crate) fn start(arguments: Vec<OsString>, stdin: Stdio, log: &Path) -> Result<Child, Failure> {
    let log_file = open_log(log).map_err(|e| Failure::file("open", log, &e))?;
    Command::new("/proc/self/exe")
        .arg0("howdah")
        .args(arguments)
        .env(logging::VARIABLE, logging::chosen().to_string())
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(|e| {
            Failure::new(
                Exit::Failed,
                "process of the VM",
                e,
                "raise the limits on processes and memory",
            )
        })
}

/// Waits until the process says how it went.
pub(crate) fn await_ready(child: Child, log: &Path) -> Result<Option<serde_json::Value>, Failure> {
    await_ready_noting(child, log, || {})
}

/// As [`await_ready`], and does `coming` when its guest begins to come in.
pub(crate) fn await_ready_noting(
    mut child: Child,
    log: &Path,
    mut coming: impl FnMut(),
) -> Result<Option<serde_json::Value>, Failure> {
    let mut said = None;
    if let Some(stdout) = child.stdout.take() {
        let words = serde_json::Deserializer::from_reader(stdout.take(MAX_READY_BYTES));
        for word in words.into_iter::<Ready>() {
            match word {
                Ok(Ready::Coming) => coming(),
                Ok(word) => said = Some(word),
                // It ended in the midst of a word.
                Err(_) => break,
            }
        }
    }
    match said {
        Some(Ready::Running(details)) => {
            children().push(child);
            Ok(details)
        }
        Some(Ready::Failed(failure)) => {
            let _ = child.wait();
            Err(failure)
        }
        Some(Ready::Coming) | None => {
            let ended = child.wait();
            let killed = ended.as_ref().is_ok_and(|s| s.signal() == Some(nix::libc::SIGKILL));
            let ended = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
            let why = format!("its process ended before the guest ran ({ended})");
            let mut way_out = format!("see {}", log.display());
            if killed {
                way_out += ", and the kernel's log (dmesg) for whether memory ran out";
            }
            Err(Failure::new(Exit::Failed, "VM", why, way_out))
        }
    }
}

/// Processes that were started and go on by themselves. A short-lived command never asks for them again;
/// a daemon must, lest their remains stay in the kernel's table.
fn children() -> MutexGuard<'static, Vec<Child>> {
    static CHILDREN: Mutex<Vec<Child>> = Mutex::new(Vec::new());
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of those that have ended.
pub(crate) fn reap() {
    children().retain_mut(|child| matches!(child.try_wait(), Ok(None)));
}

/// Leaves the session of the command that started this process, so that neither its terminal nor
/// its end matters here.
pub(crate) fn detach() {
    // Fails for a process group leader only, which a process just started is not.
    let _ = nix::unistd::setsid();
}

/// Logs to another file from now on.
pub(crate) fn log_to(log: &Path) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::file("open", log, &e);
    let file = open_log(log).map_err(failed)?;
    nix::unistd::dup2_stderr(file).map_err(|e| failed(e.into()))
}

fn open_log(log: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(log)
}

/// Says that a guest begins to come in.
pub(crate) fn say_coming() {
    write_word(&Ready::Coming);
}

fn write_word(word: &Ready) {
    let mut stdout = io::stdout();
    if let Ok(text) = serde_json::to_string(word) {
        // A starter that is gone no longer wants to know.
        let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    }
}

/// Says how it went, and closes stdout, which the starter waits for.
pub(crate) fn say(ready: &Ready) {
    write_word(ready);
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}
