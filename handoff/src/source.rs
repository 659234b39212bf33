//! The source's half of the protocol, without I/O and without a clock.
//!
//! The driver feeds it what happens (links, frames, time) and takes out what to send and what that
//! means. It keeps segments until the target says they are applied, so that a link which broke
//! goes on where it stopped and nothing applied is sent again.

mod event;

use std::{collections::VecDeque, sync::Arc, time::Duration};

pub use event::{SourceEvent, Violation};

use crate::{
    health::{Health, Pulse},
    ownership::{Question, Verdict, bounded_text},
    root::StateRoot,
    stage::{Buffers, SEGMENT_OVERHEAD, Segment},
    wire::{
        Agreed, Commit, Frame, Hello, Intent, Prepare, VERSION_EARLY_COMMIT, VERSION_REST,
        Versions, Welcome,
    },
};

/// Bytes of segments that may be unacknowledged.
pub const DEFAULT_WINDOW_BYTES: u64 = 8 << 20;

/// A target may be silent for so many times the usual bound before it says Welcome: it opens a
/// base and reserves memory and disk first.
const GREETING_PATIENCE: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// Hello is on its way.
    Greeting,
    Up,
}

/// What was said last and waits for an answer; said again on a later link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    None,
    Prepare(Prepare),
    /// An early one goes behind the Prepare that was not answered.
    Commit(Commit, Option<Prepare>),
    Over,
}

/// What is to be sent next.
#[derive(Clone, Debug)]
pub enum Outgoing {
    /// A frame.
    Frame(Frame),
    /// A segment, which stays in the window until it is applied.
    Segment(Arc<Segment>),
    /// What follows so many bytes of a segment's encoding, which the target holds.
    Rest(Arc<Segment>, usize),
}

/// The source's session: one handoff, over any number of links.
#[derive(Debug)]
pub struct SourceSession {
    hello: Hello,
    /// Whether to commit early with a target that knows how.
    wants_early: bool,
    link: Link,
    /// What the first Welcome agreed to, and in which version.
    welcomed: Option<(u32, Agreed)>,
    progressed: bool,
    /// Segments not known to be applied, oldest first, numbered without gaps.
    window: VecDeque<Arc<Segment>>,
    window_used: u64,
    /// How much of it the target takes, and how much this side wants to keep.
    window_bytes: u64,
    window_limit: u64,
    /// Where payloads go that were applied.
    buffers: Buffers,
    /// How many of `window` were sent on this link.
    sent: usize,
    /// Bytes of those.
    sent_bytes: u64,
    /// Bytes that the target holds of the first segment to be sent on this link.
    held_bytes: usize,
    last_submitted: u64,
    applied_up_to: u64,
    word: Word,
    /// Which of its frames were sent on this link.
    prepare_sent: bool,
    word_sent: bool,
    /// The target has said Prepared.
    prepared: bool,
    outbox: VecDeque<Frame>,
    events: VecDeque<SourceEvent>,
    health: Health,
    silence: Duration,
    linked_at: Duration,
}

impl SourceSession {
    /// A handoff that begins with `hello`.
    pub fn new(hello: Hello, silence: Duration, ping_every: Duration) -> Self {
        Self {
            hello,
            wants_early: false,
            link: Link::Down,
            welcomed: None,
            progressed: false,
            window: VecDeque::new(),
            window_used: 0,
            window_bytes: DEFAULT_WINDOW_BYTES,
            window_limit: DEFAULT_WINDOW_BYTES,
            buffers: Buffers::default(),
            sent: 0,
            sent_bytes: 0,
            held_bytes: 0,
            last_submitted: 0,
            applied_up_to: 0,
            word: Word::None,
            prepare_sent: false,
            word_sent: false,
            prepared: false,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            health: Health::new(silence, ping_every),
            silence,
            linked_at: Duration::ZERO,
        }
    }

    /// The same, with payloads that are given to `buffers` once they are applied.
    pub fn with_buffers(self, buffers: Buffers) -> Self {
        Self { buffers, ..self }
    }

    /// The same, with a commit that does not wait for Prepared, if the target speaks
    /// [`VERSION_EARLY_COMMIT`].
    pub fn committing_early(self, early: bool) -> Self {
        Self { wants_early: early, ..self }
    }

    /// Whether the commit may be said without waiting for Prepared. Known once there was a Welcome.
    fn is_early(&self) -> bool {
        self.wants_early
            && self.welcomed.is_some_and(|(version, _)| version >= VERSION_EARLY_COMMIT)
    }

    /// The handoff.
    pub fn handoff(&self) -> Question {
        self.hello.handoff
    }

    /// There is a link.
    pub fn link_up(&mut self, now: Duration) {
        self.link = Link::Greeting;
        self.linked_at = now;
        self.health.link_up(now);
        self.sent = 0;
        self.sent_bytes = 0;
        self.held_bytes = 0;
        self.prepare_sent = false;
        self.word_sent = false;
        self.outbox.clear();
        if self.welcomed.is_some() {
            self.hello.intent = Intent::Resume;
        }
        self.outbox.push_back(Frame::Hello(Box::new(self.hello.clone())));
    }

    /// The link is gone.
    pub fn link_down(&mut self) {
        self.link = Link::Down;
        self.outbox.clear();
    }

    /// Whether another segment may be submitted now.
    pub fn has_room(&self) -> bool {
        self.window_used < self.window_bytes.min(self.window_limit)
    }

    /// From now on, no more bytes of segments than so many are unacknowledged. At least one segment
    /// always may be.
    pub fn limit_window(&mut self, bytes: u64) {
        self.window_limit = bytes.max(1);
    }

    /// Takes the next segment to send. The window may be overrun by one segment, never by more:
    /// the driver asks [`SourceSession::has_room`] first.
    pub fn submit(&mut self, segment: Segment) {
        debug_assert_eq!(segment.seq, self.last_submitted + 1);
        self.last_submitted = segment.seq;
        self.window_used += segment.encoded_len() as u64;
        self.window.push_back(Arc::new(segment));
    }

    /// Says, right behind the last segment, that this was all.
    pub fn prepare(&mut self, root: StateRoot, full_hash: Option<[u8; 32]>) {
        let (handoff, last_seq) = (self.hello.handoff, self.last_submitted);
        // Whether it is early is known when it is sent.
        let prepare = Prepare { handoff, last_seq, root, full_hash, early: false };
        self.say(Word::Prepare(prepare));
    }

    /// Whether Commit, if it were said now, would be the next frame on the present link: everything
    /// before it was given to that, and answered unless the commit is early.
    pub fn may_commit(&self) -> bool {
        match self.word {
            Word::Prepare(_) => {
                self.link == Link::Up
                    && self.word_sent
                    && self.outbox.is_empty()
                    && (self.is_early() || self.prepared)
            }
            Word::None | Word::Commit(..) | Word::Over => false,
        }
    }

    /// Says that the epoch is the target's. Only after that is durable here. From now on it counts as
    /// said, and is said again on each link until it is answered.
    pub fn commit(&mut self) {
        let behind = match self.word {
            Word::Prepare(prepare) if self.is_early() && !self.prepared => Some(prepare),
            _ => None,
        };
        let prepare_sent = self.word_sent;
        self.say(Word::Commit(Commit { handoff: self.hello.handoff }, behind));
        self.prepare_sent = prepare_sent;
    }

    /// Whether Commit was said, or may have been.
    pub fn is_committed(&self) -> bool {
        matches!(self.word, Word::Commit(..))
    }

    /// Whether everything was submitted, so that the target may hold a copy that is whole.
    pub fn is_complete(&self) -> bool {
        matches!(self.word, Word::Prepare(_) | Word::Commit(..))
    }

    /// Says that the handoff is over. Only where it is durable that it was not committed.
    pub fn abort(&mut self, reason: &str) {
        self.say(Word::Over);
        if self.link != Link::Down {
            let (handoff, reason) = (self.hello.handoff, bounded_text(reason));
            self.outbox.push_back(Frame::Abort { handoff, reason });
        }
    }

    /// Says that this side has let go. Only after that is durable here.
    pub fn release(&mut self) {
        self.say(Word::Over);
        if self.link != Link::Down {
            self.outbox.push_back(Frame::Released(self.hello.handoff));
        }
    }

    fn say(&mut self, word: Word) {
        self.word = word;
        self.prepare_sent = false;
        self.word_sent = false;
    }

    /// Bytes of segments that the target has not applied yet, as far as is known.
    pub fn unapplied_bytes(&self) -> u64 {
        self.window_used
    }

    /// Of those, bytes that were not given to the present link yet.
    pub fn unsent_bytes(&self) -> u64 {
        self.window_used - self.sent_bytes
    }

    /// The last segment that the target has applied.
    pub fn applied_up_to(&self) -> u64 {
        self.applied_up_to
    }

    /// The smoothed and the shortest round trip of pings.
    pub fn rtt(&self) -> Option<(Duration, Duration)> {
        self.health.rtt().zip(self.health.rtt_min())
    }

    /// Whether this link, or an earlier one since this was last asked, got as far as Welcome.
    pub fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progressed)
    }

    /// Time passes. `false` if nothing was heard for so long that the link must be given up.
    #[must_use]
    pub fn tick(&mut self, now: Duration) -> bool {
        if self.link == Link::Down {
            return true;
        }
        let patient = self.link == Link::Greeting
            && now.saturating_sub(self.linked_at) < self.silence * GREETING_PATIENCE;
        match self.health.pulse(now) {
            Pulse::Dead => return patient,
            Pulse::Ping(nonce) if self.link == Link::Up => {
                self.outbox.push_back(Frame::Ping(nonce));
            }
            Pulse::Ping(_) | Pulse::Fine => {}
        }
        true
    }

    /// The next frame to send on the present link.
    pub fn poll_transmit(&mut self) -> Option<Frame> {
        self.poll_outgoing().map(|outgoing| match outgoing {
            Outgoing::Frame(frame) => frame,
            Outgoing::Segment(segment) => Frame::Segment((*segment).clone()),
            Outgoing::Rest(segment, from) => {
                let mut encoding = Vec::new();
                segment.encode_into(&mut encoding);
                Frame::Rest(encoding.split_off(from))
            }
        })
    }

    /// The same, without a copy of what stays in the window.
    pub fn poll_outgoing(&mut self) -> Option<Outgoing> {
        if let Some(frame) = self.outbox.pop_front() {
            return Some(Outgoing::Frame(frame));
        }
        if self.link != Link::Up {
            return None;
        }
        if let Some(segment) = self.window.get(self.sent) {
            // Once the handoff is over, what was not sent need not be.
            if self.word != Word::Over {
                // The target's window may be smaller than what was taken before it was known.
                if self.sent > 0 && self.sent_bytes >= self.window_bytes {
                    return None;
                }
                self.sent += 1;
                self.sent_bytes += segment.encoded_len() as u64;
                let segment = Arc::clone(segment);
                return Some(match std::mem::take(&mut self.held_bytes) {
                    0 => Outgoing::Segment(segment),
                    held => Outgoing::Rest(segment, held),
                });
            }
        }
        let frame = match self.word {
            _ if self.word_sent => return None,
            Word::None | Word::Over => return None,
            Word::Prepare(prepare) => Frame::Prepare(Prepare { early: self.is_early(), ..prepare }),
            Word::Commit(_, Some(prepare)) if !self.prepare_sent => {
                self.prepare_sent = true;
                return Some(Outgoing::Frame(Frame::Prepare(Prepare { early: true, ..prepare })));
            }
            Word::Commit(commit, _) => Frame::Commit(commit),
        };
        self.word_sent = true;
        Some(Outgoing::Frame(frame))
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<SourceEvent> {
        self.events.pop_front()
    }

    /// Something came in on the present link, and be it part of a frame.
    pub fn heard(&mut self, now: Duration) {
        self.health.heard(now);
    }

    /// Takes a frame that came in on the present link.
    pub fn handle(&mut self, frame: Frame, now: Duration) -> Result<(), Violation> {
        self.health.heard(now);
        let unexpected = |frame: &Frame, when| Violation::Unexpected { frame: frame.name(), when };
        if self.link == Link::Greeting {
            return match frame {
                Frame::Welcome(welcome) => self.welcome(welcome),
                Frame::Refuse(refusal) => self.tell(SourceEvent::Refused(refusal)),
                Frame::Status { question, verdict } => {
                    self.about("Status", question)?;
                    self.tell(SourceEvent::Answer(verdict))
                }
                Frame::Ping(nonce) => self.answer(Frame::Pong(nonce)),
                frame => Err(unexpected(&frame, "before Welcome")),
            };
        }
        match frame {
            Frame::Ack(ack) => self.applied(ack.applied_up_to),
            Frame::Prepared { handoff, root, full_hash } => {
                self.about("Prepared", handoff)?;
                match self.word {
                    Word::Prepare(prepare) if self.word_sent => {
                        self.applied(prepare.last_seq)?;
                        self.prepared = true;
                        self.tell(SourceEvent::Prepared { root, full_hash })
                    }
                    // Said twice, or when it no longer matters.
                    Word::Prepare(_) | Word::None => Err(Violation::Unexpected {
                        frame: "Prepared",
                        when: "before everything was sent",
                    }),
                    Word::Commit(..) | Word::Over => Ok(()),
                }
            }
            Frame::Declined { handoff, reason } => {
                self.about("Declined", handoff)?;
                self.tell(SourceEvent::Declined(reason))
            }
            Frame::Resumed(resumed) => {
                self.about("Resumed", resumed.handoff)?;
                match self.word {
                    Word::Commit(..) | Word::Over => self.tell(SourceEvent::Resumed(resumed)),
                    Word::Prepare(_) | Word::None => {
                        Err(Violation::Unexpected { frame: "Resumed", when: "before the commit" })
                    }
                }
            }
            Frame::Abort { handoff, reason } => {
                self.about("Abort", handoff)?;
                self.tell(SourceEvent::Aborted(reason))
            }
            Frame::Ping(nonce) => self.answer(Frame::Pong(nonce)),
            Frame::Pong(nonce) => {
                self.health.pong(nonce, now);
                Ok(())
            }
            Frame::Query(question) => {
                let verdict = self.standing(question);
                self.answer(Frame::Status { question, verdict })
            }
            frame => Err(unexpected(&frame, "from the target")),
        }
    }

    /// How this handoff stands, for a target that asks. Commit is durable before the session is
    /// told of it, so saying so is safe.
    fn standing(&self, question: Question) -> Verdict {
        match self.word {
            _ if question != self.hello.handoff => Verdict::Unknown,
            Word::None | Word::Prepare(_) => Verdict::Pending,
            Word::Commit(..) => Verdict::Committed,
            // Over may mean aborted or released: the record knows, this session does not.
            Word::Over => Verdict::Unknown,
        }
    }

    fn welcome(&mut self, welcome: Welcome) -> Result<(), Violation> {
        let Welcome { version, applied_up_to, window_bytes, agreed, held_bytes } = welcome;
        let Versions { min, max } = self.hello.versions;
        if !(min..=max).contains(&version) {
            return Err(Violation::Version(version));
        }
        if self.welcomed.is_some_and(|(before, _)| before != version) {
            return Err(Violation::Version(version));
        }
        let possible = match (self.welcomed, &self.hello.intent) {
            (Some((_, before)), _) => agreed == before,
            (None, Intent::New(offer)) => agreed.answers(offer),
            (None, Intent::Resume | Intent::Settle) => agreed == Agreed::default(),
        };
        if !possible {
            return Err(Violation::Agreed(agreed));
        }
        self.applied(applied_up_to)?;
        self.held_bytes = self.held(version, held_bytes)?;
        self.link = Link::Up;
        self.sent = 0;
        self.sent_bytes = 0;
        self.window_bytes = DEFAULT_WINDOW_BYTES.min(window_bytes);
        self.progressed = true;
        let first = self.welcomed.replace((version, agreed)).is_none();
        self.tell(if first {
            SourceEvent::Welcomed { version, agreed, early: self.is_early() }
        } else {
            SourceEvent::Relinked { applied_up_to }
        })
    }

    /// What the target holds of the next segment must be less than all of it, and more than what
    /// says which it is.
    fn held(&self, version: u32, bytes: u32) -> Result<usize, Violation> {
        let held = bytes as usize;
        let next = self.window.front().map_or(0, |segment| segment.encoded_len());
        let possible =
            held == 0 || version >= VERSION_REST && (SEGMENT_OVERHEAD..next).contains(&held);
        if possible { Ok(held) } else { Err(Violation::Held(bytes)) }
    }

    fn applied(&mut self, acked: u64) -> Result<(), Violation> {
        let (from, to) = (self.applied_up_to, self.last_submitted);
        if acked < from || acked > to {
            return Err(Violation::Ack { acked, from, to });
        }
        while self.window.front().is_some_and(|s| s.seq <= acked) {
            let Some(segment) = self.window.pop_front() else { break };
            self.window_used -= segment.encoded_len() as u64;
            if self.sent > 0 {
                self.sent -= 1;
                self.sent_bytes -= segment.encoded_len() as u64;
            }
            // One that is being written goes with its writer.
            if let Some(segment) = Arc::into_inner(segment) {
                self.buffers.give(segment.payload);
            }
        }
        self.applied_up_to = acked;
        Ok(())
    }

    fn about(&self, frame: &'static str, question: Question) -> Result<(), Violation> {
        if question == self.hello.handoff { Ok(()) } else { Err(Violation::OtherHandoff(frame)) }
    }

    fn answer(&mut self, frame: Frame) -> Result<(), Violation> {
        self.outbox.push_back(frame);
        Ok(())
    }

    fn tell(&mut self, event: SourceEvent) -> Result<(), Violation> {
        self.events.push_back(event);
        Ok(())
    }
}
