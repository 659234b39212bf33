//! A client of a cloudlet's daemon that blocks.

mod calls;
mod events;
mod link;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use serde::{Serialize, de::DeserializeOwned};

use crate::Problem;
pub use events::Events;

/// No answer is longer: reports of long handoffs are the largest.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long the daemon may take for an answer: a VM that is stopped flushes its disk first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(900);

/// Speaks with the daemon behind one Unix socket. Each call makes a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    key: Option<String>,
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens there.
    #[error("no daemon answers at {}: {source}", socket.display())]
    Unreachable {
        /// Where it was looked for.
        socket: PathBuf,
        /// Why it was not found.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the daemon at {} ended the connection: {why}", socket.display())]
    Broken {
        /// The daemon's socket.
        socket: PathBuf,
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
        Self { socket: socket.into(), key: None }
    }

    /// The same client, for one POST that may have to be sent again: with the same key it is done once.
    pub fn with_key(&self, key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..self.clone() }
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether a daemon listens there.
    pub fn answers(&self) -> bool {
        link::connect(&self.socket).is_ok()
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
        let broken = |why: String| ClientError::Broken { socket: self.socket.clone(), why };
        let mut request =
            Request::builder().method(method).uri(path).header(header::HOST, "howdah");
        if let Some(key) = &self.key {
            request = request.header("idempotency-key", key);
        }
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(serde_json::to_vec(body).map_err(|e| broken(e.to_string()))?)
            }
            None => Bytes::new(),
        };
        request.body(Full::new(body)).map_err(|e| broken(e.to_string()))
    }

    fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        let broken = |why: String| ClientError::Broken { socket: self.socket.clone(), why };
        let stream = link::connect(&self.socket)
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let runtime = link::runtime().map_err(|e| broken(e.to_string()))?;
        let exchange = async {
            let response = link::send(stream, request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|e| e.to_string())?.to_bytes()))
        };
        let answered = runtime.block_on(async {
            tokio::time::timeout(ANSWER_TIMEOUT, exchange)
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {ANSWER_TIMEOUT:?}")))
        });
        answered.map_err(broken)
    }
}
