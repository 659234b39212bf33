//! The bytes of a saved VM.
//!
//! ```text
//! magic    [8]     "howdah/s"
//! version  u32     2; 1 is the same with only raw and zstd segments
//! length   u32     of the head
//! head             an Offer, as in a Hello; it offers no known states
//! id       [32]    H("howdah 2026 saved-vm head v1", all before)
//! records          any number of segments, then the end, then nothing:
//!   1 u8, length u32, segment     as in a Segment frame
//!   2 u8, number of the last segment u64, state root [32], seal [32]
//!
//! chain 0 of the segments is that of the id
//! seal = H("howdah 2026 saved-vm end v1", chain after the last segment [32] | number | root)
//! ```
//!
//! Integers are little-endian. So every byte is under a hash that is checked before the byte is
//! used: the head under the id, a segment under its chain, the end under the seal. As with
//! segments, no secret is in it: it tells damage, not forgery.

use std::io::{self, Read, Write};

use super::SavedError;
use crate::{
    Offer, StateRoot,
    stage::{Opener, Sealer, Segment},
    vm::MAX_ALSO,
    wire::{MAX_HELLO_BYTES, MAX_SEGMENT_BYTES},
};

const MAGIC: [u8; 8] = *b"howdah/s";
pub(super) const VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;
const HEAD_CONTEXT: &str = "howdah 2026 saved-vm head v1";
const END_CONTEXT: &str = "howdah 2026 saved-vm end v1";
const SEGMENT: u8 = 1;
const END: u8 = 2;

fn seal(chain: &[u8; 32], last_seq: u64, root: StateRoot) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(END_CONTEXT);
    hasher.update(chain).update(&last_seq.to_le_bytes()).update(&root.0);
    *hasher.finalize().as_bytes()
}

/// The head of a file, and the chain that begins with it.
pub(super) struct Head {
    pub(super) bytes: Vec<u8>,
    id: [u8; 32],
}

impl Head {
    pub(super) fn new(offer: &Offer) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let body =
            postcard::to_allocvec(offer).map_err(|_| invalid("the offer cannot be encoded"))?;
        let length = u32::try_from(body.len()).ok().filter(|n| *n as usize <= MAX_HELLO_BYTES);
        let length = length.ok_or_else(|| invalid("the machine's description is too long"))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(body);
        let id = blake3::derive_key(HEAD_CONTEXT, &bytes);
        bytes.extend(id);
        Ok(Self { bytes, id })
    }

    pub(super) fn sealer(&self) -> Sealer {
        Sealer::new(&self.id)
    }
}

/// Writes records behind a head.
pub(super) struct Writer<W> {
    out: W,
    chain: [u8; 32],
    last_seq: u64,
    scratch: Vec<u8>,
    pub(super) bytes: u64,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(mut out: W, head: &Head) -> io::Result<Self> {
        out.write_all(&head.bytes)?;
        let bytes = head.bytes.len() as u64;
        Ok(Self { out, chain: [0; 32], last_seq: 0, scratch: Vec::new(), bytes })
    }

    /// The next segment, sealed by the head's sealer.
    pub(super) fn segment(&mut self, segment: &Segment) -> io::Result<()> {
        // A segment's size is bounded far below.
        let length = segment.encoded_len() as u32;
        self.scratch.clear();
        self.scratch.push(SEGMENT);
        self.scratch.extend(length.to_le_bytes());
        segment.encode_into(&mut self.scratch);
        self.out.write_all(&self.scratch)?;
        self.bytes += self.scratch.len() as u64;
        (self.chain, self.last_seq) = (segment.chain, segment.seq);
        Ok(())
    }

    pub(super) fn end(mut self, root: StateRoot) -> io::Result<u64> {
        self.out.write_all(&[END])?;
        self.out.write_all(&self.last_seq.to_le_bytes())?;
        self.out.write_all(&root.0)?;
        self.out.write_all(&seal(&self.chain, self.last_seq, root))?;
        self.out.flush()?;
        Ok(self.bytes + 1 + 8 + 64)
    }
}

/// Reads a file, front to back, and trusts none of it.
pub(super) struct Reader<R> {
    from: R,
    pub(super) offer: Offer,
    opener: Opener,
    chain: [u8; 32],
    records: u64,
    pub(super) bytes: u64,
}

/// What comes behind the head.
pub(super) enum Record {
    /// The next segment: whole, in order, unaltered.
    Segment(Segment),
    /// All was there. The state must have this root.
    End(StateRoot),
}

impl<R: Read> Reader<R> {
    /// Reads the head.
    pub(super) fn new(mut from: R) -> Result<Self, SavedError> {
        let at = "in its head";
        let begin: [u8; 12] = take(&mut from, at)?;
        let version = begin.strip_prefix(&MAGIC).and_then(|version| version.try_into().ok());
        let version = version.map(u32::from_le_bytes);
        if version.is_none_or(|version| !(OLDEST_VERSION..=VERSION).contains(&version)) {
            return Err(SavedError::Magic(begin));
        }
        let length: [u8; 4] = take(&mut from, at)?;
        let body = body(&mut from, u32::from_le_bytes(length) as usize, MAX_HELLO_BYTES, at)?
            .ok_or(SavedError::Head("it is too long"))?;
        let bytes = [&begin[..], &length, &body].concat();
        let id: [u8; 32] = take(&mut from, at)?;
        if id != blake3::derive_key(HEAD_CONTEXT, &bytes) {
            return Err(SavedError::Head("its hash is another"));
        }
        let offer: Offer = match postcard::take_from_bytes(&body) {
            Ok((offer, [])) => offer,
            _ => return Err(SavedError::Head("it cannot be read")),
        };
        if offer.also.len() > MAX_ALSO || !offer.known.is_empty() {
            return Err(SavedError::Head("it speaks of bases or states that it cannot build on"));
        }
        let (opener, bytes) = (Opener::new(&id), (bytes.len() + id.len()) as u64);
        Ok(Self { from, offer, opener, chain: [0; 32], records: 0, bytes })
    }

    /// The next record. After the end there must be no call.
    pub(super) fn next(&mut self) -> Result<Record, SavedError> {
        let at = "between two of its segments";
        let [kind] = take(&mut self.from, at)?;
        self.records += 1;
        match kind {
            SEGMENT => {
                let length = u32::from_le_bytes(take(&mut self.from, at)?);
                let record = SavedError::Record { number: self.records, kind, length };
                let at = "in the middle of a segment";
                let body =
                    body(&mut self.from, length as usize, MAX_SEGMENT_BYTES, at)?.ok_or(record)?;
                let segment = Segment::decode(&body)?;
                self.opener.open(&segment)?;
                self.chain = segment.chain;
                self.bytes += 5 + u64::from(length);
                Ok(Record::Segment(segment))
            }
            END => self.end().map(Record::End),
            kind => Err(SavedError::Record { number: self.records, kind, length: 0 }),
        }
    }

    fn end(&mut self) -> Result<StateRoot, SavedError> {
        let at = "in its last record";
        let last_seq = u64::from_le_bytes(take(&mut self.from, at)?);
        let root = StateRoot(take(&mut self.from, at)?);
        let said: [u8; 32] = take(&mut self.from, at)?;
        // What is saved has a machine's state at least.
        if last_seq == 0
            || last_seq != self.opener.last_seq()
            || said != seal(&self.chain, last_seq, root)
        {
            return Err(SavedError::End);
        }
        self.bytes += 1 + 8 + 64;
        match self.from.read(&mut [0]) {
            Ok(0) => Ok(root),
            Ok(_) => Err(SavedError::Trailing),
            Err(e) => Err(SavedError::Io(e)),
        }
    }
}

fn take<const N: usize>(from: &mut impl Read, at: &'static str) -> Result<[u8; N], SavedError> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(|e| SavedError::reading(e, at))?;
    Ok(bytes)
}

/// `None` if it claims to be longer than it may be.
fn body(
    from: &mut impl Read,
    length: usize,
    most: usize,
    at: &'static str,
) -> Result<Option<Vec<u8>>, SavedError> {
    if length > most {
        return Ok(None);
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).map_err(|e| SavedError::reading(e, at))?;
    Ok(Some(body))
}
