use std::sync::Arc;

use guest_images::BaseId;
use proptest::prelude::*;

use super::*;
use crate::{
    Geometry, Offer, Refusal, StateRoot,
    ownership::{Epoch, HandoffId, Question, Verdict, VmId},
    stage::{Codec, Segment, SegmentKind, seal::Sealer},
};

fn question() -> Question {
    Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(300) }
}

fn segment() -> Segment {
    let packed = crate::stage::Packed { codec: Codec::Raw, raw_len: 5, payload: b"12345".to_vec() };
    Sealer::new(&[2; 16]).seal(1, SegmentKind::Chunks, packed)
}

/// One of each.
fn frames() -> Vec<Frame> {
    let handoff = question();
    let offer = Offer {
        vm_name: "vm".into(),
        base: BaseId([7; 32]),
        geometry: Geometry { ram_chunks: 1 << 18, disk_chunks: 9 },
        changed_disk_chunks: 3,
        machine: vec![1, 2, 3],
        also: vec![BaseId([8; 32]), BaseId([9; 32])],
        known: vec![StateRoot([3; 32])],
    };
    let hello = |intent| {
        let (versions, vm_name) = (Versions::OURS, "vm".into());
        Frame::Hello(Box::new(Hello { versions, handoff, vm_name, intent, audit: true }))
    };
    let (last_seq, root) = (9, StateRoot([3; 32]));
    let prepare = Prepare { handoff, last_seq, root, full_hash: None, early: false };
    vec![
        hello(Intent::New(offer)),
        hello(Intent::Resume),
        hello(Intent::Settle),
        Frame::Welcome(Welcome {
            version: 3,
            applied_up_to: 7,
            window_bytes: 8 << 20,
            agreed: Agreed { bases: 0b10, known: Some(0) },
            held_bytes: 0,
        }),
        Frame::Welcome(Welcome {
            version: 5,
            applied_up_to: 7,
            window_bytes: 8 << 20,
            agreed: Agreed::default(),
            held_bytes: 70_000,
        }),
        Frame::Rest(vec![7; 90]),
        Frame::Refuse(Refusal::Version { ours: 1, theirs: 9 }),
        Frame::Refuse(Refusal::NoSpace {
            what: "disk".into(),
            needed_bytes: 2,
            available_bytes: 1,
        }),
        Frame::Segment(segment()),
        Frame::Ack(Ack { applied_up_to: u64::MAX }),
        Frame::Prepare(prepare),
        Frame::Prepare(Prepare { early: true, ..prepare }),
        Frame::Prepared { handoff, root: StateRoot([3; 32]), full_hash: Some([4; 32]) },
        Frame::Declined { handoff, reason: "no".into() },
        Frame::Commit(Commit { handoff }),
        Frame::Resumed(Resumed { handoff, prepare_us: 1, commit_us: 2, resume_us: 3 }),
        Frame::Released(handoff),
        Frame::Abort { handoff, reason: "enough".into() },
        Frame::Ping(1),
        Frame::Call(Call { versions: Versions { min: 1, max: 2 }, service: "bases".into() }),
        Frame::Called { version: 1 },
        Frame::Pong(1),
        Frame::Query(handoff),
        Frame::Status { question: handoff, verdict: Verdict::Superseded { epoch: Epoch(9) } },
    ]
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(frame, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_frame_comes_back_whatever_the_pieces() {
    let frames = frames();
    let bytes: Vec<u8> = frames.iter().flat_map(bytes_of).collect();
    for piece in [1, 2, 3, 7, 100, bytes.len()] {
        let mut decoder = Decoder::default();
        let mut back = Vec::new();
        for part in bytes.chunks(piece) {
            decoder.feed(part);
            while let Some(frame) = decoder.next_frame().unwrap() {
                back.push(frame);
            }
        }
        assert_eq!(back, frames);
        assert!(!decoder.is_mid_frame());
    }
}

/// Bytes missing or left over in a body are an error in every frame.
#[test]
fn bodies_are_exact() {
    // A rest is whatever it is: only with what is held before it can it be wrong.
    for frame in frames().into_iter().filter(|frame| !matches!(frame, Frame::Rest(_))) {
        let bytes = bytes_of(&frame);
        let (kind, body) = (bytes[4], &bytes[HEADER_BYTES..]);
        decode_body(kind, &[body, &[0]].concat()).unwrap_err();
        for len in 0..body.len() {
            let cut = decode_body(kind, &body[..len]);
            assert!(cut.is_err(), "{} cut to {len} of {}", frame.name(), body.len());
        }
    }
}

/// Wherever a link breaks in a segment, what it leaves and the rest of it are the segment again.
#[test]
fn a_segment_is_torn_and_completed_anywhere() {
    let segment = segment();
    let mut encoding = Vec::new();
    segment.encode_into(&mut encoding);
    let sent = bytes_of(&Frame::Segment(segment.clone()));
    for came in 0..sent.len() {
        let mut decoder = Decoder::default();
        decoder.feed(&bytes_of(&Frame::Ping(1)));
        decoder.feed(&sent[..came]);
        assert_eq!(decoder.next_frame().unwrap(), Some(Frame::Ping(1)));
        assert_eq!(decoder.next_frame().unwrap(), None);
        let held = match decoder.into_torn() {
            Torn::Segment(held) => held,
            torn => {
                assert_eq!((torn, came < HEADER_BYTES), (Torn::Nothing, true));
                continue;
            }
        };
        assert_eq!(held, encoding[..came - HEADER_BYTES]);
        let mut writer = FrameWriter::default();
        let mut rest = Vec::new();
        let put = writer.put_rest(Arc::new(segment.clone()), held.len());
        assert_eq!(put.is_ok(), held.len() >= crate::stage::SEGMENT_OVERHEAD, "{}", held.len());
        if put.is_err() {
            continue;
        }
        while writer.left() > 0 {
            writer.write(&mut rest, 3).unwrap();
        }
        let mut decoder = Decoder::default();
        decoder.feed(&rest);
        let Some(Frame::Rest(rest)) = decoder.next_frame().unwrap() else { panic!() };
        assert_eq!([held, rest].concat(), encoding);
        // And one that is torn in turn.
        let mut decoder = Decoder::default();
        decoder.feed(&[0, 1, 0, 0, 0x12, 9]);
        assert_eq!(decoder.next_frame().unwrap(), None);
        assert_eq!(decoder.into_torn(), Torn::Rest(vec![9]));
    }
}

#[test]
fn what_is_not_ours_is_told_at_the_first_frame() {
    let mut decoder = Decoder::default();
    decoder.feed(b"GET / HTTP/1.1\r\n\r\n");
    assert!(matches!(decoder.next_frame(), Err(WireError::UnknownType(_))));

    let mut bytes = bytes_of(&frames()[0]);
    bytes[HEADER_BYTES] = b'X';
    let mut decoder = Decoder::default();
    decoder.feed(&bytes);
    assert!(matches!(decoder.next_frame(), Err(WireError::Magic(_))));
}

/// A length is judged before its bytes are waited for.
#[test]
fn a_length_beyond_the_limit_is_an_error_at_once() {
    for (kind, limit) in
        [(0x01, MAX_HELLO_BYTES), (0x10, MAX_SEGMENT_BYTES), (0x30, MAX_CONTROL_BYTES)]
    {
        let mut decoder = Decoder::default();
        let length = u32::try_from(limit + 1).unwrap();
        decoder.feed(&length.to_le_bytes());
        decoder.feed(&[kind]);
        assert!(matches!(decoder.next_frame(), Err(WireError::TooLong { .. })));
    }
    let machine = vec![0; MAX_HELLO_BYTES];
    let Frame::Hello(mut hello) = frames().remove(0) else { panic!() };
    let Intent::New(offer) = &mut hello.intent else { panic!() };
    offer.machine = machine;
    let mut out = vec![9];
    encode(&Frame::Hello(hello), &mut out).unwrap_err();
    assert_eq!(out, [9], "nothing half written stays");
}

#[test]
fn versions_agree_on_the_newest_that_both_speak() {
    let ours = Versions { min: 2, max: 5 };
    assert_eq!(ours.agree(Versions { min: 1, max: 3 }), Ok(3));
    assert_eq!(ours.agree(Versions { min: 5, max: 9 }), Ok(5));
    assert_eq!(
        ours.agree(Versions { min: 6, max: 9 }),
        Err(Refusal::Version { ours: 5, theirs: 9 })
    );
    assert_eq!(
        ours.agree(Versions { min: 1, max: 1 }),
        Err(Refusal::Version { ours: 5, theirs: 1 })
    );
}

proptest! {
    /// Whatever comes, the decoder gives frames or an error, and what it takes it can say again.
    #[test]
    fn any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0u8..0x40) {
        if let Some(length) = bytes.len().checked_sub(HEADER_BYTES) {
            bytes[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
            bytes[4] = kind;
        }
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        while let Ok(Some(frame)) = decoder.next_frame() {
            let mut again = Decoder::default();
            again.feed(&bytes_of(&frame));
            prop_assert_eq!(again.next_frame().unwrap(), Some(frame));
        }
    }

    /// One byte changed in a frame: another valid frame or an error, never a panic.
    #[test]
    fn one_byte_changed(which in 0usize..20, at in 0usize..600, to: u8) {
        let mut bytes = bytes_of(&frames()[which]);
        let at = at % bytes.len();
        bytes[at] = to;
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        let _ = decoder.next_frame();
    }
}

#[test]
fn an_offer_that_cannot_be_answered_is_malformed() {
    let frames = frames();
    let Frame::Hello(hello) = &frames[0] else { panic!() };
    let offer = hello.offer().unwrap();
    let decoded = |offer: Offer| {
        let hello = Hello { intent: Intent::New(offer), ..(**hello).clone() };
        decode_body(1, &bytes_of(&Frame::Hello(Box::new(hello)))[HEADER_BYTES..])
    };
    decoded(offer.clone()).unwrap();
    let own = vec![offer.base];
    let twice = vec![BaseId([8; 32]); 2];
    let four = (0..4).map(|n| BaseId([n; 32])).collect();
    for also in [own, twice, four] {
        let offered = decoded(Offer { also, ..offer.clone() });
        assert!(matches!(offered, Err(WireError::Malformed { name: "Hello", .. })));
    }
    let known = vec![StateRoot([3; 32]); 5];
    decoded(Offer { known, ..offer.clone() }).unwrap_err();

    let agreed = |bases, known| Agreed { bases, known }.answers(offer);
    assert!(agreed(0b11, Some(0)) && agreed(0, None));
    assert!(!agreed(0b100, None) && !agreed(0x80, None) && !agreed(0, Some(1)));
}
