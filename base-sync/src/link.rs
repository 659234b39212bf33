//! Messages over byte streams that have ticks.

use std::{
    io::{self, Read, Write},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use crate::wire::{MAX_FRAME_BYTES, Message, SyncError};

/// How long nothing may come or go: the other side may be busy with its disk meanwhile. That its host
/// lives is for the transport to watch.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long, and for how many bytes, a side that was told no is listened to.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 32 << 20;
const LENGTH_BYTES: usize = 4;

/// Both directions of a link. A read or write that finds nothing to do may say `WouldBlock` or `TimedOut`
/// from time to time: then it is looked whether somebody cancelled.
pub struct Link<'a, R, W> {
    rx: R,
    tx: W,
    cancel: &'a AtomicBool,
    frame: Vec<u8>,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Bytes that were received.
    pub received_bytes: u64,
}

impl<'a, R: Read, W: Write> Link<'a, R, W> {
    /// Over these streams, until `cancel` becomes true.
    pub fn new(rx: R, tx: W, cancel: &'a AtomicBool) -> Self {
        Self { rx, tx, cancel, frame: Vec::new(), sent_bytes: 0, received_bytes: 0 }
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), SyncError> {
        self.frame.clear();
        self.frame.extend_from_slice(&[0; LENGTH_BYTES]);
        let unfit = |what| SyncError::Link(io::Error::new(io::ErrorKind::InvalidInput, what));
        postcard::to_io(message, &mut self.frame).map_err(|_| unfit("it cannot be encoded"))?;
        let length = self.frame.len() - LENGTH_BYTES;
        if length > MAX_FRAME_BYTES {
            return Err(unfit("a message is too long"));
        }
        self.frame[..LENGTH_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
        let (mut at, mut since) = (0, Instant::now());
        while at < self.frame.len() {
            match self.tx.write(self.frame.get(at..).unwrap_or_default()) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(taken) => (at, since) = (at + taken, Instant::now()),
                Err(error) => self.waiting(error, since)?,
            }
        }
        self.sent_bytes += at as u64;
        Ok(self.tx.flush()?)
    }

    /// Receives the next message. What the other side refuses with comes as an error.
    pub(crate) fn receive(&mut self) -> Result<Message, SyncError> {
        // Where data comes without a pause there are no ticks.
        self.check()?;
        let mut length = [0; LENGTH_BYTES];
        self.fill(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(SyncError::Protocol("a message is longer than it may be"));
        }
        let mut frame = std::mem::take(&mut self.frame);
        frame.resize(length, 0);
        let filled = self.fill(&mut frame);
        let message = filled.map(|()| postcard::take_from_bytes(&frame));
        let message = message.map(|m| m.map(|(message, rest)| (message, rest.is_empty())));
        // Its room is used again.
        self.frame = frame;
        match message? {
            Ok((Message::No(no), true)) => Err(SyncError::Refused(no)),
            Ok((message, true)) => Ok(message),
            _ => Err(SyncError::Protocol("a message is none")),
        }
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<(), SyncError> {
        let (mut at, mut since) = (0, Instant::now());
        while at < into.len() {
            match self.rx.read(into.get_mut(at..).unwrap_or_default()) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => (at, since) = (at + read, Instant::now()),
                Err(error) => self.waiting(error, since)?,
            }
        }
        self.received_bytes += at as u64;
        Ok(())
    }

    /// Whether to try again after an error.
    fn waiting(&self, error: io::Error, since: Instant) -> Result<(), SyncError> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        if !matches!(error.kind(), Interrupted | TimedOut | WouldBlock) {
            return Err(error.into());
        }
        self.check()?;
        if since.elapsed() < PATIENCE {
            return Ok(());
        }
        let what = "nothing came or went for five minutes";
        Err(io::Error::new(io::ErrorKind::TimedOut, what).into())
    }

    /// Reads what the other side still says, within bounds, until it hangs up: closing a link with bytes
    /// unread may destroy what was said last.
    pub(crate) fn linger(&mut self) {
        let (since, mut heard) = (Instant::now(), 0);
        self.frame.resize(MAX_FRAME_BYTES, 0);
        while since.elapsed() < LINGER && heard < LINGER_BYTES {
            match self.rx.read(&mut self.frame) {
                Ok(0) => return,
                Ok(read) => heard += read,
                Err(error) => match self.waiting(error, since) {
                    Ok(()) => {}
                    Err(_) => return,
                },
            }
        }
    }

    /// The half that sends.
    #[cfg(test)]
    pub(crate) fn into_tx(self) -> W {
        self.tx
    }

    /// Whether somebody cancelled.
    pub(crate) fn check(&self) -> Result<(), SyncError> {
        if self.cancel.load(Ordering::Relaxed) { Err(SyncError::Cancelled) } else { Ok(()) }
    }
}
