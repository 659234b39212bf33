//! The record layer of TLS 1.3 (RFC 8446, section 5) after the handshake, in two halves.
//!
//! A link of ours is used by two threads and may pass from one process to another; a rustls connection
//! can do neither. So the handshake's secrets are taken out of it (as is done for the kernel's TLS), and
//! this module seals and opens application data with them. It knows nothing else of TLS: a peer that
//! wants new keys or anything but data has ended the link.

use std::io;

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
    UnboundKey,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};
use zeroize::Zeroizing;

/// Before the body of each record.
pub(super) const HEADER_BYTES: usize = 5;
/// The most data in a record.
pub(super) const MAX_PLAIN_BYTES: usize = 1 << 14;
/// The most that a record's body may be longer than the data in it.
pub(super) const MAX_EXPANSION_BYTES: usize = 256;
/// Records that one key may seal or open: below the least of RFC 8446, section 5.5. A link that has
/// carried so many (256 GiB) ends, and the next one has other keys.
const MAX_RECORDS: u64 = 1 << 24;
/// The version in every record's header, whatever the real one is.
const VERSION: [u8; 2] = [3, 3];
/// Types of records.
pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// What a link's ends agreed on in the handshake: who may read this may read the link.
pub struct Session {
    suite: Suite,
    tx: Secret,
    rx: Secret,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Suite {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

struct Secret {
    sequence: u64,
    key: Zeroizing<Vec<u8>>,
    iv: Zeroizing<[u8; NONCE_LEN]>,
}

/// Bytes that are no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Too few, too many, or of a suite that is not spoken here.
    #[error("this is no TLS session")]
    Malformed,
}

impl Suite {
    const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }

    /// Its number in the registry of TLS.
    fn code(self) -> u16 {
        match self {
            Self::Aes128Gcm => 0x1301,
            Self::Aes256Gcm => 0x1302,
            Self::ChaCha20Poly1305 => 0x1303,
        }
    }
}

impl Secret {
    fn new(sequence: u64, key: &[u8], iv: &[u8]) -> Result<Self, SessionError> {
        let iv = iv.try_into().map_err(|_| SessionError::Malformed)?;
        Ok(Self { sequence, key: Zeroizing::new(key.to_vec()), iv: Zeroizing::new(iv) })
    }

    fn of(half: (u64, ConnectionTrafficSecrets)) -> Result<(Suite, Self), SessionError> {
        let (sequence, secrets) = half;
        let (suite, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Suite::Aes128Gcm, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Suite::Aes256Gcm, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (Suite::ChaCha20Poly1305, key, iv)
            }
            _ => return Err(SessionError::Malformed),
        };
        Ok((suite, Self::new(sequence, key.as_ref(), iv.as_ref())?))
    }

    fn put(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.sequence.to_be_bytes());
        into.extend_from_slice(&self.key);
        into.extend_from_slice(&*self.iv);
    }

    fn take(suite: Suite, from: &[u8]) -> Result<(Self, &[u8]), SessionError> {
        let short = || SessionError::Malformed;
        let (sequence, rest) = from.split_first_chunk::<8>().ok_or_else(short)?;
        let (key, rest) = rest.split_at_checked(suite.algorithm().key_len()).ok_or_else(short)?;
        let (iv, rest) = rest.split_at_checked(NONCE_LEN).ok_or_else(short)?;
        Ok((Self::new(u64::from_be_bytes(*sequence), key, iv)?, rest))
    }

    fn cipher(&self, suite: Suite) -> Result<Cipher, SessionError> {
        let key = UnboundKey::new(suite.algorithm(), &self.key);
        let key = LessSafeKey::new(key.map_err(|_| SessionError::Malformed)?);
        Ok(Cipher { key, iv: self.iv.clone(), sequence: self.sequence })
    }
}

impl Session {
    pub(super) fn of(secrets: ExtractedSecrets) -> Result<Self, SessionError> {
        let (suite, tx) = Secret::of(secrets.tx)?;
        let (theirs, rx) = Secret::of(secrets.rx)?;
        if suite == theirs { Ok(Self { suite, tx, rx }) } else { Err(SessionError::Malformed) }
    }

    /// For the process that goes on with the link. Only one may send with it: two records sealed alike
    /// betray both.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(128));
        bytes.extend_from_slice(&self.suite.code().to_be_bytes());
        self.tx.put(&mut bytes);
        self.rx.put(&mut bytes);
        bytes
    }

    /// From [`Session::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SessionError> {
        let (code, rest) = bytes.split_first_chunk::<2>().ok_or(SessionError::Malformed)?;
        let code = u16::from_be_bytes(*code);
        let suite = Suite::ALL.into_iter().find(|suite| suite.code() == code);
        let suite = suite.ok_or(SessionError::Malformed)?;
        let (tx, rest) = Secret::take(suite, rest)?;
        let (rx, rest) = Secret::take(suite, rest)?;
        if rest.is_empty() { Ok(Self { suite, tx, rx }) } else { Err(SessionError::Malformed) }
    }

    /// What seals, and what opens.
    pub(super) fn split(self) -> Result<(Sealing, Opening), SessionError> {
        Ok((Sealing(self.tx.cipher(self.suite)?), Opening(self.rx.cipher(self.suite)?)))
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({:?})", self.suite)
    }
}

/// Why a link's records cannot go on. A link on which one occurs is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error("the link has used up its keys ({MAX_RECORDS} records); another one goes on")]
    UsedUp,
    #[error("a TLS record was altered, repeated or left out on its way")]
    Forged,
    #[error("a TLS record of {0} bytes, at most {max}", max = MAX_PLAIN_BYTES + MAX_EXPANSION_BYTES)]
    TooLong(usize),
    #[error("bytes on the link are no TLS record of data (type {0})")]
    Foreign(u8),
    #[error("the peer ended the link in TLS: {0}")]
    Alert(String),
}

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

struct Cipher {
    key: LessSafeKey,
    iv: Zeroizing<[u8; NONCE_LEN]>,
    sequence: u64,
}

impl Cipher {
    /// Each is used once: the number of the record, in the last eight bytes.
    fn next_nonce(&mut self) -> Result<Nonce, RecordError> {
        if self.sequence >= MAX_RECORDS {
            return Err(RecordError::UsedUp);
        }
        let number = self.sequence.to_be_bytes();
        let mut nonce = *self.iv;
        nonce.iter_mut().rev().zip(number.iter().rev()).for_each(|(to, from)| *to ^= *from);
        self.sequence += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Makes records.
pub(super) struct Sealing(Cipher);

impl Sealing {
    /// Seals the data that `into` has from `start` on, behind room for a header, and puts the rest of
    /// the record around it.
    pub(super) fn seal(&mut self, into: &mut Vec<u8>, start: usize) -> Result<(), RecordError> {
        into.push(APPLICATION_DATA);
        let Some((header, body)) =
            into.get_mut(start..).and_then(|record| record.split_first_chunk_mut::<HEADER_BYTES>())
        else {
            return Err(RecordError::Foreign(0));
        };
        let length = body.len() + self.0.key.algorithm().tag_len();
        *header = header_of(length)?;
        let (nonce, aad) = (self.0.next_nonce()?, Aad::from(*header));
        let tag = self.0.key.seal_in_place_separate_tag(nonce, aad, body);
        into.extend_from_slice(tag.map_err(|_| RecordError::Forged)?.as_ref());
        Ok(())
    }
}

fn header_of(length: usize) -> Result<[u8; HEADER_BYTES], RecordError> {
    let bytes = u16::try_from(length).map_err(|_| RecordError::TooLong(length))?.to_be_bytes();
    Ok([APPLICATION_DATA, VERSION[0], VERSION[1], bytes[0], bytes[1]])
}

/// The length of the body that follows a header.
pub(super) fn body_length(header: [u8; HEADER_BYTES]) -> Result<usize, RecordError> {
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    match header[0] {
        // 20: a message of old versions that the handshake repeats for the network's sake.
        20..=APPLICATION_DATA if length <= MAX_PLAIN_BYTES + MAX_EXPANSION_BYTES => Ok(length),
        20..=APPLICATION_DATA => Err(RecordError::TooLong(length)),
        other => Err(RecordError::Foreign(other)),
    }
}

/// What was in a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Data, in so many of the first bytes of the body.
    Data(usize),
    /// The peer says that no more comes.
    End,
}

/// Opens records.
pub(super) struct Opening(Cipher);

impl Opening {
    /// Opens the body of a record in its place.
    pub(super) fn open(
        &mut self,
        header: [u8; HEADER_BYTES],
        body: &mut [u8],
    ) -> Result<Opened, RecordError> {
        if header[0] != APPLICATION_DATA {
            return Err(RecordError::Foreign(header[0]));
        }
        let nonce = self.0.next_nonce()?;
        let inner = self.0.key.open_in_place(nonce, Aad::from(header), body);
        let inner = inner.map_err(|_| RecordError::Forged)?;
        // Zeros behind the type are padding.
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Foreign(0))?;
        let data = inner.get(..end).unwrap_or_default();
        match (inner.get(end).copied().unwrap_or_default(), data) {
            (APPLICATION_DATA, _) if end <= MAX_PLAIN_BYTES => Ok(Opened::Data(end)),
            (APPLICATION_DATA, _) => Err(RecordError::TooLong(end)),
            (ALERT, [_, 0]) => Ok(Opened::End),
            (ALERT, [_, code]) => {
                Err(RecordError::Alert(format!("{:?}", AlertDescription::from(*code))))
            }
            (other, _) => Err(RecordError::Foreign(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session(suite: Suite, tx: u8, rx: u8) -> Session {
        let secret = |byte| {
            Secret::new(0, &vec![byte; suite.algorithm().key_len()], &[byte; NONCE_LEN]).unwrap()
        };
        Session { suite, tx: secret(tx), rx: secret(rx) }
    }

    fn record(sealing: &mut Sealing, data: &[u8]) -> Vec<u8> {
        let mut record = vec![0; HEADER_BYTES];
        record.extend_from_slice(data);
        sealing.seal(&mut record, 0).unwrap();
        record
    }

    fn opened(opening: &mut Opening, record: &[u8]) -> Result<Vec<u8>, RecordError> {
        let (header, body) = record.split_first_chunk::<HEADER_BYTES>().unwrap();
        assert_eq!(body_length(*header)?, body.len());
        let mut body = body.to_vec();
        match opening.open(*header, &mut body)? {
            Opened::Data(length) => Ok(body[..length].to_vec()),
            Opened::End => Ok(Vec::new()),
        }
    }

    #[test]
    fn what_is_sealed_is_opened_in_its_order_only() {
        for suite in Suite::ALL {
            let (mut seal, _) = session(suite, 1, 2).split().unwrap();
            let (_, mut open) = session(suite, 2, 1).split().unwrap();
            let [a, b] = [&b"a"[..], &[7; MAX_PLAIN_BYTES]].map(|data| record(&mut seal, data));
            assert_eq!(opened(&mut open, &a).unwrap(), b"a");
            assert_eq!(opened(&mut open, &b).unwrap(), [7; MAX_PLAIN_BYTES]);
            // Said again.
            assert!(matches!(opened(&mut open, &a), Err(RecordError::Forged)));
            let (_, mut other) = session(suite, 2, 3).split().unwrap();
            assert!(matches!(opened(&mut other, &a), Err(RecordError::Forged)));
        }
    }

    #[test]
    fn a_session_goes_to_another_process_as_bytes() {
        for suite in Suite::ALL {
            let bytes = session(suite, 5, 6).to_bytes();
            let again = Session::from_bytes(&bytes).unwrap();
            assert_eq!(again.to_bytes(), bytes);
            for length in 0..bytes.len() {
                assert!(Session::from_bytes(&bytes[..length]).is_err());
            }
            assert!(Session::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn keys_are_used_up() {
        let mut worn = session(Suite::Aes128Gcm, 1, 1);
        worn.tx.sequence = MAX_RECORDS - 1;
        let (mut seal, _) = worn.split().unwrap();
        record(&mut seal, b"last");
        let mut next = vec![0; HEADER_BYTES];
        assert!(matches!(seal.seal(&mut next, 0), Err(RecordError::UsedUp)));
    }

    proptest! {
        #[test]
        fn one_bit_is_enough(at in any::<prop::sample::Index>(), bit in 0..8u8, data: Vec<u8>) {
            let (mut seal, _) = session(Suite::Aes256Gcm, 1, 2).split().unwrap();
            let mut damaged = record(&mut seal, &data);
            let at = HEADER_BYTES + at.index(damaged.len() - HEADER_BYTES);
            damaged[at] ^= 1 << bit;
            let (_, mut open) = session(Suite::Aes256Gcm, 2, 1).split().unwrap();
            prop_assert!(opened(&mut open, &damaged).is_err());
        }

        #[test]
        fn no_header_is_too_odd(header: [u8; HEADER_BYTES]) {
            if let Ok(length) = body_length(header) {
                prop_assert!(length <= MAX_PLAIN_BYTES + MAX_EXPANSION_BYTES);
            }
        }
    }
}
