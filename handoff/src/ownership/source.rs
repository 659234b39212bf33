//! The source's half: a function from record and event to a [`Step`].

use super::{
    Epoch, Guest, HandoffId, OwnershipError, Question, Record, State, Step, Tenure, Verdict,
    record::bounded_text,
};
use crate::root::StateRoot;

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A handoff begins.
    Begin {
        /// Its fresh identity.
        handoff: HandoffId,
        /// Where to.
        peer: String,
    },
    /// The target holds everything, verified.
    Prepared {
        /// The handoff it means.
        handoff: HandoffId,
        /// The root it computed.
        theirs: StateRoot,
        /// The root this side computed.
        ours: StateRoot,
    },
    /// Everything is on its way to a target that durably took the offer, and the commit goes with it.
    CommitEarly {
        /// The root that the target must find.
        root: StateRoot,
    },
    /// Anything failed, or somebody cancelled. Has no effect once committed.
    Abort,
    /// The same after the commit, by the process that made it and knows for certain that it was
    /// never said to anybody, and never will be.
    NeverSaid,
    /// The target durably declined.
    Declined {
        /// The handoff it means.
        handoff: HandoffId,
    },
    /// The target owns the epoch; the guest runs or has run there.
    Resumed {
        /// The handoff it means.
        handoff: HandoffId,
        /// The epoch it owns.
        epoch: Epoch,
    },
    /// The target answered a question about the handoff that this record waits on.
    Answer(Verdict),
    /// The process starts again: RAM is lost.
    Restart,
    /// After a restart, the peer could not be asked within the bound.
    Unreachable,
    /// An operator asserts that the other side is down, and takes the VM.
    Takeover {
        /// Why; recorded.
        reason: String,
    },
}

/// What a source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Say {
    /// The epoch is the target's. Said again until it is answered.
    Commit(Question),
    /// The handoff is over and was not committed.
    Abort(Question),
    /// The source has let go.
    Released(Question),
    /// How does the handoff stand?
    Ask(Question),
}

/// The handoff that this record waits on, as the peer knows it.
pub fn question(record: &Record) -> Result<Option<Question>, OwnershipError> {
    let vm = record.vm;
    Ok(match &record.state {
        State::HandingOff { handoff, .. } => {
            Some(Question { vm, handoff: *handoff, epoch: record.epoch.next()? })
        }
        State::Committed { handoff, .. } | State::Released { handoff, .. } => {
            Some(Question { vm, handoff: *handoff, epoch: record.epoch })
        }
        _ => None,
    })
}

/// The source's transition function. An event that is late or not meant for this record changes
/// nothing; one that must not be is an error, and changes nothing either.
pub fn step(record: &Record, event: Event) -> Result<Step<Say>, OwnershipError> {
    let Some(asked) = question(record)? else { return idle(record, event) };
    match &record.state {
        State::HandingOff { handoff, peer } => handing_off(record, asked, *handoff, peer, event),
        State::Committed { peer, .. } => committed(record, asked, peer, event),
        _ => released(asked, event),
    }
}

fn idle(record: &Record, event: Event) -> Result<Step<Say>, OwnershipError> {
    match (event, &record.state) {
        (Event::Begin { handoff, peer }, State::Owner(_)) => {
            // A failed handoff uses up two: refuse while nothing has happened.
            record.epoch.next()?.next()?;
            let state = State::HandingOff { handoff, peer: bounded_text(peer) };
            Ok(Step { write: Some(record.with(record.epoch, state)), ..Step::nothing() })
        }
        (Event::Begin { .. }, _) => Err(OwnershipError::NotOwner { why: record.to_string() }),
        (Event::Takeover { .. }, _) => Err(OwnershipError::NoTakeover { why: record.to_string() }),
        _ => Ok(Step::nothing()),
    }
}

fn handing_off(
    record: &Record,
    asked: Question,
    current: HandoffId,
    peer: &str,
    event: Event,
) -> Result<Step<Say>, OwnershipError> {
    // The epoch that was offered is used up: a copy of that offer which turns up late, or a target
    // that still waits for its commit, can be told from the next one.
    let unused = asked.epoch.next()?;
    let back = || Step {
        write: Some(record.with(unused, State::Owner(Tenure::Settled))),
        say: Some(Say::Abort(asked)),
        guest: Guest::Run,
    };
    match event {
        Event::Prepared { handoff, .. } if handoff != current => Ok(Step::nothing()),
        Event::Prepared { theirs, ours, .. } if theirs != ours => {
            Err(OwnershipError::RootMismatch { ours, theirs })
        }
        Event::Prepared { ours: root, .. } | Event::CommitEarly { root } => {
            let state = State::Committed { handoff: current, peer: peer.into(), root };
            let write = Some(record.with(asked.epoch, state));
            Ok(Step { write, say: Some(Say::Commit(asked)), guest: Guest::Leave })
        }
        Event::Declined { handoff } if handoff != current => Ok(Step::nothing()),
        Event::Answer(Verdict::Superseded { epoch }) => Ok(let_go(record, asked, peer, epoch)),
        Event::Abort | Event::Declined { .. } | Event::Answer(_) | Event::Unreachable => Ok(back()),
        // The guest's RAM is gone; before it boots from its disk, the peer is asked whether an
        // operator took the VM over there meanwhile.
        Event::Restart => Ok(Step::saying(Say::Ask(asked))),
        Event::Begin { .. } => Err(OwnershipError::NotOwner { why: record.to_string() }),
        Event::Takeover { .. } => Err(OwnershipError::NoTakeover { why: record.to_string() }),
        Event::Resumed { .. } | Event::NeverSaid => Ok(Step::nothing()),
    }
}

fn committed(
    record: &Record,
    asked: Question,
    peer: &str,
    event: Event,
) -> Result<Step<Say>, OwnershipError> {
    let again = Step::saying(Say::Commit(asked));
    let run = |tenure| -> Result<_, OwnershipError> {
        let write = Some(record.with(record.epoch.next()?, State::Owner(tenure)));
        Ok(Step { write, say: None, guest: Guest::Run })
    };
    match event {
        Event::Declined { handoff } if handoff == asked.handoff => run(Tenure::Settled),
        Event::NeverSaid => Ok(Step { say: Some(Say::Abort(asked)), ..run(Tenure::Settled)? }),
        Event::Resumed { handoff, epoch } if handoff == asked.handoff && epoch == asked.epoch => {
            Ok(let_go(record, asked, peer, epoch))
        }
        Event::Answer(Verdict::Owner) => Ok(let_go(record, asked, peer, asked.epoch)),
        Event::Answer(Verdict::Superseded { epoch }) => Ok(let_go(record, asked, peer, epoch)),
        Event::Answer(Verdict::Declined { .. }) => run(Tenure::Settled),
        Event::Takeover { reason } => run(Tenure::TakenOver { reason: bounded_text(reason) }),
        Event::Begin { .. } => Err(OwnershipError::NotOwner { why: record.to_string() }),
        Event::Restart
        | Event::Answer(Verdict::Prepared)
        | Event::Prepared { .. }
        | Event::CommitEarly { .. } => Ok(again),
        Event::Declined { .. }
        | Event::Resumed { .. }
        | Event::Answer(_)
        | Event::Abort
        | Event::Unreachable => Ok(Step::nothing()),
    }
}

fn released(asked: Question, event: Event) -> Result<Step<Say>, OwnershipError> {
    match event {
        // The target did not hear it the first time.
        Event::Resumed { handoff, epoch } if handoff == asked.handoff && epoch == asked.epoch => {
            Ok(Step::saying(Say::Released(asked)))
        }
        Event::Restart => Ok(Step { guest: Guest::Drop, ..Step::nothing() }),
        Event::Begin { .. } => Err(OwnershipError::NotOwner { why: "it was handed off".into() }),
        Event::Takeover { .. } => {
            Err(OwnershipError::NoTakeover { why: "the peer confirmed that it runs there".into() })
        }
        _ => Ok(Step::nothing()),
    }
}

fn let_go(record: &Record, asked: Question, peer: &str, epoch: Epoch) -> Step<Say> {
    let state = State::Released { handoff: asked.handoff, peer: peer.into() };
    Step {
        write: Some(record.with(epoch.max(asked.epoch), state)),
        say: Some(Say::Released(asked)),
        guest: Guest::Drop,
    }
}
