//! Blobs that leave the VMM: a magic number, a version, then the value. The version stands before
//! what it describes, so that a blob from another age is named and not misread.

use serde::{Serialize, de::DeserializeOwned};

const MAGIC_BYTES: usize = 8;
const HEADER_BYTES: usize = MAGIC_BYTES + 2;

/// What kind of blob, and which version of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// What it is, for messages.
    pub(crate) what: &'static str,
    /// Its first bytes.
    pub(crate) magic: &'static [u8; MAGIC_BYTES],
    /// The only version that is read and written.
    pub(crate) version: u16,
    /// Longer blobs are refused unread.
    pub(crate) max_bytes: usize,
}

/// Why a blob is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Not such a blob at all.
    #[error("this is not a {0}")]
    Foreign(&'static str),
    /// Of another version.
    #[error(
        "{what} has version {found}, this program reads {expected}: use the same program version on both hosts"
    )]
    Version {
        /// What it is.
        what: &'static str,
        /// In the blob.
        found: u16,
        /// Here.
        expected: u16,
    },
    /// Larger than any real one.
    #[error("{what} of {bytes} bytes is larger than the limit of {max}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Cut off, or not what the header says.
    #[error("{what} is damaged: {reason}")]
    Damaged {
        /// What it is.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// More than one blob.
    #[error("{what} has {bytes} bytes too many")]
    Trailing {
        /// What it is.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
}

impl Format {
    pub(crate) fn encode<T: Serialize>(&self, value: &T) -> Result<Vec<u8>, CodecError> {
        let mut blob = self.magic.to_vec();
        blob.extend_from_slice(&self.version.to_le_bytes());
        let blob = postcard::to_extend(value, blob).map_err(|e| self.damaged(&e))?;
        self.check_size(&blob)?;
        Ok(blob)
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, blob: &[u8]) -> Result<T, CodecError> {
        let what = self.what;
        self.check_size(blob)?;
        let Some((header, body)) = blob.split_at_checked(HEADER_BYTES) else {
            return Err(CodecError::Foreign(what));
        };
        let (magic, version) = header.split_at(MAGIC_BYTES);
        if magic != self.magic {
            return Err(CodecError::Foreign(what));
        }
        let found = u16::from_le_bytes([version[0], version[1]]);
        if found != self.version {
            return Err(CodecError::Version { what, found, expected: self.version });
        }
        let (value, rest) = postcard::take_from_bytes(body).map_err(|e| self.damaged(&e))?;
        if !rest.is_empty() {
            return Err(CodecError::Trailing { what, bytes: rest.len() });
        }
        Ok(value)
    }

    fn check_size(&self, blob: &[u8]) -> Result<(), CodecError> {
        let (what, bytes, max) = (self.what, blob.len(), self.max_bytes);
        if bytes > max { Err(CodecError::TooLarge { what, bytes, max }) } else { Ok(()) }
    }

    fn damaged(&self, error: &postcard::Error) -> CodecError {
        CodecError::Damaged { what: self.what, reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format =
        Format { what: "test blob", magic: b"TESTBLOB", version: 3, max_bytes: 64 };

    #[test]
    fn round_trip_and_refusals() {
        let blob = FORMAT.encode(&vec![1u32, 2, 300]).unwrap();
        assert_eq!(FORMAT.decode::<Vec<u32>>(&blob).unwrap(), [1, 2, 300]);
        for len in 0..blob.len() {
            assert!(FORMAT.decode::<Vec<u32>>(&blob[..len]).is_err());
        }
        let mut other = blob.clone();
        other[0] ^= 1;
        assert_eq!(FORMAT.decode::<Vec<u32>>(&other), Err(CodecError::Foreign("test blob")));
        let mut other = blob.clone();
        other[8] = 4;
        let refused = FORMAT.decode::<Vec<u32>>(&other).unwrap_err().to_string();
        assert!(refused.contains("version 4, this program reads 3"), "{refused}");
        let mut other = blob;
        other.push(0);
        assert!(matches!(
            FORMAT.decode::<Vec<u32>>(&other),
            Err(CodecError::Trailing { bytes: 1, .. })
        ));
        assert!(matches!(FORMAT.encode(&vec![7u8; 64]), Err(CodecError::TooLarge { .. })));
    }
}
