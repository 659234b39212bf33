//! bzip2: one stream.
//!
//! Its library cannot begin again with a context that it has: each body gets its own.

use std::io;

use bzip2::{Action, Compress, Compression, Decompress, Status};

pub(in super::super) fn encode(level: i32, body: &[u8], into: &mut Vec<u8>) -> io::Result<bool> {
    let level = Compression::new(level.clamp(1, 9).unsigned_abs());
    let mut stream = Compress::new(level, 0);
    super::room_for(body.len(), into);
    let status = stream.compress_vec(body, into, Action::Finish).map_err(super::invalid)?;
    Ok(status == Status::StreamEnd && into.len() < body.len())
}

pub(in super::super) fn decode(payload: &[u8], len: usize, into: &mut Vec<u8>) -> io::Result<()> {
    let mut stream = Decompress::new(false);
    super::room_for(len, into);
    let status = stream.decompress_vec(payload, into).map_err(super::invalid)?;
    let whole = status == Status::StreamEnd && stream.total_in() == payload.len() as u64;
    whole.then_some(()).ok_or_else(|| super::invalid("not one whole bzip2 stream"))
}
