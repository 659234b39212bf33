//! Compression of a batch as one.

use std::io;

use super::{
    codec::{bzip2, deflate, lz4, xz, zstd},
    mode::{Codec, Mode},
    pack::MAX_BATCH_BYTES,
};

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
    #[error("{mode} could not compress {len} bytes: {source}")]
    Codec {
        /// How.
        mode: Mode,
        /// Bytes given to it.
        len: usize,
        /// What it said.
        source: io::Error,
    },
}

/// Compresses batch after batch, each in the mode asked for. What a codec works with is made when it
/// is first asked for, and kept; but never are two large ones held at once, so that all of it takes
/// no more than [`Compressor::MAX_BYTES`].
#[derive(Default)]
pub struct Compressor {
    zstd: Option<zstd::Encoder>,
    lz4: Option<lz4::Encoder>,
    deflate: Option<deflate::Encoder>,
}

impl Compressor {
    /// The most memory that it takes: that of the largest mode and of the small ones.
    pub const MAX_BYTES: usize = 9 << 20;

    /// A compressor.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts the payload for a body into a buffer, whatever that held, and says how it is encoded:
    /// as it is, where the mode does not make it shorter.
    pub fn compress(
        &mut self,
        mode: Mode,
        body: &[u8],
        into: &mut Vec<u8>,
    ) -> Result<Codec, CompressError> {
        let len = body.len();
        if len > MAX_BATCH_BYTES {
            return Err(CompressError::TooLarge { len });
        }
        let shorter = self.encode(mode, body, into).map_err(|source| CompressError::Codec {
            mode,
            len,
            source,
        })?;
        if shorter {
            return Ok(mode.codec());
        }
        into.clear();
        into.extend_from_slice(body);
        Ok(Codec::Raw)
    }

    /// The same with a buffer of its own.
    pub fn pack(&mut self, mode: Mode, body: &[u8]) -> Result<Packed, CompressError> {
        let mut payload = Vec::new();
        let codec = self.compress(mode, body, &mut payload)?;
        // No longer than a batch: fits.
        Ok(Packed { codec, raw_len: body.len() as u32, payload })
    }

    fn encode(&mut self, mode: Mode, body: &[u8], into: &mut Vec<u8>) -> io::Result<bool> {
        let level = mode.level();
        match mode.codec() {
            Codec::Raw => Ok(false),
            Codec::Zstd => {
                let encoder = match &mut self.zstd {
                    Some(encoder) => encoder,
                    none => none.insert(zstd::Encoder::new(level)?),
                };
                encoder.encode(level, body, into)
            }
            Codec::Lz4 => self.lz4.get_or_insert_with(lz4::Encoder::new).encode(body, into),
            Codec::Xz => {
                self.zstd = None;
                xz::encode(level, body, into)
            }
            Codec::Gzip => self
                .deflate
                .get_or_insert_with(|| deflate::Encoder::new(level))
                .encode(level, body, into),
            Codec::Bzip2 => {
                self.zstd = None;
                bzip2::encode(level, body, into)
            }
        }
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
        /// The length found, or as much of it as was looked at.
        actual: usize,
    },
    /// Not what this codec writes, or more than it claims.
    #[error(
        "{codec} could not decompress {payload_len} bytes into the {raw_len} claimed: {source}"
    )]
    Codec {
        /// The codec.
        codec: Codec,
        /// Bytes of payload.
        payload_len: usize,
        /// The length claimed.
        raw_len: u32,
        /// What it said.
        source: io::Error,
    },
}

/// Decompresses payload after payload, whatever the codec, in bounded memory.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::Decoder>,
    deflate: Option<deflate::Decoder>,
    body: Vec<u8>,
}

impl Decompressor {
    /// A decompressor.
    pub fn new() -> Self {
        Self::default()
    }

    /// The body that a payload holds: exactly `raw_len` bytes, at most [`MAX_BATCH_BYTES`].
    pub fn decompress<'a>(
        &'a mut self,
        codec: Codec,
        raw_len: u32,
        payload: &'a [u8],
    ) -> Result<&'a [u8], DecompressError> {
        let mut body = std::mem::take(&mut self.body);
        let result = match codec {
            Codec::Raw => check_len(raw_len, payload.len()),
            _ => self.decompress_into(codec, raw_len, payload, &mut body),
        };
        self.body = body;
        result?;
        Ok(if codec == Codec::Raw { payload } else { &self.body })
    }

    /// Puts the body that a payload holds into a buffer, whatever that held: exactly `raw_len` bytes,
    /// at most [`MAX_BATCH_BYTES`]. After an error the buffer holds nothing of use.
    pub fn decompress_into(
        &mut self,
        codec: Codec,
        raw_len: u32,
        payload: &[u8],
        into: &mut Vec<u8>,
    ) -> Result<(), DecompressError> {
        let len = raw_len as usize;
        if len > MAX_BATCH_BYTES {
            return Err(DecompressError::TooLarge { raw_len });
        }
        if codec == Codec::Raw {
            check_len(raw_len, payload.len())?;
        }
        self.decode(codec, len, payload, into).map_err(|source| DecompressError::Codec {
            codec,
            payload_len: payload.len(),
            raw_len,
            source,
        })?;
        check_len(raw_len, into.len())
    }

    fn decode(
        &mut self,
        codec: Codec,
        len: usize,
        payload: &[u8],
        into: &mut Vec<u8>,
    ) -> io::Result<()> {
        match codec {
            Codec::Raw => {
                into.clear();
                into.extend_from_slice(payload);
                Ok(())
            }
            Codec::Zstd => {
                let decoder = match &mut self.zstd {
                    Some(decoder) => decoder,
                    none => none.insert(zstd::Decoder::new()?),
                };
                decoder.decode(payload, len, into)
            }
            Codec::Lz4 => lz4::decode(payload, len, into),
            Codec::Xz => xz::decode(payload, len, into),
            Codec::Gzip => {
                self.deflate.get_or_insert_with(deflate::Decoder::new).decode(payload, len, into)
            }
            Codec::Bzip2 => bzip2::decode(payload, len, into),
        }
    }
}

fn check_len(raw_len: u32, actual: usize) -> Result<(), DecompressError> {
    let len = raw_len as usize;
    match len {
        _ if len > MAX_BATCH_BYTES => Err(DecompressError::TooLarge { raw_len }),
        _ if len != actual => Err(DecompressError::Length { raw_len, actual }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(mode: Mode, body: &[u8]) -> Codec {
        let packed = Compressor::new().pack(mode, body).unwrap();
        assert_eq!(packed.raw_len as usize, body.len());
        assert!(packed.payload.len() <= body.len());
        let mut decompressor = Decompressor::new();
        let out = decompressor.decompress(packed.codec, packed.raw_len, &packed.payload).unwrap();
        assert_eq!(out, body, "{mode}");
        packed.codec
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    /// The usual mode of each codec that compresses.
    fn codecs() -> impl Iterator<Item = Mode> {
        Codec::ALL.into_iter().skip(1).map(|codec| codec.name().parse().unwrap())
    }

    #[test]
    fn raw_where_it_does_not_shrink() {
        for mode in codecs() {
            assert_eq!(round_trip(mode, b""), Codec::Raw);
            assert_eq!(round_trip(mode, b"x"), Codec::Raw);
            assert_eq!(round_trip(mode, &noise(MAX_BATCH_BYTES)), Codec::Raw);
            assert_eq!(round_trip(mode, &vec![7; MAX_BATCH_BYTES]), mode.codec());
            let too_much = vec![0; MAX_BATCH_BYTES + 1];
            let error = Compressor::new().pack(mode, &too_much).unwrap_err();
            assert!(matches!(error, CompressError::TooLarge { .. }), "{error}");
        }
        assert_eq!(round_trip(Mode::NONE, &[7; 5000]), Codec::Raw);
    }

    #[test]
    fn every_mode_and_back() {
        // Words of few kinds, so that every level has something to find.
        let body: Vec<u8> = noise(30_000).iter().flat_map(|b| [b & 15, 0, 0, b >> 7]).collect();
        let (mut compressor, mut payload) = (Compressor::new(), Vec::new());
        let (mut decompressor, mut back) = (Decompressor::new(), Vec::new());
        for mode in Mode::STATIC.iter().chain(Mode::LADDER).chain(Mode::STATIC) {
            let codec = compressor.compress(*mode, &body, &mut payload).unwrap();
            assert_eq!(codec, mode.codec(), "{mode}");
            let raw_len = body.len() as u32;
            decompressor.decompress_into(codec, raw_len, &payload, &mut back).unwrap();
            assert!(back == body, "{mode}");
        }
    }

    #[test]
    fn the_length_must_be_the_length() {
        for mode in codecs() {
            let packed = Compressor::new().pack(mode, &[7; 5000]).unwrap();
            let mut decompressor = Decompressor::new();
            let mut with = |codec, raw_len, payload: &[u8]| {
                let result = decompressor.decompress(codec, raw_len, payload);
                result.map(<[u8]>::len).map_err(|e| e.to_string())
            };
            let (codec, payload) = (packed.codec, &packed.payload[..]);
            assert_eq!(with(codec, 5000, payload), Ok(5000));
            with(codec, 4999, payload).unwrap_err();
            with(codec, 5001, payload).unwrap_err();
            with(codec, 0, payload).unwrap_err();
            assert!(with(Codec::Raw, 5000, payload).unwrap_err().contains("holds"));
            assert!(with(codec, u32::MAX, payload).unwrap_err().contains("larger than"));
            assert!(with(Codec::Raw, u32::MAX, payload).unwrap_err().contains("larger than"));
            with(codec, 5000, &payload[..payload.len() - 1]).unwrap_err();
            with(codec, 5000, &[payload, &[0]].concat()).unwrap_err();
            assert_eq!(with(codec, 5000, payload), Ok(5000), "an error leaves it usable");
        }
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
            let mut decompressor = Decompressor::new();
            for codec in Codec::ALL {
                if let Ok(body) = decompressor.decompress(codec, raw_len, &payload) {
                    prop_assert_eq!(body.len(), raw_len as usize);
                }
            }
        }

        #[test]
        fn any_body(body in prop::collection::vec(0u8..8, 0..3000)) {
            codecs().for_each(|mode| _ = round_trip(mode, &body));
        }
    }
}
