//! The compress stage against the codecs that it calls.

use std::{hint::black_box, io, time::Instant};

use handoff::stage::{Codec, Compressor, Mode, pack::MAX_BATCH_DATA_CHUNKS};
use serde_json::json;
use zstd::zstd_safe::CParameter;

use crate::{
    Tell, contents,
    harness::{Bench, Outcome},
};

/// Bytes of batches that a fast mode is measured with.
const BATCHES: usize = 16;
/// About what one run may take in a slow mode.
const RUN_S: f64 = 0.25;

/// In every mode: the stage as the engine calls it, and the codec by its own library, on the same
/// batches in turns, by CPU time.
pub(crate) fn stage(runs: usize, tell: &mut Tell<'_>) -> anyhow::Result<()> {
    let chunks = contents::chunks(contents::MEMORY, BATCHES * MAX_BATCH_DATA_CHUNKS);
    let batches: Vec<&[u8]> =
        chunks.chunks(MAX_BATCH_DATA_CHUNKS).map(<[_]>::as_flattened).collect();
    Mode::STATIC.iter().try_for_each(|mode| tell(in_mode(*mode, &batches, runs)?))
}

fn in_mode(mode: Mode, batches: &[&[u8]], runs: usize) -> anyhow::Result<Outcome> {
    let (mut compressor, mut payload) = (Compressor::new(), Vec::new());
    let start = Instant::now();
    compressor.compress(mode, batches[0], &mut payload)?;
    let fit = (RUN_S / start.elapsed().as_secs_f64().max(1e-6)) as usize;
    let batches = &batches[..fit.clamp(1, batches.len())];
    let bench = Bench {
        group: "codecs",
        name: format!("compress_{mode}"),
        reference_name: "codec",
        bound: 0.9,
        bytes: batches.iter().map(|batch| batch.len() as u64).sum(),
        runs,
    };
    let (mut bare, mut out) = (Bare::new(mode)?, Vec::new());
    let (mut by_stage, mut by_codec) = (0, 0);
    let outcome = bench.run(
        || {
            by_codec = 0;
            for batch in batches {
                bare.compress(batch, &mut out)?;
                by_codec += black_box(&out).len();
            }
            Ok(())
        },
        || {
            by_stage = 0;
            for batch in batches {
                compressor.compress(mode, batch, &mut payload)?;
                by_stage += black_box(&payload).len();
            }
            Ok(())
        },
    )?;
    // The same, unless the stage has other parameters by now than are noted here.
    let left = |bytes: usize| bytes as f64 / bench.bytes as f64;
    Ok(outcome.with(json!({ "left": left(by_stage), "left_by_codec": left(by_codec) })))
}

/// A codec by its own library, with the parameters that the stage gives it, and with all that can be
/// kept from batch to batch.
enum Bare {
    Copy,
    Zstd(zstd::bulk::Compressor<'static>),
    Lz4(lz4_flex::block::CompressTable),
    Xz(u32),
    Gzip(flate2::Compress),
    Bzip2(u32),
}

impl Bare {
    fn new(mode: Mode) -> anyhow::Result<Self> {
        let level = mode.level().unsigned_abs();
        Ok(match mode.codec() {
            Codec::Raw => Self::Copy,
            Codec::Zstd => {
                let mut zstd = zstd::bulk::Compressor::new(mode.level())?;
                zstd.include_contentsize(false)?;
                zstd.set_parameter(CParameter::WindowLog(20))?;
                if mode.level() >= 4 {
                    zstd.set_parameter(CParameter::HashLog(18))?;
                    zstd.set_parameter(CParameter::ChainLog(18))?;
                }
                Self::Zstd(zstd)
            }
            Codec::Lz4 => Self::Lz4(lz4_flex::block::CompressTable::large()),
            Codec::Xz => Self::Xz(level),
            Codec::Gzip => {
                Self::Gzip(flate2::Compress::new(flate2::Compression::new(level), false))
            }
            Codec::Bzip2 => Self::Bzip2(level),
        })
    }

    fn compress(&mut self, body: &[u8], out: &mut Vec<u8>) -> anyhow::Result<()> {
        let room = match self {
            Self::Lz4(_) => lz4_flex::block::get_maximum_output_size(body.len()),
            _ => zstd::zstd_safe::compress_bound(body.len()),
        };
        out.clear();
        out.reserve(room);
        match self {
            Self::Copy => out.extend_from_slice(body),
            Self::Zstd(zstd) => _ = zstd.compress_to_buffer(body, out)?,
            Self::Lz4(table) => {
                out.resize(room, 0);
                let len = lz4_flex::block::compress_into_with_table(body, out, table)
                    .map_err(io::Error::other)?;
                out.truncate(len);
            }
            Self::Xz(level) => {
                let mut options = xz2::stream::LzmaOptions::new_preset(*level)?;
                options.dict_size(u32::try_from(body.len())?.min(512 << 10));
                options.literal_context_bits(1).literal_position_bits(2).position_bits(2);
                let mut stream = xz2::stream::Stream::new_lzma_encoder(&options)?;
                stream.process_vec(body, out, xz2::stream::Action::Finish)?;
            }
            Self::Gzip(stream) => {
                stream.reset();
                stream.compress_vec(body, out, flate2::FlushCompress::Finish)?;
            }
            Self::Bzip2(level) => {
                let mut stream = bzip2::Compress::new(bzip2::Compression::new(*level), 0);
                stream.compress_vec(body, out, bzip2::Action::Finish)?;
            }
        }
        Ok(())
    }
}
