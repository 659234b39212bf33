//! What handlers are given and what they answer: typed requests in, problems out.

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::JsonRejection},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use howdah_api::{PROBLEM_TYPE, Problem};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    failure::{Exit, Failure, guarded},
    home::VmName,
};

/// A request that was not done.
#[derive(Debug)]
pub(crate) struct Refused {
    status: StatusCode,
    failure: Failure,
}

/// What a handler answers.
pub(crate) type Answer<T> = Result<T, Refused>;

impl Refused {
    /// With a status of its own.
    pub(crate) fn with(status: StatusCode, failure: Failure) -> Self {
        Self { status, failure }
    }

    /// The same, with another status.
    pub(crate) fn and_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// A request that is none.
    pub(crate) fn usage(what: &str, why: impl std::fmt::Display) -> Self {
        let way_out = "see /openapi.json for what there is";
        Self::form(Failure::new(Exit::Usage, what, why, way_out))
    }

    /// What was found when a request was read: one that is not as the document has it is none.
    pub(crate) fn form(failure: Failure) -> Self {
        match failure.exit {
            Exit::Usage => Self { status: StatusCode::BAD_REQUEST, failure },
            _ => failure.into(),
        }
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self { status: status_of(failure.exit), failure }
    }
}

/// The status of a class of failures. What a client can provoke is not the server's error: a host that
/// lacks something, a peer that refuses and a handoff in doubt are states that a request conflicts with.
fn status_of(exit: Exit) -> StatusCode {
    match exit {
        // What is asked for has the right form, and contradicts itself or what is there.
        Exit::Usage => StatusCode::UNPROCESSABLE_ENTITY,
        Exit::NotFound => StatusCode::NOT_FOUND,
        Exit::Conflict | Exit::Host | Exit::NotMoved | Exit::InDoubt | Exit::Cancelled => {
            StatusCode::CONFLICT
        }
        Exit::Failed | Exit::Corrupt => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A failure as a document.
pub(crate) fn problem(status: StatusCode, failure: &Failure) -> Problem {
    let kind = serde_json::to_value(failure.exit).ok();
    Problem {
        type_uri: "about:blank".into(),
        title: status.canonical_reason().unwrap_or("Problem").into(),
        status: status.as_u16(),
        detail: failure.message.clone(),
        kind: kind.and_then(|kind| kind.as_str().map(str::to_owned)).unwrap_or_default(),
        exit: failure.exit as u8,
        report: failure.report.clone(),
    }
}

/// A failure as a document with the status of its class.
pub(crate) fn problem_of(failure: &Failure) -> Problem {
    problem(status_of(failure.exit), failure)
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!("{}", self.failure);
        }
        let mut response = (self.status, Json(problem(self.status, &self.failure))).into_response();
        let kind = HeaderValue::from_static(PROBLEM_TYPE);
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// Runs what blocks where it holds nobody up.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Answer<T> {
    let done = tokio::task::spawn_blocking(|| guarded("request", work).and_then(|done| done));
    let failed = |e| Failure::new(Exit::Failed, "request", e, "try again");
    Ok(done.await.map_err(failed)??)
}

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        match Json::<Value>::from_request(request, state).await {
            Ok(Json(mut body)) => {
                whole(&mut body);
                let body = serde_json::from_value(body);
                body.map(Self).map_err(|why| Refused::usage("request body", why))
            }
            Err(rejection) => {
                let status = match &rejection {
                    JsonRejection::MissingJsonContentType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
                    JsonRejection::BytesRejection(rejection) => rejection.status(),
                    _ => StatusCode::BAD_REQUEST,
                };
                let refused = Refused::usage("request body", rejection.body_text());
                Err(Refused { status, ..refused })
            }
        }
    }
}

/// Makes integers of numbers like `2.0`, which are integers to JSON Schema and not to serde.
fn whole(value: &mut Value) {
    const EXACT: f64 = (1_u64 << 53) as f64;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() <= EXACT);
            if let Some(float) = float {
                *value = (float as i64).into();
            }
        }
        Value::Array(values) => values.iter_mut().for_each(whole),
        Value::Object(fields) => fields.values_mut().for_each(whole),
        _ => {}
    }
}

/// The name of a VM or a peer in the path.
pub(crate) struct Name(pub(crate) VmName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let Path(text) = part(parts, state).await?;
        Ok(Self(text.parse().map_err(|why: String| Refused::usage("name", why))?))
    }
}

/// Any text in the path: what it is the name of is found out where it is looked up.
pub(crate) struct Part(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Part {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let Path(text) = part(parts, state).await?;
        Ok(Self(text))
    }
}

async fn part<S: Send + Sync>(parts: &mut Parts, state: &S) -> Answer<Path<String>> {
    let path = Path::<String>::from_request_parts(parts, state).await;
    path.map_err(|rejection| Refused::usage("path", rejection.body_text()))
}

/// What is behind the question mark.
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(rejection) => Err(Refused::usage("query", rejection.body_text())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_may_be_written_as_json_schema_has_them() {
        let mut value = serde_json::json!({"a": [2.0, 2.5, 1e300, -3.0, "2.0"]});
        whole(&mut value);
        assert_eq!(value, serde_json::json!({"a": [2, 2.5, 1e300, -3, "2.0"]}));
    }
}
