//! `/v1/peers`.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use howdah_api::{Peer, PeerSpec, Pinged};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Problems, vms::VmPath as PeerPath};
use crate::{
    ops,
    serve::{
        access::Caller,
        answer::{Answer, Asked, Body, Name, Refused, blocking},
        daemon::Daemon,
    },
};

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(inspect, put, remove))
        .routes(routes!(ping))
}

/// List the cloudlets that are known
#[utoipa::path(get, path = "/v1/peers", tag = "peers", operation_id = "list_peers",
    responses((status = 200, description = "Every peer, by name.", body = Vec<Peer>), Problems))]
async fn list(State(daemon): State<Arc<Daemon>>) -> Answer<Json<Vec<Peer>>> {
    blocking(move || ops::peer::list(&daemon.home)).await.map(Json)
}

/// Look at a peer
#[utoipa::path(get, path = "/v1/peers/{name}", tag = "peers", operation_id = "inspect_peer", params(PeerPath),
    responses((status = 200, description = "What is said of it.", body = Peer), Problems))]
async fn inspect(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<Json<Peer>> {
    blocking(move || ops::peer::look(&name, &daemon.home)).await.map(Json)
}

/// Let a cloudlet in by its key, or change what is said of one
#[utoipa::path(put, path = "/v1/peers/{name}", tag = "peers", operation_id = "put_peer", params(PeerPath),
    request_body = PeerSpec,
    responses((status = 200, description = "It is known so.", body = Peer), Problems))]
async fn put(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    caller: Caller,
    Body(spec): Body<PeerSpec>,
) -> Answer<Json<Peer>> {
    if spec.rights.is_some_and(|rights| rights.observe || rights.operate) {
        // Else who has the right could give it to others, and keep it when it ends.
        caller.must_be_here("the right to use the API")?;
    }
    let peer = ops::peer::described(name.as_ref(), spec).map_err(Refused::form)?;
    blocking(move || ops::peer::put(&peer, &daemon.home)).await.map(Json)
}

/// Forget a cloudlet: its links are refused from now on
///
/// Of a peer that is not known nothing is left to be forgotten: that is done, too.
#[utoipa::path(delete, path = "/v1/peers/{name}", tag = "peers", operation_id = "remove_peer", params(PeerPath),
    responses(
        (status = 200, description = "It was known so.", body = Peer),
        (status = 204, description = "It was not known."), Problems))]
async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
) -> Answer<Result<Json<Peer>, StatusCode>> {
    let removed = blocking(move || ops::peer::remove(&name, &daemon.home)).await?;
    Ok(removed.map(Json).ok_or(StatusCode::NO_CONTENT))
}

/// Where a peer is asked.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PingAt {
    /// Its `HOST:PORT`; where it is known to listen, if not said.
    #[serde(default)]
    #[param(pattern = "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?:[1-9][0-9]{0,3}$")]
    address: Option<String>,
}

/// Ask a peer how it is, and which VMs could go there
///
/// A peer that does not answer, or not as a peer should, is a 409.
#[utoipa::path(post, path = "/v1/peers/{name}/ping", tag = "peers", operation_id = "ping_peer", params(PeerPath, PingAt),
    responses((status = 200, description = "What it says.", body = Pinged), Problems))]
async fn ping(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Asked(PingAt { address }): Asked<PingAt>,
) -> Answer<Json<Pinged>> {
    let peer = address.map_or_else(|| name.to_string(), |address| format!("{name}@{address}"));
    let ping = blocking(move || ops::ping::find(&peer, &daemon.home)).await?;
    // That a peer does not answer is no fault of this server's.
    let asked = blocking(move || ping.ask()).await;
    asked.map(Json).map_err(|refused| refused.and_status(StatusCode::CONFLICT))
}
