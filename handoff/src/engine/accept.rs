//! The first frame of a link that came in.

use std::io;

use crate::{
    Clock, Refusal, Transport,
    ownership::{Record, answer},
    wire::{Frame, FrameReader, Hello, Intent, ReadError, write_frame},
};

use super::Limits;

/// A link whose Hello was read.
pub struct Incoming<L: Transport> {
    /// What the peer wants.
    pub hello: Hello,
    pub(super) tx: L::Tx,
    pub(super) reader: FrameReader<L::Rx>,
}

/// Why a link that came in is of no use.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// Nothing came in time.
    #[error("the peer connected and said nothing for {0:?}")]
    Silent(std::time::Duration),
    /// The link broke, or what came is not our protocol.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The link could not be used.
    #[error("cannot use the link: {0}")]
    Io(#[from] io::Error),
    /// The first frame was another.
    #[error("the peer began with {0} instead of Hello")]
    NotHello(&'static str),
}

/// Reads the Hello of a link that came in, within [`Limits::greeting`].
pub fn accept<L: Transport>(
    link: L,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Incoming<L>, AcceptError> {
    let (tx, rx) = link.split()?;
    let mut reader = FrameReader::new(rx);
    let deadline = clock.now() + limits.greeting;
    loop {
        match reader.read_frame()? {
            Some(Frame::Hello(hello)) => return Ok(Incoming { hello: *hello, tx, reader }),
            Some(other) => return Err(AcceptError::NotHello(other.name())),
            None if clock.now() >= deadline => return Err(AcceptError::Silent(limits.greeting)),
            None => {}
        }
    }
}

impl<L: Transport> Incoming<L> {
    /// Whether the peer begins a new handoff, to be given to [`super::receive()`]. Otherwise it
    /// goes on with one: give it to that one's `relinks`, or [`Incoming::settle`] it.
    pub fn is_new(&self) -> bool {
        self.hello.intent == Intent::New
    }

    /// Says no, and closes.
    pub fn refuse(mut self, refusal: Refusal) -> io::Result<()> {
        write_frame(&mut self.tx, &Frame::Refuse(refusal), &mut Vec::new()).map(drop)
    }

    /// Tells a peer that asks about a handoff which is over here how it ended, and closes.
    pub fn settle(mut self, record: Option<&Record>) -> io::Result<()> {
        let question = self.hello.handoff;
        let verdict = answer(record, question);
        let status = Frame::Status { question, verdict };
        write_frame(&mut self.tx, &status, &mut Vec::new()).map(drop)
    }
}
