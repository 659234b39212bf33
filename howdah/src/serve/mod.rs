//! `howdah serve`: the daemon of a cloudlet.
//!
//! ```text
//! HOME/api.sock ─► socket ─► routes ─► ops ─► HOME/vms/*/control.sock ─► processes of VMs
//!                               │
//!                               └─► operations (threads) ─► events ─► /v1/events
//! ```
//!
//! It holds no guest and no state that matters: VMs outlive it, and what it knows it reads from their
//! directories. Only here code is async; what is done is done by blocking verbs ([`crate::ops`]), on threads
//! where they hold nobody up.

mod answer;
mod daemon;
mod operations;
mod routes;
mod socket;
mod watch;

use std::{os::unix::ffi::OsStrExt, path::PathBuf, sync::Arc};

use howdah_api::SOCKET;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::ServeArgs,
    failure::{Exit, Failure},
    home::Home,
    lock::Lock,
    output::Output,
};
use daemon::Daemon;

/// Held by the daemon of a home.
const LOCK: &str = "api.lock";
/// Threads that speak HTTP; what blocks has its own.
const WORKERS: usize = 2;
/// Threads on which requests block.
const MAX_BLOCKING: usize = 128;

/// Runs the daemon until it is told to end.
pub(crate) fn run(args: ServeArgs, home: &Home, output: Output, verbose: u8) -> anyhow::Result<()> {
    home.create()?;
    let _lock = alone(home)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(MAX_BLOCKING)
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(args, home, output, verbose));
    // What still blocks is left alone: VMs do not depend on it.
    runtime.shutdown_background();
    served
}

/// Takes the home for this daemon.
fn alone(home: &Home) -> Result<Lock, Failure> {
    let path = home.root().join(LOCK);
    let lock = Lock::take(&path).map_err(|e| Failure::file("lock", &path, &e))?;
    lock.ok_or_else(|| {
        let what = format!("daemon of {}", home.root().display());
        let way_out = "stop that first, or name another directory with --home";
        Failure::new(Exit::Conflict, what, "one runs already", way_out)
    })
}

async fn serve(args: ServeArgs, home: &Home, output: Output, verbose: u8) -> anyhow::Result<()> {
    let path = args.socket.clone().unwrap_or_else(|| home.root().join(SOCKET));
    let daemon = Daemon::new(home.clone(), verbose, args.jail.clone());
    let listener = socket::bind(&path, args.socket_mode)?;
    end_at_signals(&daemon)?;
    tokio::spawn(watch::run(Arc::clone(&daemon)));
    let router = routes::router(Arc::clone(&daemon));
    say_ready(&path, output);
    socket::serve(listener, router, daemon).await;
    remove(&path);
    Ok(())
}

/// SIGTERM and SIGINT end the daemon, when what is being answered is answered.
fn end_at_signals(daemon: &Arc<Daemon>) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            signals.recv().await;
            let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
            daemon.stop();
        });
    }
    Ok(())
}

fn say_ready(path: &PathBuf, output: Output) {
    output.note(&format!("howdah: serving at {}", path.display()));
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
}

/// Removes the socket: a tidy directory says more.
fn remove(path: &PathBuf) {
    debug_assert!(!path.as_os_str().as_bytes().is_empty());
    let _ = std::fs::remove_file(path);
}
