//! LZMA: one stream in the `.lzma` format, which has 13 bytes of head and no checksum. The
//! segment has what xz's container would add.

use std::io;

use xz2::stream::{Action, LzmaOptions, Status, Stream};

use crate::stage::pack::MAX_BATCH_BYTES;

/// The largest dictionary: no body is longer.
const MAX_DICT_BYTES: u32 = MAX_BATCH_BYTES.next_power_of_two() as u32;

/// The smallest dictionary that the format has.
const MIN_DICT_BYTES: u32 = 4096;

/// The dictionary to encode with. The encoder takes 8 to 12 times as much memory; all of a batch
/// would send 0.6 % less (ADR 0014).
const ENCODER_DICT_BYTES: u32 = 512 << 10;

/// What a decoder may take: the dictionary and, generously, its tables.
const DECODER_BYTES: u64 = MAX_DICT_BYTES as u64 + (64 << 10);

pub(in super::super) fn encode(level: i32, body: &[u8], into: &mut Vec<u8>) -> io::Result<bool> {
    let mut options = LzmaOptions::new_preset(level.clamp(0, 9).unsigned_abs())?;
    let dict = u32::try_from(body.len()).unwrap_or(ENCODER_DICT_BYTES);
    options.dict_size(dict.clamp(MIN_DICT_BYTES, ENCODER_DICT_BYTES));
    // Memory is made of words: the place of a byte in its word says more about it than the byte
    // before does.
    options.literal_context_bits(1).literal_position_bits(2).position_bits(2);
    let mut stream = Stream::new_lzma_encoder(&options)?;
    super::room_for(body.len(), into);
    let status = stream.process_vec(body, into, Action::Finish)?;
    Ok(status == Status::StreamEnd && into.len() < body.len())
}

pub(in super::super) fn decode(payload: &[u8], len: usize, into: &mut Vec<u8>) -> io::Result<()> {
    let mut stream = Stream::new_lzma_decoder(DECODER_BYTES)?;
    super::room_for(len, into);
    let status = stream.process_vec(payload, into, Action::Finish)?;
    let whole = status == Status::StreamEnd && stream.total_in() == payload.len() as u64;
    whole.then_some(()).ok_or_else(|| super::invalid("not one whole LZMA stream"))
}
