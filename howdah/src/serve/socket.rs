//! The Unix socket, and serving connections until the daemon is to end.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::{
    Request,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};

use super::{access::Caller, daemon::Daemon};
use crate::{
    control::channel::with_socket_path,
    failure::{Exit, Failure},
};

/// Connections that are open at once.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// How long a client may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests that are being answered may take when the daemon is to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Listens at `path`. The caller holds the daemon's lock, so a socket that is there is left over from
/// one that died.
pub(super) fn bind(
    path: &Path,
    mode: u32,
    group: Option<&str>,
) -> Result<tokio::net::UnixListener, Failure> {
    let failed = |e: io::Error| Failure::file("listen on", path, &e);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        let way_out = "name a file in a directory";
        return Err(Failure::new(Exit::Usage, path.display(), "no socket can be there", way_out));
    };
    fs::create_dir_all(dir).map_err(failed)?;
    // Bound under another name: nobody connects before it has its mode, and it replaces what is there.
    let draft = format!(".{name}.new");
    match fs::remove_file(dir.join(&draft)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = with_socket_path(dir, &draft, |p| UnixListener::bind(p)).map_err(failed)?;
    if let Some(group) = group {
        give_to(&dir.join(&draft), group)?;
    }
    let made = fs::set_permissions(dir.join(&draft), fs::Permissions::from_mode(mode))
        .and_then(|()| fs::rename(dir.join(&draft), path))
        .and_then(|()| listener.set_nonblocking(true));
    made.map_err(failed)?;
    tokio::net::UnixListener::from_std(listener).map_err(failed)
}

fn give_to(path: &Path, group: &str) -> Result<(), Failure> {
    let found = nix::unistd::Group::from_name(group).ok().flatten().ok_or_else(|| {
        let way_out = "make it (`groupadd`), or name another in api.socket_group";
        Failure::new(Exit::NotFound, format!("group {group}"), "there is none", way_out)
    })?;
    nix::unistd::chown(path, None, Some(found.gid))
        .map_err(|e| Failure::file("give to the group", path, &e.into()))
}

/// A connection.
pub(super) struct Incoming<S> {
    pub(super) stream: S,
    /// Who is at its other end.
    pub(super) caller: Caller,
    /// What is held as long as it is open.
    pub(super) held: Option<Box<dyn Send>>,
}

/// Something that connections come from.
pub(super) trait Accept: Send + 'static {
    /// What is read and written.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next one.
    fn next(&mut self) -> impl Future<Output = io::Result<Incoming<Self::Stream>>> + Send;
}

impl Accept for tokio::net::UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&mut self) -> io::Result<Incoming<Self::Stream>> {
        let (stream, _) = self.accept().await?;
        Ok(Incoming { stream, caller: Caller::Operator, held: None })
    }
}

/// Serves what `listener` brings, `most` connections at once, until the daemon is to end; and then what is
/// being answered.
pub(super) async fn serve(
    mut listener: impl Accept,
    most: usize,
    router: Router,
    daemon: Arc<Daemon>,
) {
    let open = Arc::new(Semaphore::new(most));
    let graceful = GracefulShutdown::new();
    loop {
        // Whoever comes when all places are taken waits in the listener's backlog.
        let Ok(place) = Arc::clone(&open).acquire_owned().await else { break };
        let incoming = tokio::select! {
            incoming = listener.next() => incoming,
            () = daemon.stopped() => break,
        };
        let Incoming { stream, caller, held } = match incoming {
            Ok(incoming) => incoming,
            Err(error) => {
                // Out of descriptors, most likely: let some connections end.
                tracing::warn!("a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answering = TowerToHyperService::new(router.clone());
        let service = service_fn(move |mut request: Request<_>| {
            request.extensions_mut().insert(caller.clone());
            answering.call(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection: {error}");
            }
            drop((place, held));
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were not answered within {DRAIN_TIMEOUT:?}");
    }
}
