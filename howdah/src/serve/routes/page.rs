//! `/metrics` and `/`: for Prometheus, and for people.

use std::{fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};

use crate::{
    ops,
    serve::{
        answer::{Answer, blocking},
        daemon::Daemon,
    },
};

/// The text format that Prometheus reads.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/metrics", get(metrics)).route("/", get(page))
}

async fn metrics(State(daemon): State<Arc<Daemon>>) -> Answer<impl IntoResponse> {
    let vms = blocking(move || ops::vm::list(&daemon.home)).await?;
    let mut text =
        String::from("# HELP howdah_vms VMs of this cloudlet.\n# TYPE howdah_vms gauge\n");
    let _ = writeln!(text, "howdah_vms {}", vms.len());
    Ok(([(header::CONTENT_TYPE, METRICS_TYPE)], text))
}

async fn page(State(daemon): State<Arc<Daemon>>) -> Answer<Html<String>> {
    let vms = blocking(move || ops::vm::list(&daemon.home)).await?;
    let items: String =
        vms.iter().map(|vm| format!("<li>{}: {}</li>", vm.name, vm.state.name())).collect();
    Ok(Html(format!("<!doctype html><title>howdah</title><h1>howdah</h1><ul>{items}</ul>")))
}
