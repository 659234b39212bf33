//! Numbered, hash-chained segments: the target takes exactly what was sent, in order, or nothing.
//!
//! ```text
//! chain 0 = H("howdah 2026 segment-chain start v1", handoff id)
//! chain n = H("howdah 2026 segment-chain link v1", chain n-1 [32] | head of segment n | payload)
//! head    = number u64 | round u32 | kind u8 | codec u8 | body length u32 | payload length u32
//! segment = head | chain [32] | payload
//! ```
//!
//! `H(context, data)` is BLAKE3 in its key-derivation mode; integers are little-endian. Numbers
//! start at 1, so that "applied up to 0" says "nothing yet". The chain tells a segment lost,
//! repeated, reordered, altered, or of another handoff. It holds no secret: whoever can write to
//! the link can forge it, and keeping such a one out is the link's work.

use std::cmp::Ordering;

use super::{compress::Packed, mode::Codec, pack::MAX_BATCH_BYTES};

const START_CONTEXT: &str = "howdah 2026 segment-chain start v1";
const LINK_CONTEXT: &str = "howdah 2026 segment-chain link v1";

const HEAD_BYTES: usize = 8 + 4 + 1 + 1 + 4 + 4;

/// Bytes of a segment besides its payload.
pub const SEGMENT_OVERHEAD: usize = HEAD_BYTES + 32;

/// The largest segment.
pub const MAX_SEGMENT_BYTES: usize = SEGMENT_OVERHEAD + MAX_BATCH_BYTES;

/// What a segment's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum SegmentKind {
    /// A batch of chunks.
    Chunks = 0,
    /// A piece of the machine's state.
    MachineState = 1,
}

impl SegmentKind {
    fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Chunks),
            1 => Some(Self::MachineState),
            _ => None,
        }
    }
}

/// What travels as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its number, from 1.
    pub seq: u64,
    /// The round it belongs to.
    pub round: u32,
    /// What its body is.
    pub kind: SegmentKind,
    /// How the body is encoded.
    pub codec: Codec,
    /// Bytes of the body.
    pub raw_len: u32,
    /// The chain's value after this segment.
    pub chain: [u8; 32],
    /// The encoded body.
    pub payload: Vec<u8>,
}

/// Why bytes are not a segment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Shorter than a segment's head, or longer than the largest segment.
    #[error("{len} bytes cannot be a segment: it has {SEGMENT_OVERHEAD} to {MAX_SEGMENT_BYTES}")]
    Size {
        /// Bytes given.
        len: usize,
    },
    /// An unknown kind.
    #[error("segment {seq} is of unknown kind {kind}")]
    Kind {
        /// The segment.
        seq: u64,
        /// Its kind.
        kind: u8,
    },
    /// An unknown codec.
    #[error("segment {seq} has unknown codec {codec}")]
    Codec {
        /// The segment.
        seq: u64,
        /// Its codec.
        codec: u8,
    },
    /// A body larger than allowed, or one stored raw whose two lengths differ.
    #[error("segment {seq} claims a body of {raw_len} bytes in {payload_len} bytes of payload")]
    BodyLength {
        /// The segment.
        seq: u64,
        /// Length of the body claimed.
        raw_len: u32,
        /// Length of the payload claimed.
        payload_len: u32,
    },
    /// Another length of payload than claimed.
    #[error("segment {seq} claims {claimed} bytes of payload and carries {actual}")]
    PayloadLength {
        /// The segment.
        seq: u64,
        /// Length claimed.
        claimed: u32,
        /// Length found.
        actual: usize,
    },
}

impl Segment {
    fn head(&self) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&self.seq.to_le_bytes());
        head[8..12].copy_from_slice(&self.round.to_le_bytes());
        head[12] = self.kind as u8;
        head[13] = self.codec as u8;
        head[14..18].copy_from_slice(&self.raw_len.to_le_bytes());
        // A payload longer than this cannot be sealed, so nothing is cut off.
        head[18..].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        head
    }

    fn chain_after(&self, before: &[u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(LINK_CONTEXT);
        hasher.update(before);
        hasher.update(&self.head());
        hasher.update(&self.payload);
        *hasher.finalize().as_bytes()
    }

    /// Bytes that [`Segment::encode_into`] appends.
    pub fn encoded_len(&self) -> usize {
        SEGMENT_OVERHEAD + self.payload.len()
    }

    /// Where it stands.
    pub fn mark(&self) -> Mark {
        let bytes = self.encoded_len() as u64;
        Mark { seq: self.seq, round: self.round, chain: self.chain, bytes }
    }

    /// Appends its encoding.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.reserve(self.encoded_len());
        self.encode_head_into(out);
        out.extend_from_slice(&self.payload);
    }

    /// Appends what of its encoding comes before the payload: [`SEGMENT_OVERHEAD`] bytes.
    pub(crate) fn encode_head_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head());
        out.extend_from_slice(&self.chain);
    }

    /// Reads one segment, which must be all of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentError> {
        let size_error = SegmentError::Size { len: bytes.len() };
        if bytes.len() > MAX_SEGMENT_BYTES {
            return Err(size_error);
        }
        let mut rest = bytes;
        let (
            Some(seq),
            Some(round),
            Some([kind, codec]),
            Some(raw_len),
            Some(payload_len),
            Some(chain),
        ) = (
            take(&mut rest).map(u64::from_le_bytes),
            take(&mut rest).map(u32::from_le_bytes),
            take(&mut rest),
            take(&mut rest).map(u32::from_le_bytes),
            take(&mut rest).map(u32::from_le_bytes),
            take::<32>(&mut rest),
        )
        else {
            return Err(size_error);
        };
        let kind = SegmentKind::from_u8(kind).ok_or(SegmentError::Kind { seq, kind })?;
        let codec = Codec::from_u8(codec).ok_or(SegmentError::Codec { seq, codec })?;
        if raw_len as usize > MAX_BATCH_BYTES || codec == Codec::Raw && raw_len != payload_len {
            return Err(SegmentError::BodyLength { seq, raw_len, payload_len });
        }
        if rest.len() != payload_len as usize {
            let (claimed, actual) = (payload_len, rest.len());
            return Err(SegmentError::PayloadLength { seq, claimed, actual });
        }
        Ok(Self { seq, round, kind, codec, raw_len, chain, payload: rest.to_vec() })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

/// The end of a chain: what was last sealed or opened.
#[derive(Clone, Debug)]
struct Link {
    seq: u64,
    chain: [u8; 32],
}

impl Link {
    fn start(handoff_id: &[u8]) -> Self {
        Self { seq: 0, chain: blake3::derive_key(START_CONTEXT, handoff_id) }
    }
}

/// Numbers and chains segments at the source.
#[derive(Clone, Debug)]
pub struct Sealer {
    last: Link,
}

impl Sealer {
    /// The start of a handoff's chain.
    pub fn new(handoff_id: &[u8]) -> Self {
        Self { last: Link::start(handoff_id) }
    }

    /// The number of the last segment sealed, 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.last.seq
    }

    /// The next segment.
    pub fn seal(&mut self, round: u32, kind: SegmentKind, packed: Packed) -> Segment {
        let Packed { codec, raw_len, payload } = packed;
        let seq = self.last.seq + 1;
        let mut segment = Segment { seq, round, kind, codec, raw_len, chain: [0; 32], payload };
        segment.chain = segment.chain_after(&self.last.chain);
        self.last = Link { seq, chain: segment.chain };
        segment
    }
}

/// Why a segment is not the next one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It was opened before.
    #[error("segment {seq} came again; the next is {expected}")]
    Repeated {
        /// Its number.
        seq: u64,
        /// The number of the next.
        expected: u64,
    },
    /// One or more before it are missing.
    #[error("segment {seq} came before segment {expected}")]
    Gap {
        /// Its number.
        seq: u64,
        /// The number of the next.
        expected: u64,
    },
    /// Its content is not what was sealed, or it belongs to another handoff.
    #[error("segment {seq} does not continue the chain: it was altered, or is of another handoff")]
    Chain {
        /// Its number.
        seq: u64,
    },
}

/// Where a segment stands in its handoff, without what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its number.
    pub seq: u64,
    /// The round it belongs to.
    pub round: u32,
    /// The chain's value after it.
    pub chain: [u8; 32],
    /// Bytes of its encoding.
    pub bytes: u64,
}

/// A segment whose number is the next one, and whose content nobody has checked. Checking takes
/// time and needs nothing but what is in here, so that several can be checked at once: each by the
/// value that the one before it *claims* for the chain. Only when that one is checked too does it
/// mean anything: use them in order, up to the first that is not what it claims.
#[derive(Clone, Debug, PartialEq)]
pub struct Unchecked {
    before: [u8; 32],
    segment: Segment,
}

impl Unchecked {
    /// Its number.
    pub fn seq(&self) -> u64 {
        self.segment.seq
    }

    /// Bytes of its encoding.
    pub fn encoded_len(&self) -> usize {
        self.segment.encoded_len()
    }

    /// The segment, if it continues the chain.
    pub fn check(self) -> Result<Segment, OpenError> {
        let Self { before, segment } = self;
        if segment.chain_after(&before) != segment.chain {
            return Err(OpenError::Chain { seq: segment.seq });
        }
        Ok(segment)
    }
}

/// Checks at the target that segments continue the chain.
#[derive(Clone, Debug)]
pub struct Opener {
    last: Link,
}

impl Opener {
    /// The start of a handoff's chain.
    pub fn new(handoff_id: &[u8]) -> Self {
        Self { last: Link::start(handoff_id) }
    }

    /// The number of the last segment opened, 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.last.seq
    }

    /// Takes the next segment; any other is refused and changes nothing.
    pub fn open(&mut self, segment: &Segment) -> Result<(), OpenError> {
        self.check_number(segment)?;
        if segment.chain_after(&self.last.chain) != segment.chain {
            return Err(OpenError::Chain { seq: segment.seq });
        }
        self.last = Link { seq: segment.seq, chain: segment.chain };
        Ok(())
    }

    /// Takes the next segment by its number alone; its content is to be [checked](Unchecked::check)
    /// before it is used.
    pub fn take(&mut self, segment: Segment) -> Result<Unchecked, OpenError> {
        self.check_number(&segment)?;
        let link = Link { seq: segment.seq, chain: segment.chain };
        let before = std::mem::replace(&mut self.last, link).chain;
        Ok(Unchecked { before, segment })
    }

    /// Goes on behind a segment that was checked: forward, or back to it.
    pub fn go_to(&mut self, mark: &Mark) {
        self.last = Link { seq: mark.seq, chain: mark.chain };
    }

    fn check_number(&self, segment: &Segment) -> Result<(), OpenError> {
        let (seq, expected) = (segment.seq, self.last.seq + 1);
        match seq.cmp(&expected) {
            Ordering::Less => Err(OpenError::Repeated { seq, expected }),
            Ordering::Greater => Err(OpenError::Gap { seq, expected }),
            Ordering::Equal => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(text: &str) -> Packed {
        let payload = text.as_bytes().to_vec();
        Packed { codec: Codec::Raw, raw_len: payload.len() as u32, payload }
    }

    fn three() -> Vec<Segment> {
        let mut sealer = Sealer::new(b"one");
        ["a", "b", "c"].map(|text| sealer.seal(1, SegmentKind::Chunks, packed(text))).to_vec()
    }

    #[test]
    fn in_order_and_nothing_else() {
        let [a, b, c] = three().try_into().unwrap();
        let mut opener = Opener::new(b"one");
        assert_eq!(opener.open(&b), Err(OpenError::Gap { seq: 2, expected: 1 }));
        opener.open(&a).unwrap();
        assert_eq!(opener.open(&a), Err(OpenError::Repeated { seq: 1, expected: 2 }));
        assert_eq!(opener.open(&c), Err(OpenError::Gap { seq: 3, expected: 2 }));
        opener.open(&b).unwrap();
        opener.open(&c).unwrap();
        assert_eq!(opener.last_seq(), 3);
        let first = Opener::new(b"two").open(&a);
        assert_eq!(first, Err(OpenError::Chain { seq: 1 }), "of another handoff");
    }

    #[test]
    fn a_refused_segment_changes_nothing() {
        let [a, b, _] = three().try_into().unwrap();
        let mut opener = Opener::new(b"one");
        opener.open(&a).unwrap();
        let mut altered = b.clone();
        altered.payload = b"B".to_vec();
        assert_eq!(opener.open(&altered), Err(OpenError::Chain { seq: 2 }));
        opener.open(&b).unwrap();
    }

    #[test]
    fn checked_apart_from_each_other() {
        let mut opener = Opener::new(b"one");
        let [a, mut b, c] = three().try_into().unwrap();
        b.payload = b"B".to_vec();
        let taken = [&a, &b, &c].map(|segment| opener.take(segment.clone()).unwrap());
        let [first, second, third] = taken.map(Unchecked::check);
        // What follows a segment that is not what it claims may well fit its claim.
        assert_eq!((&first, second), (&Ok(a.clone()), Err(OpenError::Chain { seq: 2 })));
        assert!(third.is_ok());
        opener.go_to(&a.mark());
        assert_eq!(opener.take(c), Err(OpenError::Gap { seq: 3, expected: 2 }));
        assert_eq!(opener.take(a), Err(OpenError::Repeated { seq: 1, expected: 2 }));
    }

    proptest! {
        #[test]
        fn survives_the_wire(
            text in "[a-z]{0,50}", round: u32, state: bool, at in any::<prop::sample::Index>(),
            xor in 1u8..,
        ) {
            let kind = if state { SegmentKind::MachineState } else { SegmentKind::Chunks };
            let segment = Sealer::new(b"one").seal(round, kind, packed(&text));
            let mut bytes = Vec::new();
            segment.encode_into(&mut bytes);
            prop_assert_eq!(bytes.len(), segment.encoded_len());
            prop_assert_eq!(&Segment::decode(&bytes).unwrap(), &segment);
            prop_assert!(Segment::decode(&bytes[..bytes.len() - 1]).is_err());
            prop_assert!(Segment::decode(&[&bytes[..], &[0]].concat()).is_err());

            // Every bit is covered by the decoder's checks, the number, or the chain.
            let at = at.index(bytes.len());
            bytes[at] ^= xor;
            if let Ok(altered) = Segment::decode(&bytes) {
                prop_assert!(Opener::new(b"one").open(&altered).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(segment) = Segment::decode(&bytes) {
                let mut out = Vec::new();
                segment.encode_into(&mut out);
                prop_assert_eq!(out, bytes);
            }
        }
    }
}
