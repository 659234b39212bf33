//! `/v1/bases`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode},
};
use howdah_api::{Base, BaseRemoved, Kind, Operation, Progress};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Problems, vms::accepted};
use crate::{
    failure::Failure,
    ops,
    serve::{
        answer::{Answer, Part, blocking},
        daemon::Daemon,
        operations::About,
    },
};

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(inspect, remove))
        .routes(routes!(verify))
}

/// The base in the path.
#[derive(IntoParams)]
#[into_params(parameter_in = Path, names("name"))]
struct BasePath(
    /// Its name, its id, or the beginning of its id
    #[param(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    #[expect(dead_code, reason = "it only documents")]
    String,
);

/// List bases
#[utoipa::path(get, path = "/v1/bases", tag = "bases", operation_id = "list_bases",
    responses((status = 200, description = "Every base of the store.", body = Vec<Base>), Problems))]
async fn list(State(daemon): State<Arc<Daemon>>) -> Answer<Json<Vec<Base>>> {
    blocking(move || ops::base::list(&daemon.home)).await.map(Json)
}

/// Look at a base
#[utoipa::path(get, path = "/v1/bases/{name}", tag = "bases", operation_id = "inspect_base", params(BasePath),
    responses((status = 200, description = "What it is.", body = Base), Problems))]
async fn inspect(State(daemon): State<Arc<Daemon>>, Part(name): Part) -> Answer<Json<Base>> {
    blocking(move || ops::base::look(&name, &daemon.home)).await.map(Json)
}

/// Remove a base that no VM uses
#[utoipa::path(delete, path = "/v1/bases/{name}", tag = "bases", operation_id = "remove_base", params(BasePath),
    responses((status = 200, description = "It was removed.", body = BaseRemoved), Problems))]
async fn remove(State(daemon): State<Arc<Daemon>>, Part(name): Part) -> Answer<Json<BaseRemoved>> {
    let removed = blocking(move || ops::base::remove(&name, &daemon.home)).await?;
    Ok(Json(BaseRemoved { id: removed.to_string() }))
}

/// Read all of a base and compare it with its manifest
#[utoipa::path(post, path = "/v1/bases/{name}/verify", tag = "bases", operation_id = "verify_base", params(BasePath),
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "The operation."))), Problems))]
async fn verify(
    State(daemon): State<Arc<Daemon>>,
    Part(name): Part,
) -> Answer<(StatusCode, [(HeaderName, String); 1], Json<Operation>)> {
    let operation = blocking(move || begin_verify(&daemon, name)).await?;
    Ok(accepted(operation))
}

fn begin_verify(daemon: &Arc<Daemon>, name: String) -> Result<Operation, Failure> {
    // What is not there is told at once.
    ops::base::look(&name, &daemon.home)?;
    let about = About { kind: Kind::BaseVerify, subject: name.clone(), peer: None };
    let shared = Arc::clone(daemon);
    daemon.operations.begin(about, None, move |work| {
        let mut rate = Rate::default();
        let id = ops::base::verify(&name, &shared.home, &mut |progress| {
            work.progress(rate.of(progress.done_bytes, progress.total_bytes));
        })?;
        Ok(serde_json::json!({ "id": id.to_string() }))
    })
}

/// Makes a rate of what is done, over some seconds.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    since: Option<(Instant, u64)>,
    bytes_per_s: u64,
}

impl Rate {
    /// Over less time it jumps about.
    const OVER: Duration = Duration::from_secs(1);

    /// So much is done now.
    pub(crate) fn of(&mut self, done_bytes: u64, total_bytes: u64) -> Progress {
        let now = Instant::now();
        let (since, before) = *self.since.get_or_insert((now, done_bytes));
        let took = now.duration_since(since);
        if took >= Self::OVER {
            let done = done_bytes.saturating_sub(before) as f64;
            self.bytes_per_s = (done / took.as_secs_f64()) as u64;
            self.since = Some((now, done_bytes));
        }
        Progress { done_bytes, total_bytes, rate_bytes_per_s: self.bytes_per_s }
    }
}
