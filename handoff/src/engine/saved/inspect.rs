//! What is in a file.

use std::{collections::BTreeMap, io::Read};

use guest_images::{BaseId, CHUNK_SIZE};
use serde::{Deserialize, Serialize};

use super::{
    SavedError,
    format::{Reader, Record},
    restore::append_state,
};
use crate::{
    Geometry, Space,
    stage::{Batch, Class, Codec, Decompressor, SegmentKind, What},
};

/// What a saved VM holds, and what it needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// The VM's name.
    pub vm: String,
    /// The base it is to be put on, in hex.
    pub base: String,
    /// Other bases that it refers to, in hex.
    pub also: Vec<String>,
    /// Its sizes.
    pub geometry: Geometry,
    /// The state root, in hex.
    pub root: String,
    /// The machine's description, as the VMM encoded it.
    #[serde(skip)]
    pub machine: Vec<u8>,
    /// Bytes of the file.
    pub bytes: u64,
    /// Segments in it.
    pub segments: u64,
    /// Chunks by the way they travel and the space they belong to.
    pub classes: Vec<Tally>,
    /// Bytes of batches before compression, and after.
    pub batch_bytes: (u64, u64),
    /// Bytes of the machine's state before compression, and after.
    pub state_bytes: (u64, u64),
    /// Both, by the codec of their segments.
    pub codecs: Vec<CodecTally>,
}

/// Segments of one codec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecTally {
    /// The codec.
    pub codec: String,
    /// How many segments.
    pub segments: u64,
    /// Bytes of their bodies.
    pub bytes_in: u64,
    /// Bytes of their payloads.
    pub bytes_out: u64,
}

/// Chunks of one class and one space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// The class.
    pub class: String,
    /// The space.
    pub space: Space,
    /// How many.
    pub chunks: u64,
    /// Bytes of content that the file carries for them, before compression: none for references.
    pub bytes: u64,
}

/// Says what is in a saved VM, and that it is whole: all but whether its bases are there and the
/// machine can be built.
pub fn inspect(from: impl Read) -> Result<Inspection, SavedError> {
    let mut reader = Reader::new(from)?;
    let mut decompressor = Decompressor::new();
    let mut tallies: BTreeMap<(Class, Space), (u64, u64)> = BTreeMap::new();
    let (mut batch_bytes, mut state_bytes, mut segments) = ((0, 0), (0, 0), 0);
    let mut codecs: BTreeMap<Codec, (u64, u64, u64)> = BTreeMap::new();
    let mut state = Vec::new();
    let root = loop {
        let segment = match reader.next()? {
            Record::Segment(segment) => segment,
            Record::End(root) => break root,
        };
        segments += 1;
        let seq = segment.seq;
        let body = decompressor
            .decompress(segment.codec, segment.raw_len, &segment.payload)
            .map_err(|source| SavedError::Decompress { seq, source })?;
        let bytes = match segment.kind {
            SegmentKind::Chunks => {
                let batch =
                    Batch::parse(body).map_err(|source| SavedError::Batch { seq, source })?;
                for step in batch.steps() {
                    let (class, content) = class_of(&step.what);
                    let (chunks, bytes) = tallies.entry((class, step.id.space)).or_default();
                    *chunks += 1;
                    *bytes += content as u64;
                }
                &mut batch_bytes
            }
            SegmentKind::MachineState => {
                append_state(&mut state, body)?;
                &mut state_bytes
            }
        };
        bytes.0 += body.len() as u64;
        bytes.1 += segment.payload.len() as u64;
        let of_codec = codecs.entry(segment.codec).or_default();
        of_codec.0 += 1;
        of_codec.1 += body.len() as u64;
        of_codec.2 += segment.payload.len() as u64;
    };
    let tally = |((class, space), (chunks, bytes)): ((Class, Space), (u64, u64))| Tally {
        class: class.name().to_owned(),
        space,
        chunks,
        bytes,
    };
    let Reader { offer, bytes, .. } = reader;
    Ok(Inspection {
        vm: offer.vm_name,
        base: offer.base.to_string(),
        also: offer.also.iter().map(BaseId::to_string).collect(),
        geometry: offer.geometry,
        root: root.to_string(),
        machine: offer.machine,
        bytes,
        segments,
        classes: tallies.into_iter().map(tally).collect(),
        batch_bytes,
        state_bytes,
        codecs: codecs.into_iter().map(of_codec).collect(),
    })
}

fn of_codec((codec, (segments, bytes_in, bytes_out)): (Codec, (u64, u64, u64))) -> CodecTally {
    CodecTally { codec: codec.name().to_owned(), segments, bytes_in, bytes_out }
}

/// The class of a step, and the bytes of content that it carries.
fn class_of(what: &What<'_>) -> (Class, usize) {
    match what {
        What::Reset => (Class::Reset, 0),
        What::Zero => (Class::Zero, 0),
        What::FromBase(at) => (Class::of_place(*at), 0),
        What::FromSeen(_) => (Class::Seen, 0),
        What::Data(_) => (Class::Data, CHUNK_SIZE),
        What::Delta(_, delta) => (Class::Delta, delta.len()),
    }
}
