//! Peers that are not `howdah receive`.

use std::{
    net::{SocketAddr, TcpListener},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use handoff::{
    Refusal,
    wire::{Frame, FrameReader, VERSION_MAX, write_frame},
};

use super::product::PORT;
use crate::scenario::Side;

/// How long the stranger waits to be called.
const PATIENCE: Duration = Duration::from_secs(60);

/// A peer of the next protocol version, which refuses the first handoff that it is offered.
pub(crate) struct LaterVersion(JoinHandle<Result<()>>);

impl LaterVersion {
    /// Listens where the cloudlet's `howdah receive` would.
    pub(crate) fn listen(side: Side) -> Result<Self> {
        let address = SocketAddr::from((side.address(), PORT));
        let listener = side.namespace().within(|| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
        })?;
        listener.set_nonblocking(true)?;
        Ok(Self(thread::spawn(move || refuse_one(&listener))))
    }

    /// Waits until it has refused.
    pub(crate) fn finish(self) -> Result<()> {
        self.0.join().map_err(|_| anyhow!("the peer of another version panicked"))?
    }
}

fn refuse_one(listener: &TcpListener) -> Result<()> {
    let started = Instant::now();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) if started.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error).context("nobody called the peer of another version"),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let theirs = match FrameReader::new(&stream).read_frame()? {
        Some(Frame::Hello(hello)) => hello.versions.max,
        Some(other) => bail!("a handoff began with {}", other.name()),
        None => bail!("a handoff began with silence"),
    };
    let refusal = Refusal::Version { ours: VERSION_MAX + 1, theirs };
    write_frame(&mut &stream, &Frame::Refuse(refusal), &mut Vec::new())?;
    Ok(())
}
