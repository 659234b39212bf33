//! Frames to bytes and back.

use guest_images::BaseId;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Frame, HEADER_BYTES, Hello, Intent, MAGIC, MAGIC_CALL, MAX_CONTROL_BYTES, MAX_HELLO_BYTES,
    MAX_SEGMENT_BYTES, Prepare, Versions, Welcome,
    frame::{Call, HelloBody},
};
use crate::{
    Offer,
    ownership::MAX_TEXT_BYTES,
    stage::{SEGMENT_OVERHEAD, Segment, SegmentError},
    vm::{MAX_ALSO, MAX_KNOWN},
};

/// Why bytes from the peer are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A type byte that this version does not know.
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
    /// A length beyond what the type allows.
    #[error("frame type {kind:#04x} of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// The type byte.
        kind: u8,
        /// The length it claims.
        length: u64,
        /// The limit.
        limit: usize,
    },
    /// The first frame is something else than a Hello of this protocol.
    #[error("not a howdah peer: the link begins with {0:02x?}")]
    Magic([u8; 8]),
    /// A Segment frame whose body is none.
    #[error("malformed Segment frame: {0}")]
    Segment(#[from] SegmentError),
    /// The body ends too early, holds values that cannot be, or goes on after its end.
    #[error("malformed {name} frame: {what}")]
    Malformed {
        /// The message.
        name: &'static str,
        /// What is wrong.
        what: &'static str,
    },
}

impl WireError {
    fn malformed(name: &'static str, what: &'static str) -> Self {
        Self::Malformed { name, what }
    }
}

mod kind {
    pub(super) const HELLO: u8 = 0x01;
    pub(super) const WELCOME: u8 = 0x02;
    pub(super) const REFUSE: u8 = 0x03;
    pub(super) const WELCOME_BACK: u8 = 0x04;
    pub(super) const SEGMENT: u8 = 0x10;
    pub(super) const ACK: u8 = 0x11;
    pub(super) const REST: u8 = 0x12;
    pub(super) const PREPARE: u8 = 0x20;
    pub(super) const PREPARED: u8 = 0x21;
    pub(super) const DECLINED: u8 = 0x22;
    pub(super) const COMMIT: u8 = 0x23;
    pub(super) const RESUMED: u8 = 0x24;
    pub(super) const RELEASED: u8 = 0x25;
    pub(super) const ABORT: u8 = 0x26;
    pub(super) const PREPARE_EARLY: u8 = 0x27;
    pub(super) const PING: u8 = 0x30;
    pub(super) const PONG: u8 = 0x31;
    pub(super) const QUERY: u8 = 0x32;
    pub(super) const STATUS: u8 = 0x33;
    pub(super) const CALL: u8 = 0x40;
    pub(super) const CALLED: u8 = 0x41;
}

/// The longest body that a frame of this type may have.
fn limit(kind: u8) -> Result<usize, WireError> {
    match kind {
        kind::HELLO => Ok(MAX_HELLO_BYTES),
        kind::SEGMENT | kind::REST => Ok(MAX_SEGMENT_BYTES),
        kind::WELCOME
        | kind::WELCOME_BACK
        | kind::REFUSE
        | kind::ACK
        | kind::PREPARE..=kind::PREPARE_EARLY
        | kind::PING..=kind::STATUS
        | kind::CALL..=kind::CALLED => Ok(MAX_CONTROL_BYTES),
        unknown => Err(WireError::UnknownType(unknown)),
    }
}

/// Appends a segment's frame to `out`, but for the payload: that comes right behind.
pub(super) fn encode_segment_head(segment: &Segment, out: &mut Vec<u8>) -> Result<(), WireError> {
    put_header(kind::SEGMENT, segment.encoded_len(), out)?;
    segment.encode_head_into(out);
    Ok(())
}

/// Appends the header of the frame with what of a segment's encoding is behind its first `from`
/// bytes. What comes right behind is said: where in the payload it begins.
pub(super) fn encode_rest_head(
    segment: &Segment,
    from: usize,
    out: &mut Vec<u8>,
) -> Result<usize, WireError> {
    let malformed = WireError::malformed("Rest", "it begins before the payload or behind its end");
    let length = segment.encoded_len().checked_sub(from).ok_or(malformed.clone())?;
    let payload_from = from.checked_sub(SEGMENT_OVERHEAD).ok_or(malformed)?;
    put_header(kind::REST, length, out)?;
    Ok(payload_from)
}

fn put_header(kind: u8, length: usize, out: &mut Vec<u8>) -> Result<(), WireError> {
    let limit = limit(kind)?;
    let too_long = WireError::TooLong { kind, length: length as u64, limit };
    let short = u32::try_from(length).ok().filter(|_| length <= limit).ok_or(too_long)?;
    out.extend_from_slice(&short.to_le_bytes());
    out.push(kind);
    Ok(())
}

/// Appends the frame's bytes to `out`.
///
/// A frame that breaks a limit of its own type cannot be sent: an error, and `out` is unchanged.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) -> Result<(), WireError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let done = encode_body(frame, out).and_then(|kind| {
        let length = out.len() - start - HEADER_BYTES;
        let limit = limit(kind)?;
        match u32::try_from(length) {
            Ok(short) if length <= limit => {
                out[start..start + 4].copy_from_slice(&short.to_le_bytes());
                out[start + 4] = kind;
                Ok(())
            }
            _ => Err(WireError::TooLong { kind, length: length as u64, limit }),
        }
    });
    if done.is_err() {
        out.truncate(start);
    }
    done
}

fn encode_body(frame: &Frame, out: &mut Vec<u8>) -> Result<u8, WireError> {
    fn put<T: Serialize>(
        out: &mut Vec<u8>,
        name: &'static str,
        kind: u8,
        value: &T,
    ) -> Result<u8, WireError> {
        postcard::to_io(value, &mut *out)
            .map_err(|_| WireError::malformed(name, "cannot be encoded"))?;
        Ok(kind)
    }
    let name = frame.name();
    match frame {
        Frame::Hello(hello) => {
            out.extend_from_slice(&MAGIC);
            out.extend_from_slice(&hello.versions.min.to_le_bytes());
            out.extend_from_slice(&hello.versions.max.to_le_bytes());
            let (handoff, intent, audit) = (hello.handoff, hello.intent.clone(), hello.audit);
            let vm_name = hello.vm_name.clone();
            let body = HelloBody { handoff, vm_name, intent, audit };
            put(out, name, kind::HELLO, &body)
        }
        Frame::Welcome(m) if m.held_bytes > 0 => {
            put(out, name, kind::WELCOME_BACK, &(m, m.held_bytes))
        }
        Frame::Welcome(m) => put(out, name, kind::WELCOME, m),
        Frame::Refuse(m) => put(out, name, kind::REFUSE, m),
        Frame::Segment(m) => {
            m.encode_into(out);
            Ok(kind::SEGMENT)
        }
        Frame::Rest(bytes) => {
            out.extend_from_slice(bytes);
            Ok(kind::REST)
        }
        Frame::Ack(m) => put(out, name, kind::ACK, m),
        Frame::Prepare(m) if m.early => put(out, name, kind::PREPARE_EARLY, m),
        Frame::Prepare(m) => put(out, name, kind::PREPARE, m),
        Frame::Prepared { handoff, root, full_hash } => {
            put(out, name, kind::PREPARED, &(handoff, root, full_hash))
        }
        Frame::Declined { handoff, reason } => put(out, name, kind::DECLINED, &(handoff, reason)),
        Frame::Commit(m) => put(out, name, kind::COMMIT, m),
        Frame::Resumed(m) => put(out, name, kind::RESUMED, m),
        Frame::Released(m) => put(out, name, kind::RELEASED, m),
        Frame::Abort { handoff, reason } => put(out, name, kind::ABORT, &(handoff, reason)),
        Frame::Ping(m) => put(out, name, kind::PING, m),
        Frame::Pong(m) => put(out, name, kind::PONG, m),
        Frame::Call(call) => {
            out.extend_from_slice(&MAGIC_CALL);
            out.extend_from_slice(&call.versions.min.to_le_bytes());
            out.extend_from_slice(&call.versions.max.to_le_bytes());
            put(out, name, kind::CALL, &call.service)
        }
        Frame::Called { version } => put(out, name, kind::CALLED, version),
        Frame::Query(m) => put(out, name, kind::QUERY, m),
        Frame::Status { question, verdict } => put(out, name, kind::STATUS, &(question, verdict)),
    }
}

fn take<T: DeserializeOwned>(name: &'static str, body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(WireError::malformed(name, "bytes after its end")),
        Err(_) => Err(WireError::malformed(name, "cannot be read")),
    }
}

fn short(name: &'static str, text: String) -> Result<String, WireError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(WireError::malformed(name, "its text is too long"));
    }
    Ok(text)
}

/// Reads one frame's body. Every byte must belong to it.
pub fn decode_body(kind: u8, body: &[u8]) -> Result<Frame, WireError> {
    let limit = limit(kind)?;
    if body.len() > limit {
        return Err(WireError::TooLong { kind, length: body.len() as u64, limit });
    }
    Ok(match kind {
        kind::HELLO => Frame::Hello(Box::new(decode_hello(body)?)),
        kind::WELCOME => Frame::Welcome(take("Welcome", body)?),
        kind::WELCOME_BACK => {
            let (welcome, held_bytes): (Welcome, u32) = take("Welcome", body)?;
            Frame::Welcome(Welcome { held_bytes, ..welcome })
        }
        kind::REFUSE => Frame::Refuse(take("Refuse", body)?),
        kind::SEGMENT => Frame::Segment(Segment::decode(body)?),
        kind::REST => Frame::Rest(body.to_vec()),
        kind::ACK => Frame::Ack(take("Ack", body)?),
        kind::PREPARE => Frame::Prepare(take("Prepare", body)?),
        kind::PREPARE_EARLY => Frame::Prepare(Prepare { early: true, ..take("Prepare", body)? }),
        kind::PREPARED => {
            let (handoff, root, full_hash) = take("Prepared", body)?;
            Frame::Prepared { handoff, root, full_hash }
        }
        kind::DECLINED => {
            let (handoff, reason) = take("Declined", body)?;
            Frame::Declined { handoff, reason: short("Declined", reason)? }
        }
        kind::COMMIT => Frame::Commit(take("Commit", body)?),
        kind::RESUMED => Frame::Resumed(take("Resumed", body)?),
        kind::RELEASED => Frame::Released(take("Released", body)?),
        kind::ABORT => {
            let (handoff, reason) = take("Abort", body)?;
            Frame::Abort { handoff, reason: short("Abort", reason)? }
        }
        kind::PING => Frame::Ping(take("Ping", body)?),
        kind::PONG => Frame::Pong(take("Pong", body)?),
        kind::CALL => {
            let (versions, rest) = decode_head("Call", MAGIC_CALL, body)?;
            Frame::Call(Call { versions, service: short("Call", take("Call", rest)?)? })
        }
        kind::CALLED => Frame::Called { version: take("Called", body)? },
        kind::QUERY => Frame::Query(take("Query", body)?),
        kind::STATUS => {
            let (question, verdict) = take("Status", body)?;
            Frame::Status { question, verdict }
        }
        unknown => return Err(WireError::UnknownType(unknown)),
    })
}

/// What a first frame begins with in all versions, and the rest.
fn decode_head<'a>(
    name: &'static str,
    expected: [u8; 8],
    body: &'a [u8],
) -> Result<(Versions, &'a [u8]), WireError> {
    let cut = || WireError::malformed(name, "cut off");
    let (magic, rest) = body.split_first_chunk::<8>().ok_or_else(cut)?;
    if *magic != expected {
        return Err(WireError::Magic(*magic));
    }
    let (min, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    let (max, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
    Ok((Versions { min: u32::from_le_bytes(*min), max: u32::from_le_bytes(*max) }, rest))
}

fn decode_hello(body: &[u8]) -> Result<Hello, WireError> {
    let (versions, rest) = decode_head("Hello", MAGIC, body)?;
    let HelloBody { handoff, vm_name, intent, audit } = take("Hello", rest)?;
    let vm_name = short("Hello", vm_name)?;
    if let Intent::New(offer) = &intent {
        check_offer(offer)?;
    }
    Ok(Hello { versions, handoff, vm_name, intent, audit })
}

/// An offer's lists are short, and none names a thing twice: what is answered by a bit or a number
/// must mean one thing.
fn check_offer(offer: &Offer) -> Result<(), WireError> {
    if offer.also.len() > MAX_ALSO || offer.known.len() > MAX_KNOWN {
        return Err(WireError::malformed("Hello", "it offers too many bases or states"));
    }
    let repeated = |n: usize, id: &BaseId| *id == offer.base || offer.also[..n].contains(id);
    if offer.also.iter().enumerate().any(|(n, id)| repeated(n, id)) {
        return Err(WireError::malformed("Hello", "it offers a base twice"));
    }
    Ok(())
}

/// What a link that broke leaves of the frame that it broke in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Torn {
    /// Nothing of use.
    #[default]
    Nothing,
    /// The first bytes of a segment's encoding.
    Segment(Vec<u8>),
    /// The first bytes of what follows those that were held before.
    Rest(Vec<u8>),
}

/// Cuts a stream of bytes into frames. Holds at most one frame that is not complete.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes came. A length that its type does not
    /// allow is an error as soon as the header is there.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let unread = self.buffer.get(self.start..).unwrap_or_default();
        let Some((header, rest)) = unread.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [a, b, c, d, kind] = *header;
        let length = u32::from_le_bytes([a, b, c, d]);
        let limit = limit(kind)?;
        if length as usize > limit {
            return Err(WireError::TooLong { kind, length: length.into(), limit });
        }
        let Some(body) = rest.get(..length as usize) else { return Ok(None) };
        let frame = decode_body(kind, body)?;
        self.start += HEADER_BYTES + length as usize;
        Ok(Some(frame))
    }

    /// The part of a segment that was still to be completed, if that is what the stream ended in.
    pub fn into_torn(mut self) -> Torn {
        let unread = self.buffer.get(self.start..).unwrap_or_default();
        let Some(([.., kind], _)) = unread.split_first_chunk::<HEADER_BYTES>() else {
            return Torn::Nothing;
        };
        let kind = *kind;
        self.buffer.drain(..self.start + HEADER_BYTES);
        match kind {
            kind::SEGMENT => Torn::Segment(self.buffer),
            kind::REST => Torn::Rest(self.buffer),
            _ => Torn::Nothing,
        }
    }

    /// The bytes behind the last frame.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.split_off(self.start)
    }

    /// Whether bytes of an incomplete frame are held: the stream ended in the middle of one.
    pub fn is_mid_frame(&self) -> bool {
        self.start < self.buffer.len()
    }
}
