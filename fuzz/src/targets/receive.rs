//! The target of a handoff: the engine with its journal, under arbitrary frames over several links.
//!
//! What must hold (ADR 0001, design section 3): the guest is started at most once, only while the
//! record on disk says that this side owns it, and only with the state whose root the source named; what
//! is said to the source is on disk before; of a handoff that fails nothing runs.
//!
//! Input: flags, the record to begin with, then what the source says; `Op` has its words.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crossbeam_channel::unbounded;
use handoff::{
    Clock as _, StateRoot,
    engine::{Limits, ReceiveError, ReceiveOptions, Received, accept, receive},
    ownership::{Epoch, HandoffId, Journal, Record, State, Tenure},
    stage::{Sealer, SegmentKind},
    tcp::MonotonicClock,
    wire::{Commit, Frame, Hello, Intent, Prepare, Versions, encode},
};

use super::{Origin, Target, batch, frames};
use crate::{
    input::{Input, Program},
    model::{Model, packed},
    peer::{Host, Link, Script, Watch, Watched, said},
    scratch::Scratch,
    world::{QUESTION, offer, root_of},
};

pub(super) const TARGET: Target =
    Target { name: "receive", from: Origin::Peer, run, seeds, max_len: 64 << 10 };

/// What the source does next.
mod op {
    /// A segment of chunks.
    pub(super) const CHUNKS: u8 = 0;
    /// One of the machine's state.
    pub(super) const STATE: u8 = 1;
    /// Prepare, truthful but for what its flags say.
    pub(super) const PREPARE: u8 = 2;
    /// Commit.
    pub(super) const COMMIT: u8 = 3;
    /// Released.
    pub(super) const RELEASED: u8 = 4;
    /// Abort.
    pub(super) const ABORT: u8 = 5;
    /// A new link: its intent, and the segment with which it goes on.
    pub(super) const CUT: u8 = 6;
    /// Any frame: its type and body.
    pub(super) const FRAME: u8 = 7;
    /// Any bytes.
    pub(super) const BYTES: u8 = 8;
    /// Waits for a kind of frame from the target.
    pub(super) const WAIT: u8 = 9;
    /// One past the last.
    pub(super) const END: u8 = 10;
}

/// So many words and links at most: a run stays short.
const MOST_OPS: usize = 60;
const MOST_LINKS: usize = 6;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let flags = input.u8();
    let before = record_before(input.u8());
    let scratch = Scratch::new();
    let path = scratch.path().join("owner");
    let mut journal = Journal::open(&path).expect("no journal yet");
    if let Some(record) = before {
        journal.write(record).expect("a scratch file");
    }
    let watch = Arc::new(Watch::new(path, flags));
    let said = Said { audit: flags & 1 != 0, old: flags & 0x40 != 0 };
    let mut links = links(&mut input, said);
    let (relink, relinks) = unbounded();
    let clock = MonotonicClock::default();
    let options = options();
    let first = links.pop_front().unwrap_or_default();
    let link = Link::new(first, Arc::clone(&watch), relink, links, options.limits.clone());
    let Ok(first) = accept(link, &options.limits, &clock) else { return false };
    let mut host = Host { watch: Arc::clone(&watch) };
    let received = receive(first, &mut host, &mut journal, &relinks, &options, &clock);
    check(received, &watch, &journal);
    assert!(clock.now() < Duration::from_secs(8), "every wait has a bound");
    watch.started() == 1
}

fn check(received: Result<Received<Watched>, ReceiveError>, watch: &Watch, journal: &Journal) {
    let on_disk = Journal::open(journal.path()).expect("a whole record");
    let started = watch.started();
    match received {
        Ok(mut received) => {
            assert_eq!(started, 1);
            assert_eq!(Some(&received.record), on_disk.record());
            assert!(matches!(received.record.state, State::Owner(_)));
            assert_eq!(received.table.root(), root_of(received.vm.inner()));
        }
        Err(error) => {
            assert_eq!(started, 0, "{error}, and yet the guest runs");
            let ours = on_disk.record().filter(|r| r.handoff() == Some(QUESTION.handoff));
            let owns = ours.is_some_and(|record| matches!(record.state, State::Owner(_)));
            let told = matches!(error, ReceiveError::NotStarted(_) | ReceiveError::Link(_));
            assert!(!owns || told, "{error}, and the record says {ours:?}");
        }
    }
}

fn options() -> ReceiveOptions {
    let ms = Duration::from_millis;
    let limits = Limits {
        greeting: ms(100),
        ready: ms(1000),
        silence: ms(400),
        ping_every: ms(100),
        relink_grace: ms(50),
        hold_prepared: ms(50),
        release: ms(50),
        ..Limits::default()
    };
    let window_bytes = 1 << 20;
    ReceiveOptions { limits, window_bytes, workers: 1, ..ReceiveOptions::new("source") }
}

fn record_before(number: u8) -> Option<Record> {
    let (handoff, peer) = (HandoffId([9; 16]), "c:7".to_owned());
    let (epoch, state) = match number % 12 {
        1 => (1, State::Released { handoff, peer }),
        2 => (1, State::Declined { handoff, reason: "no".into() }),
        3 => (2, State::Declined { handoff: QUESTION.handoff, reason: "no".into() }),
        4 => (9, State::Released { handoff, peer }),
        5 => (1, State::Owner(Tenure::Settled)),
        6 => (2, State::Prepared { handoff, peer, root: StateRoot([3; 32]) }),
        7 => (2, State::Receiving { handoff, peer }),
        8 => (2, State::Receiving { handoff: QUESTION.handoff, peer }),
        9 => (1, State::Committed { handoff, peer, root: StateRoot([3; 32]) }),
        _ => return None,
    };
    Some(Record { vm: QUESTION.vm, epoch: Epoch(epoch), state })
}

/// What the source says in every Hello.
#[derive(Clone, Copy)]
struct Said {
    audit: bool,
    /// It speaks the older version only.
    old: bool,
}

/// What the source says on each link.
fn links(input: &mut Input<'_>, said: Said) -> VecDeque<Script> {
    let mut link = Script::default();
    link.say(&hello(Intent::New(offer()), said));
    let mut links = VecDeque::new();
    let mut model = Model::new();
    let mut sealer = Sealer::new(&QUESTION.handoff.0);
    let mut segments: Vec<Vec<u8>> = Vec::new();
    for _ in 0..MOST_OPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % op::END {
            what @ (op::CHUNKS | op::STATE) => {
                let kind =
                    if what == op::STATE { SegmentKind::MachineState } else { SegmentKind::Chunks };
                let segment = sealer.seal(1, kind, packed(input));
                model.apply(&segment);
                let bytes = say(&Frame::Segment(segment));
                link.say(&bytes);
                segments.push(bytes);
            }
            op::PREPARE => link.say(&say(&prepare(input.u8(), &sealer, &mut model, said.audit))),
            op::COMMIT => link.say(&say(&Frame::Commit(Commit { handoff: QUESTION }))),
            op::RELEASED => link.say(&say(&Frame::Released(QUESTION))),
            op::ABORT => {
                link.say(&say(&Frame::Abort { handoff: QUESTION, reason: "so".into() }));
            }
            op::CUT => {
                let intent = match input.u8() % 3 {
                    0 => Intent::Resume,
                    1 => Intent::Settle,
                    _ => Intent::New(offer()),
                };
                let applied = usize::from(input.u8()).min(segments.len());
                links.push_back(std::mem::take(&mut link));
                link.say(&hello(intent, said));
                link.say(&segments[applied..].concat());
            }
            op::WAIT => link.wait(input.u8()),
            op::FRAME => {
                let (kind, body) = (input.u8(), input.block());
                link.say(&(body.len() as u32).to_le_bytes());
                link.say(&[kind]);
                link.say(body);
            }
            _ => link.say(input.block()),
        }
    }
    links.push_back(link);
    links.truncate(MOST_LINKS);
    links
}

/// A payload that is too long for a frame is not said.
fn say(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = encode(frame, &mut bytes);
    bytes
}

fn hello(intent: Intent, Said { audit, old }: Said) -> Vec<u8> {
    let max = if old { Versions::OURS.min } else { Versions::OURS.max };
    let (versions, vm_name) = (Versions { max, ..Versions::OURS }, "vm".into());
    let hello = Hello { versions, handoff: QUESTION, vm_name, intent, audit };
    frames::bytes_of(&Frame::Hello(Box::new(hello)))
}

fn prepare(flags: u8, sealer: &Sealer, model: &mut Model, audit: bool) -> Frame {
    let mut root = model.root();
    let mut full_hash = audit.then(|| model.full_hash());
    let mut last_seq = sealer.last_seq();
    if flags & 1 != 0 {
        root.0[0] ^= 1;
    }
    if flags & 2 != 0 {
        last_seq ^= 1;
    }
    if flags & 4 != 0 {
        full_hash = Some([4; 32]);
    }
    let early = flags & 8 != 0;
    Frame::Prepare(Prepare { handoff: QUESTION, last_seq, root, full_hash, early })
}

fn seeds() -> Vec<Vec<u8>> {
    let raw = |program: Program, op: u8, body: &[u8]| program.u8(op).u8(0).u32(0).block(body);
    let begin = |flags| Program::new().u8(flags).u8(0);
    let sent = |flags| {
        let begun = begin(flags);
        let chunks = batch::bodies().iter().fold(begun, |p, body| raw(p, op::CHUNKS, body));
        raw(chunks, op::STATE, b"the machine's state")
    };
    let wait = |program: Program, kind| program.u8(op::WAIT).u8(kind);
    let prepare = |program: Program| wait(program.u8(op::PREPARE).u8(0), said::PREPARED);
    let prepared = |flags| prepare(sent(flags));
    let commit = |program: Program| wait(program.u8(op::COMMIT), said::RESUMED).u8(op::RELEASED);
    let cut = |program: Program, intent, from| program.u8(op::CUT).u8(intent).u8(from);
    let moved = |flags| commit(prepared(flags));
    let mut seeds = vec![
        moved(0),
        moved(1),
        // Commit right behind Prepare, and the links that break in between.
        commit(sent(0).u8(op::PREPARE).u8(0)),
        commit(prepare(cut(prepared(0), 0, 3))),
        commit(prepare(cut(wait(sent(0), said::ACK), 0, 3))),
        commit(prepare(cut(sent(0), 0, 0))),
        cut(wait(prepared(0).u8(op::COMMIT), said::RESUMED), 1, 3).u8(op::RELEASED),
        cut(prepared(0), 1, 3).u8(op::ABORT),
        prepared(0).u8(op::ABORT),
        sent(0).u8(op::ABORT),
        sent(0).u8(op::PREPARE).u8(1),
        sent(0).u8(op::COMMIT),
        // A commit that does not wait, over one link and two, and one that comes too late.
        sent(0).u8(op::PREPARE).u8(8).u8(op::COMMIT).u8(op::RELEASED),
        cut(sent(0).u8(op::PREPARE).u8(8).u8(op::COMMIT), 0, 3).u8(op::COMMIT).u8(op::RELEASED),
        cut(sent(0), 1, 9).u8(op::COMMIT),
    ];
    // What can fail here: loading the state, starting, the disk, the record, the offer; and a
    // source of the older version.
    let early = |flags| wait(sent(flags).u8(op::PREPARE).u8(8).u8(op::COMMIT), said::RESUMED);
    seeds.extend((1..7).map(|fault| moved(1 << fault)));
    seeds.extend((1..6).map(|fault| early(1 << fault)));
    let before = (1..12).map(|number| {
        let mut bytes = moved(0).finish();
        bytes[1] = number;
        Program::new().bytes(&bytes)
    });
    seeds.extend(before.collect::<Vec<_>>());
    let odd = frames::one_of_each().iter().fold(begin(0), |program, frame| {
        let bytes = frames::bytes_of(frame);
        program.u8(op::FRAME).u8(bytes[4]).block(&bytes[5..])
    });
    seeds.push(odd.u8(op::BYTES).block(b"GET / HTTP/1.1\r\n\r\n"));
    seeds.into_iter().map(Program::finish).collect()
}
