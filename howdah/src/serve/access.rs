//! Who asks, and what it may ask for.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{Method, StatusCode, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use handoff::tls::PeerKey;

use super::{
    answer::{Answer, Refused, blocking},
    daemon::Daemon,
};
use crate::{
    failure::{Exit, Failure},
    home::VmName,
    peers::{Right, unknown_key},
};

/// How often it is looked whether a peer that follows what happens still may.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Who could open the socket: an operator of this cloudlet.
    Operator,
    /// A peer, over TLS.
    Peer {
        /// What it is called here.
        name: VmName,
        /// Who it is.
        key: PeerKey,
    },
}

impl Caller {
    /// Fails unless it asks on this host; `what` is for whoever may come to it.
    pub(crate) fn must_be_here(&self, what: &str) -> Answer<()> {
        match self {
            Self::Operator => Ok(()),
            Self::Peer { name, .. } => {
                let why = format!("that is said on the cloudlet itself, not by peer {name}");
                let failure = Failure::new(Exit::Conflict, what, why, "ask its operator");
                Err(Refused::with(StatusCode::FORBIDDEN, failure))
            }
        }
    }

    /// What tells the keys of its POSTs from those of others.
    pub(super) fn namespace(&self) -> String {
        match self {
            Self::Operator => String::new(),
            Self::Peer { key, .. } => key.to_string(),
        }
    }

    /// Waits until it may not look at this cloudlet any more; an operator always may.
    pub(super) async fn shut_out(&self, daemon: Arc<Daemon>) {
        if *self == Self::Operator {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if may(&daemon, self, Right::Observe).await.is_err() {
                return;
            }
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        parts.extensions.get().cloned().ok_or_else(|| {
            let failure = Failure::new(Exit::Failed, "caller", "it is not known", "report it");
            failure.into()
        })
    }
}

async fn may(daemon: &Arc<Daemon>, caller: &Caller, right: Right) -> Answer<()> {
    let Caller::Peer { key, .. } = caller else { return Ok(()) };
    let (daemon, key) = (Arc::clone(daemon), *key);
    let book = blocking(move || daemon.book.read()).await?;
    let known = book.by_key(key).ok_or_else(|| unknown_key(key));
    let checked = known.and_then(|peer| peer.check(right));
    checked.map_err(|failure| Refused::with(StatusCode::FORBIDDEN, failure))
}

/// Asks for the rights of a peer at each request: they may have changed since it came in.
pub(super) async fn check(
    State(daemon): State<Arc<Daemon>>,
    caller: Caller,
    request: Request,
    next: Next,
) -> Response {
    let right = match *request.method() {
        Method::GET | Method::HEAD => Right::Observe,
        _ => Right::Operate,
    };
    match may(&daemon, &caller, right).await {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    }
}
