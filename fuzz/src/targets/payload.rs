//! Decompressors: a payload from a peer, in any codec.
//!
//! What comes out has the length that was announced, or is an error; and whatever a decompressor was
//! given, it reads the next payload as if nothing had been.

use handoff::stage::{Codec, Compressor, Decompressor, Mode, pack::MAX_BATCH_BYTES};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    world::chunk,
};

pub(super) const TARGET: Target =
    Target { name: "payload", from: Origin::Peer, run, seeds, max_len: 16 << 10 };

/// One for each codec, and two for the one with several frames.
const MODES: [&str; 6] = ["none", "lz4", "zstd:1", "gzip:6", "bzip2:9", "xz:0"];

fn codec(number: u8) -> Codec {
    Codec::ALL[usize::from(number) % Codec::ALL.len()]
}

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let codec = codec(input.u8());
    // What a segment may announce: its decoder looks at that first.
    let raw_len = input.u32() % (MAX_BATCH_BYTES as u32 + 1);
    let payload = input.rest();
    let mut decompressor = Decompressor::new();
    let mut body = Vec::new();
    let taken = decompressor.decompress_into(codec, raw_len, payload, &mut body).is_ok();
    if taken {
        assert_eq!(body.len(), raw_len as usize, "{codec} gives what was announced");
        let again = Decompressor::new().decompress(codec, raw_len, payload).map(<[u8]>::to_vec);
        assert_eq!(again.as_deref().ok(), Some(&body[..]), "{codec} gives the same again");
    }
    assert!(body.capacity() <= 2 * MAX_BATCH_BYTES, "{codec} took {} bytes", body.capacity());
    let sound = sound(codec);
    let (raw_len, payload) = (sound.len() as u32, pack(codec, &sound));
    let after = decompressor.decompress(codec, raw_len, &payload);
    assert_eq!(after.expect("a sound payload"), sound, "{codec} after something else");
    taken
}

fn sound(codec: Codec) -> Vec<u8> {
    chunk(codec as u8)[..1000].to_vec()
}

fn pack(codec: Codec, body: &[u8]) -> Vec<u8> {
    let modes = MODES.iter().map(|mode| mode.parse::<Mode>().expect("a mode"));
    let mode = modes.clone().find(|mode| mode.codec() == codec).expect("a mode of each codec");
    let packed = Compressor::new().pack(mode, body).expect("a body can be compressed");
    assert_eq!(packed.codec, codec);
    packed.payload
}

fn seeds() -> Vec<Vec<u8>> {
    let seed = |codec: Codec| {
        let body: Vec<u8> = (0..3).flat_map(chunk).collect();
        let payload = pack(codec, &body);
        Program::new().u8(codec as u8).u32(body.len() as u32).bytes(&payload).finish()
    };
    Codec::ALL.into_iter().map(seed).collect()
}
