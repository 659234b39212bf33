//! `/metrics` and `/`: for Prometheus, and for people. What they look like is `howdah-status`' business.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};
use howdah_status::{Snapshot, metrics, page};

use super::host;
use crate::{
    failure::Failure,
    home::{Home, read_json},
    ops,
    peers::BookFile,
    serve::{
        answer::{Answer, blocking},
        daemon::Daemon,
    },
};

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/metrics", get(numbers)).route("/", get(shown))
}

async fn numbers(State(daemon): State<Arc<Daemon>>) -> Answer<impl IntoResponse> {
    let text = blocking(move || {
        let tally = daemon.operations.tally();
        Ok::<_, Failure>(metrics::render(&snapshot(&daemon)?, &tally))
    });
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text.await?))
}

async fn shown(State(daemon): State<Arc<Daemon>>) -> Answer<impl IntoResponse> {
    let page = blocking(move || Ok::<_, Failure>(page::render(&snapshot(&daemon)?))).await?;
    let headers = [
        (header::CONTENT_SECURITY_POLICY, page::security_policy()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, Html(page)))
}

fn snapshot(daemon: &Daemon) -> Result<Snapshot, Failure> {
    let mut vms = ops::vm::list(&daemon.home)?;
    for vm in &mut vms {
        vm.last_report = last_report(&daemon.home, &vm.name);
    }
    let usage =
        vms.iter().filter_map(|vm| ops::host::usage(&vm.name, vm.process.as_ref()?.pid)).collect();
    let book = BookFile::of(&daemon.home).read()?;
    Ok(Snapshot {
        host: host::look(daemon)?,
        bases: ops::base::list(&daemon.home)?,
        peers: book.peers().iter().map(Into::into).collect(),
        operations: daemon.operations.list(),
        usage,
        vms,
    })
}

/// Lists do without it, as it may be long.
fn last_report(home: &Home, vm: &str) -> Option<serde_json::Value> {
    read_json(&home.vm(&vm.parse().ok()?).report()).ok()
}
