//! Compression of a batch as one.

use std::io;

use super::pack::MAX_BATCH_BYTES;

/// The zstd level of every batch.
///
/// One fixed level has to suit every link. Memory of a freshly booted Debian guest without what is
/// in its base, in batches of 1 MiB; bytes left, and CPU time against that of level 3:
///
/// | level | 1 | 3 | 5 | 6 | 9 | 12 |
/// |---|---|---|---|---|---|---|
/// | left | 29.7 % | 27.7 % | 26.9 % | 26.6 % | 26.3 % | 26.2 % |
/// | time | 0.6 | 1 | 3 | 4 | 7 | 14 |
///
/// Level 6 sends 4.2 % less than level 3 and costs four times as much. On an idle core it would
/// still keep 25 Mbps full, but a cloudlet's cores are not idle: they run the guest too, and where
/// the level did not keep up the handoff took four times as long as the link needed.
pub const ZSTD_LEVEL: i32 = 3;

/// How a payload is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As it is: chosen where compression does not shrink it.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    /// The codec with this number on the wire.
    pub fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A compressed body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// How it is encoded.
    pub codec: Codec,
    /// Bytes of the body.
    pub raw_len: u32,
    /// The encoded body.
    pub payload: Vec<u8>,
}

/// The body could not be compressed.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// More than one batch.
    #[error("{len} bytes are more than the {MAX_BATCH_BYTES} that one segment carries")]
    TooLarge {
        /// Its size.
        len: usize,
    },
    /// The codec failed.
    #[error("zstd could not compress {len} bytes: {source}")]
    Codec {
        /// Bytes given to it.
        len: usize,
        /// What it said.
        source: io::Error,
    },
}

/// Compresses batch after batch with one context.
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
}

impl Compressor {
    /// A compressor at [`ZSTD_LEVEL`].
    pub fn new() -> io::Result<Self> {
        Self::with_level(ZSTD_LEVEL)
    }

    /// A compressor at another level: to measure, and for a policy to come.
    pub fn with_level(level: i32) -> io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        // The segment carries length and hash of what is in the frame.
        zstd.include_contentsize(false)?;
        zstd.include_checksum(false)?;
        Ok(Self { zstd })
    }

    /// Compresses a body, or keeps it as it is where that is shorter.
    pub fn compress(&mut self, body: &[u8]) -> Result<Packed, CompressError> {
        let len = body.len();
        let raw_len = u32::try_from(len).ok().filter(|_| len <= MAX_BATCH_BYTES);
        let raw_len = raw_len.ok_or(CompressError::TooLarge { len })?;
        let payload =
            self.zstd.compress(body).map_err(|source| CompressError::Codec { len, source })?;
        Ok(if payload.len() < len {
            Packed { codec: Codec::Zstd, raw_len, payload }
        } else {
            Packed { codec: Codec::Raw, raw_len, payload: body.to_vec() }
        })
    }
}

/// Why a payload does not hold the body it claims.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// A length that no body has.
    #[error("a body of {raw_len} bytes is larger than the {MAX_BATCH_BYTES} allowed")]
    TooLarge {
        /// The length claimed.
        raw_len: u32,
    },
    /// Another length than it claims.
    #[error("a payload that claims {raw_len} bytes holds {actual}")]
    Length {
        /// The length claimed.
        raw_len: u32,
        /// The length found.
        actual: usize,
    },
    /// Not a zstd frame, or one that holds more than it claims.
    #[error("zstd could not decompress {payload_len} bytes into the {raw_len} claimed: {source}")]
    Codec {
        /// Bytes of payload.
        payload_len: usize,
        /// The length claimed.
        raw_len: u32,
        /// What it said.
        source: io::Error,
    },
}

/// Decompresses payload after payload with one context and one buffer of bounded size.
pub struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
    body: Vec<u8>,
}

impl Decompressor {
    /// A decompressor.
    pub fn new() -> io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()?, body: Vec::new() })
    }

    /// The body that a payload holds: exactly `raw_len` bytes, at most [`MAX_BATCH_BYTES`].
    pub fn decompress<'a>(
        &'a mut self,
        codec: Codec,
        raw_len: u32,
        payload: &'a [u8],
    ) -> Result<&'a [u8], DecompressError> {
        let len = raw_len as usize;
        if len > MAX_BATCH_BYTES {
            return Err(DecompressError::TooLarge { raw_len });
        }
        let body = match codec {
            Codec::Raw => payload,
            Codec::Zstd => {
                self.body.resize(len, 0);
                let into = self.body.as_mut_slice();
                let actual = self.zstd.decompress_to_buffer(payload, into).map_err(|source| {
                    DecompressError::Codec { payload_len: payload.len(), raw_len, source }
                })?;
                self.body.get(..actual).unwrap_or_default()
            }
        };
        if body.len() != len {
            return Err(DecompressError::Length { raw_len, actual: body.len() });
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(body: &[u8]) -> Codec {
        let packed = Compressor::new().unwrap().compress(body).unwrap();
        assert_eq!(packed.raw_len as usize, body.len());
        assert!(packed.payload.len() <= body.len());
        let mut decompressor = Decompressor::new().unwrap();
        let out = decompressor.decompress(packed.codec, packed.raw_len, &packed.payload).unwrap();
        assert_eq!(out, body);
        packed.codec
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn raw_where_it_does_not_shrink() {
        assert_eq!(round_trip(b""), Codec::Raw);
        assert_eq!(round_trip(b"x"), Codec::Raw);
        assert_eq!(round_trip(&noise(MAX_BATCH_BYTES)), Codec::Raw);
        assert_eq!(round_trip(&vec![7; MAX_BATCH_BYTES]), Codec::Zstd);
        let too_much = vec![0; MAX_BATCH_BYTES + 1];
        let error = Compressor::new().unwrap().compress(&too_much).unwrap_err();
        assert!(matches!(error, CompressError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn the_length_must_be_the_length() {
        let packed = Compressor::new().unwrap().compress(&[7; 5000]).unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        let mut with = |codec, raw_len| {
            let result = decompressor.decompress(codec, raw_len, &packed.payload);
            result.map(<[u8]>::len).map_err(|e| e.to_string())
        };
        assert_eq!(with(Codec::Zstd, 5000), Ok(5000));
        assert!(with(Codec::Zstd, 4999).unwrap_err().contains("could not decompress"));
        assert!(with(Codec::Zstd, 5001).unwrap_err().contains("holds 5000"));
        assert!(with(Codec::Raw, 5000).unwrap_err().contains("holds"));
        assert!(with(Codec::Zstd, u32::MAX).unwrap_err().contains("larger than"));
        assert_eq!(with(Codec::Zstd, 5000), Ok(5000), "an error leaves the context usable");
    }

    proptest! {
        #[test]
        fn hostile_payloads(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            raw_len in 0u32..100_000,
            frame: bool,
        ) {
            let magic = [0x28, 0xb5, 0x2f, 0xfd];
            let payload = if frame { [&magic[..], &payload].concat() } else { payload };
            let mut decompressor = Decompressor::new().unwrap();
            if let Ok(body) = decompressor.decompress(Codec::Zstd, raw_len, &payload) {
                prop_assert_eq!(body.len(), raw_len as usize);
            }
        }

        #[test]
        fn any_body(body in prop::collection::vec(0u8..8, 0..3000)) {
            round_trip(&body);
        }
    }
}
