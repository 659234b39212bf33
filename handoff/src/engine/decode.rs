//! The target's decoders: segments are checked, decompressed, read and hashed side by side, and
//! come out in the order in which they went in.

use std::{
    collections::BTreeMap,
    thread::{Scope, ScopedJoinHandle},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::MAX_DECODERS;
use crate::stage::{
    Codec, Decompressor, Inspected, Inspector, Mark, OpenError, Segment, SegmentKind, Unchecked,
};

/// Segments that are being decoded or wait to be applied, besides one for each decoder: none of
/// them waits for the thread that applies.
const AHEAD: usize = 2;

/// A segment that is ready to be applied.
#[derive(Debug)]
pub(super) struct Decoded {
    pub(super) mark: Mark,
    pub(super) kind: SegmentKind,
    /// What is to be applied; of machine state only the body.
    pub(super) content: Inspected,
}

/// Why a segment cannot be applied.
#[derive(Debug)]
pub(super) enum Undecodable {
    /// The link did not carry what was sent.
    Link(OpenError),
    /// It is what was sent, and makes no sense.
    Content(String),
}

type Outcome = Result<Decoded, Undecodable>;

/// The decoding threads and what they have at hand: at most [`Decoders::room`] segments, from
/// [`Decoders::push`] until [`Decoders::next`].
#[derive(Debug)]
pub(super) struct Decoders {
    jobs: Sender<(Unchecked, Inspected)>,
    done: Receiver<(u64, Outcome)>,
    /// Decoded before their turn.
    early: BTreeMap<u64, Outcome>,
    /// The number whose turn it is.
    next: u64,
    at_hand: usize,
    room: usize,
    /// Buffers for segments to come.
    spare: Vec<Inspected>,
}

impl Decoders {
    /// Starts so many threads. They end when this value is dropped.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        workers: usize,
        inspector: &Inspector,
    ) -> Self {
        let workers = workers.clamp(1, MAX_DECODERS);
        let room = workers + AHEAD;
        let (jobs, taken) = bounded::<(Unchecked, Inspected)>(room);
        let (to, done) = bounded(room);
        for _ in 0..workers {
            let (inspector, taken, to) = (inspector.clone(), taken.clone(), to.clone());
            let _: ScopedJoinHandle<'_, ()> = scope.spawn(move || work(&inspector, &taken, &to));
        }
        let (early, spare) = (BTreeMap::new(), Vec::new());
        Self { jobs, done, early, next: 0, at_hand: 0, room, spare }
    }

    /// Whether one more can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.at_hand < self.room
    }

    /// Whether nothing is at hand.
    pub(super) fn is_empty(&self) -> bool {
        self.at_hand == 0
    }

    /// Becomes ready when there may be something for [`Decoders::next`].
    pub(super) fn done(&self) -> &Receiver<(u64, Outcome)> {
        &self.done
    }

    /// Takes the next segment. There must be [room](Decoders::has_room).
    pub(super) fn push(&mut self, segment: Unchecked) {
        if self.is_empty() {
            self.next = segment.seq();
        }
        self.at_hand += 1;
        let into = self.spare.pop().unwrap_or_default();
        // The threads live as long as this value does.
        let sent = self.jobs.send((segment, into));
        debug_assert!(sent.is_ok());
    }

    /// The segment whose turn it is, once it is decoded. After one that cannot be applied nothing
    /// is at hand any more: what came behind it means nothing.
    pub(super) fn next(&mut self) -> Option<Outcome> {
        self.early.extend(self.done.try_iter());
        self.give()
    }

    /// The same, waiting for it; `None` if nothing is at hand.
    pub(super) fn wait(&mut self) -> Option<Outcome> {
        while !self.is_empty() && !self.early.contains_key(&self.next) {
            self.early.extend([self.done.recv().ok()?]);
        }
        self.give()
    }

    fn give(&mut self) -> Option<Outcome> {
        let outcome = self.early.remove(&self.next)?;
        self.at_hand -= 1;
        self.next += 1;
        if outcome.is_err() {
            self.forget();
        }
        Some(outcome)
    }

    /// Gives up what is at hand.
    pub(super) fn forget(&mut self) {
        while self.at_hand > self.early.len() {
            let Ok(late) = self.done.recv() else { break };
            self.early.extend([late]);
        }
        self.early.clear();
        self.at_hand = 0;
    }

    /// Takes back the buffers of what was applied.
    pub(super) fn reuse(&mut self, content: Inspected) {
        if self.spare.len() < self.room {
            self.spare.push(content);
        }
    }
}

/// Answers for one job, also where decoding it panics: whoever applies waits for each.
struct Answer<'a> {
    seq: u64,
    outcome: Option<Outcome>,
    to: &'a Sender<(u64, Outcome)>,
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        let broke =
            || Err(Undecodable::Content(format!("decoding segment {} broke off", self.seq)));
        // Whoever waited may be gone; then nobody needs it.
        let _ = self.to.send((self.seq, self.outcome.take().unwrap_or_else(broke)));
    }
}

fn work(
    inspector: &Inspector,
    jobs: &Receiver<(Unchecked, Inspected)>,
    done: &Sender<(u64, Outcome)>,
) {
    let mut decompressor = Decompressor::new();
    for (segment, into) in jobs {
        let mut answer = Answer { seq: segment.seq(), outcome: None, to: done };
        answer.outcome = Some(decode(&mut decompressor, inspector, segment, into));
    }
}

fn decode(
    decompressor: &mut Decompressor,
    inspector: &Inspector,
    segment: Unchecked,
    mut content: Inspected,
) -> Outcome {
    let segment = segment.check().map_err(Undecodable::Link)?;
    let mark = segment.mark();
    let Segment { seq, kind, codec, raw_len, payload, .. } = segment;
    let wrong = |why: &dyn std::fmt::Display| Undecodable::Content(format!("segment {seq}: {why}"));
    if codec == Codec::Raw && payload.len() == raw_len as usize {
        *content.body_mut() = payload;
    } else {
        decompressor
            .decompress_into(codec, raw_len, &payload, content.body_mut())
            .map_err(|e| wrong(&e))?;
    }
    if kind == SegmentKind::Chunks {
        inspector.inspect(&mut content).map_err(|e| wrong(&e))?;
    }
    Ok(Decoded { mark, kind, content })
}
