//! The thread that reads one link.

use std::{
    io::Read,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crossbeam_channel::Sender;

use crate::{
    Clock,
    wire::{Frame, FrameReader, ReadError, Torn},
};

/// What a reading thread gives: a frame and when it came, or why there are no more.
pub(super) type Heard = Result<(Frame, Duration), ReadError>;

/// How much a frame weighs in a queue, besides its payload.
const FRAME_WEIGHT_BYTES: u64 = 256;

/// How much a frame weighs in a queue.
pub(super) fn weight(frame: &Frame) -> u64 {
    match frame {
        Frame::Segment(segment) => segment_weight(segment.encoded_len() as u64),
        Frame::Rest(bytes) => segment_weight(bytes.len() as u64),
        _ => FRAME_WEIGHT_BYTES,
    }
}

/// The same for a segment whose encoding has so many bytes.
pub(super) fn segment_weight(bytes: u64) -> u64 {
    FRAME_WEIGHT_BYTES + bytes
}

/// Reads frames until the link ends, `stop` is set or nobody takes them. What the link left of a
/// segment is given back.
///
/// `queued` is what was read and not yet taken, in bytes; beyond `most_queued` reading waits, so
/// that the link's own flow control holds the peer back. `at_once` sees each frame first and may
/// keep it: a busy engine must not make the link look dead.
pub(super) fn read_link<R: Read>(
    mut reader: FrameReader<R>,
    to: &Sender<Heard>,
    clock: &dyn Clock,
    stop: &AtomicBool,
    bytes: &AtomicU64,
    (queued, most_queued): (&AtomicU64, u64),
    mut at_once: impl FnMut(Frame) -> Option<Frame>,
) -> Torn {
    let mut counted = 0;
    while !stop.load(Relaxed) {
        if queued.load(Relaxed) > most_queued {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let read = reader.read_frame();
        bytes.fetch_add(reader.bytes() - counted, Relaxed);
        counted = reader.bytes();
        let heard = match read {
            Ok(None) => continue,
            Ok(Some(frame)) => match at_once(frame) {
                None => continue,
                Some(frame) => {
                    queued.fetch_add(weight(&frame), Relaxed);
                    Ok((frame, clock.now()))
                }
            },
            Err(e) => Err(e),
        };
        let last = heard.is_err();
        if to.send(heard).is_err() || last {
            break;
        }
    }
    reader.into_torn()
}
