//! A client of a cloudlet's daemon that blocks.

mod calls;
mod events;
mod link;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use serde::{Serialize, de::DeserializeOwned};

use crate::Problem;
pub use events::Events;
use link::Way;
pub use link::{At, Connection, Dial};

/// No answer is longer: reports of long handoffs are the largest.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long the daemon may take for an answer: a VM that is stopped flushes its disk first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(900);

/// Speaks with one daemon. Each call makes a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    way: Way,
    key: Option<String>,
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens there.
    #[error("no daemon answers at {at}: {source}")]
    Unreachable {
        /// Where it was looked for.
        at: At,
        /// Why it was not found.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the daemon at {at} ended the connection: {why}")]
    Broken {
        /// Where the daemon is.
        at: At,
        /// How.
        why: String,
    },
    /// The daemon says no.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The answer is none that this client knows.
    #[error("the daemon answers {status} to {what}, which this client does not understand: {why}")]
    Foreign {
        /// What was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// What is odd about it.
        why: String,
    },
}

impl Client {
    /// A client of the daemon that listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { way: Way::Socket(socket.into()), key: None }
    }

    /// A client of a daemon that is elsewhere.
    pub fn over(dial: Arc<dyn Dial>) -> Self {
        Self { way: Way::Dial(dial), key: None }
    }

    /// The same client, for one POST that may have to be sent again: with the same key it is done once.
    pub fn with_key(&self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self.clone() }
    }

    /// Whether a daemon listens at its socket; one that is elsewhere is not asked.
    pub fn answers(&self) -> bool {
        match &self.way {
            Way::Socket(path) => link::connect(path).is_ok(),
            Way::Dial(_) => true,
        }
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        ClientError::Broken { at: self.way.at(), why: why.to_string() }
    }

    /// Connects, where tokio runs.
    fn connect(&self) -> Result<Box<dyn Connection>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { at: self.way.at(), source };
        self.way.connect().map_err(unreachable)
    }

    /// Asks for `path`; a body goes along as JSON.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let what = format!("{method} {path}");
        let request = self.request(method, path, body)?;
        let (status, answer) = self.exchange(request)?;
        let foreign =
            |why: String| ClientError::Foreign { what: what.clone(), status: status.as_u16(), why };
        if !status.is_success() {
            let problem = serde_json::from_slice(&answer).map_err(|e| foreign(e.to_string()))?;
            return Err(ClientError::Problem(Box::new(problem)));
        }
        // An answer without a body is an answer to whoever expects nothing.
        let answer = if answer.is_empty() { &b"null"[..] } else { &answer };
        serde_json::from_slice(answer).map_err(|e| foreign(e.to_string()))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut request =
            Request::builder().method(method).uri(path).header(header::HOST, "howdah");
        if let Some(key) = &self.key {
            request = request.header("idempotency-key", key);
        }
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(serde_json::to_vec(body).map_err(|e| self.broken(e))?)
            }
            None => Bytes::new(),
        };
        request.body(Full::new(body)).map_err(|e| self.broken(e))
    }

    fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        let runtime = link::runtime().map_err(|e| self.broken(e))?;
        let exchange = async {
            let response = link::send(self.connect()?, request).await;
            let response = response.map_err(|e| self.broken(e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|e| self.broken(e))?.to_bytes()))
        };
        runtime.block_on(async {
            let answered = tokio::time::timeout(ANSWER_TIMEOUT, exchange).await;
            let late = |_| Err(self.broken(format_args!("no answer within {ANSWER_TIMEOUT:?}")));
            answered.unwrap_or_else(late)
        })
    }
}
