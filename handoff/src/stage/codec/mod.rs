//! The codecs, each with its encoder and its decoder, and each the same to call:
//!
//! - `encode` puts the payload into a buffer and says whether it is shorter than the body. If not,
//!   what the buffer holds is of no use.
//! - `decode` puts at most `len` bytes, and little more than that in memory, into a buffer, and says
//!   whether the payload ended there, with nothing behind it.
//!
//! Both keep what they need from one call to the next. An error leaves them usable.

pub(super) mod bzip2;
pub(super) mod deflate;
pub(super) mod lz4;
pub(super) mod xz;
pub(super) mod zstd;

use std::io;

/// The bytes are not what this codec writes.
fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Makes room for a body of `len` bytes, and for one byte by which a longer one shows.
fn room_for(len: usize, into: &mut Vec<u8>) {
    into.clear();
    into.reserve(len + 1);
}
