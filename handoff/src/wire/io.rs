//! Frames over blocking byte streams.

use std::io::{self, Read, Write};

use super::{Decoder, Frame, WireError, encode};

/// Bytes asked for in one read.
const READ_BYTES: usize = 64 << 10;

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
                Err(e) => match e.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Ok(None),
                    _ => return Err(e.into()),
                },
            }
        }
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
    encode(frame, scratch).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    stream.write_all(scratch)?;
    stream.flush()?;
    Ok(scratch.len() as u64)
}
