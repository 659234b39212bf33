//! A source that gave a handoff up and was not heard says so later.
//!
//! Before the commit a source decides alone: it writes that it keeps the guest, and says Abort if there is
//! a link. Where there is none the target goes on waiting, with the memory and the name of a VM that will never come.
//! Nothing is unsafe about that, and the guest runs on at the source meanwhile; but nobody else there can have what it
//! holds. So the word is brought later, over a link of its own, by a thread that nobody waits for.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::{
    Limits,
    settle::{Asking, Talk},
};
use crate::{
    Clock, Connect,
    ownership::{Question, Verdict},
    source::SourceEvent,
    wire::{Frame, ReadError},
};

/// A handoff that is over at the source, durably, and of whose end the target may not have heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untold {
    /// The handoff.
    pub handoff: Question,
    /// Why it is over, for a person.
    pub reason: String,
    /// For how long a target with bounds like the source's goes on waiting.
    pub patience: Duration,
}

/// What a source owes its target when it is done with a handoff.
#[derive(Debug, Default)]
pub(super) struct Owed {
    /// Links that there were: over each, Hello may have got through, whatever came back.
    links: u32,
    /// The target ended it, or knows nothing of it, or has heard.
    settled: bool,
    /// The last link did not break: the target closed it.
    closed: bool,
    untold: Option<Untold>,
}

impl Owed {
    /// There is a link.
    pub(super) fn link_up(&mut self) {
        self.links += 1;
        self.closed = false;
    }

    /// The target said this.
    pub(super) fn heard(&mut self, event: &SourceEvent) {
        self.settled |= match event {
            SourceEvent::Declined(_) | SourceEvent::Aborted(_) => true,
            // What was begun over an earlier link may go on there.
            SourceEvent::Refused(_) => self.links == 1,
            SourceEvent::Answer(verdict) => *verdict != Verdict::Prepared,
            _ => false,
        };
    }

    /// This side aborted, durably.
    pub(super) fn aborted(&mut self, handoff: Question, reason: &str, patience: Duration) {
        self.untold = Some(Untold { handoff, reason: reason.to_owned(), patience });
    }

    /// The link ended like this.
    pub(super) fn link_ended(&mut self, error: &ReadError) {
        self.closed = matches!(error, ReadError::Closed { .. });
    }

    /// The last word was given to the link before that ended. One that was closed and did not break was
    /// closed by a target that had heard it.
    pub(super) fn said(&mut self) {
        self.settled |= self.closed;
    }

    /// What is left to be told.
    pub(super) fn left(self) -> Option<Untold> {
        self.untold.filter(|_| self.links > 0 && !self.settled)
    }
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// The target has heard, or knew already, that the handoff is over.
    Heard,
    /// It could not be told for as long as it may have waited.
    Unheard(String),
    /// Nobody wants it to be told any more.
    Stopped,
    /// The target says that the guest is its own: an operator took it over there, against what the
    /// source's record says.
    TakenThere,
}

/// Tells the target of an aborted handoff, over links of its own, until that is heard, `patience` is
/// over, or `stop` is closed. Attempts and the waits between them are those of broken links.
///
/// May be called at any time after `send()` has returned it, also while another handoff of the VM is under way:
/// that the handoff was aborted is durable, and stays true.
pub fn say_farewell<C: Connect>(
    untold: &Untold,
    vm_name: &str,
    connect: &mut C,
    limits: &Limits,
    clock: &dyn Clock,
    stop: &Receiver<()>,
) -> Farewell {
    let deadline = clock.now() + untold.patience;
    let limits = Limits { connect: limits.attempt, ..limits.clone() };
    let asking = Asking { vm_name, limits: &limits, clock };
    let (mut told, mut misses) = (false, 0);
    loop {
        let wait = limits.retry.wait(misses, rand::random());
        match stop.recv_timeout(wait) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Farewell::Stopped,
        }
        misses = misses.saturating_add(1);
        let why = match tell(untold, connect, asking) {
            Ok(Verdict::Owner) => return Farewell::TakenThere,
            // Told now. That it was heard is for its next answer to say: a link can be closed by others.
            Ok(Verdict::Prepared) => {
                told = true;
                "it has not confirmed that it heard".into()
            }
            // What it does not know yet it may be about to take.
            Ok(Verdict::Unknown) if !std::mem::replace(&mut told, true) => {
                "it does not know the handoff".into()
            }
            Ok(_) => return Farewell::Heard,
            Err(why) => why,
        };
        if clock.now() >= deadline {
            return Farewell::Unheard(why);
        }
    }
}

/// One attempt: how the target stood before it was told; why that is not known.
fn tell<C: Connect>(
    untold: &Untold,
    connect: &mut C,
    asking: Asking<'_>,
) -> Result<Verdict, String> {
    let (limits, clock) = (asking.limits, asking.clock);
    let handoff = untold.handoff;
    let mut talk = Talk::open(connect, handoff, asking)?;
    let deadline = clock.now() + limits.greeting;
    let verdict = loop {
        match talk.next(deadline, clock)? {
            Frame::Status { question, verdict } if question == handoff => break verdict,
            Frame::Declined { reason, .. } => break Verdict::Declined { reason },
            Frame::Resumed(_) => break Verdict::Owner,
            Frame::Refuse(refusal) => return Err(refusal.to_string()),
            _ => {}
        }
    };
    if verdict == Verdict::Prepared {
        talk.say(&Frame::Abort { handoff, reason: untold.reason.clone() })?;
        // It closes the link when it has acted on that.
        talk.await_close(clock.now() + limits.release, clock)?;
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Refusal,
        ownership::{Epoch, HandoffId, VmId},
    };

    fn left(after: impl FnOnce(&mut Owed)) -> bool {
        let handoff = Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(3) };
        let mut owed = Owed::default();
        after(&mut owed);
        owed.aborted(handoff, "cancelled", Duration::ZERO);
        owed.left().is_some()
    }

    #[test]
    fn nothing_is_owed_to_who_was_never_asked_or_knows() {
        let refused = || SourceEvent::Refused(Refusal::Other("busy".into()));
        let answer = |verdict| {
            move |owed: &mut Owed| {
                owed.link_up();
                owed.heard(&SourceEvent::Answer(verdict));
            }
        };
        assert!(!left(|_| {}));
        assert!(left(Owed::link_up));
        assert!(!left(answer(Verdict::Unknown)) && left(answer(Verdict::Prepared)));
        for (links, is_left) in [(1, false), (2, true)] {
            let after = |owed: &mut Owed| {
                (0..links).for_each(|_| owed.link_up());
                owed.heard(&refused());
            };
            assert_eq!(left(after), is_left, "refused on link {links}");
        }
    }

    #[test]
    fn what_a_broken_link_took_along_was_not_heard() {
        let (closed, broke) = (
            ReadError::Closed { mid_frame: false },
            ReadError::Io(std::io::ErrorKind::ConnectionReset.into()),
        );
        for (ends, is_left) in
            [(vec![&closed], false), (vec![&broke], true), (vec![&closed, &broke], true)]
        {
            let after = |owed: &mut Owed| {
                for end in &ends {
                    owed.link_up();
                    owed.link_ended(end);
                }
                owed.said();
            };
            assert_eq!(left(after), is_left, "{ends:?}");
        }
    }
}
