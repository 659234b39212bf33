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
use howdah_api::{
    Base, BaseHeal, BaseMoved, BasePull, BasePush, BaseRemoved, BasesCollected, BasesGc, Kind,
    Operation, Progress,
};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Problems, vms::accepted};
use crate::{
    bases::{self, Watch},
    failure::{Exit, Failure},
    home::Home,
    ops,
    serve::{
        answer::{Answer, Body, Part, Refused, blocking},
        daemon::Daemon,
        operations::About,
    },
};

/// An operation that has begun.
type Begun = (StatusCode, [(HeaderName, String); 1], Json<Operation>);

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(inspect, remove))
        .routes(routes!(verify))
        .routes(routes!(push))
        .routes(routes!(pull))
        .routes(routes!(heal))
        .routes(routes!(collect))
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
async fn verify(State(daemon): State<Arc<Daemon>>, Part(name): Part) -> Answer<Begun> {
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

/// Send a base to a peer, which takes what it lacks of it
///
/// Cancelled or broken off, the same again goes on where it ended.
#[utoipa::path(post, path = "/v1/bases/{name}/push", tag = "bases", operation_id = "push_base", params(BasePath),
    request_body = BasePush,
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "The operation."))), Problems))]
async fn push(
    State(daemon): State<Arc<Daemon>>,
    Part(name): Part,
    Body(BasePush { peer, called }): Body<BasePush>,
) -> Answer<Begun> {
    called.as_deref().map_or(Ok(()), bases::check_name).map_err(Refused::form)?;
    let operation = blocking(move || {
        // What is not there is told at once.
        ops::base::look(&name, &daemon.home)?;
        let move_it = Move { kind: Kind::BasePush, base: name, peer, called };
        begin_move(&daemon, move_it, |Move { base, peer, called, .. }, home, watch| {
            bases::push(home, base, called.as_deref(), peer, watch)
        })
    });
    Ok(accepted(operation.await?))
}

/// Fetch a base of a peer, as far as it is not here
///
/// Cancelled or broken off, the same again goes on where it ended.
#[utoipa::path(post, path = "/v1/bases/{name}/pull", tag = "bases", operation_id = "pull_base", params(BasePath),
    request_body = BasePull,
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "The operation."))), Problems))]
async fn pull(
    State(daemon): State<Arc<Daemon>>,
    Part(name): Part,
    Body(BasePull { peer, called }): Body<BasePull>,
) -> Answer<Begun> {
    called.as_deref().map_or(Ok(()), bases::check_name).map_err(Refused::form)?;
    let operation = blocking(move || {
        let move_it = Move { kind: Kind::BasePull, base: name, peer, called };
        begin_move(&daemon, move_it, |Move { base, peer, called, .. }, home, watch| {
            bases::pull(home, base, called.as_deref(), peer, watch)
        })
    });
    Ok(accepted(operation.await?))
}

/// Mend a damaged base with what a peer has of it
///
/// What is whole of it is kept; a VM that runs goes on with the files that it has open.
#[utoipa::path(post, path = "/v1/bases/{name}/heal", tag = "bases", operation_id = "heal_base", params(BasePath),
    request_body = BaseHeal,
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "The operation."))), Problems))]
async fn heal(
    State(daemon): State<Arc<Daemon>>,
    Part(name): Part,
    Body(BaseHeal { peer }): Body<BaseHeal>,
) -> Answer<Begun> {
    let operation = blocking(move || {
        ops::base::look(&name, &daemon.home)?;
        let move_it = Move { kind: Kind::BaseHeal, base: name, peer, called: None };
        begin_move(&daemon, move_it, |Move { base, peer, .. }, home, watch| {
            bases::heal(home, base, peer, watch)
        })
    });
    Ok(accepted(operation.await?))
}

/// Remove the bases that nothing uses
///
/// In use is what a VM is made from, what a process has open and, unless that is asked for, what has a name.
#[utoipa::path(post, path = "/v1/store/gc", tag = "bases", operation_id = "collect_bases",
    request_body = BasesGc,
    responses((status = 200, description = "What was removed, and what stays why.", body = BasesCollected), Problems))]
async fn collect(
    State(daemon): State<Arc<Daemon>>,
    Body(asked): Body<BasesGc>,
) -> Answer<Json<BasesCollected>> {
    blocking(move || ops::gc::gc(&daemon.home, asked)).await.map(Json)
}

/// A base that is to come or go.
struct Move {
    kind: Kind,
    base: String,
    peer: String,
    called: Option<String>,
}

/// Begins to move a base; cancelling is seen within a message or a tick of the link.
fn begin_move(
    daemon: &Arc<Daemon>,
    asked: Move,
    work: impl FnOnce(&Move, &Home, Watch<'_>) -> Result<BaseMoved, Failure> + Send + 'static,
) -> Result<Operation, Failure> {
    let peer = bases::find(&daemon.home, &asked.peer)?;
    let about = About { kind: asked.kind, subject: asked.base.clone(), peer: Some(peer) };
    let shared = Arc::clone(daemon);
    daemon.operations.begin(about, None, move |doing| {
        let mut rate = Rate::default();
        let mut progress = |now: base_sync::Progress| {
            doing.progress(rate.of(now.done_bytes, now.total_bytes));
        };
        let watch = Watch { cancel: doing.cancelled(), progress: &mut progress };
        let moved = work(&asked, &shared.home, watch)?;
        serde_json::to_value(&moved).map_err(|e| Failure::plain(Exit::Failed, "operation", e))
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
