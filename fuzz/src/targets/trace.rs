//! Traces: files of recorded guests.
//!
//! What was read can be written, and is then read as the same trace. Input: whether to reseal, and
//! the file, or its header without the checksum and what is compressed in it.

use std::{io::Write as _, time::Duration};

use guest_images::{Part, Place};
use handoff::{
    ChunkId, Geometry, Space,
    trace::{Trace, TraceBuilder, file},
};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    world::chunk,
};

pub(super) const TARGET: Target =
    Target { name: "trace", from: Origin::File, run, seeds, max_len: 64 << 10 };

const HEADER_BYTES: usize = 104;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let bytes = match input.u8() & 1 {
        0 => input.rest().to_vec(),
        _ => sealed(input.take(HEADER_BYTES), input.rest()),
    };
    let Ok(trace) = file::read(&bytes[..]) else { return false };
    let written = encode(&trace);
    let again = file::read(&written[..]).expect("what was written can be read");
    assert_eq!(encode(&again), written);
    let summary = trace.summary(3);
    assert_eq!(summary, again.summary(3));
    for change in trace.changes() {
        assert!(trace.geometry().contains(change.id) && change.at <= trace.duration());
        assert!(trace.contents().get(change.content).is_some());
    }
    true
}

fn sealed(header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut file = header.to_vec();
    file.extend(*blake3::hash(header).as_bytes());
    let mut zstd = zstd::stream::write::Encoder::new(file, 1).expect("an encoder");
    zstd.write_all(body).expect("to memory");
    zstd.write_all(blake3::hash(body).as_bytes()).expect("to memory");
    zstd.finish().expect("to memory")
}

fn encode(trace: &Trace) -> Vec<u8> {
    let mut bytes = Vec::new();
    file::write(trace, &mut bytes).expect("a trace can be written");
    bytes
}

fn sample() -> Trace {
    let ram = |index| ChunkId { space: Space::Ram, index };
    let disk = |index| ChunkId { space: Space::Disk, index };
    let geometry = Geometry { ram_chunks: 40, disk_chunks: 10 };
    let mut trace = TraceBuilder::new(geometry, [20, 2, 0, 40], 100);
    let mut make = || {
        trace.base(Place { part: Part::Disk, index: 3 }, &chunk(1))?;
        trace.base(Place { part: Part::Memory, index: 39 }, &chunk(2))?;
        trace.initial(ram(0), &chunk(3))?;
        trace.initial(disk(9), &chunk(1))?;
        trace.change(Duration::from_millis(1), ram(0), &chunk(4))?;
        trace.change(Duration::from_millis(1), disk(0), &[0; 4096])?;
        trace.change(Duration::from_millis(9), ram(39), &chunk(2))
    };
    make().expect("a small trace");
    trace.finish(Duration::from_millis(10))
}

fn seeds() -> Vec<Vec<u8>> {
    let geometry = Geometry { ram_chunks: 1, disk_chunks: 0 };
    let empty = TraceBuilder::new(geometry, [0; 4], 10).finish(Duration::ZERO);
    let seeds = [encode(&sample()), encode(&empty)].map(|file| {
        let (head, frame) = file.split_at(HEADER_BYTES + blake3::OUT_LEN);
        let mut body = zstd::stream::decode_all(frame).expect("what was just written");
        body.truncate(body.len() - blake3::OUT_LEN);
        let open = Program::new().u8(1).bytes(&head[..HEADER_BYTES]).bytes(&body).finish();
        [Program::new().u8(0).bytes(&file).finish(), open]
    });
    seeds.concat()
}
