//! One connection to the daemon.

use std::{
    fmt,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// Where a daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// On this host, behind this Unix socket.
    Socket(PathBuf),
    /// Elsewhere: who it is, for people.
    Peer(String),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Peer(peer) => f.write_str(peer),
        }
    }
}

/// A connection to a daemon.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Makes connections to a daemon that is not on this host, private ones: this crate knows nothing of keys.
pub trait Dial: fmt::Debug + Send + Sync {
    /// A connection. Called where tokio runs, and may block.
    fn dial(&self) -> io::Result<Box<dyn Connection>>;

    /// Whom it dials, for people.
    fn peer(&self) -> String;
}

/// How connections are made.
#[derive(Clone, Debug)]
pub(super) enum Way {
    Socket(PathBuf),
    Dial(Arc<dyn Dial>),
}

impl Way {
    pub(super) fn at(&self) -> At {
        match self {
            Self::Socket(path) => At::Socket(path.clone()),
            Self::Dial(dial) => At::Peer(dial.peer()),
        }
    }

    /// Connects. Called where tokio runs.
    pub(super) fn connect(&self) -> io::Result<Box<dyn Connection>> {
        match self {
            Self::Socket(path) => {
                let stream = connect(path)?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(tokio::net::UnixStream::from_std(stream)?))
            }
            Self::Dial(dial) => dial.dial(),
        }
    }
}

/// Connects to the socket at `path`, however long that is.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it names no file"));
    };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    // Socket paths end at 108 bytes; a descriptor of the directory makes any of them short.
    let opened = File::open(dir)?;
    let short = Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short)
}

/// What drives a connection while its caller waits.
pub(super) fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Sends a request; the body of the answer is read by the caller, on the same runtime.
pub(super) async fn send(
    connection: Box<dyn Connection>,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, String> {
    let handshake = http1::handshake(TokioIo::new(connection)).await;
    let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(|e| e.to_string())
}
