//! The server in the guest.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use thiserror::Error;

use super::{Reading, Water};
use crate::{
    Progress,
    frame::{Frame, Kind, Reader},
};

/// Connections at once; each costs a thread and half a megabyte.
const MAX_CONNECTIONS: usize = 16;
/// A connection on which nothing comes for so long is closed. Longer than any handoff that a
/// client waits through.
const SILENCE: Duration = Duration::from_secs(3600);
const READ_BYTES: usize = 64 << 10;

/// Why the server does not serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

/// Fluids for those who connect, each with one of its own.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connections: AtomicUsize,
    answered: AtomicU64,
    progress: Option<Progress>,
}

impl Server {
    /// Listens; notes in `progress` how many requests it has answered.
    pub fn bind(address: SocketAddr, progress: Option<Progress>) -> Result<Self, ServeError> {
        let listener =
            TcpListener::bind(address).map_err(|source| ServeError::Listen { address, source })?;
        let shared =
            Shared { connections: AtomicUsize::new(0), answered: AtomicU64::new(0), progress };
        Ok(Self { listener, shared: Arc::new(shared) })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves for as long as the process lives.
    pub fn run(self) -> ! {
        loop {
            match self.listener.accept() {
                Ok((stream, peer)) => self.welcome(stream, peer),
                Err(error) => {
                    eprintln!("howdah-app: cannot take a connection: {error}");
                    // Out of descriptors, say: those in use are given back in time.
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn welcome(&self, stream: TcpStream, peer: SocketAddr) {
        if self.shared.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            eprintln!("howdah-app: {peer} is turned away: {MAX_CONNECTIONS} are connected");
            return;
        }
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            if let Err(error) = converse(&stream, &shared) {
                eprintln!("howdah-app: the connection of {peer} is over: {error}");
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Answers the requests of a connection until it ends.
fn converse(mut stream: &TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let (mut reader, mut water) = (Reader::default(), Water::default());
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        reader.push(buffer.get(..length).unwrap_or_default());
        while let Some(request) = reader.next_frame().map_err(io::Error::other)? {
            let answer = answer(&mut water, request).encode().map_err(io::Error::other)?;
            stream.write_all(&answer)?;
            let answered = shared.answered.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(progress) = &shared.progress {
                progress.note(answered)?;
            }
        }
    }
}

fn answer(water: &mut Water, request: Frame) -> Frame {
    let Frame { kind, seq, sent_ns, payload } = request;
    let reading = match kind {
        Kind::Request => Reading::decode(&payload).map_err(|error| error.to_string()),
        Kind::Answer | Kind::Failure => Err("this is the server: it takes requests".to_owned()),
    };
    match reading {
        Ok(reading) => {
            let payload = water.frame(reading).encode();
            Frame { kind: Kind::Answer, seq, sent_ns, payload }
        }
        Err(problem) => Frame { kind: Kind::Failure, seq, sent_ns, payload: problem.into_bytes() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_request_is_told_so_and_the_water_stands_still() {
        let mut water = Water::default();
        let request =
            |kind, payload: &[u8]| Frame { kind, seq: 5, sent_ns: 6, payload: payload.into() };
        let good = Reading([0.0, 0.0, 1.0]).encode();
        for bad in [request(Kind::Request, b"?"), request(Kind::Answer, &good)] {
            let answer = answer(&mut water, bad);
            assert_eq!((answer.kind, answer.seq, answer.sent_ns), (Kind::Failure, 5, 6));
        }
        let answer = answer(&mut water, request(Kind::Request, &good));
        let picture = super::super::Picture::decode(&answer.payload).unwrap();
        assert_eq!((answer.kind, picture.frame), (Kind::Answer, 1));
    }
}
