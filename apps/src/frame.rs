//! The protocol between a client and an application: frames over TCP.
//!
//! ```text
//!   offset  bytes
//!   0       4      length of what follows, big endian
//!   4       1      kind: 1 request, 2 answer, 3 failure (the payload is a message in UTF-8)
//!   5       8      the request's number, big endian; an answer repeats it
//!   13      8      when the request was sent, by the client's clock in ns; an answer repeats it
//!   21      ...    payload, at most 4 MiB
//! ```
//!
//! An application answers the requests of a connection in their order, each once.

use thiserror::Error;

/// The longest payload.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;

const LENGTH_BYTES: usize = 4;
/// Kind, number and time.
const FIXED_BYTES: usize = 1 + 8 + 8;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A client asks.
    Request,
    /// The application's answer.
    Answer,
    /// The application could not answer; the payload says why.
    Failure,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Answer => 2,
            Self::Failure => 3,
        }
    }

    fn of(byte: u8) -> Result<Self, FrameError> {
        match byte {
            1 => Ok(Self::Request),
            2 => Ok(Self::Answer),
            3 => Ok(Self::Failure),
            other => Err(FrameError::Kind(other)),
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The request's number.
    pub seq: u64,
    /// When the request was sent, by the client's clock.
    pub sent_ns: i64,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// Why bytes are no frame. The connection is of no use after that.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Longer or shorter than a frame can be.
    #[error("a frame of {0} bytes: use {FIXED_BYTES} to {max}", max = FIXED_BYTES + MAX_PAYLOAD_BYTES)]
    Length(usize),
    /// No such kind.
    #[error("a frame of kind {0}: 1 is a request, 2 an answer, 3 a failure")]
    Kind(u8),
}

impl Frame {
    /// The frame as it goes over the wire.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let length = FIXED_BYTES + self.payload.len();
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            return Err(FrameError::Length(length));
        }
        let mut bytes = Vec::with_capacity(LENGTH_BYTES + length);
        bytes.extend((length as u32).to_be_bytes());
        bytes.push(self.kind.byte());
        bytes.extend(self.seq.to_be_bytes());
        bytes.extend(self.sent_ns.to_be_bytes());
        bytes.extend(&self.payload);
        Ok(bytes)
    }
}

/// Takes bytes as they come and gives frames.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    /// What has been handed out already.
    taken: usize,
}

impl Reader {
    /// Adds what came.
    pub fn push(&mut self, bytes: &[u8]) {
        // Moved here and not for each frame: one frame takes many reads, few reads hold many.
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame, once all of it is there.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if !(FIXED_BYTES..=FIXED_BYTES + MAX_PAYLOAD_BYTES).contains(&length) {
            return Err(FrameError::Length(length));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let frame = decode(body)?;
        self.taken += LENGTH_BYTES + length;
        Ok(Some(frame))
    }
}

/// What follows the length.
fn decode(body: &[u8]) -> Result<Frame, FrameError> {
    let short = || FrameError::Length(body.len());
    let (kind, rest) = body.split_first().ok_or_else(short)?;
    let (seq, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (sent_ns, payload) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    Ok(Frame {
        kind: Kind::of(*kind)?,
        seq: u64::from_be_bytes(*seq),
        sent_ns: i64::from_be_bytes(*sent_ns),
        payload: payload.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let kind = prop_oneof![Just(Kind::Request), Just(Kind::Answer), Just(Kind::Failure)];
        (kind, any::<u64>(), any::<i64>(), prop::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(kind, seq, sent_ns, payload)| Frame { kind, seq, sent_ns, payload })
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            frames in prop::collection::vec(any_frame(), 0..6),
            cut in 1..50usize,
        ) {
            let wire: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().unwrap()).collect();
            let (mut reader, mut got) = (Reader::default(), Vec::new());
            for piece in wire.chunks(cut) {
                reader.push(piece);
                while let Some(frame) = reader.next_frame().unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn strange_bytes_are_refused_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Reader::default();
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_frame() {}
        }
    }

    #[test]
    fn lengths_and_kinds_have_bounds() {
        let error_of = |bytes: &[u8]| {
            let mut reader = Reader::default();
            reader.push(bytes);
            reader.next_frame().unwrap_err()
        };
        assert_eq!(error_of(&u32::MAX.to_be_bytes()), FrameError::Length(u32::MAX as usize));
        assert_eq!(error_of(&[0, 0, 0, 16]), FrameError::Length(16));
        let mut wire = vec![0, 0, 0, 17, 9];
        wire.extend([0; 16]);
        assert_eq!(error_of(&wire), FrameError::Kind(9));
        let payload = vec![0; MAX_PAYLOAD_BYTES + 1];
        let frame = Frame { kind: Kind::Request, seq: 0, sent_ns: 0, payload };
        assert!(frame.encode().is_err());
    }
}
