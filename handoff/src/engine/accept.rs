//! The first frame of a link that came in.

use std::io;

use super::{Limits, settle::decline_lost_copy};
use crate::{
    Clock, Refusal, Transport,
    ownership::{
        Guest, Journal, JournalError, OwnershipError, Record, Verdict, answer,
        target::{self, Event, Say},
    },
    wire::{Call, Frame, FrameReader, Hello, ReadError, Resumed, write_frame},
};

/// Ticks or frames that a closing side waits for the peer to close first.
const LINGER_READS: u32 = 10;

/// A link whose Hello was read.
pub struct Incoming<L: Transport> {
    /// What the peer wants.
    pub hello: Hello,
    pub(super) tx: L::Tx,
    pub(super) reader: FrameReader<L::Rx>,
}

/// A link whose first frame was read.
pub enum Greeting<L: Transport> {
    /// It is of a handoff.
    Handoff(Incoming<L>),
    /// It is for something else.
    Call(IncomingCall<L>),
}

/// A link that is not of a handoff.
pub struct IncomingCall<L: Transport> {
    /// What the peer wants.
    pub call: Call,
    tx: L::Tx,
    reader: FrameReader<L::Rx>,
}

/// What a link's service reads from.
pub type CallRx<R> = io::Chain<io::Cursor<Vec<u8>>, R>;

impl<L: Transport> IncomingCall<L> {
    /// Says that the service begins, in this version, and gives it the link.
    pub fn take(mut self, version: u32) -> io::Result<(CallRx<L::Rx>, L::Tx)> {
        write_frame(&mut self.tx, &Frame::Called { version }, &mut Vec::new())?;
        Ok((self.reader.into_stream(), self.tx))
    }

    /// Says no, and closes.
    pub fn refuse(mut self, refusal: Refusal) -> io::Result<()> {
        write_frame(&mut self.tx, &Frame::Refuse(refusal), &mut Vec::new())?;
        linger(&mut self.reader);
        Ok(())
    }
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

/// Why a handoff that is over could not be settled with the peer that asked.
#[derive(Debug, thiserror::Error)]
pub enum SettleLinkError {
    /// The link broke.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
    /// The record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The peer's word contradicts the record.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
}

/// Reads the Hello of a link that came in, within [`Limits::greeting`].
pub fn accept<L: Transport>(
    link: L,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Incoming<L>, AcceptError> {
    match greet(link, limits, clock)? {
        Greeting::Handoff(incoming) => Ok(incoming),
        Greeting::Call(_) => Err(AcceptError::NotHello("Call")),
    }
}

/// Reads the first frame of a link that came in, within [`Limits::greeting`].
pub fn greet<L: Transport>(
    link: L,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Greeting<L>, AcceptError> {
    let (tx, rx) = link.split()?;
    let mut reader = FrameReader::new(rx);
    let deadline = clock.now() + limits.greeting;
    loop {
        match reader.read_frame()? {
            Some(Frame::Hello(hello)) => {
                return Ok(Greeting::Handoff(Incoming { hello: *hello, tx, reader }));
            }
            Some(Frame::Call(call)) => {
                return Ok(Greeting::Call(IncomingCall { call, tx, reader }));
            }
            Some(other) => return Err(AcceptError::NotHello(other.name())),
            None if clock.now() >= deadline => return Err(AcceptError::Silent(limits.greeting)),
            None => {}
        }
    }
}

impl<L: Transport> Incoming<L> {
    /// Whether the peer begins a new handoff, to be given to [`super::receive()`]. A link of a
    /// handoff that is under way, new or not, belongs to that one's `relinks`; any other is to be
    /// [settled](Incoming::settle).
    pub fn is_new(&self) -> bool {
        self.hello.offer().is_some()
    }

    /// Says no, and closes.
    pub fn refuse(mut self, refusal: Refusal) -> io::Result<()> {
        write_frame(&mut self.tx, &Frame::Refuse(refusal), &mut Vec::new())?;
        linger(&mut self.reader);
        Ok(())
    }

    /// Tells a peer that asks about a handoff which is over here how it ended, from a record that
    /// this process only reads, and closes.
    pub fn answer(mut self, record: Option<&Record>) -> io::Result<()> {
        let verdict = match answer(record, self.hello.handoff) {
            // That is for the process to say that committed: it may know that it never did.
            Verdict::Committed => Verdict::Pending,
            verdict => verdict,
        };
        self.say_verdict(verdict)?;
        linger(&mut self.reader);
        Ok(())
    }

    /// As [`Incoming::answer`], and takes note of what the peer says to that: that it aborted, or
    /// that it has let go. For the process that holds the journal.
    pub fn settle(
        mut self,
        journal: &mut Journal,
        limits: &Limits,
        clock: &dyn Clock,
    ) -> Result<(), SettleLinkError> {
        decline_lost_copy(journal)?;
        self.say_verdict(answer(journal.record(), self.hello.handoff))?;
        let deadline = clock.now() + limits.release;
        while clock.now() < deadline {
            let event = match self.reader.read_frame() {
                Ok(Some(Frame::Released(question))) => Event::Released(question),
                Ok(Some(Frame::Abort { handoff, .. })) => Event::Aborted(handoff),
                Ok(Some(Frame::Commit(commit))) => Event::Commit(commit.handoff),
                Ok(Some(_)) => return Ok(()),
                Ok(None) => continue,
                // The peer has heard enough.
                Err(_) => return Ok(()),
            };
            let over = !matches!(event, Event::Commit(_));
            let step = target::step(journal.record(), event)?;
            // Without a copy in memory nothing can be committed here: only words are repeated.
            if step.guest != Guest::Run {
                if let Some(record) = step.write {
                    journal.write(record)?;
                }
                self.say(step.say)?;
            }
            if over {
                return Ok(());
            }
        }
        Ok(())
    }

    fn say(&mut self, say: Option<Say>) -> io::Result<()> {
        let frame = match say {
            Some(Say::Declined(handoff, reason)) => Frame::Declined { handoff, reason },
            Some(Say::Resumed(handoff)) => Frame::Resumed(Resumed::untimed(handoff)),
            Some(Say::Prepared(..) | Say::Ask(_)) | None => return Ok(()),
        };
        write_frame(&mut self.tx, &frame, &mut Vec::new()).map(drop)
    }

    fn say_verdict(&mut self, verdict: Verdict) -> io::Result<()> {
        let status = Frame::Status { question: self.hello.handoff, verdict };
        write_frame(&mut self.tx, &status, &mut Vec::new()).map(drop)
    }
}

/// Lets the peer read what was said before the link is closed: closing with unread bytes on this side
/// may destroy it on its way.
fn linger<R: io::Read>(reader: &mut FrameReader<R>) {
    for _ in 0..LINGER_READS {
        if reader.read_frame().is_err() {
            return;
        }
    }
}
