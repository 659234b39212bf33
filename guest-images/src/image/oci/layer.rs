//! Layers as they come: verified, unpacked, and read entry by entry.

use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, ErrorKind, Read},
};

use flate2::bufread::MultiGzDecoder;

use super::{
    OciError,
    blob::{Digest, Hasher},
    manifest::Layer,
};
use crate::image::tar::{Archive, Entry, Skip, TarError};

const BUFFER_BYTES: usize = 256 << 10;
/// What `zstd` makes at most without being asked: what a decompressor makes room for.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

/// What is made of a blob: its content, however it is packed.
enum Unpacked<R: BufRead> {
    Plain(R),
    Gzip(Box<MultiGzDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

impl<R: BufRead> Unpacked<R> {
    fn new(mut packed: R) -> io::Result<Self> {
        Ok(match packed.fill_buf()? {
            [0x1f, 0x8b, ..] => Self::Gzip(Box::new(MultiGzDecoder::new(packed))),
            // A frame, or one that says something beside.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
                decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
                Self::Zstd(decoder)
            }
            _ => Self::Plain(packed),
        })
    }
}

impl<R: BufRead> Read for Unpacked<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(into),
            Self::Gzip(reader) => reader.read(into),
            Self::Zstd(reader) => reader.read(into),
        }
    }
}

/// A content that is hashed as it is read, and has an end: `left` is what all layers may yet have.
struct Bounded<'a, R> {
    inner: R,
    hasher: Hasher,
    left: &'a mut u64,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        let bytes = into.get(..read).unwrap_or_default();
        self.hasher.update(bytes);
        let left = self.left.checked_sub(read as u64).ok_or(ErrorKind::QuotaExceeded)?;
        *self.left = left;
        Ok(read)
    }
}

impl<R: Read> Skip for Bounded<'_, R> {}

/// What happens to the entries of a layer: its archive is at the content of each.
pub(super) trait Take {
    /// Takes the entry that has this number in the layer. `false` if no more of the layer is needed.
    fn take(&mut self, number: u64, entry: Entry, content: &mut dyn Read)
    -> Result<bool, OciError>;
}

/// Compares a layer's bytes with its digest, where it has one of its own.
pub(super) fn verify(layer: &Layer, progress: &mut dyn FnMut(u64)) -> Result<(), OciError> {
    match layer.digest {
        Some(digest) => layer.blob.verify(digest, progress),
        None => Ok(()),
    }
}

/// Reads a layer, of which not more than `left` bytes are unpacked. If all of it is read, it must be what the
/// configuration says.
pub(super) fn read(
    layer: &Layer,
    left: &mut u64,
    take: &mut dyn Take,
    progress: &mut dyn FnMut(u64),
) -> Result<(), OciError> {
    let count = Cell::new(0);
    let wrong = |error: TarError| match error {
        TarError::Io(error) if error.kind() == ErrorKind::QuotaExceeded => OciError::Bomb,
        error => OciError::Layer { layer: layer.blob.name.clone(), error },
    };
    let packed = BufReader::with_capacity(BUFFER_BYTES, layer.blob.stream(&count));
    let inner = Unpacked::new(packed).map_err(|error| wrong(error.into()))?;
    let mut archive = Archive::new(Bounded { inner, hasher: Hasher::new(), left });
    let mut number = 0;
    while let Some(entry) = archive.next().map_err(wrong)? {
        let goes_on = take.take(number, entry, &mut archive).map_err(|error| match error {
            OciError::Content(error) => wrong(error.into()),
            error => error,
        })?;
        if !goes_on {
            return Ok(());
        }
        progress(count.get());
        number += 1;
    }
    // Behind the archive's end there may be more that the digest is of.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| wrong(error.into()))?;
    progress(count.get());
    check(layer, rest.hasher.finish())
}

fn check(layer: &Layer, is: Digest) -> Result<(), OciError> {
    match layer.content {
        Some(said) if said != is => Err(OciError::Digest(layer.blob.name.clone())),
        _ => Ok(()),
    }
}
