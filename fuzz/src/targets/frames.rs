//! The frame decoder: a stream from a peer, in pieces.
//!
//! The frames, and where they end, do not depend on the pieces; what was decoded can be said, and says
//! the same.

use handoff::{
    Refusal, StateRoot,
    ownership::{Epoch, Verdict},
    stage::{Codec, Packed, SegmentKind, seal::Sealer},
    wire::{
        Ack, Agreed, Call, Commit, Decoder, Frame, FrameReader, Hello, Intent, MAX_SEGMENT_BYTES,
        Prepare, ReadError, Resumed, VERSION_MAX, Versions, Welcome, encode,
    },
};

use super::{Origin, Target};
use crate::{
    input::Input,
    world::{QUESTION, offer},
};

pub(super) const TARGET: Target =
    Target { name: "frames", from: Origin::Peer, run, seeds, max_len: 64 << 10 };

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let piece = usize::from(input.u8()) + 1;
    let stream = input.rest();
    let (frames, refused) = decode(stream.chunks(piece));
    assert_eq!(decode([stream].into_iter()), (frames.clone(), refused), "in one piece");
    assert_eq!(read(stream), (frames.clone(), refused), "read from a stream");
    for frame in frames {
        let mut said = Vec::new();
        encode(&frame, &mut said).expect("what was decoded can be encoded");
        assert!(said.len() <= MAX_SEGMENT_BYTES + 5);
        assert_eq!(decode([&said[..]].into_iter()), (vec![frame], false));
    }
    !refused
}

/// The frames, and whether it ended with something that is none.
fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, bool) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, true),
            }
        }
    }
    (frames, false)
}

fn read(stream: &[u8]) -> (Vec<Frame>, bool) {
    let mut reader = FrameReader::new(stream);
    let mut frames = Vec::new();
    loop {
        match reader.read_frame() {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => unreachable!("a slice has no tick"),
            Err(ReadError::Wire(_)) => return (frames, true),
            Err(ReadError::Closed { .. }) => return (frames, false),
            Err(ReadError::Io(e)) => panic!("reading a slice: {e}"),
        }
    }
}

/// One frame of each kind.
pub(super) fn one_of_each() -> Vec<Frame> {
    let handoff = QUESTION;
    let hello = |intent| {
        let (versions, vm_name) = (Versions::OURS, "vm".into());
        Frame::Hello(Box::new(Hello { versions, handoff, vm_name, intent, audit: false }))
    };
    let root = StateRoot([3; 32]);
    let packed = Packed { codec: Codec::Raw, raw_len: 5, payload: b"12345".to_vec() };
    let segment = Sealer::new(&handoff.handoff.0).seal(1, SegmentKind::MachineState, packed);
    let agreed = Agreed { bases: 1, known: None };
    let welcome = Welcome {
        version: VERSION_MAX,
        applied_up_to: 0,
        window_bytes: 1 << 20,
        agreed,
        held_bytes: 0,
    };
    let what = "disk".into();
    let (last_seq, full_hash) = (9, Some([4; 32]));
    let prepare = Prepare { handoff, last_seq, root, full_hash, early: false };
    vec![
        hello(Intent::New(offer())),
        hello(Intent::Resume),
        hello(Intent::Settle),
        Frame::Welcome(welcome),
        Frame::Welcome(Welcome { held_bytes: 300, ..welcome }),
        Frame::Refuse(Refusal::Version { ours: 3, theirs: 9 }),
        Frame::Refuse(Refusal::NoSpace { what, needed_bytes: 2, available_bytes: 1 }),
        Frame::Refuse(Refusal::Other("no".into())),
        Frame::Segment(segment),
        Frame::Rest(b"345".to_vec()),
        Frame::Ack(Ack { applied_up_to: 300 }),
        Frame::Prepare(prepare),
        Frame::Prepare(Prepare { early: true, ..prepare }),
        Frame::Prepared { handoff, root, full_hash: None },
        Frame::Declined { handoff, reason: "no".into() },
        Frame::Commit(Commit { handoff }),
        Frame::Resumed(Resumed::untimed(handoff)),
        Frame::Released(handoff),
        Frame::Abort { handoff, reason: "enough".into() },
        Frame::Ping(1),
        Frame::Pong(1),
        Frame::Call(Call { versions: Versions { min: 1, max: 2 }, service: "bases".into() }),
        Frame::Called { version: 1 },
        Frame::Query(handoff),
        Frame::Status { question: handoff, verdict: Verdict::Superseded { epoch: Epoch(9) } },
        Frame::Status { question: handoff, verdict: Verdict::Declined { reason: "no".into() } },
    ]
}

pub(super) fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(frame, &mut bytes).expect("a sound frame");
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let one_by_one = one_of_each();
    let all: Vec<u8> = one_by_one.iter().flat_map(bytes_of).collect();
    let seed = |bytes: Vec<u8>| [vec![6], bytes].concat();
    one_by_one.iter().map(bytes_of).chain([all]).map(seed).collect()
}
