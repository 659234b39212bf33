//! The API for peers: TLS, then who it is and whether it may, and only then HTTP.
//!
//! ```text
//! --api-listen ─► quota ─► handshake ─► key, rights ─► bounds of peers ─► HTTP, rights again at each request
//!                 └──────────── strangers, on threads ───────────────┘
//! ```
//!
//! Who is not let in is told so in an answer that is the same whatever it asks: nothing of it is parsed.

use std::{
    collections::HashMap,
    io::{self, Read},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use handoff::{
    Clock, Transport,
    tcp::{MonotonicClock, TcpLink},
    tls::{Handshake, PeerKey, Speech},
};
use howdah_api::PROBLEM_TYPE;
use tokio::sync::mpsc;

use super::{
    access::Caller,
    answer::problem,
    socket::{Accept, Incoming},
};
use crate::{
    failure::{Exit, Failure, one_line},
    home::Home,
    peers::{
        Gate, Peer, Place, Quota, QuotaLimits, Refusals, Right, Stream, Turned, bind, last_word,
    },
};

/// Connections of peers that are open at once.
pub(super) const MAX_LINKS: usize = 64;
/// Of those, of one peer.
const MAX_LINKS_OF_PEER: usize = 16;
/// How long a caller that is told no may take to say something: before that it does not listen.
const FIRST_WORD: Duration = Duration::from_secs(2);
/// A peer's host that does not answer for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// Takes links, and lets peers in.
struct Door {
    gate: Gate,
    quota: Quota,
    refusals: Refusals,
    links: Links,
    clock: MonotonicClock,
    admitted: mpsc::Sender<Admitted>,
}

/// A peer that came in.
struct Admitted {
    tcp: TcpStream,
    done: Handshake,
    peer: Peer,
    held: Held,
}

/// What peers that came in come from.
pub(super) struct Admission {
    admitted: mpsc::Receiver<Admitted>,
}

/// Listens at `address` on threads of this process; where that is, and who comes in.
pub(super) fn open(address: SocketAddr, home: &Home) -> Result<(SocketAddr, Admission), Failure> {
    let listener = bind(address, "--api-listen")?;
    let address = listener.local_addr().map_or(address, |address| address);
    let (tell, admitted) = mpsc::channel(MAX_LINKS);
    let door = Arc::new(Door {
        gate: Gate::of(home)?,
        quota: Quota::new(QuotaLimits::DEFAULT),
        refusals: Refusals::default(),
        links: Links::default(),
        clock: MonotonicClock::default(),
        admitted: tell,
    });
    std::thread::spawn(move || take_links(&listener, &door));
    Ok((address, Admission { admitted }))
}

/// Takes links as they come, each on a thread of its own until it is known who calls.
fn take_links(listener: &TcpListener, door: &Arc<Door>) {
    loop {
        let taken = listener.accept().and_then(|(stream, address)| {
            let place = match door.quota.enter(address.ip(), door.clock.now()) {
                Ok(place) => place,
                Err(full) => {
                    door.refused(address, &full);
                    return Ok(());
                }
            };
            let working = Arc::clone(door);
            let work = move || working.link(stream, address, place);
            std::thread::Builder::new().name("api-link".into()).spawn(work).map(drop)
        });
        if let Err(error) = taken {
            // Out of descriptors or threads, most likely: let some links end.
            tracing::warn!("a link to the API could not be taken: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Door {
    fn link(&self, stream: TcpStream, address: SocketAddr, place: Place) {
        match self.admit(stream) {
            Ok(admitted) => {
                drop(place);
                // Nobody takes it any more when the daemon ends.
                let _ = self.admitted.blocking_send(admitted);
            }
            Err(turned) => self.refused(address, &turned),
        }
    }

    fn admit(&self, tcp: TcpStream) -> Result<Admitted, Turned> {
        let done = self.gate.shake(&tcp, Speech::Api)?;
        match self.may_come(done.peer) {
            Ok((peer, held)) => {
                // As for any link: whether its host is still there is found out.
                TcpLink::with_timeout(tcp.try_clone()?, SILENCE)?;
                Ok(Admitted { tcp, done, peer, held })
            }
            Err((status, turned)) => {
                self.tell(&tcp, done, status, &turned)?;
                Err(turned)
            }
        }
    }

    fn may_come(&self, key: PeerKey) -> Result<(Peer, Held), (StatusCode, Turned)> {
        let known = self.gate.known(key).map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, e.into()));
        let peer = known?.ok_or((StatusCode::FORBIDDEN, Turned::Unknown(key)))?;
        let may = peer.check(Right::Observe);
        may.map_err(|failure| (StatusCode::FORBIDDEN, Turned::Forbidden(failure)))?;
        match self.links.hold(key) {
            Some(held) => Ok((peer, held)),
            None => Err((StatusCode::SERVICE_UNAVAILABLE, Turned::Crowd(peer.name))),
        }
    }

    /// Says no. The caller hears it when it has asked something, of which nothing is looked at.
    fn tell(
        &self,
        tcp: &TcpStream,
        done: Handshake,
        status: StatusCode,
        turned: &Turned,
    ) -> io::Result<()> {
        let why = match turned {
            Turned::Unknown(key) => {
                format!("your key {key} is not known here; `howdah peer add` there lets it in")
            }
            other => other.to_string(),
        };
        let (mut tx, mut rx) = done.over(TcpLink::new(tcp.try_clone()?)?).split()?;
        let (begun, mut scratch) = (Instant::now(), [0; 1024]);
        while begun.elapsed() < FIRST_WORD {
            match rx.read(&mut scratch) {
                Err(e) if handoff::link::is_tick(&e) => {}
                _ => break,
            }
        }
        last_word(tcp, &mut tx, &no(status, &why));
        Ok(())
    }

    /// Tells the operator why a caller came to nothing, unless that was told lately.
    fn refused(&self, address: SocketAddr, why: &dyn std::fmt::Display) {
        let why = one_line(&why.to_string());
        if let Some(why) = self.refusals.line(address.ip(), &why, self.clock.now()) {
            tracing::warn!("API: {address}: {why}");
        }
    }
}

/// A whole answer that says no.
fn no(status: StatusCode, why: &str) -> Vec<u8> {
    let failure = Failure::line(Exit::Conflict, &format!("API: {why}"));
    let body = serde_json::to_string(&problem(status, &failure)).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {PROBLEM_TYPE}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

impl Accept for Admission {
    type Stream = Stream;

    async fn next(&mut self) -> io::Result<Incoming<Stream>> {
        let Some(Admitted { tcp, done, peer, held }) = self.admitted.recv().await else {
            // The thread that listens does not end before the daemon.
            return std::future::pending().await;
        };
        let caller = Caller::Peer { name: peer.name, key: peer.key };
        Ok(Incoming { stream: Stream::new(tcp, done)?, caller, held: Some(Box::new(held)) })
    }
}

/// Counts the links of peers.
#[derive(Clone, Debug, Default)]
struct Links(Arc<Mutex<HashMap<PeerKey, usize>>>);

/// One of them; no more when dropped.
#[derive(Debug)]
struct Held {
    links: Links,
    key: PeerKey,
}

impl Links {
    fn all(&self) -> MutexGuard<'_, HashMap<PeerKey, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another link of a peer, if there is room.
    fn hold(&self, key: PeerKey) -> Option<Held> {
        let mut all = self.all();
        if all.values().sum::<usize>() >= MAX_LINKS {
            return None;
        }
        let of_peer = all.entry(key).or_default();
        if *of_peer >= MAX_LINKS_OF_PEER {
            return None;
        }
        *of_peer += 1;
        Some(Held { links: self.clone(), key })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut all = self.links.all();
        if let Some(of_peer) = all.get_mut(&self.key) {
            *of_peer = of_peer.saturating_sub(1);
            if *of_peer == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use handoff::tls::Identity;

    use super::*;

    #[test]
    fn a_peer_leaves_room_for_others() {
        let links = Links::default();
        let [a, b] = [0; 2].map(|_| Identity::generate().unwrap().key());
        let held: Vec<_> = (0..MAX_LINKS_OF_PEER).map(|_| links.hold(a).unwrap()).collect();
        assert!(links.hold(a).is_none());
        let other = links.hold(b).unwrap();
        drop(held);
        drop(other);
        assert!(links.all().is_empty());
        let mut all = Vec::new();
        for _ in 0..MAX_LINKS / MAX_LINKS_OF_PEER {
            let key = Identity::generate().unwrap().key();
            all.extend((0..MAX_LINKS_OF_PEER).map(|_| links.hold(key).unwrap()));
        }
        assert!(links.hold(b).is_none(), "all together have a bound");
    }

    #[test]
    fn no_is_a_whole_answer() {
        let answer = String::from_utf8(no(StatusCode::FORBIDDEN, "a \"b\"")).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        let problem: howdah_api::Problem = serde_json::from_str(body).unwrap();
        assert_eq!((problem.status, problem.detail.as_str()), (403, "API: a \"b\""));
    }
}
