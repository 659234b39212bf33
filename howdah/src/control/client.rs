//! The commands' end: one request to a VM's process.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use super::{
    Envelope, Reply, Request, Status, VERSION,
    channel::{Channel, with_socket_path},
};
use crate::{
    failure::{Exit, Failure},
    home::VmDir,
    lock::Probe,
};

/// How long a process may take to answer anything but a handoff, an export or a stop.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends `request` to the process of `dir`. Replies come through the returned channel.
pub(crate) fn ask(
    dir: &VmDir,
    request: Request,
    fd: Option<BorrowedFd>,
) -> Result<Channel, Failure> {
    let name = dir.name();
    if dir.probe()? == Probe::Free {
        return Err(not_running(dir));
    }
    let failed = |e: io::Error| {
        Failure::new(
            Exit::Failed,
            format!("VM {name}"),
            format!("its process does not answer: {e}"),
            format!("see {}", dir.vm_log().display()),
        )
    };
    let stream =
        with_socket_path(dir.path(), VmDir::SOCKET, |p| UnixStream::connect(p)).map_err(failed)?;
    let mut channel = Channel::new(stream, Some(ANSWER_TIMEOUT)).map_err(failed)?;
    channel.send(&Envelope { version: VERSION, request }, fd).map_err(failed)?;
    Ok(channel)
}

/// Takes the next reply; a process that closed or fell silent is a failure.
pub(crate) fn next_reply(dir: &VmDir, channel: &mut Channel) -> Result<Reply, Failure> {
    let silent = |why: String| {
        let log = dir.vm_log();
        let way_out = format!("see {} and `howdah vm inspect {}`", log.display(), dir.name());
        Failure::new(Exit::Failed, format!("VM {}", dir.name()), why, way_out)
    };
    match channel.receive() {
        Ok(Some(reply)) => Ok(reply),
        Ok(None) => Err(silent("its process ended before it answered".into())),
        Err(e) => Err(silent(format!("its process does not answer: {e}"))),
    }
}

/// A request that is done or fails, within `timeout`.
pub(crate) fn call(dir: &VmDir, request: Request, timeout: Duration) -> Result<(), Failure> {
    let mut channel = ask(dir, request, None)?;
    let _ = channel.set_timeout(Some(timeout));
    match next_reply(dir, &mut channel)? {
        Reply::Failed(failure) => Err(failure),
        _ => Ok(()),
    }
}

/// A request for which the process writes a file; its answer, within `timeout`.
pub(crate) fn fill(
    dir: &VmDir,
    request: Request,
    file: &File,
    timeout: Duration,
) -> Result<Reply, Failure> {
    let mut channel = ask(dir, request, Some(file.as_fd()))?;
    let _ = channel.set_timeout(Some(timeout));
    match next_reply(dir, &mut channel)? {
        Reply::Failed(failure) => Err(failure),
        reply => Ok(reply),
    }
}

/// How the process of `dir` stands.
pub(crate) fn status(dir: &VmDir) -> Result<Status, Failure> {
    let mut channel = ask(dir, Request::Status, None)?;
    match next_reply(dir, &mut channel)? {
        Reply::Status(status) => Ok(status),
        Reply::Failed(failure) => Err(failure),
        _ => Err(Failure::new(
            Exit::Failed,
            format!("VM {}", dir.name()),
            "its process gave an answer this program does not know",
            "use the howdah that started it",
        )),
    }
}

fn not_running(dir: &VmDir) -> Failure {
    let name = dir.name();
    let (why, way_out) = match dir.record() {
        Ok(Some(record)) if !record.may_run() => (
            format!("it does not run here: {record}"),
            format!("`howdah vm inspect {name}` says more"),
        ),
        _ => ("it is not running".into(), format!("`howdah vm run {name}` starts it")),
    };
    Failure::new(Exit::Conflict, format!("VM {name}"), why, way_out)
}
