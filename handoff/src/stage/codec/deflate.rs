//! Deflate: one raw stream, as gzip has it inside.

use std::io;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

pub(in super::super) struct Encoder {
    stream: Compress,
    level: i32,
}

fn compression(level: i32) -> Compression {
    Compression::new(level.clamp(1, 9).unsigned_abs())
}

impl Encoder {
    pub(in super::super) fn new(level: i32) -> Self {
        Self { stream: Compress::new(compression(level), false), level }
    }

    pub(in super::super) fn encode(
        &mut self,
        level: i32,
        body: &[u8],
        into: &mut Vec<u8>,
    ) -> io::Result<bool> {
        self.stream.reset();
        if level != self.level {
            self.stream.set_level(compression(level))?;
            self.level = level;
        }
        super::room_for(body.len(), into);
        let status = self.stream.compress_vec(body, into, FlushCompress::Finish)?;
        Ok(status == Status::StreamEnd && into.len() < body.len())
    }
}

pub(in super::super) struct Decoder {
    stream: Decompress,
}

impl Decoder {
    pub(in super::super) fn new() -> Self {
        Self { stream: Decompress::new(false) }
    }

    pub(in super::super) fn decode(
        &mut self,
        payload: &[u8],
        len: usize,
        into: &mut Vec<u8>,
    ) -> io::Result<()> {
        self.stream.reset(false);
        super::room_for(len, into);
        let status = self.stream.decompress_vec(payload, into, FlushDecompress::Finish)?;
        let whole = status == Status::StreamEnd && self.stream.total_in() == payload.len() as u64;
        whole.then_some(()).ok_or_else(|| super::invalid("not one whole deflate stream"))
    }
}
