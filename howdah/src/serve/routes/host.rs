//! `/v1/host`.

use std::sync::Arc;

use axum::{Json, extract::State};
use howdah_api::Host;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Problems;
use crate::{
    failure::Failure,
    ops,
    peers::identity,
    serve::{
        answer::{Answer, blocking},
        daemon::Daemon,
    },
};

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new().routes(routes!(host))
}

/// Look at the host and its daemon
#[utoipa::path(get, path = "/v1/host", tag = "host", operation_id = "inspect_host",
    responses((status = 200, description = "What it is and what it has left.", body = Host), Problems))]
async fn host(State(daemon): State<Arc<Daemon>>) -> Answer<Json<Host>> {
    blocking(move || look(&daemon)).await.map(Json)
}

/// The host as it is now.
pub(super) fn look(daemon: &Daemon) -> Result<Host, Failure> {
    let (memory_bytes, memory_available_bytes) = ops::host::memory();
    let (hostname, kernel) = ops::host::names();
    Ok(Host {
        version: env!("CARGO_PKG_VERSION").into(),
        key: identity(&daemon.home)?.key().to_string(),
        home: daemon.home.root().display().to_string(),
        pid: std::process::id(),
        uptime_ms: u64::try_from(daemon.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        hostname,
        kernel,
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory_bytes,
        memory_available_bytes,
        disk: ops::host::disk(&daemon.home),
        kvm: ops::host::kvm(),
        receive: daemon.receiving.get().cloned(),
        api: daemon.listening.get().map(ToString::to_string),
    })
}
