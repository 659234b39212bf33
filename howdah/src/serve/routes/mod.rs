//! What can be asked for, and the document that says so.

mod bases;
mod events;
mod host;
mod operations;
mod page;
mod peers;
mod vms;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::DefaultBodyLimit,
    http::{Method, StatusCode, Uri},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use howdah_api::{PROBLEM_TYPE, Problem};
use utoipa::{
    IntoResponses, OpenApi, ToSchema,
    openapi::{
        ContentBuilder, ObjectBuilder, Ref, RefOr, Required, Response as Documented,
        ResponseBuilder, ResponsesBuilder, Type,
        path::{Parameter, ParameterBuilder, ParameterIn},
    },
};
use utoipa_axum::router::OpenApiRouter;

use super::{access, answer::Refused, daemon::Daemon, keys};
use crate::failure::{Exit, Failure};

/// No request is longer.
pub(super) const MAX_BODY_BYTES: usize = 256 << 10;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "howdah",
        description = "One cloudlet: its VMs, bases, peers, and what goes on between it and others.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(Problem, howdah_api::Event, howdah_api::BaseMoved))
)]
struct Document;

/// All that can be asked for.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    let (router, document) = parts();
    router
        .route("/openapi.json", get(move || async move { Json(document) }))
        .merge(page::routes())
        .fallback(nothing_there)
        .method_not_allowed_fallback(not_that_way)
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), keys::once))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        // Before anything else is looked at.
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), access::check))
        .with_state(daemon)
}

fn parts() -> (Router<Arc<Daemon>>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(vms::routes())
        .merge(bases::routes())
        .merge(peers::routes())
        .merge(operations::routes())
        .merge(events::routes())
        .merge(host::routes())
        .split_for_parts();
    for path in document.paths.paths.values_mut() {
        if let Some(post) = &mut path.post {
            post.parameters.get_or_insert_default().push(key_parameter());
        }
    }
    (router, document)
}

/// What every POST may bring along.
fn key_parameter() -> Parameter {
    let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[!-~]{1,255}$"));
    ParameterBuilder::new()
        .name(keys::HEADER)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(
            "The same request with the same key is done once: sent again, it is answered as before.",
        ))
        .schema(Some(text))
        .build()
}

async fn nothing_there(uri: Uri) -> Response {
    let way_out = "/openapi.json lists what there is";
    let failure = Failure::new(Exit::NotFound, uri.path(), "nothing is there", way_out);
    Refused::from(failure).into_response()
}

async fn not_that_way(method: Method, uri: Uri) -> Response {
    let why = format!("{method} is not possible there");
    let way_out = "the header Allow lists what is";
    let failure = Failure::new(Exit::Usage, uri.path(), why, way_out);
    Refused::with(StatusCode::METHOD_NOT_ALLOWED, failure).into_response()
}

/// What every request may be answered instead.
pub(super) struct Problems;

impl IntoResponses for Problems {
    fn responses() -> std::collections::BTreeMap<String, RefOr<Documented>> {
        let said = [
            ("400", "The request is none: the problem says what is wrong with it."),
            (
                "403",
                "Not for this caller: a peer without the right, or what is said on the cloudlet itself.",
            ),
            ("404", "There is no such thing."),
            ("409", "Not in this state: of the VM, the peer, or the host."),
            ("422", "The request contradicts itself, or what is there."),
            ("default", "Anything else that went wrong."),
        ];
        let schema = Ref::from_schema_name(Problem::name());
        let documented = said.into_iter().fold(ResponsesBuilder::new(), |all, (status, why)| {
            let content = ContentBuilder::new().schema(Some(schema.clone())).build();
            let response =
                ResponseBuilder::new().description(why).content(PROBLEM_TYPE, content).build();
            all.response(status, response)
        });
        documented.build().responses
    }
}

#[cfg(test)]
mod tests {
    /// Every path has a summary, an id, and says what else may be answered.
    #[test]
    fn the_document_says_all_of_everything() {
        let (_, document) = super::parts();
        let document = serde_json::to_value(document).unwrap();
        let paths = document["paths"].as_object().unwrap();
        assert!(paths.len() > 10, "{paths:?}");
        for (path, methods) in paths {
            for (method, said) in methods.as_object().unwrap() {
                assert!(said["summary"].is_string(), "{method} {path}");
                assert!(said["operationId"].is_string(), "{method} {path}");
                assert!(said["responses"]["default"].is_object(), "{method} {path}");
            }
        }
    }
}
