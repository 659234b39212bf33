//! zstd: one frame, without a checksum and without the length, both of which the segment has.

use std::io;

pub(in super::super) struct Encoder {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Encoder {
    pub(in super::super) fn new(level: i32) -> io::Result<Self> {
        let mut context = zstd::bulk::Compressor::new(level)?;
        context.include_contentsize(false)?;
        context.include_checksum(false)?;
        Ok(Self { context, level })
    }

    pub(in super::super) fn encode(
        &mut self,
        level: i32,
        body: &[u8],
        into: &mut Vec<u8>,
    ) -> io::Result<bool> {
        if level != self.level {
            self.context.set_compression_level(level)?;
            self.level = level;
        }
        into.clear();
        into.reserve(zstd::zstd_safe::compress_bound(body.len()));
        let len = self.context.compress_to_buffer(body, into)?;
        Ok(len < body.len())
    }
}

pub(in super::super) struct Decoder {
    context: zstd::bulk::Decompressor<'static>,
}

impl Decoder {
    pub(in super::super) fn new() -> io::Result<Self> {
        Ok(Self { context: zstd::bulk::Decompressor::new()? })
    }

    pub(in super::super) fn decode(
        &mut self,
        payload: &[u8],
        len: usize,
        into: &mut Vec<u8>,
    ) -> io::Result<()> {
        super::room_for(len, into);
        self.context.decompress_to_buffer(payload, into).map(drop)
    }
}
