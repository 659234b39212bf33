//! The source of a handoff: the engine with its journal, and a target that says anything at any time.
//!
//! What must hold (ADR 0001): Commit and Released are on disk before they are said, and the guest does not
//! run from then on; it is set running only where the record allows it; whatever the target says, it ends
//! in bounded time with the guest running here, given away, or in doubt and paused, as the record says.
//!
//! Input: flags, then what the target says; `op` has its words.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use handoff::{
    Clock as _, Refusal,
    engine::{CommitMode, Limits, PipelineOptions, SendError, SendOptions, SendOutcome, send},
    ownership::{Epoch, Journal, Record, State, Verdict, VmId},
    tcp::MonotonicClock,
    wire::{Ack, Agreed, Frame, Resumed, VERSION_MAX, Welcome, encode},
};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    scratch::Scratch,
    told::{Guard, Guest, Heard, Line, Links, Say},
    world::bases,
};

pub(super) const TARGET: Target =
    Target { name: "send", from: Origin::Peer, run, seeds, max_len: 4096 };

/// What the target says next. Each comes behind the number of a kind of frame to wait for.
mod op {
    /// Welcome: version's distance, segments applied, window in KiB, what is agreed.
    pub(super) const WELCOME: u8 = 0;
    /// Ack of all that came but so many.
    pub(super) const ACK: u8 = 1;
    /// Prepared, with the right root or another.
    pub(super) const PREPARED: u8 = 2;
    /// Declined.
    pub(super) const DECLINED: u8 = 3;
    /// Resumed.
    pub(super) const RESUMED: u8 = 4;
    /// Refuse.
    pub(super) const REFUSE: u8 = 5;
    /// Status, with a verdict.
    pub(super) const STATUS: u8 = 6;
    /// Query.
    pub(super) const QUERY: u8 = 7;
    /// Ping.
    pub(super) const PING: u8 = 8;
    /// Any frame: its type and body.
    pub(super) const FRAME: u8 = 9;
    /// Nothing more: the link ends, and the next one begins.
    pub(super) const CUT: u8 = 10;
    pub(super) const END: u8 = 11;
}

/// Kinds of frames to wait for.
mod after {
    pub(super) const HELLO: u8 = 1;
    pub(super) const SEGMENT: u8 = 2;
    pub(super) const PREPARE: u8 = 3;
    pub(super) const COMMIT: u8 = 4;
}

/// So many links at most: each that breaks costs time.
const MOST_LINKS: usize = 4;
/// So many lines at most.
const MOST_LINES: usize = 40;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let flags = input.u8();
    let scratch = Scratch::new();
    let path = scratch.path().join("owner");
    let mut journal = Journal::open(&path).expect("no journal yet");
    journal.write(Record::created(VmId([1; 16]))).expect("a scratch file");
    let guard = Arc::new(Guard::new(path));
    let mut guest = Guest::new(Arc::clone(&guard));
    let mut links = Links { scripts: scripts(&mut input), guard: Arc::clone(&guard) };
    let options = options(flags);
    let clock = MonotonicClock::default();
    let outcome = send(
        &mut guest,
        bases(),
        &mut links,
        &mut journal,
        &options,
        &clock,
        &mut |_| {},
        &AtomicBool::new(false),
    );
    assert!(clock.now() < Duration::from_secs(8), "every wait has a bound");
    check(&outcome, &guard)
}

fn check(outcome: &Result<SendOutcome, SendError>, guard: &Guard) -> bool {
    let (record, runs) = (guard.record(), guard.is_running());
    match outcome {
        Ok(SendOutcome::Moved { .. }) => {
            assert!(!runs && matches!(record.state, State::Released { .. }), "{record}");
            true
        }
        Ok(SendOutcome::InDoubt { .. }) => {
            assert!(!runs && matches!(record.state, State::Committed { .. }), "{record}");
            false
        }
        Ok(SendOutcome::KeptHere { reason, .. }) => {
            assert!(runs && matches!(record.state, State::Owner(_)), "{reason}; {record}");
            false
        }
        Err(e) => panic!("{e}; {record}"),
    }
}

fn options(flags: u8) -> SendOptions {
    let ms = Duration::from_millis;
    let limits = Limits {
        connect: ms(50),
        greeting: ms(100),
        ready: ms(100),
        silence: ms(100),
        ping_every: ms(30),
        relink_grace: ms(60),
        stall: ms(100),
        prepare: ms(100),
        commit: ms(150),
        release: ms(50),
        ..Limits::default()
    };
    let mut options = SendOptions::new("vm", "target", b"one vCPU".to_vec());
    options.limits = limits;
    options.audit = flags & 1 != 0;
    options.commit = if flags & 2 == 0 { CommitMode::Early } else { CommitMode::Prepared };
    options.pipeline = PipelineOptions { workers: 1, ..options.pipeline };
    options
}

fn scripts(input: &mut Input<'_>) -> VecDeque<VecDeque<Line>> {
    let mut scripts = VecDeque::from([VecDeque::new()]);
    for _ in 0..MOST_LINES {
        if input.is_empty() {
            break;
        }
        let (after, op) = (input.u8() % 8, input.u8() % op::END);
        if op == op::CUT {
            if scripts.len() == MOST_LINKS {
                break;
            }
            scripts.push_back(VecDeque::new());
        } else if let Some(script) = scripts.back_mut() {
            script.push_back(Line { after, say: line(op, input) });
        }
    }
    scripts
}

fn line(op: u8, input: &mut Input<'_>) -> Say {
    if op == op::FRAME {
        let (kind, body) = (input.u8(), input.block());
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.push(kind);
        bytes.extend(body);
        return Box::new(move |_| bytes.clone());
    }
    let arguments = [(); 4].map(|()| input.u8());
    Box::new(move |heard| {
        let mut bytes = Vec::new();
        let _ = encode(&frame(op, arguments, heard), &mut bytes);
        bytes
    })
}

fn frame(op: u8, [a, b, c, d]: [u8; 4], heard: &Heard) -> Frame {
    let handoff = heard.question;
    match op {
        op::WELCOME => Frame::Welcome(Welcome {
            version: VERSION_MAX.wrapping_sub(a.into()),
            applied_up_to: b.into(),
            window_bytes: u64::from(c) << 10,
            agreed: Agreed { bases: d & 7, known: (d & 8 != 0).then_some(d >> 4) },
            held_bytes: u32::from(a >> 4) * 37,
        }),
        op::ACK => Frame::Ack(Ack { applied_up_to: heard.last_seq.wrapping_sub(a.into()) }),
        op::PREPARED => {
            let mut root = heard.root;
            root.0[0] ^= a;
            Frame::Prepared { handoff, root, full_hash: (b != 0).then_some([b; 32]) }
        }
        op::DECLINED => Frame::Declined { handoff, reason: "no".into() },
        op::RESUMED => Frame::Resumed(Resumed::untimed(handoff)),
        op::REFUSE => Frame::Refuse(match a % 3 {
            0 => Refusal::Version { ours: b.into(), theirs: c.into() },
            1 => Refusal::Conflict("it runs here".into()),
            _ => Refusal::Other("no".into()),
        }),
        op::STATUS => Frame::Status { question: handoff, verdict: verdict(a, b) },
        op::QUERY => Frame::Query(handoff),
        _ => Frame::Ping(a.into()),
    }
}

fn verdict(number: u8, epoch: u8) -> Verdict {
    match number % 9 {
        0 => Verdict::Pending,
        1 => Verdict::Committed,
        2 => Verdict::Released,
        3 => Verdict::Aborted,
        4 => Verdict::Prepared,
        5 => Verdict::Owner,
        6 => Verdict::Declined { reason: "no".into() },
        7 => Verdict::Superseded { epoch: Epoch(epoch.into()) },
        _ => Verdict::Unknown,
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let say = |program: Program, after: u8, op: u8, arguments: [u8; 4]| {
        program.u8(after).u8(op).bytes(&arguments)
    };
    let welcome = |program, applied| say(program, after::HELLO, op::WELCOME, [0, applied, 255, 1]);
    let old = |program| say(program, after::HELLO, op::WELCOME, [1, 0, 255, 1]);
    let welcomed = || welcome(Program::new().u8(0), 0);
    let prepared_first = || welcome(Program::new().u8(2), 0);
    let prepared = |program| say(program, after::PREPARE, op::PREPARED, [0; 4]);
    let acked = || say(welcomed(), after::SEGMENT, op::ACK, [0; 4]);
    let resumed = |program| say(program, after::COMMIT, op::RESUMED, [0; 4]);
    let cut = |program: Program| program.u8(0).u8(op::CUT);
    let seeds = [
        resumed(prepared(welcomed())),
        resumed(prepared(acked())),
        resumed(prepared(prepared_first())),
        resumed(prepared(old(Program::new().u8(0)))),
        say(prepared_first(), after::PREPARE, op::PREPARED, [1, 0, 0, 0]),
        say(old(Program::new().u8(0)), after::PREPARE, op::DECLINED, [0; 4]),
        // An early commit that is answered by No, and one behind which the link breaks.
        say(welcomed(), after::COMMIT, op::DECLINED, [0; 4]),
        say(cut(welcomed()), after::HELLO, op::STATUS, [6, 0, 0, 0]),
        // The links break before and behind the commit.
        resumed(prepared(welcome(cut(acked()), 1))),
        resumed(welcome(cut(prepared(acked())), 1)),
        say(cut(prepared(acked())), after::HELLO, op::STATUS, [5, 0, 0, 0]),
        say(prepared(acked()), after::COMMIT, op::DECLINED, [0; 4]),
        cut(prepared(acked())),
        // It says no, lies, or speaks out of turn.
        say(Program::new().u8(0), after::HELLO, op::REFUSE, [1, 0, 0, 0]),
        say(welcomed(), after::PREPARE, op::DECLINED, [0; 4]),
        say(welcomed(), after::PREPARE, op::PREPARED, [1, 0, 0, 0]),
        say(welcomed(), after::SEGMENT, op::ACK, [255, 0, 0, 0]),
        say(welcomed(), after::SEGMENT, op::RESUMED, [0; 4]),
        say(Program::new().u8(0), after::HELLO, op::WELCOME, [2, 0, 255, 1]),
        say(Program::new().u8(0), after::HELLO, op::WELCOME, [0, 0, 255, 0xff]),
        say(Program::new().u8(0), after::HELLO, op::WELCOME, [0, 0, 0, 1]),
        say(say(welcomed(), 0, op::QUERY, [0; 4]), 0, op::PING, [7, 0, 0, 0]),
    ];
    seeds.map(Program::finish).into()
}
