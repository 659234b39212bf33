//! Frames over blocking byte streams.

use std::{
    io::{self, IoSlice, Read, Write},
    sync::Arc,
};

use super::{
    Decoder, Frame, Torn, WireError,
    decode::{encode_rest_head, encode_segment_head},
    encode,
};
use crate::{link::is_tick, stage::Segment};

/// Bytes asked for in one read.
const READ_BYTES: usize = 64 << 10;
/// A frame that is written whole waits for room for so many ticks in a row: ten seconds.
const MOST_TICKS: u32 = 100;

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The peer closed the link.
    #[error("the peer closed the link{}", if *.mid_frame { " in the middle of a frame" } else { "" })]
    Closed {
        /// Whether part of a frame had come.
        mid_frame: bool,
    },
    /// The link broke.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
    /// What came is not a frame.
    #[error("the peer does not follow the protocol: {0}")]
    Wire(#[from] WireError),
}

/// Reads frames from a stream and counts its bytes.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
    scratch: Vec<u8>,
    bytes: u64,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, decoder: Decoder::default(), scratch: vec![0; READ_BYTES], bytes: 0 }
    }

    /// The next frame, or `None` when the stream had nothing within its tick.
    pub fn read_frame(&mut self) -> Result<Option<Frame>, ReadError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match self.stream.read(&mut self.scratch) {
                Ok(0) => {
                    return Err(ReadError::Closed { mid_frame: self.decoder.is_mid_frame() });
                }
                Ok(n) => {
                    self.bytes += n as u64;
                    self.decoder.feed(self.scratch.get(..n).unwrap_or_default());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_tick(&e) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// What the stream left of a segment, if it ended in one.
    pub fn into_torn(self) -> Torn {
        self.decoder.into_torn()
    }

    /// The stream, from behind the last frame that was read.
    pub fn into_stream(self) -> io::Chain<io::Cursor<Vec<u8>>, R> {
        io::Cursor::new(self.decoder.into_rest()).chain(self.stream)
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Writes one frame whole and returns its length on the wire. `scratch` is reused between calls.
pub fn write_frame(
    stream: &mut impl Write,
    frame: &Frame,
    scratch: &mut Vec<u8>,
) -> io::Result<u64> {
    scratch.clear();
    encode(frame, scratch).map_err(unfit)?;
    write_whole(stream, scratch)?;
    stream.flush()?;
    Ok(scratch.len() as u64)
}

/// Writes all of `bytes`, waiting for room for a bounded time.
fn write_whole(stream: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    let mut ticks = 0;
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(taken) => {
                bytes = bytes.get(taken..).unwrap_or_default();
                ticks = 0;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_tick(&e) && ticks < MOST_TICKS => ticks += 1,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes frames piece by piece, so that its owner can look at other things in between. A segment's
/// payload goes out from where it is.
#[derive(Debug, Default)]
pub struct FrameWriter {
    /// A small frame, or what comes before the payload.
    head: Vec<u8>,
    segment: Option<Arc<Segment>>,
    /// Where in its payload the frame begins.
    payload_from: usize,
    written: usize,
}

impl FrameWriter {
    /// Bytes of the present frame that are not written.
    pub fn left(&self) -> usize {
        self.head.len() + self.payload().len() - self.written
    }

    fn payload(&self) -> &[u8] {
        let payload = self.segment.as_ref().map_or(&[][..], |segment| &segment.payload);
        payload.get(self.payload_from..).unwrap_or_default()
    }

    /// Whether the present frame is a segment's.
    pub fn is_segment(&self) -> bool {
        self.segment.is_some()
    }

    /// Begins with a frame. What was left of the one before is dropped.
    pub fn put(&mut self, frame: &Frame) -> io::Result<()> {
        self.clear();
        encode(frame, &mut self.head).map_err(unfit)
    }

    /// Begins with the frame of a segment.
    pub fn put_segment(&mut self, segment: Arc<Segment>) -> io::Result<()> {
        self.clear();
        encode_segment_head(&segment, &mut self.head).map_err(unfit)?;
        self.segment = Some(segment);
        Ok(())
    }

    /// Begins with the frame of what follows the first `from` bytes of a segment's encoding.
    pub fn put_rest(&mut self, segment: Arc<Segment>, from: usize) -> io::Result<()> {
        self.clear();
        self.payload_from = encode_rest_head(&segment, from, &mut self.head).map_err(unfit)?;
        self.segment = Some(segment);
        Ok(())
    }

    fn clear(&mut self) {
        self.head.clear();
        self.segment = None;
        self.payload_from = 0;
        self.written = 0;
    }

    /// Writes a piece of no more than `most` bytes; how many were taken, none if there was no room
    /// for any within the transport's tick.
    pub fn write(&mut self, stream: &mut impl Write, most: usize) -> io::Result<usize> {
        let payload = self.payload();
        let head = self.head.get(self.written..).unwrap_or_default();
        let from = self.written.saturating_sub(self.head.len());
        let rest = payload.get(from..).unwrap_or_default();
        let head = head.get(..most).unwrap_or(head);
        let rest = rest.get(..most - head.len()).unwrap_or(rest);
        let taken = match stream.write_vectored(&[IoSlice::new(head), IoSlice::new(rest)]) {
            Ok(0) if head.len() + rest.len() > 0 => return Err(io::ErrorKind::WriteZero.into()),
            Ok(taken) => taken,
            Err(e) if e.kind() == io::ErrorKind::Interrupted || is_tick(&e) => 0,
            Err(e) => return Err(e),
        };
        self.written += taken;
        if self.left() == 0 {
            self.clear();
            stream.flush()?;
        }
        Ok(taken)
    }
}

fn unfit(error: WireError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
