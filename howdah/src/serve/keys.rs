//! `Idempotency-Key`: a POST that is sent again, because its answer was lost, is not done again.
//!
//! What was answered to a key is kept in memory for a day, and gone with the daemon; a VM that exists
//! and a handoff that goes on are not begun a second time after that either.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{access::Caller, answer::Refused, daemon::Daemon};
use crate::failure::{Exit, Failure};

/// The header.
pub(super) const HEADER: &str = "idempotency-key";
/// No key is longer.
const MAX_KEY_BYTES: usize = 255;
/// Answers that are kept.
const MAX_ANSWERS: usize = 1024;
/// For how long.
const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// No answer to a POST is longer.
const MAX_ANSWER_BYTES: usize = 8 << 20;

/// What was asked under which key, and what was answered.
#[derive(Debug, Default)]
pub(super) struct Keys(Mutex<HashMap<String, Asked>>);

#[derive(Debug)]
struct Asked {
    at: Instant,
    /// Path, query and body.
    what: (String, Bytes),
    /// None as long as it is being done.
    answer: Option<Answered>,
}

#[derive(Clone, Debug)]
struct Answered {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl IntoResponse for Answered {
    fn into_response(self) -> Response {
        (self.status, self.headers, self.body).into_response()
    }
}

/// What is to be done about a request with a key.
enum Verdict {
    Do,
    Repeat(Answered),
    Refuse(Refused),
}

impl Keys {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Asked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, key: &str, what: (String, Bytes)) -> Verdict {
        let mut all = self.all();
        all.retain(|_, asked| asked.answer.is_none() || asked.at.elapsed() < KEPT_FOR);
        let refuse = |why: &str| {
            let way_out = "wait, or take a new key for a new request";
            let failure = Failure::new(Exit::Conflict, "Idempotency-Key", why, way_out);
            Verdict::Refuse(failure.into())
        };
        match all.get(key) {
            Some(asked) if asked.what != what => refuse("another request was sent with that key"),
            Some(Asked { answer: Some(answer), .. }) => Verdict::Repeat(answer.clone()),
            Some(_) => refuse("that request is being done"),
            None => {
                if all.len() >= MAX_ANSWERS {
                    let answered = all.iter().filter(|(_, asked)| asked.answer.is_some());
                    let oldest = answered.min_by_key(|(_, asked)| asked.at);
                    let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                        return refuse("too many requests are being done");
                    };
                    all.remove(&oldest);
                }
                let asked = Asked { at: Instant::now(), what, answer: None };
                all.insert(key.to_owned(), asked);
                Verdict::Do
            }
        }
    }

    /// Keeps an answer. What went wrong here may go right the next time.
    fn end(&self, key: &str, answer: Option<Answered>) {
        let mut all = self.all();
        match (all.get_mut(key), answer) {
            (Some(asked), Some(answer)) if !answer.status.is_server_error() => {
                asked.answer = Some(answer);
            }
            _ => _ = all.remove(key),
        }
    }
}

/// Does a request once for each key.
pub(super) async fn once(
    State(daemon): State<Arc<Daemon>>,
    caller: Caller,
    request: Request,
    next: Next,
) -> Response {
    let key = match request.headers().get(HEADER) {
        Some(key) if request.method() == Method::POST => key,
        _ => return next.run(request).await,
    };
    let key = match key.to_str() {
        Ok(key) if (1..=MAX_KEY_BYTES).contains(&key.len()) => {
            // Nobody is answered what another one asked.
            format!("{} {key}", caller.namespace())
        }
        _ => {
            let why = format!("it has 1 to {MAX_KEY_BYTES} visible ASCII characters");
            return Refused::usage("Idempotency-Key", why).into_response();
        }
    };
    let (head, body) = request.into_parts();
    let body = match to_bytes(body, super::routes::MAX_BODY_BYTES).await {
        Ok(body) => body,
        Err(why) => {
            let refused = Refused::usage("request body", why);
            return refused.and_status(StatusCode::PAYLOAD_TOO_LARGE).into_response();
        }
    };
    match daemon.keys.begin(&key, (head.uri.to_string(), body.clone())) {
        Verdict::Repeat(answer) => return answer.into_response(),
        Verdict::Refuse(refused) => return refused.into_response(),
        Verdict::Do => {}
    }
    // On a task of its own: it is done and noted even if whoever asked goes away.
    let request = Request::from_parts(head, Body::from(body));
    let done = tokio::spawn(async move {
        let answer = kept(next.run(request).await).await;
        daemon.keys.end(&key, answer.clone());
        answer
    });
    match done.await {
        Ok(Some(answer)) => answer.into_response(),
        _ => {
            let failure = Failure::new(Exit::Failed, "answer", "it was lost", "ask how it stands");
            Refused::from(failure).into_response()
        }
    }
}

/// An answer that can be given again.
async fn kept(response: Response) -> Option<Answered> {
    let (head, body) = response.into_parts();
    let body = to_bytes(body, MAX_ANSWER_BYTES).await.ok()?;
    let mut headers = HeaderMap::new();
    for name in [header::CONTENT_TYPE, header::LOCATION, header::ALLOW] {
        if let Some(value) = head.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    Some(Answered { status: head.status, headers, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: StatusCode) -> Option<Answered> {
        Some(Answered { status, headers: HeaderMap::new(), body: Bytes::from_static(b"x") })
    }

    #[test]
    fn a_key_is_good_for_one_request() {
        let keys = Keys::default();
        let what = || ("/v1/vms".to_owned(), Bytes::from_static(b"{}"));
        assert!(matches!(keys.begin("k", what()), Verdict::Do));
        assert!(matches!(keys.begin("k", what()), Verdict::Refuse(_)), "it is being done");
        keys.end("k", answered(StatusCode::CREATED));
        assert!(matches!(keys.begin("k", what()), Verdict::Repeat(a) if a.status == 201));
        let other = ("/v1/vms".to_owned(), Bytes::from_static(b"[]"));
        assert!(matches!(keys.begin("k", other), Verdict::Refuse(_)), "another request");
        assert!(matches!(keys.begin("l", what()), Verdict::Do));
        keys.end("l", answered(StatusCode::INTERNAL_SERVER_ERROR));
        assert!(matches!(keys.begin("l", what()), Verdict::Do), "what failed here is tried again");
    }

    #[test]
    fn answers_are_bounded() {
        let keys = Keys::default();
        let what = || ("/".to_owned(), Bytes::new());
        for n in 0..2 * MAX_ANSWERS {
            assert!(matches!(keys.begin(&n.to_string(), what()), Verdict::Do));
            keys.end(&n.to_string(), answered(StatusCode::OK));
        }
        assert_eq!(keys.all().len(), MAX_ANSWERS);
    }
}
