//! The engine's progress, as commands show it.

use handoff::report::Progress as Engine;

use crate::control::Progress;

/// What the engine tells, for the clients of this process.
pub(crate) fn of(peer: &str, _progress: &Engine) -> Progress {
    Progress { peer: peer.to_owned(), stage: "sending".into(), ..Progress::default() }
}
