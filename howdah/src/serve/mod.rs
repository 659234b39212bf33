//! `howdah serve`: the daemon of a cloudlet.
//!
//! ```text
//! HOME/api.sock ─► socket ─► access ─► routes ─► ops ─► HOME/vms/*/control.sock ─► processes of VMs
//! --api-listen ─► door ──┘               │
//!                                        └─► operations (threads) ─► events ─► /v1/events
//! ```
//!
//! It holds no guest and no state that matters: VMs outlive it, and what it knows it reads from their
//! directories. Only here code is async; what is done is done by blocking verbs ([`crate::ops`]), on threads
//! where they hold nobody up.

mod access;
mod adopt;
mod answer;
mod daemon;
mod door;
mod keys;
mod operations;
mod routes;
mod socket;
mod watch;

use std::sync::Arc;

use howdah_api::SOCKET;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    cli::{ServeArgs, Settings},
    config,
    failure::{Exit, Failure},
    home::Home,
    lock::Lock,
    net,
    output::Output,
    peers::{Peer, Right},
    receive, spawn,
};
use daemon::Daemon;

/// Held by the daemon of a home.
const LOCK: &str = "api.lock";
/// Threads that speak HTTP; what blocks has its own.
const WORKERS: usize = 2;
/// Threads on which requests block.
const MAX_BLOCKING: usize = 128;

/// Runs the daemon until it is told to end.
pub(crate) fn run(
    args: &ServeArgs,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let (settings, _) = config::resolve(args, home)?;
    home.create()?;
    let _lock = alone(home)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(MAX_BLOCKING)
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(&settings, home, output, verbose));
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

async fn serve(
    settings: &Settings,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let path = settings.api_socket.clone().unwrap_or_else(|| home.root().join(SOCKET));
    let daemon = Daemon::new(home.clone(), verbose, settings.jail());
    let group = settings.api_socket_group.as_deref();
    let listener = socket::bind(&path, settings.api_socket_mode, group)?;
    end_at_signals(&daemon)?;
    tokio::spawn(watch::run(Arc::clone(&daemon)));
    tokio::spawn(adopt::run(Arc::clone(&daemon)));
    tokio::spawn(reap(signal(SignalKind::child())?));
    net::keep(home);
    receive(settings, &daemon, output)?;
    let router = routes::router(Arc::clone(&daemon));
    let peers = listen(settings, &daemon, output)?;
    output.note(&format!("howdah: serving at {}", path.display()));
    notify(NotifyState::Ready);
    let here =
        socket::serve(listener, socket::MAX_CONNECTIONS, router.clone(), Arc::clone(&daemon));
    match peers {
        Some(peers) => {
            tokio::join!(here, socket::serve(peers, door::MAX_LINKS, router, daemon));
        }
        None => here.await,
    }
    // A tidy directory says more.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Listens for peers that use the API, if that is wanted.
fn listen(
    settings: &Settings,
    daemon: &Arc<Daemon>,
    output: Output,
) -> Result<Option<door::Admission>, Failure> {
    let Some(address) = settings.api_listen else { return Ok(None) };
    let (address, peers) = door::open(address, &daemon.home)?;
    // Once: there is one listener.
    let _ = daemon.listening.set(address);
    let everywhere = if address.ip().is_unspecified() { ", on all interfaces" } else { "" };
    output.note(&format!("howdah: serving peers at {address}{everywhere}"));
    let may = |peer: &Peer| peer.check(Right::Observe).is_ok();
    if !daemon.book.read()?.peers().iter().any(may) {
        output.note(
            "howdah: no peer may use the API; `howdah peer add NAME KEY --may observe` (or operate) lets \
             one, also while this listens",
        );
    }
    Ok(Some(peers))
}

/// Listens for peers, if that is wanted; what happens is told to those who follow, and logged.
fn receive(settings: &Settings, daemon: &Arc<Daemon>, output: Output) -> anyhow::Result<()> {
    let Some(args) = settings.receive() else { return Ok(()) };
    let plain = args.plain;
    let shared = Arc::clone(daemon);
    let tell = move |event: &receive::Event| {
        event.tell(output);
        let what = serde_json::to_value(event).unwrap_or_default();
        shared.tell(howdah_api::Event::Receive { what });
        shared.vms_changed();
    };
    let address = receive::start(args, &daemon.home, output, daemon.verbose, Arc::new(tell))?;
    // Once: there is one listener.
    let _ = daemon.receiving.set(howdah_api::Receiving { address: address.to_string(), plain });
    Ok(())
}

/// SIGTERM and SIGINT end the daemon, when what is being answered is answered.
fn end_at_signals(daemon: &Arc<Daemon>) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            signals.recv().await;
            notify(NotifyState::Stopping);
            daemon.stop();
        });
    }
    Ok(())
}

/// Lets go of processes of VMs that have ended.
async fn reap(mut ended: Signal) {
    while ended.recv().await.is_some() {
        let _ = tokio::task::spawn_blocking(spawn::reap).await;
    }
}

/// Tells whoever started the daemon, if that is systemd.
fn notify(state: NotifyState) {
    if let Err(error) = sd_notify::notify(false, &[state]) {
        tracing::warn!("systemd is not told: {error}");
    }
}
