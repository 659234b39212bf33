//! `/v1/operations`.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use howdah_api::{Event, Operation};
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Problems;
use crate::serve::{
    answer::{Answer, Asked, Part, Refused, blocking},
    daemon::Daemon,
};

/// The longest wait for an operation in one request.
const MAX_WAIT_S: u32 = 60;

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(inspect)).routes(routes!(cancel))
}

/// The id in the path.
#[derive(IntoParams)]
#[into_params(parameter_in = Path, names("id"))]
struct IdPath(
    #[param(pattern = "^[0-9a-f]{32}$")]
    #[expect(dead_code, reason = "it only documents")]
    String,
);

/// List operations, the latest first
#[utoipa::path(get, path = "/v1/operations", tag = "operations", operation_id = "list_operations",
    responses((status = 200, description = "Those that run, and the latest that are over.", body = Vec<Operation>), Problems))]
async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Vec<Operation>> {
    Json(daemon.operations.list())
}

/// How long it is waited.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wait {
    /// Answer when the operation is over, or after so many seconds.
    #[serde(default)]
    #[param(maximum = 60)]
    wait_s: u32,
}

/// Look at an operation, or wait for it
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations", operation_id = "inspect_operation", params(IdPath, Wait),
    responses((status = 200, description = "How it stands.", body = Operation), Problems))]
async fn inspect(
    State(daemon): State<Arc<Daemon>>,
    Part(id): Part,
    Asked(Wait { wait_s }): Asked<Wait>,
) -> Answer<Json<Operation>> {
    if wait_s > MAX_WAIT_S {
        return Err(Refused::usage("wait_s", format_args!("at most {MAX_WAIT_S} seconds")));
    }
    // Before it is looked at: an end in between is not missed.
    let mut events = daemon.subscribe();
    let operation = daemon.operations.get(&id)?;
    if wait_s == 0 || operation.state.is_over() {
        return Ok(Json(operation));
    }
    let over = async {
        loop {
            match events.recv().await {
                Ok(Event::Operation { operation }) if operation.id == id => {
                    if operation.state.is_over() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => match daemon.operations.get(&id) {
                    Ok(operation) if !operation.state.is_over() => {}
                    _ => return,
                },
                Err(RecvError::Closed) => return,
            }
        }
    };
    tokio::select! {
        () = over => {}
        () = daemon.stopped() => {}
        () = tokio::time::sleep(Duration::from_secs(wait_s.into())) => {}
    }
    Ok(Json(daemon.operations.get(&id)?))
}

/// Give an operation up
///
/// What is committed is not undone. An operation that is over stays as it is.
#[utoipa::path(post, path = "/v1/operations/{id}/cancel", tag = "operations", operation_id = "cancel_operation", params(IdPath),
    responses((status = 200, description = "It is being given up, or is over.", body = Operation), Problems))]
async fn cancel(State(daemon): State<Arc<Daemon>>, Part(id): Part) -> Answer<Json<Operation>> {
    let operation = blocking(move || {
        daemon.operations.cancel(&id)?;
        daemon.operations.get(&id)
    });
    operation.await.map(Json)
}
