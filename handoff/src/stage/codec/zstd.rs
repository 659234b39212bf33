//! zstd: one frame, without a checksum and without the length, both of which the segment has.

use std::io;

use zstd::zstd_safe::CParameter;

/// No match is further away than this: a batch is hardly longer.
const WINDOW_LOG: u32 = 20;

/// The first level whose tables are made smaller than zstd would have them.
const FIRST_BOUNDED_LEVEL: i32 = 4;

/// Entries of each of its tables. Without this, a context of level 19 takes 34 MiB in place of 4, and
/// sends 0.25 % less (ADR 0014).
const TABLE_LOG: u32 = 18;

pub(in super::super) struct Encoder {
    context: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl Encoder {
    pub(in super::super) fn new(level: i32) -> io::Result<Self> {
        let mut context = zstd::bulk::Compressor::new(level)?;
        context.include_contentsize(false)?;
        context.include_checksum(false)?;
        context.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        let mut encoder = Self { context, level };
        encoder.bound_tables()?;
        Ok(encoder)
    }

    fn bound_tables(&mut self) -> io::Result<()> {
        // 0 leaves it to the level.
        let log = if self.level < FIRST_BOUNDED_LEVEL { 0 } else { TABLE_LOG };
        self.context.set_parameter(CParameter::HashLog(log))?;
        self.context.set_parameter(CParameter::ChainLog(log))
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
            self.bound_tables()?;
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
