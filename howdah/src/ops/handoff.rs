//! Handoffs: asking a VM's process to send it.

use std::time::Duration;

use crate::{
    control::{HandoffRequest, HandoffTls, Progress, Reply, Request, channel::Channel, client},
    failure::Failure,
    home::{Home, VmDir},
    ops,
    peers::{self, BookFile},
};

/// The process says something at least this often, or it hangs.
const SILENCE: Duration = Duration::from_secs(600);
/// A handoff that is given up says a last word to its peer, if there is a link.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(60);

/// A handoff that a VM's process was asked for.
#[derive(Debug)]
pub(crate) struct Handoff {
    home: Home,
    dir: VmDir,
    channel: Channel,
    /// The peer, as people know it.
    pub(crate) peer: String,
}

/// Asks the process of `dir` to hand its VM off to `peer`: a name, `HOST:PORT`, or both.
pub(crate) fn begin(
    dir: &VmDir,
    peer: &str,
    plain: bool,
    request: HandoffRequest,
    home: &Home,
) -> Result<Handoff, Failure> {
    let book = BookFile::of(home).read()?;
    let endpoint = peers::resolve(&book, peer, plain)?;
    let known = endpoint.key.and_then(|key| book.by_key(key)).cloned();
    let tls = match known {
        Some(peer) => {
            let identity = peers::identity(home)?.to_pem().to_string();
            Some(HandoffTls { peer, identity })
        }
        None => None,
    };
    let request = HandoffRequest { peer: endpoint.to_string(), tls, ..request };
    let channel = client::ask(dir, Request::Handoff(Box::new(request)), None)?;
    // A process that does not take it in time is found out by the first reply.
    let _ = channel.set_timeout(Some(SILENCE));
    Ok(Handoff { home: home.clone(), dir: dir.clone(), channel, peer: endpoint.shown(&book) })
}

impl Handoff {
    /// Waits for its end, and tells how it goes on; its report.
    pub(crate) fn follow(
        mut self,
        mut progress: impl FnMut(Progress),
    ) -> Result<serde_json::Value, Failure> {
        loop {
            match client::next_reply(&self.dir, &mut self.channel)? {
                Reply::Progress(now) => progress(now),
                Reply::Moved(report) => {
                    // What comes for it goes on to the peer from now, also while its process still
                    // writes what it keeps.
                    ops::vm::refresh_network(&self.home);
                    if let Err(e) = ops::vm::await_exit(&self.dir, ops::vm::KEEP_TIMEOUT) {
                        tracing::warn!("{e}");
                    }
                    return Ok(report);
                }
                Reply::Failed(failure) => return Err(failure),
                _ => {}
            }
        }
    }
}

/// Gives up the handoff of a VM that is under way.
pub(crate) fn cancel(dir: &VmDir) -> Result<(), Failure> {
    client::call(dir, Request::CancelHandoff, CANCEL_TIMEOUT)
}
