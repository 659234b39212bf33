//! The two sessions against each other in one thread, with time that only the test moves: latency,
//! links that break after any frame, and frames that break the protocol.
#![allow(clippy::unwrap_used)]

use std::{collections::VecDeque, time::Duration};

use guest_images::BaseId;
use handoff::{
    Geometry, Offer, StateRoot,
    ownership::{Epoch, HandoffId, Question, Verdict, VmId},
    source::{SourceEvent, SourceSession, Violation},
    stage::{Codec, OpenError, Packed, Sealer, Segment, SegmentKind},
    target::{TargetError, TargetEvent, TargetSession},
    wire::{
        Ack, Agreed, Frame, Hello, Intent, Prepare, Resumed, Torn, VERSION_EARLY_COMMIT,
        VERSION_MAX, VERSION_REST, Versions, Welcome,
    },
};
use proptest::prelude::*;

const LATENCY: Duration = Duration::from_millis(25);
const STEP: Duration = Duration::from_millis(5);
const ROOT: StateRoot = StateRoot([5; 32]);
/// What the target took of the offer.
const AGREED: Agreed = Agreed { bases: 1, known: Some(0) };
const SILENCE: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_millis(60);

fn question() -> Question {
    Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(2) }
}

fn hello() -> Hello {
    let offer = Offer {
        vm_name: "vm".into(),
        base: BaseId([0; 32]),
        geometry: Geometry { ram_chunks: 1, disk_chunks: 1 },
        changed_disk_chunks: 0,
        machine: Vec::new(),
        also: vec![BaseId([1; 32])],
        known: vec![ROOT],
    };
    Hello {
        versions: Versions::OURS,
        handoff: question(),
        vm_name: "vm".into(),
        intent: Intent::New(offer),
        audit: false,
    }
}

fn segments(n: u64) -> VecDeque<Segment> {
    let mut sealer = Sealer::new(&question().handoff.0);
    (0..n)
        .map(|i| {
            let payload = vec![i as u8; 100_000];
            let packed = Packed { codec: Codec::Raw, raw_len: 100_000, payload };
            sealer.seal(1, SegmentKind::Chunks, packed)
        })
        .collect()
}

fn arrived(queue: &mut VecDeque<(Duration, Frame)>, now: Duration) -> Option<Frame> {
    let due = queue.front().is_some_and(|(at, _)| *at <= now);
    due.then(|| queue.pop_front()).flatten().map(|(_, frame)| frame)
}

/// Both ends, a link with latency, and what each end came to know.
struct Pair {
    now: Duration,
    source: SourceSession,
    target: TargetSession,
    up: VecDeque<(Duration, Frame)>,
    down: VecDeque<(Duration, Frame)>,
    linked: bool,
    /// The target has seen this link's Hello.
    greeted: bool,
    to_send: VecDeque<Segment>,
    applied: Vec<u64>,
    segments_carried: u64,
    rests_carried: u64,
    asked_to_prepare: bool,
    prepared: bool,
    /// Whether the commit goes early; whether the target has verified, and has heard of the commit.
    early: bool,
    verified: bool,
    committed: bool,
    runs: u32,
    moved: bool,
    frames: u64,
}

impl Pair {
    fn new(n: u64) -> Self {
        Self::committing(n, false)
    }

    fn committing(n: u64, early: bool) -> Self {
        Self {
            now: Duration::from_secs(1),
            source: SourceSession::new(hello(), SILENCE, PING).committing_early(early),
            target: TargetSession::new(question(), AGREED, 350_000, SILENCE, PING),
            up: VecDeque::new(),
            down: VecDeque::new(),
            linked: false,
            greeted: false,
            to_send: segments(n),
            applied: Vec::new(),
            segments_carried: 0,
            rests_carried: 0,
            asked_to_prepare: false,
            prepared: false,
            early,
            verified: false,
            committed: false,
            runs: 0,
            moved: false,
            frames: 0,
        }
    }

    fn link(&mut self) {
        self.linked = true;
        self.source.link_up(self.now);
    }

    /// Everything on its way is lost, but for a part of the first segment.
    fn cut(&mut self) {
        self.linked = false;
        self.greeted = false;
        let torn = self.up.iter().map(|(_, frame)| frame).find_map(|frame| match frame {
            Frame::Segment(segment) => {
                let mut encoding = Vec::new();
                segment.encode_into(&mut encoding);
                encoding.truncate(encoding.len() / 2);
                Some(Torn::Segment(encoding))
            }
            Frame::Rest(rest) => Some(Torn::Rest(rest[..rest.len() / 2].to_vec())),
            _ => None,
        });
        self.target.tore(torn.unwrap_or_default());
        self.up.clear();
        self.down.clear();
        self.source.link_down();
        self.target.link_down();
        self.committed = false;
        if std::mem::take(&mut self.verified) && self.runs == 0 {
            self.target.prepared(ROOT, None, self.now);
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        while self.source.has_room() {
            match self.to_send.pop_front() {
                Some(segment) => self.source.submit(segment),
                None => break,
            }
        }
        if self.to_send.is_empty() && !std::mem::replace(&mut self.asked_to_prepare, true) {
            self.source.prepare(ROOT, None);
        }
        if !self.linked {
            return;
        }
        assert!(self.source.tick(self.now), "a live link is not given up");
        assert!(!self.greeted || self.target.tick(self.now), "a live link is not given up");
        self.source_sends();
        if self.early && self.source.may_commit() {
            self.source.commit();
            self.source_sends();
        }
        while let Some(frame) = self.target.poll_transmit().filter(|_| self.greeted) {
            self.down.push_back((self.now + LATENCY, frame));
        }
        while let Some(frame) = arrived(&mut self.up, self.now) {
            self.frames += 1;
            match frame {
                Frame::Hello(hello) => {
                    assert_eq!(hello.handoff, question());
                    self.greeted = true;
                    self.target.link_up(VERSION_MAX, self.now);
                }
                frame => self.target.handle(frame, self.now).unwrap(),
            }
            self.target_acts();
        }
        while let Some(frame) = arrived(&mut self.down, self.now) {
            self.frames += 1;
            self.source.handle(frame, self.now).unwrap();
            self.source_acts();
        }
    }

    fn source_sends(&mut self) {
        while let Some(frame) = self.source.poll_transmit() {
            self.segments_carried += u64::from(matches!(frame, Frame::Segment(_)));
            self.rests_carried += u64::from(matches!(frame, Frame::Rest(_)));
            self.up.push_back((self.now + LATENCY, frame));
        }
    }

    fn target_acts(&mut self) {
        while let Some(event) = self.target.poll_event() {
            match event {
                TargetEvent::Segment(segment) => {
                    let segment = segment.check().unwrap();
                    self.applied.push(segment.seq);
                    self.target.applied(&segment.mark(), self.now);
                }
                TargetEvent::Prepare(prepare) => {
                    assert_eq!((prepare.root, prepare.early), (ROOT, self.early));
                    self.verified = true;
                    if !prepare.early {
                        self.target.prepared(ROOT, None, self.now);
                    }
                }
                TargetEvent::Commit | TargetEvent::Answer(Verdict::Committed) => {
                    self.committed = true;
                }
                TargetEvent::Answer(verdict) => assert_eq!(verdict, Verdict::Pending),
                TargetEvent::Released => {}
                other => panic!("{other:?}"),
            }
        }
        let may_run = self.verified || self.target.is_prepared();
        if self.committed && may_run && self.runs == 0 {
            self.runs += 1;
            self.target.resumed(Resumed::untimed(question()));
        }
    }

    fn source_acts(&mut self) {
        while let Some(event) = self.source.poll_event() {
            match event {
                SourceEvent::Prepared { root, .. } => {
                    assert_eq!(root, ROOT);
                    if !std::mem::replace(&mut self.prepared, true) && !self.early {
                        self.source.commit();
                    }
                }
                SourceEvent::Resumed(_) => {
                    self.moved = true;
                    self.source.release();
                }
                SourceEvent::Welcomed { .. } | SourceEvent::Relinked { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn finish(&mut self, n: u64) {
        for _ in 0..20_000 {
            if self.moved {
                break;
            }
            self.step();
        }
        assert!(self.moved, "not done in 100 s");
        assert_eq!(self.applied, (1..=n).collect::<Vec<_>>(), "each once, in order");
        assert_eq!(self.runs, 1);
    }
}

#[test]
fn a_handoff_over_one_link() {
    let mut pair = Pair::new(30);
    pair.link();
    pair.finish(30);
    assert_eq!(pair.segments_carried, 30);
    let (rtt, least) = pair.source.rtt().unwrap();
    assert!(least >= 2 * LATENCY && rtt < 2 * LATENCY + 4 * STEP, "{rtt:?}");
}

/// With an early commit the guest runs one way of the link after the last segment was sent, and the
/// source knows after another one.
#[test]
fn an_early_commit_waits_for_no_answer() {
    let took = |early| {
        let mut pair = Pair::committing(3, early);
        pair.link();
        while !pair.asked_to_prepare || pair.segments_carried < 3 {
            pair.step();
        }
        let sent = pair.now;
        pair.finish(3);
        pair.now - sent
    };
    let (early, prepared) = (took(true), took(false));
    assert!(early <= 2 * LATENCY + 3 * STEP, "{early:?}");
    assert!(prepared >= early + 2 * LATENCY, "{prepared:?}, {early:?} early");
}

/// The link breaks after every single step of the whole handoff in turn.
#[test]
fn a_break_at_any_moment() {
    breaks_at_any_moment(false);
}

#[test]
fn a_break_at_any_moment_with_an_early_commit() {
    breaks_at_any_moment(true);
}

fn breaks_at_any_moment(early: bool) {
    let (mut steps, mut rests) = (0, 0);
    loop {
        let mut pair = Pair::committing(8, early);
        pair.link();
        for _ in 0..steps {
            pair.step();
        }
        if pair.moved {
            break;
        }
        pair.cut();
        pair.step();
        pair.link();
        pair.finish(8);
        // The window is what a break can cost.
        assert!(pair.segments_carried <= 8 + 5, "{} carried", pair.segments_carried);
        rests += pair.rests_carried;
        steps += 1;
    }
    assert!(rests > 5, "what was torn is completed, {rests} times");
    assert!(steps > 40, "the handoff takes more steps than {steps}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any number of breaks anywhere.
    #[test]
    fn breaks(pauses in proptest::collection::vec(1u32..60, 0..12), early: bool) {
        let mut pair = Pair::committing(12, early);
        for steps in pauses {
            pair.link();
            for _ in 0..steps {
                pair.step();
            }
            if pair.moved {
                break;
            }
            pair.cut();
        }
        if !pair.moved {
            pair.link();
        }
        pair.finish(12);
    }
}

fn welcomed() -> SourceSession {
    let mut source = SourceSession::new(hello(), SILENCE, PING);
    source.link_up(Duration::ZERO);
    assert!(matches!(source.poll_transmit(), Some(Frame::Hello(_))));
    let welcome = Welcome {
        version: VERSION_MAX,
        applied_up_to: 0,
        window_bytes: 1 << 20,
        agreed: AGREED,
        held_bytes: 0,
    };
    source.handle(Frame::Welcome(welcome), Duration::ZERO).unwrap();
    source
}

#[test]
fn a_target_that_lies_is_found_out() {
    let at = Duration::ZERO;
    let ack = Frame::Ack(Ack { applied_up_to: 1 });
    assert!(matches!(welcomed().handle(ack, at), Err(Violation::Ack { acked: 1, .. })));

    let prepared = Frame::Prepared { handoff: question(), root: ROOT, full_hash: None };
    let early = welcomed().handle(prepared.clone(), at);
    assert!(matches!(early, Err(Violation::Unexpected { .. })));

    let resumed = Frame::Resumed(Resumed::untimed(question()));
    assert!(matches!(welcomed().handle(resumed, at), Err(Violation::Unexpected { .. })));

    let other = Question { epoch: Epoch(9), ..question() };
    let mut asked = welcomed();
    asked.prepare(ROOT, None);
    assert!(matches!(asked.poll_transmit(), Some(Frame::Prepare(_))));
    let foreign = Frame::Prepared { handoff: other, root: ROOT, full_hash: None };
    assert_eq!(asked.handle(foreign, at), Err(Violation::OtherHandoff("Prepared")));
    asked.handle(prepared, at).unwrap();

    let mut greeting = SourceSession::new(hello(), SILENCE, PING);
    greeting.link_up(at);
    let welcome =
        Welcome { version: 7, applied_up_to: 0, window_bytes: 0, agreed: AGREED, held_bytes: 0 };
    assert_eq!(greeting.handle(Frame::Welcome(welcome), at), Err(Violation::Version(7)));

    for (bases, known) in [(2, None), (0, Some(1))] {
        let mut greeting = SourceSession::new(hello(), SILENCE, PING);
        greeting.link_up(at);
        let agreed = Agreed { bases, known };
        let welcome = Welcome {
            version: VERSION_MAX,
            applied_up_to: 0,
            window_bytes: 0,
            agreed,
            held_bytes: 0,
        };
        let answer = greeting.handle(Frame::Welcome(welcome), at);
        assert_eq!(answer, Err(Violation::Agreed(agreed)), "not offered");
    }
    let mut relinked = welcomed();
    relinked.link_down();
    relinked.link_up(at);
    let welcome = Welcome {
        version: VERSION_MAX,
        applied_up_to: 0,
        window_bytes: 0,
        agreed: Agreed::default(),
        held_bytes: 0,
    };
    let answer = relinked.handle(Frame::Welcome(welcome), at);
    assert_eq!(answer, Err(Violation::Agreed(Agreed::default())), "another than before");
}

#[test]
fn a_source_that_lies_is_found_out() {
    let at = Duration::ZERO;
    let fresh = || TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
    let mut all = segments(2);
    let second = all.pop_back().unwrap();
    assert!(matches!(fresh().handle(Frame::Segment(second), at), Err(TargetError::Open(_))));

    let mut damaged = all.pop_back().unwrap();
    damaged.payload[7] ^= 1;
    let mut target = fresh();
    target.handle(Frame::Segment(damaged), at).unwrap();
    let Some(TargetEvent::Segment(taken)) = target.poll_event() else { panic!() };
    assert_eq!(taken.check(), Err(OpenError::Chain { seq: 1 }));
    // On the next link it is the first again.
    target.link_up(VERSION_MAX, at);
    target.handle(Frame::Segment(segments(1).pop_back().unwrap()), at).unwrap();

    let (handoff, full_hash, early) = (question(), None, false);
    let prepare = Prepare { handoff, last_seq: 3, root: ROOT, full_hash, early };
    let answer = fresh().handle(Frame::Prepare(prepare), at);
    assert_eq!(answer, Err(TargetError::LastSegment { said: 3, came: 0 }));

    let commit = handoff::wire::Commit { handoff: question() };
    assert!(fresh().handle(Frame::Commit(commit), at).is_err());
}

/// What came with version 4 is not understood in version 3, and a Commit behind a Prepare that waits
/// for its answer breaks the protocol in both.
#[test]
fn an_early_commit_is_of_its_version_only() {
    let at = Duration::ZERO;
    let prepare =
        Prepare { handoff: question(), last_seq: 0, root: ROOT, full_hash: None, early: true };
    let waits = Prepare { early: false, ..prepare };
    let commit = Frame::Commit(handoff::wire::Commit { handoff: question() });
    for (version, prepare, fits) in [
        (VERSION_EARLY_COMMIT, prepare, true),
        (VERSION_EARLY_COMMIT, waits, false),
        (VERSION_EARLY_COMMIT - 1, waits, false),
    ] {
        let mut target = TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
        target.link_up(version, at);
        target.handle(Frame::Prepare(prepare), at).unwrap();
        assert_eq!(target.handle(commit.clone(), at).is_ok(), fits, "{version} {prepare:?}");
    }
    let mut target = TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
    target.link_up(VERSION_EARLY_COMMIT - 1, at);
    assert!(target.handle(Frame::Prepare(prepare), at).is_err());

    // And a source does not use it there.
    let mut source = SourceSession::new(hello(), SILENCE, PING).committing_early(true);
    source.link_up(at);
    let version = VERSION_EARLY_COMMIT - 1;
    let welcome =
        Welcome { version, applied_up_to: 0, window_bytes: 1 << 20, agreed: AGREED, held_bytes: 0 };
    source.handle(Frame::Welcome(welcome), at).unwrap();
    let early = |event| matches!(event, Some(SourceEvent::Welcomed { early: true, .. }));
    assert!(!early(source.poll_event()));
    source.prepare(ROOT, None);
    while source.poll_transmit().is_some() {}
    assert!(!source.may_commit());
}

/// What a link left of a segment is completed by the rest of it and nothing else, in the version that
/// has this, and as far as it can be what it claims.
#[test]
fn a_torn_segment_is_completed_by_its_rest() {
    let at = Duration::ZERO;
    let mut encoding = Vec::new();
    segments(1)[0].encode_into(&mut encoding);
    let (part, rest) = encoding.split_at(encoding.len() / 3);
    let relinked = |version, torn| {
        let mut target = TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
        target.link_up(version, at);
        target.link_down();
        target.tore(torn);
        target.link_up(version, at);
        let Some(Frame::Welcome(welcome)) = target.poll_transmit() else { panic!() };
        (target, welcome.held_bytes as usize)
    };
    let torn = || Torn::Segment(part.to_vec());
    let (mut target, held) = relinked(VERSION_REST, torn());
    assert_eq!(held, part.len());
    target.handle(Frame::Rest(rest.to_vec()), at).unwrap();
    let Some(TargetEvent::Segment(whole)) = target.poll_event() else { panic!() };
    assert_eq!(whole.check().unwrap(), segments(1)[0]);
    // Once.
    assert!(target.handle(Frame::Rest(rest.to_vec()), at).is_err());

    // Another rest makes no segment, and what was held is gone with it.
    let (mut target, _) = relinked(VERSION_REST, torn());
    assert!(target.handle(Frame::Rest(rest[1..].to_vec()), at).is_err());
    assert_eq!(target.held_bytes(), 0);

    // The whole of it does as well; an older source knows no rest; and of another segment, or of one
    // whose number did not come, nothing is kept.
    let (mut target, _) = relinked(VERSION_REST, torn());
    target.handle(Frame::Segment(segments(1).pop_back().unwrap()), at).unwrap();
    assert_eq!(target.held_bytes(), 0);
    assert_eq!(relinked(VERSION_REST - 1, torn()).1, 0);
    assert_eq!(relinked(VERSION_REST, Torn::Segment(part[..20].to_vec())).1, 0);
    let mut second = Vec::new();
    segments(2)[1].encode_into(&mut second);
    assert_eq!(relinked(VERSION_REST, Torn::Segment(second)).1, 0);

    // A source believes no more than what can be.
    for (held_bytes, possible) in [(1, false), (part.len(), true), (encoding.len(), false)] {
        let mut source = welcomed();
        source.submit(segments(1).pop_back().unwrap());
        source.link_down();
        source.link_up(at);
        let welcome = Welcome {
            version: VERSION_MAX,
            applied_up_to: 0,
            window_bytes: 1 << 20,
            agreed: AGREED,
            held_bytes: held_bytes as u32,
        };
        let answer = source.handle(Frame::Welcome(welcome), at);
        assert_eq!(answer.is_ok(), possible, "{held_bytes} held: {answer:?}");
        if possible {
            let hello = source.poll_transmit();
            assert!(matches!(hello, Some(Frame::Hello(_))));
            assert_eq!(source.poll_transmit(), Some(Frame::Rest(rest.to_vec())));
        }
    }
}

/// A source that has only its record left says Commit; what is not here whole never will be.
#[test]
fn what_can_never_be_completed_is_told_from_what_is_early() {
    let at = Duration::ZERO;
    let mut target = TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
    target.link_up(VERSION_MAX, at);
    target.link_up_to_settle(VERSION_MAX, Verdict::Prepared, at);
    let commit = Frame::Commit(handoff::wire::Commit { handoff: question() });
    target.handle(commit, at).unwrap();
    assert_eq!(target.poll_event(), Some(TargetEvent::CommitLost));
}

#[test]
fn a_silent_link_is_given_up_and_a_waiting_target_asks() {
    let mut target = TargetSession::new(question(), AGREED, 1 << 20, SILENCE, PING);
    target.link_up(VERSION_MAX, Duration::ZERO);
    target.prepared(ROOT, None, Duration::ZERO);
    let mut now = Duration::ZERO;
    let mut asked = false;
    while target.tick(now) {
        while let Some(frame) = target.poll_transmit() {
            asked |= frame == Frame::Query(question());
        }
        now += STEP;
        assert!(now < SILENCE * 2);
    }
    assert!(now >= SILENCE);
    // Two seconds of silence are also when it would ask; a link that says anything else is asked.
    target.link_up(VERSION_MAX, now);
    for _ in 0..500 {
        now += STEP;
        target.heard(now);
        assert!(target.tick(now));
        while let Some(frame) = target.poll_transmit() {
            asked |= frame == Frame::Query(question());
        }
    }
    assert!(asked);
}
