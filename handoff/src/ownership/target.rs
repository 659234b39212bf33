//! The target's half: a function from record and event to a [`Step`].
//!
//! An offer that is taken is on disk before the source hears of it ([`Event::Receive`]). So whenever
//! the source commits, also ahead of the verification, there is a side that remembers the offer and
//! answers: with the guest, or, after a crash that lost the copy, with Declined.

use super::{
    Guest, HandoffId, OwnershipError, Question, Record, State, Step, Tenure, Verdict,
    record::bounded_text,
};
use crate::root::StateRoot;

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An offer is taken: all that it needs is reserved.
    Receive {
        /// The handoff and the epoch it gives.
        offered: Question,
        /// Where it comes from.
        peer: String,
    },
    /// Everything is in memory and on disk, durable and verified.
    Prepare {
        /// The handoff and the epoch it gives.
        offered: Question,
        /// The root that was verified.
        root: StateRoot,
    },
    /// The source committed. Starts a prepared copy; of one that still comes in, or lies in the
    /// memory of nobody, nothing is known by this alone.
    Commit(Question),
    /// The source committed, and everything is in memory and on disk, durable and verified.
    CommitVerified(Question),
    /// The guest runs here now.
    Started,
    /// The guest could not be started, and not one instruction of it ran here. Only the process
    /// that wrote the ownership may say so, and only before it said anything else.
    NeverRan {
        /// Why, for a person.
        reason: String,
    },
    /// This side cannot or will not run the guest.
    Decline {
        /// The handoff and the epoch it would give.
        offered: Question,
        /// Why, for a person.
        reason: String,
    },
    /// The source aborted.
    Aborted(Question),
    /// The source has let go.
    Released(Question),
    /// Nothing was heard for long while waiting.
    Silence,
    /// The source answered a question about the handoff this record waits on.
    Answer(Verdict),
    /// The source of this handoff offers the VM anew. That it is the same source is for the driver to
    /// know; what the offer means, [`supersedes`] says.
    Newer(Question),
    /// The process starts again: RAM is lost.
    Restart,
    /// After a restart, the peer could not be asked within the bound.
    Unreachable,
    /// An operator asserts that the source is down, and takes the VM.
    Takeover {
        /// Why; recorded.
        reason: String,
    },
}

/// What a target says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Say {
    /// Everything is in place, durable and verified.
    Prepared(Question, StateRoot),
    /// It will never run here in that epoch.
    Declined(Question, String),
    /// It runs or has run here.
    Resumed(Question),
    /// How does the handoff stand?
    Ask(Question),
}

/// Why a VM that is offered may not be received over what is recorded here.
pub fn admit(record: Option<&Record>, offered: Question) -> Result<(), String> {
    let Some(record) = record else { return Ok(()) };
    match &record.state {
        State::Owner(_) | State::HandingOff { .. } => Err(format!("it runs here: {record}")),
        State::Committed { .. } => Err(format!("it is in doubt here: {record}")),
        State::Receiving { .. } | State::Prepared { .. } => {
            Err(format!("a handoff of it is not over: {record}"))
        }
        // Each offer has an epoch of its own, so one that is not newer was seen before.
        State::Released { .. } | State::Declined { .. } if is_newer(record, offered) => Ok(()),
        State::Released { .. } | State::Declined { .. } => {
            Err(format!("the offer of epoch {} is out of date: {record}", offered.epoch))
        }
    }
}

/// Whether an offer of the same source ends the handoff that is under way here as `held`.
///
/// The source wrote the epoch that it offers before it said so, and a source that offers an epoch beyond
/// that of `held` has a record that moved on past `held`: it left `HandingOff` of that by aborting it, or
/// `Committed` by taking that back. Either is durable, so no process of it will ever say Commit of
/// `held` again, whatever it forgot to say: the offer tells the same as Aborted, or as an answer of
/// [`Verdict::Superseded`].
///
/// Should it be wrong (the source is broken, lies, or took the VM over while its Commit was on its way)
/// nothing is lost either, and nothing runs twice. What the target does is to decline, durably, which it
/// may at any time before it owns the epoch: a Commit that comes behind that is answered with Declined,
/// and the source, which keeps its paused guest until it is answered, runs it. A Commit that came before has
/// made the target the owner, and of an owner's record this is no event: one thread writes both. So
/// what the rule guards is not the guest but the transfer, which only its own source may end.
pub fn supersedes(held: Question, offered: Question) -> bool {
    held.vm == offered.vm && offered.epoch > held.epoch
}

/// Whether the offer came after what is recorded: another VM, or a higher epoch.
fn is_newer(record: &Record, offered: Question) -> bool {
    record.vm != offered.vm || offered.epoch > record.epoch
}

/// The target's transition function, over the record of this VM if there is one. An event that is
/// late or not meant for this record changes nothing.
pub fn step(record: Option<&Record>, event: Event) -> Result<Step<Say>, OwnershipError> {
    match event {
        Event::Receive { offered, peer } => Ok(receive(record, offered, peer)),
        Event::Prepare { offered, root } => Ok(prepare(record, offered, root)),
        Event::Decline { offered, reason } => Ok(decline(record, offered, reason)),
        Event::Commit(offered) => Ok(commit(record, offered, false)),
        Event::CommitVerified(offered) => Ok(commit(record, offered, true)),
        event => match record {
            None => Ok(Step::nothing()),
            Some(record) => settled(record, event),
        },
    }
}

fn receive(record: Option<&Record>, offered: Question, peer: String) -> Step<Say> {
    if admit(record, offered).is_err() {
        return Step::nothing();
    }
    let state = State::Receiving { handoff: offered.handoff, peer: bounded_text(peer) };
    let write = Some(Record { vm: offered.vm, epoch: offered.epoch, state });
    Step { write, ..Step::nothing() }
}

fn prepare(record: Option<&Record>, offered: Question, root: StateRoot) -> Step<Say> {
    let said = Some(Say::Prepared(offered, root));
    match record.filter(|r| is_of(r, offered)) {
        // Said again after a broken link: the word is on disk already.
        Some(Record { state: State::Prepared { root: held, .. }, .. }) if *held == root => {
            Step { say: said, ..Step::nothing() }
        }
        Some(record @ Record { state: State::Receiving { handoff, peer }, .. }) => {
            let state = State::Prepared { handoff: *handoff, peer: peer.clone(), root };
            let write = Some(record.with(record.epoch, state));
            Step { write, say: said, guest: Guest::Leave }
        }
        _ => Step::nothing(),
    }
}

/// Whether the record is about exactly this handoff.
fn is_of(record: &Record, offered: Question) -> bool {
    record.vm == offered.vm
        && record.epoch == offered.epoch
        && record.handoff() == Some(offered.handoff)
}

fn decline(record: Option<&Record>, offered: Question, reason: String) -> Step<Say> {
    let refuse = || declined(offered, bounded_text(&reason));
    match record.map(|r| (&r.state, r.handoff() == Some(offered.handoff))) {
        None | Some((State::Receiving { .. } | State::Prepared { .. }, true)) => refuse(),
        Some((State::Declined { reason, .. }, true)) => {
            Step::saying(Say::Declined(offered, reason.clone()))
        }
        Some((State::Released { .. } | State::Declined { .. }, _))
            if record.is_none_or(|r| is_newer(r, offered)) =>
        {
            refuse()
        }
        // An owner cannot decline any more; an older offer needs no answer.
        Some(_) => Step::nothing(),
    }
}

fn declined(offered: Question, reason: String) -> Step<Say> {
    let state = State::Declined { handoff: offered.handoff, reason: reason.clone() };
    Step {
        write: Some(Record { vm: offered.vm, epoch: offered.epoch, state }),
        say: Some(Say::Declined(offered, reason)),
        guest: Guest::Drop,
    }
}

fn commit(record: Option<&Record>, offered: Question, verified: bool) -> Step<Say> {
    let Some(record) = record.filter(|r| r.vm == offered.vm) else { return Step::nothing() };
    let own = |handoff: &HandoffId, peer: &str| {
        let tenure = Tenure::Unconfirmed { handoff: *handoff, peer: peer.to_owned() };
        let write = Some(record.with(record.epoch, State::Owner(tenure)));
        Step { write, say: None, guest: Guest::Run }
    };
    match &record.state {
        State::Prepared { handoff, peer, .. } if is_of(record, offered) => own(handoff, peer),
        State::Receiving { handoff, peer } if verified && is_of(record, offered) => {
            own(handoff, peer)
        }
        State::Declined { handoff, reason } if *handoff == offered.handoff => {
            Step::saying(Say::Declined(offered, reason.clone()))
        }
        _ => match super::answer(Some(record), offered) {
            Verdict::Owner | Verdict::Superseded { .. } => Step::saying(Say::Resumed(offered)),
            _ => Step::nothing(),
        },
    }
}

/// The handoff that this record waits on, as the source knows it.
pub fn question(record: &Record) -> Option<Question> {
    match &record.state {
        State::Receiving { handoff, .. }
        | State::Prepared { handoff, .. }
        | State::Owner(Tenure::Unconfirmed { handoff, .. }) => {
            Some(Question { vm: record.vm, handoff: *handoff, epoch: record.epoch })
        }
        _ => None,
    }
}

fn settled(record: &Record, event: Event) -> Result<Step<Say>, OwnershipError> {
    let Some(asked) = question(record) else {
        return match event {
            Event::Restart if record.may_run() => Ok(Step { guest: Guest::Run, ..Step::nothing() }),
            Event::Takeover { .. } => Err(OwnershipError::NoTakeover { why: record.to_string() }),
            _ => Ok(Step::nothing()),
        };
    };
    if record.is_volatile() {
        return undecided(record, asked, event);
    }
    unconfirmed(record, asked, event)
}

/// The copy comes in, or is there: the source decides.
fn undecided(record: &Record, asked: Question, event: Event) -> Result<Step<Say>, OwnershipError> {
    let prepared = matches!(record.state, State::Prepared { .. });
    let give_up = |why: &str| Ok(declined(asked, why.into()));
    match event {
        Event::Aborted(which) if which.handoff == asked.handoff => give_up("the source aborted"),
        Event::Answer(Verdict::Aborted) => give_up("the source aborted"),
        Event::Answer(Verdict::Superseded { epoch }) => {
            give_up(&format!("the VM has moved on to epoch {epoch}"))
        }
        Event::Newer(offered) if supersedes(asked, offered) => give_up("the source began anew"),
        Event::Answer(Verdict::Committed) => Ok(commit(Some(record), asked, false)),
        // The copy was in memory only.
        Event::Restart => give_up("the receiver stopped before it was told to run the guest"),
        Event::Silence => Ok(Step::saying(Say::Ask(asked))),
        // What is on disk is not a whole guest.
        Event::Takeover { .. } if !prepared => {
            Err(OwnershipError::NoTakeover { why: record.to_string() })
        }
        Event::Takeover { reason } => {
            let tenure = Tenure::TakenOver { reason: bounded_text(reason) };
            let write = Some(record.with(record.epoch.next()?, State::Owner(tenure)));
            Ok(Step { write, say: None, guest: Guest::Run })
        }
        _ => Ok(Step::nothing()),
    }
}

fn unconfirmed(
    record: &Record,
    asked: Question,
    event: Event,
) -> Result<Step<Say>, OwnershipError> {
    let confirmed = |guest| Step {
        write: Some(record.with(record.epoch, State::Owner(Tenure::Settled))),
        say: None,
        guest,
    };
    match event {
        Event::Started => Ok(Step::saying(Say::Resumed(asked))),
        Event::NeverRan { reason } => Ok(declined(asked, bounded_text(reason))),
        Event::Released(which) if which == asked => Ok(confirmed(Guest::Leave)),
        // Only the disk is left; before the guest boots from it, the source is asked whether an
        // operator took the VM back meanwhile.
        Event::Restart | Event::Silence => Ok(Step::saying(Say::Ask(asked))),
        Event::Answer(Verdict::Superseded { epoch }) => {
            let state = State::Released { handoff: asked.handoff, peer: peer_of(record) };
            let write = Some(record.with(epoch, state));
            Ok(Step { write, say: None, guest: Guest::Drop })
        }
        Event::Answer(Verdict::Released) => Ok(confirmed(Guest::Run)),
        Event::Answer(_) | Event::Unreachable => Ok(Step { guest: Guest::Run, ..Step::nothing() }),
        Event::Takeover { .. } => Err(OwnershipError::NoTakeover { why: record.to_string() }),
        _ => Ok(Step::nothing()),
    }
}

fn peer_of(record: &Record) -> String {
    match &record.state {
        State::Owner(Tenure::Unconfirmed { peer, .. }) => peer.clone(),
        _ => String::new(),
    }
}
