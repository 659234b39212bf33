//! `/v1/events`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::sse::{Event as Message, KeepAlive, Sse},
};
use futures_util::{Stream, StreamExt, stream};
use howdah_api::Event;
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Problems;
use crate::{
    ops,
    serve::{
        access::Caller,
        answer::{Answer, blocking},
        daemon::Daemon,
    },
};

/// How often something is said where nothing happens: a client finds out that the daemon is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) fn routes() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::new().routes(routes!(events))
}

/// Follow what happens
///
/// Server-sent events; the data of each is one JSON document of the schema `Event`. The stream begins
/// with all VMs and operations as they are, and ends with the daemon.
#[utoipa::path(get, path = "/v1/events", tag = "events", operation_id = "follow_events",
    responses((status = 200, description = "Events as they happen.", content_type = "text/event-stream", body = String), Problems))]
async fn events(
    State(daemon): State<Arc<Daemon>>,
    caller: Caller,
) -> Answer<Sse<impl Stream<Item = Result<Message, Infallible>>>> {
    // Before it is looked at what there is: what changes in between is told.
    let coming = BroadcastStream::new(daemon.subscribe()).map(|event| match event {
        Ok(event) => event,
        Err(BroadcastStreamRecvError::Lagged(events)) => Event::Lost { events },
    });
    let shared = Arc::clone(&daemon);
    let vms = blocking(move || ops::vm::list(&shared.home)).await?;
    let vms = vms.into_iter().map(|vm| Event::Vm { vm: Box::new(vm) });
    let operations = daemon.operations.list().into_iter().rev();
    let operations =
        operations.map(|operation| Event::Operation { operation: Box::new(operation) });
    let present: Vec<Event> = vms.chain(operations).collect();
    daemon.vms_changed();
    let all = stream::iter(present).chain(coming).map(|event| Ok(message(&event)));
    let until_over = all.take_until(async move {
        tokio::select! {
            () = daemon.stopped() => {}
            () = caller.shut_out(Arc::clone(&daemon)) => {}
        }
    });
    Ok(Sse::new(until_over).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

fn message(event: &Event) -> Message {
    // Events are made of what JSON has.
    let data = serde_json::to_string(event).unwrap_or_default();
    Message::default().event(event.name()).data(data)
}
