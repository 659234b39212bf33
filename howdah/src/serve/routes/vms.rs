//! `/v1/vms`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use howdah_api::{HandoffSpec, Kind, Operation, Vm, VmRun, VmRunning};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Problems;
use crate::{
    cli::VmRunArgs,
    control::HandoffRequest,
    failure::{Exit, Failure},
    home::{Home, VmName},
    ops,
    serve::{
        access::Caller,
        answer::{Answer, Asked, Body, Name, Refused, blocking},
        daemon::Daemon,
        operations::About,
    },
};

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new()
        .routes(routes!(list, run))
        .routes(routes!(inspect, remove))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(stop))
        .routes(routes!(hand_off))
}

/// The name in the path.
#[derive(IntoParams)]
#[into_params(parameter_in = Path, names("name"))]
pub(super) struct VmPath(
    #[param(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")]
    #[expect(dead_code, reason = "it only documents")]
    String,
);

/// List VMs
#[utoipa::path(get, path = "/v1/vms", tag = "vms", operation_id = "list_vms",
    responses((status = 200, description = "Every VM, without its last report.", body = Vec<Vm>), Problems))]
async fn list(State(daemon): State<Arc<Daemon>>) -> Answer<Json<Vec<Vm>>> {
    blocking(move || ops::vm::list(&daemon.home)).await.map(Json)
}

/// Look at a VM
#[utoipa::path(get, path = "/v1/vms/{name}", tag = "vms", operation_id = "inspect_vm", params(VmPath),
    responses((status = 200, description = "All that is known of it.", body = Vm), Problems))]
async fn inspect(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<Json<Vm>> {
    blocking(move || seen(&daemon.home, &name)).await.map(Json)
}

fn seen(home: &Home, name: &VmName) -> Result<Vm, Failure> {
    Ok(ops::vm::look(&home.existing(name)?))
}

/// Create a VM and run it, or run one that is there again
#[utoipa::path(post, path = "/v1/vms", tag = "vms", operation_id = "run_vm", request_body = VmRun,
    responses((status = 201, description = "Its guest runs.", body = VmRunning,
        headers(("Location" = String, description = "The VM."))), Problems))]
async fn run(
    State(daemon): State<Arc<Daemon>>,
    caller: Caller,
    Body(asked): Body<VmRun>,
) -> Answer<(StatusCode, [(HeaderName, String); 1], Json<VmRunning>)> {
    if asked.no_jail || asked.run_as.is_some() {
        caller.must_be_here("how a VM's process is confined")?;
    }
    let shared = Arc::clone(&daemon);
    let args = VmRunArgs::asked(asked, &shared.jail).map_err(Refused::form)?;
    let running = blocking(move || {
        ops::run::prepare(&args, &shared.home)?;
        ops::run::launch(&args, &shared.home, shared.verbose)
    })
    .await?;
    daemon.vms_changed();
    let place = format!("/v1/vms/{}", running.vm);
    Ok((StatusCode::CREATED, [(header::LOCATION, place)], Json(running)))
}

/// Remove a stopped VM with its disk
///
/// Of a VM that is not there, nothing is left to be removed: that is done, too.
#[utoipa::path(delete, path = "/v1/vms/{name}", tag = "vms", operation_id = "remove_vm", params(VmPath),
    responses((status = 204, description = "It is not there any more."), Problems))]
async fn remove(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<StatusCode> {
    let shared = Arc::clone(&daemon);
    blocking(move || match shared.home.existing(&name) {
        Ok(dir) => ops::vm::remove(&dir, &shared.home),
        Err(failure) if failure.exit == Exit::NotFound => Ok(()),
        Err(failure) => Err(failure),
    })
    .await?;
    daemon.vms_changed();
    Ok(StatusCode::NO_CONTENT)
}

/// Stop the vCPUs, keep everything
#[utoipa::path(post, path = "/v1/vms/{name}/pause", tag = "vms", operation_id = "pause_vm", params(VmPath),
    responses((status = 200, description = "It is paused.", body = Vm), Problems))]
async fn pause(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<Json<Vm>> {
    changed(daemon, name, |home, name| ops::vm::pause(&home.existing(name)?)).await
}

/// Let a paused VM go on
#[utoipa::path(post, path = "/v1/vms/{name}/resume", tag = "vms", operation_id = "resume_vm", params(VmPath),
    responses((status = 200, description = "It runs.", body = Vm), Problems))]
async fn resume(State(daemon): State<Arc<Daemon>>, Name(name): Name) -> Answer<Json<Vm>> {
    changed(daemon, name, |home, name| ops::vm::resume(&home.existing(name)?)).await
}

/// How a VM is stopped.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Stop {
    /// Even while it is being handed off.
    #[serde(default)]
    force: bool,
}

/// Flush the disk and end the VM
///
/// The guest is not asked to shut down: it sees a power cut after its last flush.
#[utoipa::path(post, path = "/v1/vms/{name}/stop", tag = "vms", operation_id = "stop_vm", params(VmPath, Stop),
    responses((status = 200, description = "It is stopped.", body = Vm), Problems))]
async fn stop(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Asked(Stop { force }): Asked<Stop>,
) -> Answer<Json<Vm>> {
    changed(daemon, name, move |home, name| ops::vm::stop(&home.existing(name)?, force)).await
}

/// Does something with a VM; how it is then.
async fn changed(
    daemon: Arc<Daemon>,
    name: VmName,
    change: impl FnOnce(&Home, &VmName) -> Result<(), Failure> + Send + 'static,
) -> Answer<Json<Vm>> {
    let shared = Arc::clone(&daemon);
    let vm = blocking(move || {
        change(&shared.home, &name)?;
        seen(&shared.home, &name)
    })
    .await?;
    daemon.vms_changed();
    Ok(Json(vm))
}

/// Where an operation is looked at.
pub(super) fn accepted(
    operation: Operation,
) -> (StatusCode, [(HeaderName, String); 1], Json<Operation>) {
    let place = format!("/v1/operations/{}", operation.id);
    (StatusCode::ACCEPTED, [(header::LOCATION, place)], Json(operation))
}

/// Hand a running VM off to a peer
///
/// The guest runs until the last moment and goes on at the peer.
#[utoipa::path(post, path = "/v1/vms/{name}/handoff", tag = "vms", operation_id = "hand_off_vm", params(VmPath),
    request_body = HandoffSpec,
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "The operation."))), Problems))]
async fn hand_off(
    State(daemon): State<Arc<Daemon>>,
    Name(name): Name,
    Body(spec): Body<HandoffSpec>,
) -> Answer<(StatusCode, [(HeaderName, String); 1], Json<Operation>)> {
    let shared = Arc::clone(&daemon);
    let request = HandoffRequest::try_from(&spec).map_err(Refused::form)?;
    let operation = blocking(move || begin(&shared, &name, &spec, request)).await?;
    daemon.vms_changed();
    Ok(accepted(operation))
}

fn begin(
    daemon: &Arc<Daemon>,
    name: &VmName,
    spec: &HandoffSpec,
    request: HandoffRequest,
) -> Result<Operation, Failure> {
    let dir = daemon.home.existing(name)?;
    let handoff = ops::handoff::begin(&dir, &spec.peer, spec.plain, request, &daemon.home)?;
    let about =
        About { kind: Kind::Handoff, subject: name.to_string(), peer: Some(handoff.peer.clone()) };
    let cancel = Arc::new(move || ops::handoff::cancel(&dir));
    let shared = Arc::clone(daemon);
    daemon.operations.begin(about, Some(cancel), move |work| {
        let ended = handoff.follow(|progress| work.handoff(progress.into()));
        shared.vms_changed();
        ended
    })
}
