//! What a link really carries: one TCP connection sends through it as fast as it can, for a while.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use super::net::Network;
use crate::scenario::{Link, Side};

const PORT: u16 = 5201;
/// How long is sent.
const SENDS: Duration = Duration::from_secs(4);
/// What comes before that is left out: the connection is still finding its rate.
const WARM_UP: Duration = Duration::from_millis(1500);
/// How long either end waits for the other.
const PATIENCE: Duration = Duration::from_secs(30);
const PIECE_BYTES: usize = 64 << 10;
/// How a connection ends whose other end has gone.
const ENOUGH: [ErrorKind; 2] = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];

/// Bytes of payload a second from A to B over a link that is shaped so, with nothing else on it.
pub(crate) fn measure(link: Link) -> Result<f64> {
    let _network = Network::build(link)?;
    let address = SocketAddr::from((Side::B.address(), PORT));
    let listener = Side::B.namespace().within(|| {
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
    })?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener));
        let sent = Side::A.namespace().within(|| send(address));
        if sent.is_err() {
            // It waits for a connection that will not come.
            let _ = Side::B.namespace().within(|| Ok(TcpStream::connect(address)?));
        }
        let received = receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        sent.context("sending through the link")?;
        received.context("receiving from the link")
    })
}

fn send(to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let piece = vec![0x5a; PIECE_BYTES];
    let started = Instant::now();
    while started.elapsed() < SENDS {
        match stream.write_all(&piece) {
            Ok(()) => {}
            // The receiver has seen enough; what was still on its way is of no interest.
            Err(error) if ENOUGH.contains(&error.kind()) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn receive(listener: &TcpListener) -> Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut arrivals = Arrivals::default();
    let started = Instant::now();
    loop {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => arrivals.take(started.elapsed(), count as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        // What is still in queues would come at the same rate.
        if started.elapsed() > SENDS {
            break;
        }
    }
    arrivals.rate()
}

/// What came after the warm-up.
#[derive(Debug, Default)]
struct Arrivals {
    first: Option<Duration>,
    last: Duration,
    bytes: u64,
}

impl Arrivals {
    fn take(&mut self, at: Duration, bytes: u64) {
        if at < WARM_UP {
            return;
        }
        // The first piece began to come before it is counted.
        if self.first.is_none() {
            self.first = Some(at);
        } else {
            self.bytes += bytes;
        }
        self.last = at;
    }

    fn rate(&self) -> Result<f64> {
        let took = self.first.map(|first| self.last.saturating_sub(first).as_secs_f64());
        match took {
            Some(took) if took > 0.1 => Ok(self.bytes as f64 / took),
            _ => bail!("too little came through the link to tell its rate"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_after_the_warm_up() {
        let mut arrivals = Arrivals::default();
        for ms in (0..1500).step_by(10) {
            arrivals.take(Duration::from_millis(ms), 1 << 20);
        }
        assert!(arrivals.rate().is_err());
        for ms in (1500..=3500).step_by(10) {
            arrivals.take(Duration::from_millis(ms), 12_500);
        }
        assert_eq!(arrivals.rate().unwrap().round(), 1_250_000.0);
    }
}
