//! How a handoff that was cut short is brought to its end.

use std::time::Duration;

use super::{Limits, SendError};
use crate::{
    Clock, Connect, SourceVm, Transport,
    ownership::{
        Guest, Journal, JournalError, OwnershipError, Question, Record, State, Tenure, Verdict,
        source, target,
    },
    wire::{Commit, Frame, FrameReader, Hello, Intent, ReadError, Versions, write_frame},
};

/// Between two attempts to ask the peer.
const RETRY: Duration = Duration::from_millis(500);

/// What may be done with a VM after its process started again, or after a doubt was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Recovery {
    /// The guest may run here: the paused copy if there is one, else from its disk.
    MayRun,
    /// It runs at the peer. What is here may be deleted.
    Gone {
        /// Where it went.
        peer: String,
    },
    /// It was never here as a whole. What is here may be deleted.
    NeverHere {
        /// Why.
        reason: String,
    },
    /// The peer owns the epoch or may own it, and cannot be asked now. It must not run here. Try
    /// again, or let an operator take it over.
    InDoubt {
        /// Whom to ask.
        peer: String,
        /// Why it could not be settled, for a person.
        reason: String,
    },
}

/// Why ownership could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The record cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record does not allow it.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
}

/// Settles a VM's ownership after its process started again: asks the peer where the record says
/// so, within `limits.commit`. Must be called before a VM is started from its directory.
///
/// `connect` reaches the peer that the record names; `None` if there is no way to reach it.
pub fn recover<C: Connect>(
    journal: &mut Journal,
    vm_name: &str,
    connect: Option<&mut C>,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Recovery, SettleError> {
    let Some(record) = journal.record().cloned() else {
        return Ok(Recovery::NeverHere { reason: "there is no ownership record".into() });
    };
    let asking = Asking { vm_name, limits, clock };
    match &record.state {
        State::Receiving { .. } | State::Prepared { .. } => {
            decline_lost_copy(journal)?;
            read_off(journal)
        }
        State::HandingOff { .. } | State::Committed { .. } => {
            ask_as_source(journal, &record, asking, connect)
        }
        State::Owner(Tenure::Unconfirmed { .. }) => {
            ask_as_target(journal, &record, asking, connect)
        }
        State::Owner(_) | State::Released { .. } | State::Declined { .. } => read_off(journal),
    }
}

/// Declines, durably, what the record says is in the memory of a process that came before this one.
/// For the process that holds the journal, and no copy: to be called before anything is said or
/// begun from the record.
pub fn decline_lost_copy(journal: &mut Journal) -> Result<(), JournalError> {
    let Some(record) = journal.record().filter(|record| record.is_volatile()) else {
        return Ok(());
    };
    // Of a volatile record a restart is never an error.
    let step = target::step(Some(record), target::Event::Restart);
    match step.ok().and_then(|step| step.write) {
        Some(record) => journal.write(record),
        None => Ok(()),
    }
}

/// Goes on with a handoff that ended [`super::SendOutcome::InDoubt`]; `vm` still holds the paused
/// guest, which is resumed if the peer durably declined.
pub fn send_resume<C: Connect>(
    vm: &mut dyn SourceVm,
    journal: &mut Journal,
    vm_name: &str,
    connect: &mut C,
    limits: &Limits,
    clock: &dyn Clock,
) -> Result<Recovery, SendError> {
    let recovery =
        recover(journal, vm_name, Some(connect), limits, clock).map_err(|e| match e {
            SettleError::Journal(e) => SendError::from(e),
            SettleError::Ownership(e) => e.into(),
        })?;
    if recovery == Recovery::MayRun {
        let reason = "the peer declined".to_owned();
        vm.resume().map_err(|source| SendError::NotResumed { reason, source })?;
        if let Err(e) = vm.stop_tracking() {
            tracing::warn!(error = %e, "the guest runs, but its changes are still tracked");
        }
    }
    Ok(recovery)
}

/// An operator takes the VM, asserting that the other side is down and will not run it. Recorded
/// with its reason, under a higher epoch that the other side sees when it comes back. Afterwards
/// the guest may run here.
pub fn takeover(journal: &mut Journal, reason: &str) -> Result<Recovery, SettleError> {
    let Some(record) = journal.record() else {
        let why = "there is no ownership record".into();
        return Err(OwnershipError::NoTakeover { why }.into());
    };
    let reason = reason.to_owned();
    if matches!(record.state, State::Prepared { .. }) {
        apply_target(journal, target::Event::Takeover { reason })?;
    } else {
        apply_source(journal, source::Event::Takeover { reason })?;
    }
    read_off(journal)
}

/// What a settled record allows.
fn read_off(journal: &Journal) -> Result<Recovery, SettleError> {
    Ok(match journal.record().map(|r| (&r.state, r.to_string())) {
        None => Recovery::NeverHere { reason: "there is no ownership record".into() },
        Some((State::Owner(_) | State::HandingOff { .. }, _)) => Recovery::MayRun,
        Some((State::Released { peer, .. }, _)) => Recovery::Gone { peer: peer.clone() },
        Some((
            State::Committed { peer, .. }
            | State::Receiving { peer, .. }
            | State::Prepared { peer, .. },
            reason,
        )) => Recovery::InDoubt { peer: peer.clone(), reason },
        Some((State::Declined { reason, .. }, _)) => Recovery::NeverHere { reason: reason.clone() },
    })
}

fn apply_source(
    journal: &mut Journal,
    event: source::Event,
) -> Result<(Option<source::Say>, Guest), SettleError> {
    let Some(record) = journal.record() else { return Ok((None, Guest::Leave)) };
    let step = source::step(record, event)?;
    if let Some(record) = step.write {
        journal.write(record)?;
    }
    Ok((step.say, step.guest))
}

fn apply_target(journal: &mut Journal, event: target::Event) -> Result<Guest, SettleError> {
    let step = target::step(journal.record(), event)?;
    if let Some(record) = step.write {
        journal.write(record)?;
    }
    Ok(step.guest)
}

/// What asking needs besides a link.
#[derive(Clone, Copy)]
pub(super) struct Asking<'a> {
    pub(super) vm_name: &'a str,
    pub(super) limits: &'a Limits,
    pub(super) clock: &'a dyn Clock,
}

/// A source that lost its RAM, or its patience, asks the target and does what the answer means.
fn ask_as_source<C: Connect>(
    journal: &mut Journal,
    record: &Record,
    asking: Asking<'_>,
    connect: Option<&mut C>,
) -> Result<Recovery, SettleError> {
    let Some(question) = source::question(record)? else { return read_off(journal) };
    let committed = matches!(record.state, State::Committed { .. });
    // Before the commit the answer cannot change what may be done, short of a takeover.
    let limits = asking.limits;
    let patience = if committed { limits.commit } else { limits.ask };
    let deadline = asking.clock.now() + patience;
    let mut connect = connect;
    let why = loop {
        let Some(connect) = connect.as_deref_mut() else {
            break "there is no way to reach the peer".to_owned();
        };
        let why = match converse(journal, connect, question, asking)? {
            Ok(()) if !committed => return read_off(journal),
            Ok(()) => match read_off(journal)? {
                Recovery::InDoubt { reason, .. } => reason,
                settled => return Ok(settled),
            },
            Err(why) => why,
        };
        if asking.clock.now() + RETRY >= deadline {
            break why;
        }
        std::thread::sleep(RETRY);
    };
    apply_source(journal, source::Event::Unreachable)?;
    Ok(match read_off(journal)? {
        Recovery::InDoubt { peer, .. } => Recovery::InDoubt { peer, reason: why },
        settled => settled,
    })
}

/// One attempt to ask: the inner error says why there was no answer.
fn converse<C: Connect>(
    journal: &mut Journal,
    connect: &mut C,
    question: Question,
    asking: Asking<'_>,
) -> Result<Result<(), String>, SettleError> {
    let mut talk = match Talk::open(connect, question, asking) {
        Ok(talk) => talk,
        Err(e) => return Ok(Err(e)),
    };
    let deadline = asking.clock.now() + asking.limits.greeting;
    loop {
        let event = match talk.next(deadline, asking.clock) {
            Ok(Frame::Status { verdict, .. }) => source::Event::Answer(verdict),
            Ok(Frame::Declined { handoff, .. }) => {
                source::Event::Declined { handoff: handoff.handoff }
            }
            Ok(Frame::Resumed(resumed)) => {
                let Question { handoff, epoch, .. } = resumed.handoff;
                source::Event::Resumed { handoff, epoch }
            }
            Ok(Frame::Refuse(refusal)) => return Ok(Err(refusal.to_string())),
            Ok(_) => continue,
            Err(why) => return Ok(Err(why)),
        };
        let unknown = matches!(event, source::Event::Answer(Verdict::Unknown));
        let (said, _) = apply_source(journal, event)?;
        let reply = match said {
            Some(source::Say::Commit(handoff)) => Frame::Commit(Commit { handoff }),
            Some(source::Say::Abort(handoff)) => {
                Frame::Abort { handoff, reason: "the source started again".into() }
            }
            Some(source::Say::Released(handoff)) => Frame::Released(handoff),
            Some(source::Say::Ask(_)) | None if unknown => {
                return Ok(Err("the peer does not know this handoff".into()));
            }
            Some(source::Say::Ask(_)) | None => return Ok(Ok(())),
        };
        let last = !matches!(reply, Frame::Commit(_));
        // What is not heard is asked for again.
        let said = talk.say(&reply);
        if last {
            return Ok(Ok(()));
        }
        if let Err(e) = said {
            return Ok(Err(e));
        }
    }
}

/// A target that lost its RAM after it owned the guest asks whether it was taken back meanwhile.
fn ask_as_target<C: Connect>(
    journal: &mut Journal,
    record: &Record,
    asking: Asking<'_>,
    connect: Option<&mut C>,
) -> Result<Recovery, SettleError> {
    let answered = match (connect, target::question(record)) {
        (Some(connect), Some(question)) => Talk::open(connect, question, asking)
            .and_then(|mut talk| {
                loop {
                    if let Frame::Status { verdict, .. } =
                        talk.next(asking.clock.now() + asking.limits.greeting, asking.clock)?
                    {
                        break Ok(verdict);
                    }
                }
            })
            .ok(),
        _ => None,
    };
    let event = answered.map_or(target::Event::Unreachable, target::Event::Answer);
    apply_target(journal, event)?;
    read_off(journal)
}

/// A link made only to settle a handoff.
pub(super) struct Talk<L: Transport> {
    tx: L::Tx,
    reader: FrameReader<L::Rx>,
}

impl<L: Transport> Talk<L> {
    pub(super) fn open<C: Connect<Link = L>>(
        connect: &mut C,
        question: Question,
        asking: Asking<'_>,
    ) -> Result<Self, String> {
        let link = connect.connect(asking.limits.connect).map_err(|e| e.to_string())?;
        let (tx, rx) = link.split().map_err(|e| e.to_string())?;
        let mut talk = Self { tx, reader: FrameReader::new(rx) };
        let (versions, intent) = (Versions::OURS, Intent::Settle);
        let vm_name = asking.vm_name.to_owned();
        let hello = Hello { versions, handoff: question, vm_name, intent, audit: false };
        talk.say(&Frame::Hello(Box::new(hello)))?;
        Ok(talk)
    }

    pub(super) fn say(&mut self, frame: &Frame) -> Result<(), String> {
        write_frame(&mut self.tx, frame, &mut Vec::new()).map(drop).map_err(|e| e.to_string())
    }

    /// Waits until the peer has closed the link; an error if it breaks, or nothing happens in time.
    pub(super) fn await_close(
        &mut self,
        deadline: Duration,
        clock: &dyn Clock,
    ) -> Result<(), String> {
        while clock.now() < deadline {
            match self.reader.read_frame() {
                Err(ReadError::Closed { .. }) => return Ok(()),
                Err(e) => return Err(e.to_string()),
                // What is on its way matters no more.
                Ok(_) => {}
            }
        }
        Err("the peer did not close the link in time".into())
    }

    pub(super) fn next(&mut self, deadline: Duration, clock: &dyn Clock) -> Result<Frame, String> {
        loop {
            match self.reader.read_frame() {
                Ok(Some(Frame::Ping(nonce))) => self.say(&Frame::Pong(nonce))?,
                Ok(Some(frame)) => return Ok(frame),
                Ok(None) if clock.now() >= deadline => {
                    return Err("the peer did not answer in time".into());
                }
                Ok(None) => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}
