//! What a listener tells its user: lines for people, JSON lines for programs.

use std::io::{self, Write};

use handoff::tls::PeerKey;
use serde::Serialize;

use crate::output::Output;

/// Something a listener did.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// It listens.
    Listening {
        /// Where; the port is real even if any was asked for.
        address: String,
        /// The key that it shows; none if links are plain.
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<PeerKey>,
    },
    /// A VM begins to come in.
    Receiving {
        /// Its name.
        vm: String,
        /// From where.
        peer: String,
    },
    /// A VM came in and runs.
    Received {
        /// Its name.
        vm: String,
        /// From where.
        peer: String,
        /// Bytes and hashes, as this side saw them.
        details: Option<serde_json::Value>,
    },
    /// A VM did not come in; its source keeps it, or the record says otherwise.
    NotReceived {
        /// Its name.
        vm: String,
        /// From where.
        peer: String,
        /// Why.
        why: String,
        /// Its source began anew, and that is coming in instead.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        superseded: bool,
    },
    /// A peer brought a base.
    BaseTaken {
        /// Its id.
        base: String,
        /// What it is called here.
        name: String,
        /// From where.
        peer: String,
        /// Chunks that went over the link.
        chunks_on_link: u64,
    },
    /// A peer was given a base.
    BaseGiven {
        /// Its id.
        base: String,
        /// To where.
        peer: String,
        /// Chunks that went over the link.
        chunks_on_link: u64,
    },
    /// A link that was of no use.
    Dropped {
        /// From where.
        peer: String,
        /// Why.
        why: String,
    },
}

impl Event {
    /// Of a base that came or went.
    pub(super) fn of_base(served: base_sync::Served, peer: String) -> Self {
        match served {
            base_sync::Served::Taken(id, name, taken) => {
                let (base, chunks_on_link) = (id.to_string(), taken.received_chunks);
                Self::BaseTaken { base, name, peer, chunks_on_link }
            }
            base_sync::Served::Given(id, given) => {
                Self::BaseGiven { base: id.to_string(), peer, chunks_on_link: given.sent_chunks }
            }
        }
    }

    /// Tells it.
    pub(crate) fn tell(&self, output: Output) {
        let line = if output.is_json() {
            serde_json::to_string(self).unwrap_or_default()
        } else {
            self.text()
        };
        let mut stdout = io::stdout().lock();
        // Nobody may be reading; the listener listens on.
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    }

    fn text(&self) -> String {
        match self {
            Self::Listening { address, key: Some(key) } => {
                format!("listening on {address} as {key}")
            }
            Self::Listening { address, key: None } => {
                format!("listening on {address}, without TLS")
            }
            Self::Receiving { vm, peer } => format!("receiving VM {vm} from {peer}"),
            Self::Received { vm, peer, .. } => format!("VM {vm} from {peer} runs here"),
            Self::NotReceived { vm, peer, why, .. } => {
                format!("VM {vm} from {peer} not received: {why}")
            }
            Self::BaseTaken { base, name, peer, .. } => {
                format!("base {base} from {peer} is here, as {name}")
            }
            Self::BaseGiven { base, peer, .. } => format!("base {base} was given to {peer}"),
            Self::Dropped { peer, why } => format!("link from {peer} dropped: {why}"),
        }
    }
}
