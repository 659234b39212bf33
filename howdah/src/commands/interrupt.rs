//! Ctrl-C while a command waits for a VM's process.
//!
//! The process goes on whatever becomes of the command, so that a key pressed by mistake need not cost
//! what was done: on a terminal it is asked once, and a second Ctrl-C is a yes.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::sys::signal::{SigSet, Signal};

use crate::{
    control::{Request, client},
    failure::{Exit, Failure},
    home::VmDir,
    output::Output,
};

/// How long a process may take to do what it is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What happens at the user's end.
#[derive(Debug)]
enum Event {
    Interrupt,
    Terminate,
    /// A line was typed; none at the end of the input.
    Line(Option<String>),
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Nothing,
    /// Ask whether it is meant.
    Ask,
    /// It is not meant.
    GoOn,
    /// Ask the process to end what it does.
    GiveUp,
    /// Leave it to itself.
    Leave,
}

/// How far the user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    /// Nothing was pressed; whether it is asked then.
    Calm { asks: bool },
    /// It is asked.
    Asked,
    /// The process was told.
    Told,
}

impl Asking {
    fn take(&mut self, event: &Event) -> Act {
        let (next, act) = match (*self, event) {
            (Self::Calm { asks: true }, Event::Interrupt) => (Self::Asked, Act::Ask),
            (Self::Calm { .. } | Self::Asked, Event::Interrupt | Event::Terminate) => {
                (Self::Told, Act::GiveUp)
            }
            (Self::Told, Event::Interrupt | Event::Terminate) => (Self::Told, Act::Leave),
            (Self::Asked, Event::Line(Some(line))) if is_yes(line) => (Self::Told, Act::GiveUp),
            // It was asked once: the next Ctrl-C is meant.
            (Self::Asked, Event::Line(Some(_))) => (Self::Calm { asks: false }, Act::GoOn),
            (Self::Asked, Event::Line(None)) => (Self::Asked, Act::Nothing),
            (same, Event::Line(_)) => (same, Act::Nothing),
        };
        *self = next;
        act
    }
}

fn is_yes(line: &str) -> bool {
    matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Signals of this process, taken from its threads: those that are started from now on.
pub(crate) struct Interrupts(SigSet);

impl Interrupts {
    /// Must be called before other threads start.
    pub(crate) fn take() -> nix::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block()?;
        Ok(Self(set))
    }

    /// From now on Ctrl-C asks the process of `dir` to do `request`, and this command goes on to see
    /// how that ends; one more leaves it to itself. With a question, a person at a terminal is asked
    /// first, and `quiet` is told when nothing else must be shown meanwhile.
    pub(crate) fn watch(
        self,
        dir: &VmDir,
        request: Request,
        output: Output,
        question: Option<&'static str>,
        quiet: impl Fn(bool) + Send + 'static,
    ) {
        let dir = dir.clone();
        self.tell(output, question, quiet, move || {
            client::call(&dir, request.clone(), ANSWER_TIMEOUT)
        });
    }

    /// From now on Ctrl-C does what gives up whatever it is that this command waits for; otherwise as
    /// [`Self::watch`].
    pub(crate) fn tell(
        self,
        output: Output,
        question: Option<&'static str>,
        quiet: impl Fn(bool) + Send + 'static,
        give_up: impl Fn() -> Result<(), Failure> + Send + Clone + 'static,
    ) {
        let person = io::stdin().is_terminal() && io::stderr().is_terminal() && !output.is_json();
        let question = question.filter(|_| person);
        let (events, taken) = unbounded();
        let signals = events.clone();
        std::thread::spawn(move || {
            while let Ok(signal) = self.0.wait() {
                let event = match signal {
                    Signal::SIGINT => Event::Interrupt,
                    _ => Event::Terminate,
                };
                let _ = signals.send(event);
            }
        });
        std::thread::spawn(move || {
            answer(&taken, &events, question, &quiet, output, move || {
                give_up()
                    .inspect_err(|e| output.note(&format!("howdah: not given up: {e}")))
                    .is_ok()
            });
        });
    }
}

/// Does what the events ask for.
fn answer(
    taken: &Receiver<Event>,
    events: &Sender<Event>,
    question: Option<&'static str>,
    quiet: &dyn Fn(bool),
    output: Output,
    give_up: impl Fn() -> bool + Send + Clone + 'static,
) {
    let mut asking = Asking::Calm { asks: question.is_some() };
    for event in taken {
        match asking.take(&event) {
            Act::Nothing => {}
            Act::Ask => {
                quiet(true);
                let question = question.unwrap_or_default();
                output.note(&format!("\n{question} [y/N, or Ctrl-C again]"));
                read_line(events.clone());
            }
            Act::GoOn => quiet(false),
            Act::GiveUp => {
                quiet(false);
                // On a thread of its own: one more Ctrl-C is heard meanwhile.
                let give_up = give_up.clone();
                std::thread::spawn(give_up);
            }
            Act::Leave => std::process::exit(Exit::Cancelled as i32),
        }
    }
}

fn read_line(events: Sender<Event>) {
    std::thread::spawn(move || {
        let mut line = String::new();
        let typed = io::stdin().read_line(&mut line).is_ok_and(|bytes| bytes > 0);
        let _ = events.send(Event::Line(typed.then_some(line)));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acts(asks: bool, events: &[Event]) -> Vec<Act> {
        let mut asking = Asking::Calm { asks };
        events.iter().map(|event| asking.take(event)).collect()
    }

    fn line(text: &str) -> Event {
        Event::Line(Some(text.into()))
    }

    #[test]
    fn a_second_press_is_a_yes_and_a_third_leaves() {
        use Event::{Interrupt, Terminate};
        let presses = [Interrupt, Interrupt, Interrupt];
        assert_eq!(acts(true, &presses), [Act::Ask, Act::GiveUp, Act::Leave]);
        assert_eq!(acts(false, &presses[..2]), [Act::GiveUp, Act::Leave], "nobody to ask");
        assert_eq!(acts(true, &[Terminate, Terminate]), [Act::GiveUp, Act::Leave]);
    }

    #[test]
    fn an_answer_counts_once_it_was_asked() {
        use Event::Interrupt;
        assert_eq!(acts(true, &[Interrupt, line(" Yes\n")]), [Act::Ask, Act::GiveUp]);
        assert_eq!(
            acts(true, &[line("y"), Interrupt, line("\n"), line("y"), Interrupt]),
            [Act::Nothing, Act::Ask, Act::GoOn, Act::Nothing, Act::GiveUp]
        );
        assert_eq!(
            acts(true, &[Interrupt, Event::Line(None), Interrupt]),
            [Act::Ask, Act::Nothing, Act::GiveUp]
        );
    }
}
