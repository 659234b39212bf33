//! The target's half of the protocol, without I/O and without a clock.
//!
//! It checks that segments come in order, leaves to its driver to check that they are whole and of
//! this handoff, says how far they are applied, and tells its driver what the source decided. What may be decided here is the work of
//! [`crate::ownership::target`].

use std::{collections::VecDeque, time::Duration};

use crate::{
    health::{Health, Pulse},
    ownership::{Question, Verdict, bounded_text},
    root::StateRoot,
    source::Violation,
    stage::{Mark, OpenError, Opener, SEGMENT_OVERHEAD, Segment, SegmentError, Unchecked},
    wire::{
        Ack, Agreed, Frame, MAX_SEGMENT_BYTES, Prepare, Resumed, Torn, VERSION_EARLY_COMMIT,
        VERSION_MIN, VERSION_REST, Welcome,
    },
};

/// An acknowledgement is sent when nothing that came is left to apply, when so many bytes were applied
/// since the last one ...
pub const ACK_BYTES: u64 = 256 << 10;
/// ... or so long after the first of them.
pub const ACK_AFTER: Duration = Duration::from_millis(50);
/// A target that waits for the word asks when it did not come for so long.
pub const ASK_AFTER: Duration = Duration::from_secs(2);

/// What the source's frames mean to the target's driver.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetEvent {
    /// The next segment. To be checked, applied in order, then [`TargetSession::applied`]; if it is
    /// not what it claims, the link is to be given up.
    Segment(Unchecked),
    /// Everything was sent: verify, once all segments before are applied.
    Prepare(Prepare),
    /// The source committed; what it said before may still be to be verified.
    Commit,
    /// The source committed, and has lost what is still missing here: it can only be declined.
    CommitLost,
    /// The source aborted.
    Aborted(String),
    /// The source has let go.
    Released,
    /// The source answered a question about this handoff.
    Answer(Verdict),
}

/// Why the source's frames are not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// A frame that breaks the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// A segment that does not continue what came before.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What was held of a segment and what followed are none together.
    #[error("malformed segment: {0}")]
    Segment(#[from] SegmentError),
    /// Prepare names another last segment than the one that came.
    #[error("the source says that segment {said} was the last, {came} came last")]
    LastSegment {
        /// What Prepare says.
        said: u64,
        /// What came.
        came: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Segments come.
    Receiving,
    /// Everything came; the driver verifies. Whether Commit may come before it has.
    Verifying { early: bool },
    /// Prepared was said.
    Prepared(StateRoot, Option<[u8; 32]>),
    /// The guest runs here; the times are said with Resumed.
    Running(Resumed),
    /// Declined was said.
    Declined,
}

/// The target's session: one handoff, over any number of links.
#[derive(Debug)]
pub struct TargetSession {
    handoff: Question,
    agreed: Agreed,
    window_bytes: u64,
    /// What both speak on the present link.
    version: u32,
    /// The present link was made only to settle the handoff.
    settling: bool,
    phase: Phase,
    /// Up to what was taken.
    opener: Opener,
    /// Up to what was applied.
    applied: Opener,
    /// The first bytes of the segment behind that, which an earlier link broke off.
    held: Vec<u8>,
    unacked_bytes: u64,
    unacked_since: Option<Duration>,
    asked_at: Duration,
    declined: String,
    outbox: VecDeque<Frame>,
    events: VecDeque<TargetEvent>,
    health: Health,
}

impl TargetSession {
    /// A handoff whose Hello was accepted, built on what `agreed` says. Say [`TargetSession::link_up`] for the first link too.
    pub fn new(
        handoff: Question,
        agreed: Agreed,
        window_bytes: u64,
        silence: Duration,
        ping_every: Duration,
    ) -> Self {
        Self {
            handoff,
            agreed,
            window_bytes,
            version: VERSION_MIN,
            settling: false,
            phase: Phase::Receiving,
            opener: Opener::new(&handoff.handoff.0),
            applied: Opener::new(&handoff.handoff.0),
            held: Vec::new(),
            unacked_bytes: 0,
            unacked_since: None,
            asked_at: Duration::ZERO,
            declined: String::new(),
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            health: Health::new(silence, ping_every),
        }
    }

    /// A link whose Hello names this handoff; `version` is what both speak. What was taken from the
    /// link before and not applied comes again: the driver forgets it.
    pub fn link_up(&mut self, version: u32, now: Duration) {
        self.begin_link(version, false, now);
        let applied_up_to = self.applied.last_seq();
        if version < VERSION_REST || seq_of(&self.held) != Some(applied_up_to + 1) {
            self.held = Vec::new();
        }
        // What is held came in one frame, whose length is 32 bits.
        let held_bytes = self.held.len() as u32;
        let Self { window_bytes, agreed, .. } = *self;
        let welcome = Welcome { version, applied_up_to, window_bytes, agreed, held_bytes };
        self.outbox.push_back(Frame::Welcome(welcome));
    }

    /// A link on which the source, having lost all but its record, asks how this handoff stands.
    pub fn link_up_to_settle(&mut self, version: u32, verdict: Verdict, now: Duration) {
        self.begin_link(version, true, now);
        self.outbox.push_back(Frame::Status { question: self.handoff, verdict });
    }

    fn begin_link(&mut self, version: u32, settling: bool, now: Duration) {
        self.link_down();
        self.health.link_up(now);
        self.version = version;
        self.settling = settling;
        self.asked_at = now;
        self.outbox.clear();
        self.unacked_bytes = 0;
        self.unacked_since = None;
    }

    /// The link is gone, and with it all that was not applied: it comes again, or never.
    pub fn link_down(&mut self) {
        self.opener = self.applied.clone();
        self.events.retain(|e| {
            !matches!(e, TargetEvent::Segment(_) | TargetEvent::Prepare(_) | TargetEvent::Commit)
        });
        if matches!(self.phase, Phase::Verifying { .. }) {
            self.phase = Phase::Receiving;
        }
    }

    /// The link left this of a segment: what follows is enough on the next one.
    pub fn tore(&mut self, torn: Torn) {
        match torn {
            Torn::Nothing => {}
            Torn::Segment(bytes) => self.held = bytes,
            Torn::Rest(bytes) => self.held.extend_from_slice(&bytes),
        }
    }

    /// Bytes held of a segment that an earlier link broke off.
    pub fn held_bytes(&self) -> u64 {
        self.held.len() as u64
    }

    /// The handoff.
    pub fn handoff(&self) -> Question {
        self.handoff
    }

    /// Whether everything came, whatever became of it.
    pub fn is_past_receiving(&self) -> bool {
        self.phase != Phase::Receiving
    }

    /// Whether Prepared was said and nothing decided since.
    pub fn is_prepared(&self) -> bool {
        matches!(self.phase, Phase::Prepared(..))
    }

    /// The segment behind the last one applied was applied too.
    pub fn applied(&mut self, mark: &Mark, now: Duration) {
        self.applied.go_to(mark);
        self.unacked_bytes += mark.bytes;
        self.unacked_since.get_or_insert(now);
        self.ack_if_due(now);
    }

    /// Nothing that came is left to apply. What the source sends last waits for nothing here then, and
    /// that is what it wants to know before it pauses the guest.
    pub fn caught_up(&mut self) {
        if self.unacked_bytes > 0 {
            self.ack();
        }
    }

    fn ack_if_due(&mut self, now: Duration) {
        let late = self.unacked_since.is_some_and(|t| now.saturating_sub(t) >= ACK_AFTER);
        if late || self.unacked_bytes >= ACK_BYTES {
            self.ack();
        }
    }

    fn ack(&mut self) {
        self.outbox.push_back(Frame::Ack(Ack { applied_up_to: self.applied.last_seq() }));
        self.unacked_bytes = 0;
        self.unacked_since = None;
    }

    /// Says Prepared. Only after that is durable here.
    pub fn prepared(&mut self, root: StateRoot, full_hash: Option<[u8; 32]>, now: Duration) {
        self.phase = Phase::Prepared(root, full_hash);
        self.asked_at = now;
        self.say_again();
    }

    /// Says Declined. Only after that is durable here.
    pub fn declined(&mut self, reason: &str) {
        self.phase = Phase::Declined;
        self.declined = bounded_text(reason);
        self.say_again();
    }

    /// Says Resumed. Only after the guest runs.
    pub fn resumed(&mut self, resumed: Resumed) {
        self.phase = Phase::Running(resumed);
        self.say_again();
    }

    fn say_again(&mut self) {
        let handoff = self.handoff;
        self.outbox.extend(match self.phase {
            Phase::Receiving | Phase::Verifying { .. } => None,
            Phase::Prepared(root, full_hash) => Some(Frame::Prepared { handoff, root, full_hash }),
            Phase::Running(resumed) => Some(Frame::Resumed(resumed)),
            Phase::Declined => Some(Frame::Declined { handoff, reason: self.declined.clone() }),
        });
    }

    /// Time passes. `false` if nothing was heard for so long that the link must be given up.
    #[must_use]
    pub fn tick(&mut self, now: Duration) -> bool {
        self.ack_if_due(now);
        if self.is_prepared() && now.saturating_sub(self.asked_at) >= ASK_AFTER {
            self.asked_at = now;
            self.outbox.push_back(Frame::Query(self.handoff));
        }
        match self.health.pulse(now) {
            Pulse::Dead => return false,
            Pulse::Ping(nonce) => self.outbox.push_back(Frame::Ping(nonce)),
            Pulse::Fine => {}
        }
        true
    }

    /// The next frame to send on the present link.
    pub fn poll_transmit(&mut self) -> Option<Frame> {
        self.outbox.pop_front()
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<TargetEvent> {
        self.events.pop_front()
    }

    /// Something came in on the present link that needs no more than to be heard.
    pub fn heard(&mut self, now: Duration) {
        self.health.heard(now);
    }

    /// Takes a frame that came in on the present link.
    pub fn handle(&mut self, frame: Frame, now: Duration) -> Result<(), TargetError> {
        self.health.heard(now);
        match frame {
            Frame::Segment(segment) => {
                self.held = Vec::new();
                self.segment(segment)?;
            }
            Frame::Rest(rest) => {
                if self.held.is_empty() {
                    return Err(unexpected("Rest", "of nothing that is held"));
                }
                let mut encoding = std::mem::take(&mut self.held);
                encoding.extend_from_slice(&rest);
                self.segment(Segment::decode(&encoding)?)?;
            }
            Frame::Prepare(prepare) => {
                self.about("Prepare", prepare.handoff)?;
                self.prepare(prepare)?;
            }
            Frame::Commit(commit) => {
                self.about("Commit", commit.handoff)?;
                match self.phase {
                    Phase::Prepared(..) | Phase::Verifying { early: true } => {
                        self.events.push_back(TargetEvent::Commit);
                    }
                    Phase::Running(_) | Phase::Declined => self.say_again(),
                    Phase::Receiving if self.settling => {
                        self.events.push_back(TargetEvent::CommitLost);
                    }
                    Phase::Receiving | Phase::Verifying { early: false } => {
                        return Err(unexpected("Commit", "before Prepared"));
                    }
                }
            }
            Frame::Released(handoff) => {
                self.about("Released", handoff)?;
                self.events.push_back(TargetEvent::Released);
            }
            Frame::Abort { handoff, reason } => {
                self.about("Abort", handoff)?;
                self.events.push_back(TargetEvent::Aborted(reason));
            }
            Frame::Status { question, verdict } => {
                self.about("Status", question)?;
                self.events.push_back(TargetEvent::Answer(verdict));
            }
            Frame::Ping(nonce) => self.outbox.push_back(Frame::Pong(nonce)),
            Frame::Pong(nonce) => self.health.pong(nonce, now),
            frame => return Err(unexpected(frame.name(), "from the source")),
        }
        Ok(())
    }

    fn segment(&mut self, segment: Segment) -> Result<(), TargetError> {
        if self.phase != Phase::Receiving {
            return Err(unexpected("Segment", "after Prepare"));
        }
        let segment = self.opener.take(segment)?;
        self.events.push_back(TargetEvent::Segment(segment));
        Ok(())
    }

    fn prepare(&mut self, prepare: Prepare) -> Result<(), TargetError> {
        match self.phase {
            Phase::Receiving => {
                let came = self.opener.last_seq();
                if prepare.last_seq != came {
                    return Err(TargetError::LastSegment { said: prepare.last_seq, came });
                }
                if prepare.early && self.version < VERSION_EARLY_COMMIT {
                    return Err(unexpected("PrepareEarly", "in a version that has none"));
                }
                self.phase = Phase::Verifying { early: prepare.early };
                self.events.push_back(TargetEvent::Prepare(prepare));
            }
            // Said twice on this link: the answer is still to come.
            Phase::Verifying { .. } => {}
            Phase::Prepared(..) | Phase::Running(_) | Phase::Declined => self.say_again(),
        }
        Ok(())
    }

    fn about(&self, frame: &'static str, question: Question) -> Result<(), Violation> {
        if question == self.handoff { Ok(()) } else { Err(Violation::OtherHandoff(frame)) }
    }
}

/// Which segment it is whose encoding begins so. None has less than what says so, nor as much as
/// the largest segment: all of that would not be a part.
fn seq_of(encoding: &[u8]) -> Option<u64> {
    let known = (SEGMENT_OVERHEAD..MAX_SEGMENT_BYTES).contains(&encoding.len());
    encoding.first_chunk::<8>().filter(|_| known).map(|seq| u64::from_le_bytes(*seq))
}

fn unexpected(frame: &'static str, when: &'static str) -> TargetError {
    Violation::Unexpected { frame, when }.into()
}
